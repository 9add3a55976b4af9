/* LoRA adapters from C: adapters MODEL ADAPTER. Reads "rows length ids mask" from stdin and prints the tokens that the
 * adapter generates, 14 of them for each row, by the option and by the sources. */
#include "check.h"

static int64_t *numbers(size_t count) {
    int64_t *read = calloc(count, sizeof *read);
    for (size_t at = 0; at < count; at++) {
        long long number;
        CHECK(read != NULL && scanf("%lld", &number) == 1);
        read[at] = number;
    }
    return read;
}

static void show(t5g_result *result) {
    for (size_t row = 0; row < t5g_result_rows(result); row++) {
        t5g_hypothesis found = t5g_hypothesis_default();
        WELL(t5g_result_get(result, row, 0, &found));
        for (size_t at = 0; at < found.token_count; at++) printf("%lld ", (long long)found.tokens[at]);
    }
    printf("\n");
    t5g_result_free(result);
}

static void print(const t5g_model *model, const t5g_sources *sources, const t5g_generation_options *options) {
    t5g_result *result;
    WELL(t5g_model_generate(model, sources, options, NULL, &result));
    show(result);
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    t5g_model *model;
    WELL(t5g_model_open(argv[1], NULL, &model));
    unsigned long long rows, length;
    CHECK(scanf("%llu %llu", &rows, &length) == 2);
    t5g_sources sources = t5g_sources_default();
    sources.rows = rows;
    sources.length = length;
    int64_t *ids = numbers(rows * length), *mask = numbers(rows * length);
    sources.input_ids = ids;
    sources.attention_mask = mask;
    t5g_generation_options options = t5g_generation_options_default();
    const int64_t end = 63;
    options.max_new_tokens = 14;
    options.eos_token_id = &end;
    options.eos_token_id_count = 1;

    t5g_result *result;
    t5g_text *json;
    options.adapter = "mine";
    FAILS(t5g_model_generate(model, &sources, &options, NULL, &result), T5G_ERROR_OPTIONS, "adapter", "there is none");
    FAILS(t5g_model_load_adapter(model, "mine", "/no/such"), T5G_ERROR_FILE, NULL, "/no/such/adapter_config.json");
    FAILS(t5g_model_load_adapter(model, NULL, argv[2]), T5G_ERROR_ARGUMENT, "name", "NULL");
    FAILS(t5g_model_load_adapter(model, "mine", NULL), T5G_ERROR_ARGUMENT, "folder", "NULL");
    FAILS(t5g_model_load_adapter(NULL, "mine", argv[2]), T5G_ERROR_ARGUMENT, "model", "NULL");
    FAILS(t5g_model_unload_adapter(model, "mine"), T5G_ERROR_OPTIONS, "adapter", "there is none");
    WELL(t5g_model_load_adapter(model, "mine", argv[2]));
    FAILS(t5g_model_load_adapter(model, "mine", argv[2]), T5G_ERROR_INPUT, "adapter", "no loaded adapter has");
    WELL(t5g_model_adapters(model, &json));
    CHECK(strcmp(t5g_text_data(json), "[\"mine\"]") == 0);
    t5g_text_free(json);
    FAILS(t5g_model_adapters(model, NULL), T5G_ERROR_ARGUMENT, "json", "NULL");

    print(model, &sources, &options);
    options.adapter = NULL;
    options.json = "{\"adapter\": \"mine\"}";
    print(model, &sources, &options);
    options.json = NULL;
    sources.adapter = "mine";
    print(model, &sources, &options);
    sources.adapter = "other";
    FAILS(t5g_model_generate(model, &sources, &options, NULL, &result), T5G_ERROR_OPTIONS, "adapter", "mine");

    /* An engine uses the adapters of its model, also after they were unloaded. */
    t5g_engine *engine;
    t5g_request *request;
    WELL(t5g_engine_new(model, NULL, &engine));
    sources.adapter = NULL;
    options.adapter = "mine";
    WELL(t5g_engine_submit(engine, &sources, &options, NULL, &request));
    WELL(t5g_model_unload_adapter(model, "mine"));
    FAILS(t5g_engine_submit(engine, &sources, &options, NULL, &request), T5G_ERROR_OPTIONS, "adapter", "there is none");
    t5g_event event = t5g_event_default();
    do WELL(t5g_request_poll(request, 3600, &event));
    while (event.kind != T5G_EVENT_END);
    WELL(t5g_request_result(request, &result));
    show(result);
    t5g_request_free(request);
    t5g_engine_free(engine);
    t5g_model_free(model);
    free(ids);
    free(mask);
    return 0;
}
