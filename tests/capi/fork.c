/* A process that is forked while an engine generates: fork DEMO. It has none of the threads of its parent, is told so by whatever
 * needs them, and can do the rest, with deadlines that it keeps by itself. Then forks at random moments of another thread's calls. */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "check.h"

static void done(void *user, t5g_result *result, t5g_error *error) {
    (void)user;
    t5g_result_free(result);
    t5g_error_free(error);
}

/* What hangs is ended by an alarm, and so told by its status. */
static void in_child(const t5g_model *model, t5g_engine *engine, t5g_request *request, t5g_cancellation *cancellation) {
    const char *text = "in 1990";
    t5g_sources sources = t5g_sources_default();
    sources.rows = 1;
    sources.texts = &text;
    t5g_request *other;
    t5g_result *result;
    t5g_event event = t5g_event_default();
    t5g_engine_counts counts = t5g_engine_counts_default();
    alarm(3600);
    FAILS(t5g_engine_submit(engine, &sources, NULL, NULL, &other), T5G_ERROR_CLOSED, NULL, "forked");
    FAILS(t5g_engine_call(engine, &sources, NULL, NULL, done), T5G_ERROR_CLOSED, NULL, "forked");
    FAILS(t5g_request_poll(request, 30, &event), T5G_ERROR_CLOSED, NULL, "forked");
    FAILS(t5g_request_result(request, &result), T5G_ERROR_CLOSED, NULL, "forked");
    WELL(t5g_request_cancel(request));
    FAILS(t5g_engine_stats(engine, &counts), T5G_ERROR_CLOSED, NULL, "forked");
    FAILS(t5g_engine_stats_of_copy(engine, 0, &counts), T5G_ERROR_CLOSED, NULL, "forked");
    FAILS(t5g_engine_drain(engine), T5G_ERROR_CLOSED, NULL, "forked");
    FAILS(t5g_engine_shutdown(engine), T5G_ERROR_CLOSED, NULL, "forked");
    CHECK(t5g_request_free(request) == T5G_OK && t5g_engine_free(engine) == T5G_OK);
    WELL(t5g_cancellation_cancel(cancellation));
    CHECK(t5g_cancellation_free(cancellation) == T5G_OK);
    t5g_text *json;
    WELL(t5g_model_describe(model, &json));
    t5g_text_free(json);
    t5g_call call = t5g_call_default();
    call.deadline_seconds = -1;
    FAILS(t5g_model_generate(model, &sources, NULL, &call, &result), T5G_ERROR_DEADLINE, "deadline_seconds", "deadline");
}

/* A thread that generates again and again. */
static atomic_int begun, stop;
static const t5g_model *busy;

static int32_t count_step(void *user) {
    (void)user;
    atomic_fetch_add(&begun, 1);
    return atomic_load(&stop);
}

static void *generate_on_and_on(void *cancellation) {
    const char *texts[] = {"mr brown paid $5 on may 3rd", "in 1990"};
    t5g_sources sources = t5g_sources_default();
    sources.rows = 2;
    sources.texts = texts;
    t5g_call call = t5g_call_default();
    call.on_step = count_step;
    call.cancellation = cancellation;
    while (!atomic_load(&stop)) {
        t5g_result *result;
        t5g_error *error = t5g_model_generate(busy, &sources, NULL, &call, &result);
        if (error)
            t5g_error_free(error);
        else
            t5g_result_free(result);
    }
    return NULL;
}

/* Whether a call of the child was refused for the fork. It must not wait, whatever the parent was doing. */
static int is_refused(t5g_error *error) {
    if (error == NULL)
        return 0;
    CHECK(t5g_error_code(error) == T5G_ERROR_CLOSED && strstr(t5g_error_message(error), "forked") != NULL);
    t5g_error_free(error);
    return 1;
}

/* What a child can do with objects of a parent that was in calls: exits with 0 if the model was refused, and else with 1. */
static void in_child_of_busy(t5g_model *other, t5g_tokenizer *tokenizer, t5g_cancellation *cancellation, const char *path) {
    const char *text = "in 1990";
    t5g_sources sources = t5g_sources_default();
    sources.rows = 1;
    sources.texts = &text;
    t5g_call call = t5g_call_default();
    call.deadline_seconds = 120;
    t5g_result *result = NULL;
    t5g_tokens *tokens = NULL;
    t5g_engine *engine;
    alarm(240);
    int was_refused = is_refused(t5g_model_generate(busy, &sources, NULL, &call, &result));
    t5g_result_free(result);
    result = NULL;
    is_refused(t5g_model_generate(other, &sources, NULL, &call, &result));
    t5g_result_free(result);
    is_refused(t5g_tokenizer_encode(tokenizer, "may 3rd", T5G_ZERO_TERMINATED, 0, &tokens));
    t5g_tokens_free(tokens);
    is_refused(t5g_cancellation_cancel(cancellation));
    if (!is_refused(t5g_engine_new(busy, NULL, &engine)))
        CHECK(t5g_engine_free(engine) == T5G_OK);
    if (path != NULL) {
        t5g_model *mine;
        WELL(t5g_model_open(path, NULL, &mine));
        WELL(t5g_model_generate(mine, &sources, NULL, &call, &result));
        t5g_result_free(result);
        CHECK(t5g_model_free(mine) == T5G_OK);
    }
    CHECK(t5g_cancellation_free(cancellation) == T5G_OK && t5g_tokenizer_free(tokenizer) == T5G_OK);
    CHECK(t5g_model_free((t5g_model *)busy) == T5G_OK && t5g_model_free(other) == T5G_OK && t5g_live_handles() == 0);
    _exit(!was_refused);
}

static void fork_in_calls(t5g_model *model, const char *path) {
    t5g_model *other;
    t5g_tokenizer *tokenizer;
    t5g_cancellation *cancellation;
    pthread_t thread;
    int refused = 0;
    busy = model;
    WELL(t5g_model_open(path, NULL, &other));
    WELL(t5g_model_tokenizer(model, &tokenizer));
    WELL(t5g_cancellation_new(&cancellation));
    CHECK(pthread_create(&thread, NULL, generate_on_and_on, cancellation) == 0);
    while (atomic_load(&begun) == 0)
        nanosleep(&(struct timespec){0, 1000}, NULL);
    for (int time = 0; time < 100; time++) {
        /* The moments of a step, and some between calls. */
        nanosleep(&(struct timespec){0, 1000 * (1 + time * 37 % 1000)}, NULL);
        fflush(NULL);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0)
            in_child_of_busy(other, tokenizer, cancellation, time % 10 == 0 ? path : NULL);
        int status;
        CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) <= 1);
        refused += WEXITSTATUS(status) == 0;
    }
    CHECK(refused > 50);
    atomic_store(&stop, 1);
    CHECK(pthread_join(thread, NULL) == 0);
    /* The parent's go on. */
    CHECK(t5g_cancellation_free(cancellation) == T5G_OK && t5g_tokenizer_free(tokenizer) == T5G_OK);
    CHECK(t5g_model_free(other) == T5G_OK);
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    const char *text = "mr brown paid $5 on may 3rd";
    t5g_model *model;
    t5g_engine *engine;
    t5g_request *request;
    t5g_result *result;
    t5g_sources sources = t5g_sources_default();
    sources.rows = 1;
    sources.texts = &text;
    t5g_generation_options endless = t5g_generation_options_default();
    int64_t end = 1;
    endless.max_new_tokens = 500;
    endless.suppress_tokens = &end;
    endless.suppress_tokens_count = 1;
    WELL(t5g_model_open(argv[1], NULL, &model));
    t5g_call call = t5g_call_default();
    /* Starts the thread that watches deadlines. */
    call.deadline_seconds = 3600;
    WELL(t5g_model_generate(model, &sources, NULL, &call, &result));
    t5g_result_free(result);
    for (int time = 0; time < 4; time++) {
        WELL(t5g_cancellation_new(&call.cancellation));
        WELL(t5g_engine_new(model, NULL, &engine));
        WELL(t5g_engine_submit(engine, &sources, &endless, &call, &request));
        if (time % 2) {
            t5g_event event = t5g_event_default();
            WELL(t5g_request_poll(request, 3600, &event));
            CHECK(event.kind == T5G_EVENT_PIECE);
        }
        fflush(NULL);
        pid_t child = fork();
        CHECK(child >= 0);
        if (child == 0) {
            in_child(model, engine, request, call.cancellation);
            _exit(0);
        }
        int status;
        CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
        t5g_request_free(request);
        CHECK(t5g_engine_free(engine) == T5G_OK);
        t5g_cancellation_free(call.cancellation);
    }

    /* Where nothing was using the model, the child can use it, in an engine of its own too. */
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        alarm(240);
        call = t5g_call_default();
        call.deadline_seconds = 3600;
        WELL(t5g_model_generate(model, &sources, NULL, &call, &result));
        t5g_result_free(result);
        WELL(t5g_engine_new(model, NULL, &engine));
        WELL(t5g_engine_submit(engine, &sources, NULL, &call, &request));
        WELL(t5g_request_result(request, &result));
        t5g_result_free(result);
        t5g_request_free(request);
        CHECK(t5g_engine_free(engine) == T5G_OK);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
    fork_in_calls(model, argv[1]);
    CHECK(t5g_model_free(model) == T5G_OK && t5g_live_handles() == 0);
    puts("well");
    return 0;
}
