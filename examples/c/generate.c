#include <stdio.h>
#include "t5gemma.h"

static int failed(t5g_error *error) {
    if (error == NULL) return 0;
    fprintf(stderr, "%s\n", t5g_error_message(error));
    t5g_error_free(error);
    return 1;
}

int main(int argc, char **argv) {
    t5g_model *model;
    if (argc < 2 || failed(t5g_model_open(argv[1], NULL, &model))) return 1;

    const char *texts[] = {"Dr. Smith paid $3.50 on May 3, 2019.", "The meeting starts at 9:05 am on Elm St."};
    t5g_sources sources = t5g_sources_default();
    sources.rows = 2;
    sources.texts = texts;
    t5g_generation_options options = t5g_generation_options_default();
    options.max_new_tokens = 64;
    options.num_beams = 4;

    t5g_result *result;
    if (failed(t5g_model_generate(model, &sources, &options, NULL, &result))) return 1;
    for (size_t row = 0; row < t5g_result_rows(result); row++) {
        const char *text;
        if (failed(t5g_result_text(result, row, 0, &text, NULL))) return 1;
        puts(text);
    }
    t5g_result_free(result);
    t5g_model_free(model);
    return 0;
}
