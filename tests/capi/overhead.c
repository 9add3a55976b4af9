/* What the door costs: overhead MODEL. A call that is refused just before the model would run has gone through everything
 * that the door does with sources and options; reading a result is the rest of a call; and the callbacks of a generation are
 * counted as the difference that they make. Each is the least of many runs. */
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

static int32_t on_piece(void *user, const t5g_piece *piece) {
    *(size_t *)user += piece->text_size;
    return 0;
}

static int32_t on_step(void *user) {
    (void)user;
    return 0;
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
    size_t seen = 0;
    t5g_call call = t5g_call_default();
    call.user = &seen;
    call.stream_text = 1;
    call.on_piece = on_piece;
    call.on_step = on_step;
    double in = 0, out = 0, plain = 0, streamed = 0;
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
        WELL(t5g_model_generate(model, &sources, &options, &call, &result));
        least(&streamed, start);
        t5g_result_free(result);
        start = now();
        t5g_error *error = t5g_model_generate(model, &sources, &refused, NULL, &result);
        least(&in, start);
        CHECK(t5g_error_code(error) == T5G_ERROR_INPUT && t5g_error_free(error) == T5G_OK);
    }
    double step = plain / STEPS;
    printf("step %.1f us; call %.1f us in and %.1f us out, %.3f%% of %d steps; callbacks with text %.2f us a step, %.3f%%\n",
           step, in, out, 100 * (in + out) / plain, STEPS, (streamed - plain) / STEPS, 100 * (streamed - plain) / plain);
    t5g_model_free(model);
    return 0;
}
