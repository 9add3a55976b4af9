/* Cases of generation through C: golden MODEL < cases > results. A case is a line: rows, length, the ids, the mask, the
 * length of decoder prompts, these, and the options as JSON. A result is the line of t5g_result_json. */
#include <inttypes.h>

#include "check.h"

static int64_t *numbers(size_t count) {
    int64_t *read = calloc(count + 1, sizeof *read);
    CHECK(read != NULL);
    for (size_t at = 0; at < count; at++) CHECK(scanf("%" SCNd64, &read[at]) == 1);
    return read;
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    t5g_model *model;
    WELL(t5g_model_open(argv[1], NULL, &model));
    size_t rows, length, prompt;
    static char json[65536];
    while (scanf("%zu %zu", &rows, &length) == 2) {
        int64_t *ids = numbers(rows * length), *mask = numbers(rows * length);
        CHECK(scanf("%zu", &prompt) == 1);
        int64_t *prompts = numbers(rows * prompt);
        CHECK(fgets(json, sizeof json, stdin) != NULL && strchr(json, '\n') != NULL);
        t5g_sources sources = t5g_sources_default();
        sources.rows = rows;
        sources.length = length;
        sources.input_ids = ids;
        sources.attention_mask = mask;
        sources.decoder_input_ids = prompts;
        sources.decoder_length = prompt;
        t5g_generation_options options = t5g_generation_options_default();
        options.json = json;
        t5g_result *result;
        t5g_text *text;
        WELL(t5g_model_generate(model, &sources, &options, NULL, &result));
        WELL(t5g_result_json(result, &text));
        puts(t5g_text_data(text));
        t5g_text_free(text);
        t5g_result_free(result);
        free(ids);
        free(mask);
        free(prompts);
    }
    t5g_model_free(model);
    return t5g_live_handles() == 0 ? 0 : 1;
}
