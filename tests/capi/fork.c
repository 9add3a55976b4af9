/* A process that is forked while an engine generates: fork DEMO. It has none of the threads of its parent, is told so by whatever
 * needs them, and can do the rest, with deadlines that it keeps by itself. */
#define _POSIX_C_SOURCE 200809L
#include <sys/wait.h>
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
    CHECK(t5g_model_free(model) == T5G_OK && t5g_live_handles() == 0);
    puts("well");
    return 0;
}
