/* The overhead of the C library: overhead MODEL. Measures a call that is refused just before the model would run, which has
 * converted sources and options; reading a result with its text, which is the rest of a call; and decoding a token by a call of its
 * own, which is more than streaming adds to a step. Each time is the minimum of many runs, and has to be below a hundredth of the
 * model's. */
#define _POSIX_C_SOURCE 200809L
#include <time.h>

#include "check.h"

enum { STEPS = 64, RUNS = 40 };

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1e6 + time.tv_nsec / 1e3;
}

static void least(double *least_of_all, double start) {
    double took = now() - start;
    if (*least_of_all == 0 || took < *least_of_all) *least_of_all = took;
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    t5g_model *model;
    WELL(t5g_model_open(argv[1], NULL, &model));
    int64_t end = 1, ids[64];
    for (size_t at = 0; at < 64; at++) ids[at] = 40 + (int64_t)at;
    t5g_sources sources = t5g_sources_default();
    sources.rows = 1;
    sources.length = 64;
    sources.input_ids = ids;
    t5g_generation_options options = t5g_generation_options_default(), refused;
    options.max_new_tokens = STEPS;
    options.suppress_tokens = &end;
    options.suppress_tokens_count = 1;
    refused = options;
    refused.max_new_tokens = 1 << 20;
    t5g_tokenizer *tokenizer;
    t5g_stream *stream;
    WELL(t5g_model_tokenizer(model, &tokenizer));
    WELL(t5g_stream_new(tokenizer, 0, &stream));
    double in = 0, out = 0, plain = 0, pieces = 0;
    for (int run = 0; run < RUNS; run++) {
        t5g_result *result;
        double start = now();
        WELL(t5g_model_generate(model, &sources, &options, NULL, &result));
        least(&plain, start);
        start = now();
        t5g_hypothesis found = t5g_hypothesis_default();
        const char *text;
        WELL(t5g_result_get(result, 0, 0, &found));
        WELL(t5g_result_text(result, 0, 0, &text, NULL));
        CHECK(t5g_result_free(result) == T5G_OK);
        least(&out, start);
        start = now();
        for (size_t at = 0; at < STEPS; at++) WELL(t5g_stream_push(stream, ids[at], &text, NULL));
        least(&pieces, start);
        WELL(t5g_stream_finish(stream, &text, NULL));
        start = now();
        t5g_error *error = t5g_model_generate(model, &sources, &refused, NULL, &result);
        least(&in, start);
        CHECK(t5g_error_code(error) == T5G_ERROR_INPUT && t5g_error_free(error) == T5G_OK);
    }
    double step = plain / STEPS;
    printf("step %.1f us; call %.1f us in and %.1f us out, %.3f%% of %d steps; text %.2f us a token, %.3f%% of a step\n", step,
           in, out, 100 * (in + out) / plain, STEPS, pieces / STEPS, 100 * pieces / plain);
    t5g_stream_free(stream);
    t5g_tokenizer_free(tokenizer);
    t5g_model_free(model);
    CHECK(in + out < plain / 100 && pieces < plain / 100);
    puts("well");
    return 0;
}
