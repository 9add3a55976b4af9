/* Eight threads over one model, each with calls, cancellations, streams and frees of its own: stress DEMO. What they get is
 * what one thread gets. At the end two threads meet in one stream, and one is told. */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdatomic.h>
#include <time.h>

#include "check.h"

enum { THREADS = 8, TEXTS = 6, ROUNDS = 4 };

static const char *const texts[TEXTS] = {"mr brown paid $5 on may 3rd", "Prof. Lee lives at 1420 Elm St. in Boston.",
                                         "Dr. Smith paid $3.50", "at 9:05 am", "x", "in 1990"};
static char expected[TEXTS][400];
static t5g_model *model;
static t5g_cancellation *shared;
static atomic_int cancelled;

static t5g_result *generate(size_t text, const t5g_call *call, t5g_error **error) {
    t5g_sources sources = t5g_sources_default();
    t5g_generation_options options = t5g_generation_options_default();
    t5g_result *result = NULL;
    sources.rows = 1;
    sources.texts = &texts[text];
    options.max_new_tokens = 24;
    options.num_beams = text % 2 ? 2 : T5G_UNSET;
    *error = t5g_model_generate(model, &sources, &options, call, &result);
    return result;
}

static void *work(void *argument) {
    size_t own = (size_t)argument;
    for (size_t round = 0; round < ROUNDS; round++) {
        size_t at = (own + round) % TEXTS;
        t5g_error *error;
        t5g_result *result = generate(at, NULL, &error);
        WELL(error);
        const char *text;
        WELL(t5g_result_text(result, 0, 0, &text, NULL));
        CHECK(strcmp(text, expected[at]) == 0);
        CHECK(t5g_result_free(result) == T5G_OK && t5g_result_free(result) == T5G_ERROR_HANDLE);
        t5g_call call = t5g_call_default();
        call.cancellation = shared;
        result = generate(at, &call, &error);
        if (error != NULL) {
            CHECK(t5g_error_code(error) == T5G_ERROR_CANCELLED);
            t5g_error_free(error);
            atomic_fetch_add(&cancelled, 1);
        }
        t5g_result_free(result);
        if (own == 0 && round == ROUNDS / 2) WELL(t5g_cancellation_cancel(shared));
    }
    return NULL;
}

static atomic_int refused, done;
static t5g_stream *stream;

/* Pushes into the stream that others push into too. */
static void *push(void *argument) {
    const char *text;
    (void)argument;
    while (!atomic_load(&done)) {
        t5g_error *error = t5g_stream_push(stream, 40, &text, NULL);
        if (error != NULL) {
            CHECK(t5g_error_code(error) == T5G_ERROR_BUSY);
            atomic_fetch_add(&refused, 1);
            t5g_error_free(error);
        }
    }
    return NULL;
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    WELL(t5g_model_open(argv[1], NULL, &model));
    for (size_t at = 0; at < TEXTS; at++) {
        t5g_error *error;
        const char *text;
        t5g_result *result = generate(at, NULL, &error);
        WELL(error);
        WELL(t5g_result_text(result, 0, 0, &text, NULL));
        snprintf(expected[at], sizeof expected[at], "%s", text);
        t5g_result_free(result);
    }
    WELL(t5g_cancellation_new(&shared));
    pthread_t threads[THREADS];
    for (size_t at = 0; at < THREADS; at++) CHECK(pthread_create(&threads[at], NULL, work, (void *)at) == 0);
    for (size_t at = 0; at < THREADS; at++) CHECK(pthread_join(threads[at], NULL) == 0);
    CHECK(atomic_load(&cancelled) > 0);

    t5g_tokenizer *tokenizer;
    WELL(t5g_model_tokenizer(model, &tokenizer));
    WELL(t5g_stream_new(tokenizer, 0, &stream));
    for (size_t at = 0; at < 4; at++) CHECK(pthread_create(&threads[at], NULL, push, NULL) == 0);
    while (atomic_load(&refused) == 0) {
        struct timespec nap = {0, 10000000};
        nanosleep(&nap, NULL);
    }
    atomic_store(&done, 1);
    for (size_t at = 0; at < 4; at++) CHECK(pthread_join(threads[at], NULL) == 0);
    CHECK(atomic_load(&refused) > 0);
    t5g_stream_free(stream);
    t5g_tokenizer_free(tokenizer);
    t5g_cancellation_free(shared);
    CHECK(t5g_model_free(model) == T5G_OK && t5g_live_handles() == 0);
    puts("well");
    return 0;
}
