/* Every function of t5gemma.h, used well and badly: surface DEMO CLASSIFIER SCRATCH. DEMO is a model with a tokenizer that
 * says "five dollars" for "$5"; CLASSIFIER labels sources, without a tokenizer; SCRATCH is a folder that is no model. */
#define _POSIX_C_SOURCE 200809L
#include <stddef.h>
#include <time.h>

#include "check.h"

static const char *const TEXTS[] = {"mr brown paid $5 on may 3rd", "Prof. Lee lives at 1420 Elm St. in Boston."};
static const char *const SPOKEN[] = {"mister brown paid five dollars on may third",
                                     "professor lee lives at fourteen twenty elm street in boston"};

static t5g_sources texts(void) {
    t5g_sources sources = t5g_sources_default();
    sources.rows = 2;
    sources.texts = TEXTS;
    return sources;
}

static t5g_generation_options short_options(void) {
    t5g_generation_options options = t5g_generation_options_default();
    options.max_new_tokens = 40;
    return options;
}

/* ---- what callbacks saw ---- */

struct seen {
    char text[2][200];
    int64_t tokens[2][100];
    size_t counts[2];
    int steps, stop_after, scores, rows_allowed;
    t5g_cancellation *cancel_in_step;
    int64_t only;
};

static int32_t on_piece(void *user, const t5g_piece *piece) {
    struct seen *seen = user;
    CHECK(piece->size >= sizeof *piece && piece->row < 2 && seen->counts[piece->row] < 100);
    if (piece->token >= 0) seen->tokens[piece->row][seen->counts[piece->row]++] = piece->token;
    if (piece->text != NULL) {
        CHECK(strlen(piece->text) == piece->text_size);
        strcat(seen->text[piece->row], piece->text);
    }
    return 0;
}

static int32_t on_step(void *user) {
    struct seen *seen = user;
    seen->steps++;
    if (seen->cancel_in_step != NULL) WELL(t5g_cancellation_cancel(seen->cancel_in_step));
    return seen->stop_after > 0 && seen->steps >= seen->stop_after;
}

static void logits_processor(void *user, const t5g_position *position, float *scores, size_t count) {
    struct seen *seen = user;
    CHECK(position->size >= sizeof *position && position->source_length > 0 && position->prompt_length == 1);
    CHECK(position->target_length >= 1 && (size_t)seen->only < count);
    for (size_t token = 0; token < count; token++)
        if ((int64_t)token != seen->only) scores[token] = -INFINITY;
    seen->scores++;
}

static size_t prefix_allowed_tokens(void *user, size_t row, const int64_t *target, size_t length, const int64_t **allowed) {
    struct seen *seen = user;
    CHECK(row < 2 && length >= 1 && target[0] == 2);
    seen->rows_allowed |= 1 << row;
    *allowed = &seen->only;
    return 1;
}

static void log_message(void *user, t5g_severity severity, const char *message) {
    CHECK(severity >= T5G_SEVERITY_VERBOSE && severity <= T5G_SEVERITY_FATAL && message != NULL);
    ++*(int *)user;
}

/* ---- parts ---- */

static void check_versions(void) {
    CHECK(strchr(t5g_version(), '.') != NULL);
    CHECK(t5g_abi_version() == T5G_ABI_MAJOR * 65536 + T5G_ABI_MINOR);
    CHECK(t5g_live_handles() == 0);
}

static void check_onnxruntime(void) {
    t5g_text *text;
    FAILS(t5g_onnxruntime_report(NULL, NULL), T5G_ERROR_ARGUMENT, "json", "NULL");
    FAILS(t5g_onnxruntime_report("\xff", &text), T5G_ERROR_ARGUMENT, "library", "UTF-8");
    WELL(t5g_onnxruntime_report(NULL, &text));
    CHECK(strstr(t5g_text_data(text), "CPUExecutionProvider") != NULL);
    CHECK(t5g_text_size(text) == strlen(t5g_text_data(text)));
    CHECK(t5g_text_free(text) == T5G_OK && t5g_text_free(text) == T5G_ERROR_HANDLE);
    CHECK(strcmp(t5g_text_data(text), "") == 0 && t5g_text_size(text) == 0);
    /* The process has one already. */
    WELL(t5g_onnxruntime_report("/no/such/file", &text));
    CHECK(strstr(t5g_text_data(text), "already uses") != NULL);
    t5g_text_free(text);
    FAILS(t5g_log_set(7, NULL, NULL), T5G_ERROR_ARGUMENT, "severity", "found 7");
    WELL(t5g_log_recent(&text));
    t5g_text_free(text);
    FAILS(t5g_log_recent(NULL), T5G_ERROR_ARGUMENT, "text", "NULL");
}

static void check_opening(const char *demo, const char *classifier, const char *scratch) {
    t5g_model *model = (t5g_model *)&model;
    t5g_open_options options = t5g_open_options_default();
    FAILS(t5g_model_open(NULL, NULL, &model), T5G_ERROR_ARGUMENT, "path", "NULL");
    FAILS(t5g_model_open(demo, NULL, NULL), T5G_ERROR_ARGUMENT, "model", "NULL");
    FAILS(t5g_model_open("a\xffz", NULL, &model), T5G_ERROR_ARGUMENT, "path", "UTF-8");
    FAILS(t5g_model_open("/no/such/model", NULL, &model), T5G_ERROR_FILE, NULL, "/no/such/model");
    FAILS(t5g_model_open(scratch, NULL, &model), T5G_ERROR_FILE, NULL, "manifest.json");
    FAILS(t5g_model_open(classifier, NULL, &model), T5G_ERROR_MODEL, "task", "text-classification");
    options.size = 3;
    FAILS(t5g_model_open(demo, &options, &model), T5G_ERROR_ARGUMENT, "options.size", "found 3");
    options.size = (size_t)-1;
    FAILS(t5g_model_open(demo, &options, &model), T5G_ERROR_ARGUMENT, "options.size", "found");
    options = t5g_open_options_default();
    options.library = "/no/such/library.so";
    FAILS(t5g_model_open(demo, &options, &model), T5G_ERROR_LIBRARY, NULL, "/no/such/library.so");
    options.library = NULL;
    options.provider = "abacus";
    FAILS(t5g_model_open(demo, &options, &model), T5G_ERROR_OPTIONS, "provider", "abacus");
    options.provider = "cuda";
    FAILS(t5g_model_open(demo, &options, &model), T5G_ERROR_LIBRARY, NULL, "onnxruntime-gpu");
    options.provider = "cpu";
    options.device = 1;
    FAILS(t5g_model_open(demo, &options, &model), T5G_ERROR_OPTIONS, "device", "found 1");
    options.device = T5G_UNSET;
    options.json = "{\"provider_options\": {\"arena\": [1]}}";
    FAILS(t5g_model_open(demo, &options, &model), T5G_ERROR_OPTIONS, "provider_options", "strings and numbers");
    options.json = NULL;
    options.threads = 0;
    FAILS(t5g_model_open(demo, &options, &model), T5G_ERROR_INPUT, "threads", "found 0");
    options.threads = -1;
    FAILS(t5g_model_open(demo, &options, &model), T5G_ERROR_OPTIONS, "threads", "found -1");
    options.threads = 1;
    options.json = "{\"threads\": 2}";
    FAILS(t5g_model_open(demo, &options, &model), T5G_ERROR_OPTIONS, "threads", "in json");
    options.json = "{";
    FAILS(t5g_model_open(demo, &options, &model), T5G_ERROR_OPTIONS, "json", "JSON");
    options.json = "{\"thread\": 2}";
    FAILS(t5g_model_open(demo, &options, &model), T5G_ERROR_OPTIONS, "thread", "unknown");
    CHECK(model == (t5g_model *)&model); /* untouched by failures */

    options.json = "{\"encoder_cache_bytes\": 1000000, \"check_weights\": true}";
    WELL(t5g_model_open(demo, &options, &model));
    t5g_text *json;
    WELL(t5g_model_describe(model, &json));
    CHECK(strstr(t5g_text_data(json), "\"task\":\"text2text-generation\"") != NULL);
    FAILS(t5g_model_describe((t5g_model *)json, &json), T5G_ERROR_HANDLE, "model", "found a t5g_text");
    t5g_text_free(json);
    CHECK(t5g_text_free((t5g_text *)model) == T5G_ERROR_HANDLE);
    CHECK(t5g_model_free(model) == T5G_OK && t5g_model_free(model) == T5G_ERROR_HANDLE);
    CHECK(t5g_model_free((t5g_model *)&options) == T5G_ERROR_HANDLE && t5g_model_free(NULL) == T5G_OK);
    FAILS(t5g_model_describe(model, &json), T5G_ERROR_HANDLE, "model", "freed");
    FAILS(t5g_model_describe(NULL, &json), T5G_ERROR_ARGUMENT, "model", "NULL");
}

static void check_generation(const t5g_model *model) {
    t5g_sources sources = texts();
    t5g_generation_options options = short_options();
    t5g_result *result;
    WELL(t5g_model_generate(model, &sources, &options, NULL, &result));
    CHECK(t5g_result_rows(result) == 2 && t5g_result_count(result, 0) == 1 && t5g_result_count(result, 2) == 0);
    const char *text;
    size_t size;
    for (size_t row = 0; row < 2; row++) {
        WELL(t5g_result_text(result, row, 0, &text, &size));
        CHECK(strcmp(text, SPOKEN[row]) == 0 && size == strlen(text));
        WELL(t5g_result_text(result, row, 0, &text, NULL));
    }
    t5g_hypothesis found = t5g_hypothesis_default();
    WELL(t5g_result_get(result, 0, 0, &found));
    CHECK(found.token_count > 3 && found.tokens[found.token_count - 1] == 1 && found.finish_reason == T5G_FINISH_EOS);
    CHECK(isnan(found.score) && isnan(found.logprob) && found.logprobs == NULL && found.top_count == 0);
    FAILS(t5g_result_get(result, 2, 0, &found), T5G_ERROR_ARGUMENT, "row", "below 2");
    FAILS(t5g_result_get(result, 0, 1, &found), T5G_ERROR_ARGUMENT, "index", "below 1");
    FAILS(t5g_result_get(result, 0, 0, NULL), T5G_ERROR_ARGUMENT, "hypothesis", "NULL");
    found.size = 1;
    FAILS(t5g_result_get(result, 0, 0, &found), T5G_ERROR_ARGUMENT, "hypothesis.size", "found 1");
    FAILS(t5g_result_text(result, 0, 9, &text, &size), T5G_ERROR_ARGUMENT, "index", "below 1");
    FAILS(t5g_result_text(result, 0, 0, NULL, &size), T5G_ERROR_ARGUMENT, "text", "NULL");
    t5g_text *json;
    WELL(t5g_result_json(result, &json));
    CHECK(strstr(t5g_text_data(json), "\"text\":\"mister brown paid five dollars on may third\"") != NULL);
    t5g_text_free(json);
    FAILS(t5g_result_json(result, NULL), T5G_ERROR_ARGUMENT, "json", "NULL");
    t5g_result_free(result);
    CHECK(t5g_result_rows(result) == 0 && t5g_result_count(NULL, 0) == 0);
    FAILS(t5g_result_get(result, 0, 0, &found), T5G_ERROR_HANDLE, "result", "freed");

    /* Beams, n-best, log-probabilities; texts by their sizes. */
    const char *pieces = "mr brown paid $5 on may 3rd, and more";
    size_t sizes[] = {27};
    sources.rows = 1;
    sources.texts = &pieces;
    sources.text_sizes = sizes;
    options.num_beams = 3;
    options.num_return_sequences = 2;
    options.output_logprobs = 1;
    options.top_logprobs = 2;
    WELL(t5g_model_generate(model, &sources, &options, NULL, &result));
    CHECK(t5g_result_count(result, 0) == 2);
    WELL(t5g_result_text(result, 0, 0, &text, NULL));
    CHECK(strcmp(text, SPOKEN[0]) == 0);
    found = t5g_hypothesis_default();
    WELL(t5g_result_get(result, 0, 0, &found));
    double sum = 0;
    for (size_t at = 0; at < found.token_count; at++) sum += found.logprobs[at];
    CHECK(fabs(sum - found.logprob) < 1e-6 && found.score <= 0 && found.perplexity >= 1);
    CHECK(found.top_count == 2 && found.top_logprobs[0] >= found.top_logprobs[1] && found.top_tokens[0] == found.tokens[0]);
    t5g_result_free(result);

    /* What the tokens attended to, and what a coverage penalty makes of it. */
    double score = found.score;
    options.num_return_sequences = 3;
    options.output_attentions = 1;
    options.coverage_penalty = 0.5;
    WELL(t5g_model_generate(model, &sources, &options, NULL, &result));
    found = t5g_hypothesis_default();
    WELL(t5g_result_get(result, 0, 0, &found));
    CHECK(found.source_length > 5 && found.cross_attentions != NULL && found.score < score);
    double penalty = 0;
    for (size_t place = 0; place < found.source_length; place++) {
        double coverage = 0;
        for (size_t at = 0; at < found.token_count; at++) coverage += found.cross_attentions[at * found.source_length + place];
        penalty += log(coverage < 1 ? coverage : 1);
    }
    CHECK(fabs(found.logprob / (double)found.token_count + 0.5 * penalty - found.score) < 1e-4);
    t5g_result_free(result);

    /* Sampling is the same for the same seed, by struct and by JSON. */
    int64_t tokens[2][64];
    size_t counts[2];
    for (int way = 0; way < 2; way++) {
        options = t5g_generation_options_default();
        if (way == 0) {
            options.max_new_tokens = 12;
            options.do_sample = 1;
            options.temperature = 4.0;
            options.seed = 11;
        } else {
            options.json = "{\"max_new_tokens\": 12, \"do_sample\": true, \"temperature\": 4.0, \"seed\": 11}";
        }
        WELL(t5g_model_generate(model, &sources, &options, NULL, &result));
        found = t5g_hypothesis_default();
        WELL(t5g_result_get(result, 0, 0, &found));
        counts[way] = found.token_count;
        memcpy(tokens[way], found.tokens, found.token_count * sizeof *found.tokens);
        t5g_result_free(result);
    }
    CHECK(counts[0] == counts[1] && memcmp(tokens[0], tokens[1], counts[0] * sizeof(int64_t)) == 0);

    /* Options that are none. */
    options = short_options();
    options.num_beams = 0;
    FAILS(t5g_model_generate(model, &sources, &options, NULL, &result), T5G_ERROR_OPTIONS, "num_beams", "found 0");
    options = short_options();
    options.temperature = 0.5;
    FAILS(t5g_model_generate(model, &sources, &options, NULL, &result), T5G_ERROR_OPTIONS, "temperature", "do_sample");
    options = short_options();
    options.json = "{\"num_beam\": 4}";
    FAILS(t5g_model_generate(model, &sources, &options, NULL, &result), T5G_ERROR_OPTIONS, "num_beam", "unknown");
    options = short_options();
    options.json_schema = "{";
    FAILS(t5g_model_generate(model, &sources, &options, NULL, &result), T5G_ERROR_OPTIONS, "json_schema", "JSON");
    int64_t suppressed[] = {1000000};
    options = short_options();
    options.suppress_tokens = suppressed;
    options.suppress_tokens_count = 1;
    FAILS(t5g_model_generate(model, &sources, &options, NULL, &result), T5G_ERROR_OPTIONS, "suppress_tokens", "1000000");
    options.suppress_tokens_count = (size_t)-1;
    FAILS(t5g_model_generate(model, &sources, &options, NULL, &result), T5G_ERROR_ARGUMENT, "suppress_tokens", "memory");
    struct {
        t5g_generation_options known;
        int64_t unknown;
    } newer = {short_options(), 0};
    newer.known.size = sizeof newer;
    WELL(t5g_model_generate(model, &sources, &newer.known, NULL, &result));
    t5g_result_free(result);
    newer.unknown = 5;
    FAILS(t5g_model_generate(model, &sources, &newer.known, NULL, &result), T5G_ERROR_ARGUMENT, "options.size", "later fields set");

    /* A constraint, and stop strings. */
    const char *stops[] = {"five"};
    options = short_options();
    options.regex = "it costs (six|seven) dollars";
    WELL(t5g_model_generate(model, &sources, &options, NULL, &result));
    WELL(t5g_result_text(result, 0, 0, &text, NULL));
    CHECK(strcmp(text, "it costs six dollars") == 0 || strcmp(text, "it costs seven dollars") == 0);
    t5g_result_free(result);
    options.regex = NULL;
    options.stop_strings = stops;
    options.stop_strings_count = 1;
    WELL(t5g_model_generate(model, &sources, &options, NULL, &result));
    WELL(t5g_result_get(result, 0, 0, &found));
    CHECK(found.finish_reason == T5G_FINISH_STOP_STRING);
    t5g_result_free(result);
}

static void check_sources(const t5g_model *model) {
    t5g_result *result;
    t5g_generation_options options = short_options();
    options.max_new_tokens = 4;
    const t5g_generation_options *o = &options;
    FAILS(t5g_model_generate(model, NULL, o, NULL, &result), T5G_ERROR_ARGUMENT, "sources", "NULL");
    t5g_sources sources = t5g_sources_default();
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_INPUT, "sources.rows", "found 0");
    sources.rows = 1;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_INPUT, "sources", "none");
    FAILS(t5g_model_generate(model, &sources, o, NULL, NULL), T5G_ERROR_ARGUMENT, "result", "NULL");

    const char *bad[] = {"good", "b\xff"};
    sources.texts = bad;
    sources.rows = 2;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_ARGUMENT, "sources.texts[1]", "UTF-8");
    bad[1] = NULL;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_ARGUMENT, "sources.texts[1]", "NULL");
    sources.rows = (size_t)1 << 62;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_ARGUMENT, "sources.texts", "memory");
    int64_t ids[] = {5, 6, 7, 8, 9, 10};
    sources.rows = 2;
    sources.input_ids = ids;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_INPUT, "sources", "several");

    /* The same rows by lengths and by a mask. */
    size_t lengths[] = {2, 3};
    int64_t ragged[] = {5, 6, 7, 8, 9}, padded[] = {5, 6, 0, 7, 8, 9}, mask[] = {1, 1, 0, 1, 1, 1};
    t5g_text *json[2];
    sources = t5g_sources_default();
    sources.rows = 2;
    sources.input_ids = ragged;
    sources.lengths = lengths;
    WELL(t5g_model_generate(model, &sources, o, NULL, &result));
    WELL(t5g_result_json(result, &json[0]));
    t5g_result_free(result);
    sources.lengths = NULL;
    sources.length = 3;
    sources.input_ids = padded;
    sources.attention_mask = mask;
    WELL(t5g_model_generate(model, &sources, o, NULL, &result));
    WELL(t5g_result_json(result, &json[1]));
    CHECK(strcmp(t5g_text_data(json[0]), t5g_text_data(json[1])) == 0);
    t5g_text_free(json[0]);
    t5g_text_free(json[1]);
    t5g_result_free(result);

    int64_t prompts[] = {2, 40, 2, 41};
    sources.decoder_length = 2;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_ARGUMENT, "sources.decoder_input_ids", "NULL");
    sources.decoder_input_ids = prompts;
    WELL(t5g_model_generate(model, &sources, o, NULL, &result));
    t5g_result_free(result);
    prompts[3] = -7;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_INPUT, "decoder_input_ids[1][1]", "-7");
    padded[4] = 1 << 30;
    sources.decoder_input_ids = NULL;
    sources.decoder_length = 0;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_INPUT, "input_ids[1][1]", "vocabulary");
    mask[0] = mask[1] = 0;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_INPUT, "input_ids[0]", "not padding");
    sources.length = (size_t)1 << 60;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_ARGUMENT, "sources.input_ids", "memory");
    sources.input_ids = (const int64_t *)((const char *)padded + 1);
    sources.length = 2;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_ARGUMENT, "sources.input_ids", "aligned");

    /* Sizes that are told are compared with what would be read; those of older programs are not there. */
    sources = t5g_sources_default();
    sources.rows = 2;
    sources.length = 3;
    padded[4] = 8;
    prompts[3] = 41;
    sources.input_ids = padded;
    sources.input_ids_size = 5;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_INPUT, "sources.input_ids_size", "6 (");
    sources.input_ids_size = 6;
    mask[0] = mask[1] = 1;
    sources.attention_mask = mask;
    sources.attention_mask_size = 3;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_INPUT, "sources.attention_mask_size", "6 (");
    sources.attention_mask_size = 6;
    sources.decoder_input_ids = prompts;
    sources.decoder_length = 2;
    sources.decoder_rows = 1;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_INPUT, "sources.decoder_rows", "2 (one for");
    sources.decoder_rows = 2;
    WELL(t5g_model_generate(model, &sources, o, NULL, &result));
    t5g_result_free(result);
    sources.size = offsetof(t5g_sources, decoder_text_sizes);
    sources.decoder_rows = 1; /* beyond an older struct's end */
    WELL(t5g_model_generate(model, &sources, o, NULL, &result));
    t5g_result_free(result);
    sources = t5g_sources_default();
    sources.rows = 2;
    sources.input_ids = ragged;
    sources.lengths = lengths;
    sources.input_ids_size = 4;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_INPUT, "sources.input_ids_size", "5 (");

    const char *beginnings[] = {"it", "it"};
    sources = texts();
    sources.decoder_texts = beginnings;
    WELL(t5g_model_generate(model, &sources, o, NULL, &result));
    t5g_result_free(result);
    sources.decoder_rows = 3;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_INPUT, "sources.decoder_rows", "found 3");
    sources.decoder_rows = 2;
    /* A zero within a text belongs to it. */
    const char zeros[] = "it\0it";
    size_t sizes[] = {2, 2}, whole[] = {5, 5};
    beginnings[0] = beginnings[1] = zeros;
    t5g_text *cut[3];
    for (int way = 0; way < 3; way++) {
        sources.decoder_text_sizes = way == 0 ? NULL : way == 1 ? sizes : whole;
        WELL(t5g_model_generate(model, &sources, o, NULL, &result));
        WELL(t5g_result_json(result, &cut[way]));
        t5g_result_free(result);
    }
    CHECK(strcmp(t5g_text_data(cut[0]), t5g_text_data(cut[1])) == 0);
    CHECK(strcmp(t5g_text_data(cut[0]), t5g_text_data(cut[2])) != 0);
    for (int way = 0; way < 3; way++) t5g_text_free(cut[way]);
    sources.texts = NULL;
    sources.messages = "[{\"role\": \"user\", \"content\": \"hi\"}]";
    sources.rows = 1;
    FAILS(t5g_model_generate(model, &sources, o, NULL, &result), T5G_ERROR_FILE, NULL, "chat_template");
    t5g_text *text;
    FAILS(t5g_model_chat(model, "[]", &text), T5G_ERROR_FILE, NULL, "chat_template");
    FAILS(t5g_model_chat(model, "{}", &text), T5G_ERROR_INPUT, "messages", "list");
    FAILS(t5g_model_chat(model, NULL, &text), T5G_ERROR_ARGUMENT, "messages", "NULL");
}

static void check_calls(const t5g_model *model) {
    t5g_sources sources = texts();
    t5g_generation_options options = short_options();
    t5g_result *result;
    struct seen seen;
    memset(&seen, 0, sizeof seen);
    t5g_call call = t5g_call_default();
    call.user = &seen;
    call.on_piece = on_piece;
    call.on_step = on_step;
    call.stream_text = 1;
    call.deadline_seconds = 3600;
    WELL(t5g_model_generate(model, &sources, &options, &call, &result));
    for (size_t row = 0; row < 2; row++) {
        t5g_hypothesis found = t5g_hypothesis_default();
        WELL(t5g_result_get(result, row, 0, &found));
        CHECK(strcmp(seen.text[row], SPOKEN[row]) == 0 && seen.counts[row] == found.token_count);
        CHECK(memcmp(seen.tokens[row], found.tokens, found.token_count * sizeof(int64_t)) == 0);
    }
    CHECK(seen.steps > 3);
    t5g_result_free(result);

    seen.steps = 0;
    seen.stop_after = 2;
    call.on_piece = NULL;
    FAILS(t5g_model_generate(model, &sources, &options, &call, &result), T5G_ERROR_CANCELLED, NULL, "cancelled");
    CHECK(seen.steps == 2);
    seen.stop_after = 0;

    WELL(t5g_cancellation_new(&call.cancellation));
    CHECK(t5g_cancellation_is_cancelled(call.cancellation) == 0 && t5g_cancellation_is_cancelled(NULL) == -1);
    WELL(t5g_model_generate(model, &sources, &options, &call, &result));
    t5g_result_free(result);
    seen.cancel_in_step = call.cancellation;
    FAILS(t5g_model_generate(model, &sources, &options, &call, &result), T5G_ERROR_CANCELLED, NULL, "cancelled");
    CHECK(t5g_cancellation_is_cancelled(call.cancellation) == 1);
    FAILS(t5g_model_generate(model, &sources, &options, &call, &result), T5G_ERROR_CANCELLED, NULL, "cancelled");
    CHECK(t5g_cancellation_free(call.cancellation) == T5G_OK);
    FAILS(t5g_cancellation_cancel(call.cancellation), T5G_ERROR_HANDLE, "cancellation", "freed");
    FAILS(t5g_model_generate(model, &sources, &options, &call, &result), T5G_ERROR_HANDLE, "call.cancellation", "freed");
    FAILS(t5g_cancellation_new(NULL), T5G_ERROR_ARGUMENT, "cancellation", "NULL");
    seen.cancel_in_step = NULL;

    call = t5g_call_default();
    call.deadline_seconds = 1e-9;
    FAILS(t5g_model_generate(model, &sources, &options, &call, &result), T5G_ERROR_DEADLINE, "deadline_seconds", "deadline has");
    call.deadline_seconds = -1;
    FAILS(t5g_model_generate(model, &sources, &options, &call, &result), T5G_ERROR_DEADLINE, "deadline_seconds", "deadline has");
    FAILS(t5g_model_warm_up(model, &call), T5G_ERROR_DEADLINE, "deadline_seconds", "deadline has");
    call.deadline_seconds = (double)-INFINITY;
    FAILS(t5g_model_generate(model, &sources, &options, &call, &result), T5G_ERROR_DEADLINE, "deadline_seconds", "deadline has");
    call.deadline_seconds = (double)INFINITY;
    WELL(t5g_model_warm_up(model, &call));
    WELL(t5g_model_warm_up(model, NULL));
    FAILS(t5g_model_warm_up(NULL, NULL), T5G_ERROR_ARGUMENT, "model", "NULL");
    call.deadline_seconds = (double)NAN;
    FAILS(t5g_model_generate(model, &sources, &options, &call, &result), T5G_ERROR_ARGUMENT, "call.deadline_seconds", "NaN");
    call.deadline_seconds = 1e300;
    call.stream_text = 2;
    FAILS(t5g_model_generate(model, &sources, &options, &call, &result), T5G_ERROR_ARGUMENT, "call.stream_text", "found 2");

    call = t5g_call_default();
    call.user = &seen;
    call.logits_processor = logits_processor;
    seen.only = 40;
    options.max_new_tokens = 3;
    WELL(t5g_model_generate(model, &sources, &options, &call, &result));
    t5g_hypothesis found = t5g_hypothesis_default();
    WELL(t5g_result_get(result, 1, 0, &found));
    CHECK(seen.scores == 6 && found.token_count == 3 && found.tokens[0] == 40 && found.tokens[2] == 40);
    t5g_result_free(result);
    call.logits_processor = NULL;
    call.prefix_allowed_tokens = prefix_allowed_tokens;
    WELL(t5g_model_generate(model, &sources, &options, &call, &result));
    WELL(t5g_result_get(result, 0, 0, &found));
    CHECK(seen.rows_allowed == 3 && found.token_count == 3 && found.tokens[1] == 40);
    t5g_result_free(result);
}

static void check_scores(const t5g_model *model) {
    t5g_sources sources = texts();
    t5g_targets targets = t5g_targets_default();
    t5g_result *result;
    targets.texts = SPOKEN;
    WELL(t5g_model_score(model, &sources, &targets, 3, NULL, &result));
    t5g_hypothesis found = t5g_hypothesis_default();
    WELL(t5g_result_get(result, 0, 0, &found));
    CHECK(found.finish_reason == T5G_FINISH_NONE && found.tokens[found.token_count - 1] == 1 && found.top_count == 3);
    CHECK(found.logprob < 0 && found.logprob > -1);
    double likely = found.logprob;
    size_t count = found.token_count;
    t5g_result_free(result);
    CHECK(found.source_length == 0 && found.cross_attentions == NULL);
    targets.output_attentions = 1;
    WELL(t5g_model_score(model, &sources, &targets, 0, NULL, &result));
    WELL(t5g_result_get(result, 1, 0, &found));
    double sum = 0;
    for (size_t place = 0; place < found.source_length; place++) sum += found.cross_attentions[place];
    CHECK(found.source_length > 5 && fabs(sum - 1) < 1e-4);
    t5g_result_free(result);
    targets.output_attentions = 2;
    FAILS(t5g_model_score(model, &sources, &targets, 0, NULL, &result), T5G_ERROR_ARGUMENT, "targets.output_attentions", "2");
    targets.output_attentions = 0;
    targets.without_end = 1;
    WELL(t5g_model_score(model, &sources, &targets, 0, NULL, &result));
    WELL(t5g_result_get(result, 0, 0, &found));
    CHECK(found.token_count == count - 1 && found.top_count == 0 && found.top_tokens == NULL);
    t5g_result_free(result);

    int64_t ids[] = {40, 41, 42};
    size_t lengths[] = {1, 2};
    targets = t5g_targets_default();
    targets.target_ids = ids;
    FAILS(t5g_model_score(model, &sources, &targets, 0, NULL, &result), T5G_ERROR_ARGUMENT, "targets.lengths", "NULL");
    targets.lengths = lengths;
    WELL(t5g_model_score(model, &sources, &targets, 0, NULL, &result));
    WELL(t5g_result_get(result, 1, 0, &found));
    CHECK(found.token_count == 2 && found.tokens[1] == 42 && found.logprob < likely);
    t5g_result_free(result);
    lengths[0] = 0;
    FAILS(t5g_model_score(model, &sources, &targets, 0, NULL, &result), T5G_ERROR_INPUT, "target_ids[0]", "none");
    lengths[0] = (size_t)-2;
    FAILS(t5g_model_score(model, &sources, &targets, 0, NULL, &result), T5G_ERROR_ARGUMENT, "targets.target_ids", "memory");
    targets.texts = SPOKEN;
    FAILS(t5g_model_score(model, &sources, &targets, 0, NULL, &result), T5G_ERROR_INPUT, "targets", "both");
    FAILS(t5g_model_score(model, &sources, NULL, 0, NULL, &result), T5G_ERROR_ARGUMENT, "targets", "NULL");
    targets = t5g_targets_default();
    targets.target_ids = ids;
    targets.lengths = lengths;
    lengths[0] = 1;
    targets.rows = 1;
    FAILS(t5g_model_score(model, &sources, &targets, 0, NULL, &result), T5G_ERROR_INPUT, "targets.rows", "2 (one for each");
    targets.rows = 2;
    targets.target_ids_size = 2;
    FAILS(t5g_model_score(model, &sources, &targets, 0, NULL, &result), T5G_ERROR_INPUT, "targets.target_ids_size", "3 (");
    targets.target_ids_size = 3;
    WELL(t5g_model_score(model, &sources, &targets, 0, NULL, &result));
    t5g_result_free(result);
    targets.size = offsetof(t5g_targets, rows);
    targets.rows = 1; /* beyond an older struct's end */
    WELL(t5g_model_score(model, &sources, &targets, 0, NULL, &result));
    t5g_result_free(result);
    targets = t5g_targets_default();
    FAILS(t5g_model_score(model, &sources, &targets, 0, NULL, &result), T5G_ERROR_INPUT, "targets", "neither");
    struct seen seen;
    memset(&seen, 0, sizeof seen);
    t5g_call call = t5g_call_default();
    call.user = &seen;
    call.on_step = on_step;
    targets.texts = SPOKEN;
    WELL(t5g_model_score(model, &sources, &targets, 0, &call, &result));
    t5g_result_free(result);
    CHECK(seen.steps > 3);
    seen.stop_after = seen.steps + 2;
    FAILS(t5g_model_score(model, &sources, &targets, 0, &call, &result), T5G_ERROR_CANCELLED, NULL, "cancelled");
    CHECK(seen.steps == seen.stop_after);
    call.on_piece = on_piece;
    FAILS(t5g_model_score(model, &sources, &targets, 0, &call, &result), T5G_ERROR_ARGUMENT, "call.on_piece", "nothing is");
    targets.texts = SPOKEN;
    FAILS(t5g_model_score(model, &sources, &targets, 1 << 20, NULL, &result), T5G_ERROR_INPUT, "top_logprobs", "1048576");
}

static void check_encoding(const t5g_model *model, const char *demo, const char *classifier) {
    t5g_sources sources = texts();
    t5g_states states = t5g_states_default();
    WELL(t5g_model_encode(model, &sources, NULL, &states));
    CHECK(states.rows == 2 && states.length > 3 && states.width > 8 && states.mask_length == states.length);
    size_t count = states.rows * states.length * states.width;
    float *values = calloc(count, sizeof *values), *again = calloc(count, sizeof *again);
    int64_t *mask = calloc(states.rows * states.length, sizeof *mask);
    states.values = values;
    states.capacity = count - 1;
    FAILS(t5g_model_encode(model, &sources, NULL, &states), T5G_ERROR_BUFFER, "states.values", "room for");
    states.capacity = count;
    states.attention_mask = mask;
    FAILS(t5g_model_encode(model, &sources, NULL, &states), T5G_ERROR_BUFFER, "states.attention_mask", "room for");
    CHECK(values[0] == 0);
    states.mask_capacity = states.rows * states.length;
    WELL(t5g_model_encode(model, &sources, NULL, &states));
    CHECK(values[0] != 0 && mask[0] == 1 && mask[states.length - 1] + mask[2 * states.length - 1] == 1);
    FAILS(t5g_model_encode(model, &sources, NULL, NULL), T5G_ERROR_ARGUMENT, "states", "NULL");

    /* The states in place of the encoder. */
    t5g_generation_options options = short_options();
    t5g_result *result;
    const char *text;
    t5g_sources known = texts();
    known.encoder_outputs = values;
    known.encoder_rows = 1;
    FAILS(t5g_model_generate(model, &known, &options, NULL, &result), T5G_ERROR_INPUT, "sources.encoder_rows", "2 (one for");
    known.encoder_rows = states.rows;
    known.encoder_length = states.length + 1;
    FAILS(t5g_model_generate(model, &known, &options, NULL, &result), T5G_ERROR_INPUT, "sources.encoder_length", "tokens of");
    known.encoder_length = states.length;
    known.encoder_width = 1;
    FAILS(t5g_model_generate(model, &known, &options, NULL, &result), T5G_ERROR_INPUT, "sources.encoder_width", "hidden_size");
    known.encoder_width = states.width;
    WELL(t5g_model_generate(model, &known, &options, NULL, &result));
    WELL(t5g_result_text(result, 1, 0, &text, NULL));
    CHECK(strcmp(text, SPOKEN[1]) == 0);
    t5g_result_free(result);

    t5g_encoder *encoder;
    t5g_text *json;
    t5g_tokenizer *tokenizer;
    FAILS(t5g_encoder_open("/no/such/model", NULL, &encoder), T5G_ERROR_FILE, NULL, "/no/such/model");
    WELL(t5g_encoder_open(demo, NULL, &encoder));
    WELL(t5g_encoder_tokenizer(encoder, &tokenizer));
    t5g_tokenizer_free(tokenizer);
    states.values = again;
    WELL(t5g_encoder_encode(encoder, &sources, T5G_POOLING_NONE, 0, NULL, &states));
    for (size_t token = 0; token < states.rows * states.length; token++)
        for (size_t at = 0; at < states.width; at++)
            CHECK(!mask[token] || fabsf(values[token * states.width + at] - again[token * states.width + at]) < 1e-5f);
    WELL(t5g_encoder_encode(encoder, &sources, T5G_POOLING_MEAN, 1, NULL, &states));
    double length = 0;
    for (size_t at = 0; at < states.width; at++) length += (double)again[at] * again[at];
    CHECK(states.length == 1 && states.mask_length > 1 && fabs(length - 1) < 1e-4);
    FAILS(t5g_encoder_encode(encoder, &sources, 9, 0, NULL, &states), T5G_ERROR_ARGUMENT, "pooling", "found 9");
    FAILS(t5g_encoder_encode(encoder, &sources, 0, 1, NULL, &states), T5G_ERROR_ARGUMENT, "normalize", "pooling");
    FAILS(t5g_encoder_encode(encoder, &sources, 1, 5, NULL, &states), T5G_ERROR_ARGUMENT, "normalize", "found 5");
    FAILS(t5g_encoder_classify(encoder, &sources, 0, NULL, &states), T5G_ERROR_MODEL, "task", "classification");
    t5g_encoder_free(encoder);
    free(values);
    free(again);
    free(mask);

    float scores[16];
    WELL(t5g_encoder_open(classifier, NULL, &encoder));
    WELL(t5g_encoder_describe(encoder, &json));
    CHECK(strstr(t5g_text_data(json), "\"labels\":[") != NULL);
    t5g_text_free(json);
    states = t5g_states_default();
    FAILS(t5g_encoder_classify(encoder, &sources, 0, NULL, &states), T5G_ERROR_TOKENIZER, NULL, "tokenizer.json");
    int64_t ids[] = {5, 6, 7};
    sources = t5g_sources_default();
    sources.rows = 1;
    sources.length = 3;
    sources.input_ids = ids;
    states.values = scores;
    states.capacity = 16;
    WELL(t5g_encoder_classify(encoder, &sources, T5G_SCORES_SOFTMAX, NULL, &states));
    float sum = 0;
    for (size_t label = 0; label < states.width; label++) sum += scores[label];
    CHECK(states.rows == 1 && states.length == 1 && states.width > 1 && fabsf(sum - 1) < 1e-5f);
    WELL(t5g_encoder_classify(encoder, &sources, T5G_SCORES_NONE, NULL, &states));
    FAILS(t5g_encoder_classify(encoder, &sources, -1, NULL, &states), T5G_ERROR_ARGUMENT, "function", "found -1");
    FAILS(t5g_encoder_encode(encoder, &sources, 0, 0, NULL, &states), T5G_ERROR_MODEL, "task", "feature-extraction");
    CHECK(t5g_encoder_free(encoder) == T5G_OK && t5g_encoder_free(encoder) == T5G_ERROR_HANDLE);
}

static void check_tokenizer(const t5g_model *model, const char *demo) {
    t5g_tokenizer *tokenizer;
    t5g_tokens *tokens, *target;
    t5g_text *text;
    char path[4096];
    FAILS(t5g_tokenizer_open(demo, &tokenizer), T5G_ERROR_TOKENIZER, NULL, demo);
    snprintf(path, sizeof path, "%s/tokenizer.json", demo);
    WELL(t5g_tokenizer_open(path, &tokenizer));
    t5g_tokenizer_free(tokenizer);
    WELL(t5g_model_tokenizer(model, &tokenizer));
    WELL(t5g_tokenizer_encode(tokenizer, TEXTS[0], T5G_ZERO_TERMINATED, T5G_TEXT_SOURCE, &tokens));
    WELL(t5g_tokenizer_encode(tokenizer, TEXTS[0], strlen(TEXTS[0]), T5G_TEXT_TARGET, &target));
    CHECK(t5g_tokens_size(tokens) >= t5g_tokens_size(target) && t5g_tokens_size(target) > 2);
    WELL(t5g_tokenizer_decode(tokenizer, t5g_tokens_data(tokens), t5g_tokens_size(tokens), 0, &text));
    CHECK(strcmp(t5g_text_data(text), TEXTS[0]) == 0);
    t5g_text_free(text);
    WELL(t5g_tokenizer_token(tokenizer, t5g_tokens_data(target)[0], &text));
    CHECK(t5g_text_size(text) > 0);
    t5g_text_free(text);
    WELL(t5g_tokenizer_token(tokenizer, -1, &text));
    CHECK(t5g_text_size(text) == 0);
    t5g_text_free(text);
    FAILS(t5g_tokenizer_encode(tokenizer, "x", 1, 2, &tokens), T5G_ERROR_ARGUMENT, "kind", "found 2");
    FAILS(t5g_tokenizer_encode(tokenizer, "\xc3", 1, 0, &tokens), T5G_ERROR_ARGUMENT, "text", "UTF-8");
    FAILS(t5g_tokenizer_encode(tokenizer, NULL, 1, 0, &tokens), T5G_ERROR_ARGUMENT, "text", "NULL");
    int64_t wrong[] = {-5};
    FAILS(t5g_tokenizer_decode(tokenizer, wrong, 1, 0, &text), T5G_ERROR_INPUT, "tokens", "-5");
    FAILS(t5g_tokenizer_decode(tokenizer, NULL, 1, 0, &text), T5G_ERROR_ARGUMENT, "tokens", "NULL");
    FAILS(t5g_tokenizer_decode(tokenizer, wrong, 1, 3, &text), T5G_ERROR_ARGUMENT, "special", "found 3");
    WELL(t5g_tokenizer_decode(tokenizer, NULL, 0, 1, &text));
    CHECK(t5g_text_size(text) == 0);
    t5g_text_free(text);

    t5g_stream *stream;
    const char *piece;
    size_t size;
    char whole[200] = "";
    WELL(t5g_stream_new(tokenizer, 0, &stream));
    t5g_tokenizer_free(tokenizer); /* the stream keeps it */
    for (size_t at = 0; at < t5g_tokens_size(tokens); at++) {
        WELL(t5g_stream_push(stream, t5g_tokens_data(tokens)[at], &piece, &size));
        CHECK(strlen(piece) == size);
        strcat(whole, piece);
    }
    WELL(t5g_stream_finish(stream, &piece, NULL));
    strcat(whole, piece);
    CHECK(strcmp(whole, TEXTS[0]) == 0);
    WELL(t5g_stream_finish(stream, &piece, &size));
    CHECK(size == 0);
    FAILS(t5g_stream_push(stream, -1, &piece, &size), T5G_ERROR_INPUT, "tokens", "-1");
    FAILS(t5g_stream_push(stream, 5, NULL, &size), T5G_ERROR_ARGUMENT, "text", "NULL");
    CHECK(t5g_stream_free(stream) == T5G_OK);
    FAILS(t5g_stream_push(stream, 5, &piece, &size), T5G_ERROR_HANDLE, "stream", "freed");
    t5g_tokens_free(tokens);
    CHECK(t5g_tokens_free(target) == T5G_OK && t5g_tokens_data(target) == NULL && t5g_tokens_size(target) == 0);
}

struct answered {
    struct seen seen;
    volatile int done;
    t5g_result *result;
    t5g_error *error;
};

static void done(void *user, t5g_result *result, t5g_error *error) {
    struct answered *answered = user;
    CHECK((result == NULL) != (error == NULL));
    answered->result = result;
    answered->error = error;
    __atomic_store_n(&answered->done, 1, __ATOMIC_SEQ_CST);
}

static void wait_for(struct answered *answered) {
    struct timespec nap = {0, 1000000};
    while (!__atomic_load_n(&answered->done, __ATOMIC_SEQ_CST)) nanosleep(&nap, NULL);
}

/* Holds a request within a step until it is let go. */
static int is_let_go;

static void hold(void *user, const t5g_position *position, float *scores, size_t count) {
    struct timespec nap = {0, 1000000};
    (void)user, (void)position, (void)scores, (void)count;
    while (!__atomic_load_n(&is_let_go, __ATOMIC_SEQ_CST)) nanosleep(&nap, NULL);
}

static void let_go(int now) { __atomic_store_n(&is_let_go, now, __ATOMIC_SEQ_CST); }

static void check_engine(const t5g_model *model) {
    t5g_engine *engine;
    t5g_request *request, *second;
    t5g_result *result;
    t5g_sources sources = texts();
    t5g_generation_options options = short_options();
    t5g_engine_options bounds = t5g_engine_options_default();
    FAILS(t5g_engine_new(NULL, NULL, &engine), T5G_ERROR_ARGUMENT, "model", "NULL");
    FAILS(t5g_engine_new(model, NULL, NULL), T5G_ERROR_ARGUMENT, "engine", "NULL");
    bounds.max_rows = -3;
    FAILS(t5g_engine_new(model, &bounds, &engine), T5G_ERROR_ARGUMENT, "options.max_rows", "-3");
    bounds.max_rows = 0;
    FAILS(t5g_engine_new(model, &bounds, &engine), T5G_ERROR_ARGUMENT, "options.max_rows", "at least 1");
    bounds.max_rows = T5G_UNSET;
    bounds.max_bytes = 0;
    FAILS(t5g_engine_new(model, &bounds, &engine), T5G_ERROR_ARGUMENT, "options.max_bytes", "at least 1");
    bounds.max_bytes = T5G_UNSET;
    bounds.max_waiting = 0;
    FAILS(t5g_engine_new(model, &bounds, &engine), T5G_ERROR_ARGUMENT, "options.max_waiting", "at least 1");
    bounds.max_waiting = T5G_UNSET;
    bounds.max_rows = 4;
    bounds.device_count = 1;
    FAILS(t5g_engine_new(model, &bounds, &engine), T5G_ERROR_ARGUMENT, "options.devices", "NULL");
    bounds.device_count = 0;
    WELL(t5g_engine_new(model, &bounds, &engine));

    /* Polled to the end, with text. */
    char spoken[2][200] = {"", ""};
    int rows = 0;
    t5g_call call = t5g_call_default();
    call.stream_text = 1;
    call.deadline_seconds = 3600;
    WELL(t5g_engine_submit(engine, &sources, &options, &call, &request));
    WELL(t5g_engine_submit(engine, &sources, &options, NULL, &second));
    t5g_event event = t5g_event_default();
    do {
        WELL(t5g_request_poll(request, 3600, &event));
        CHECK(event.kind != T5G_EVENT_NONE);
        if (event.kind == T5G_EVENT_PIECE) strcat(spoken[event.row], event.text);
        rows += event.kind == T5G_EVENT_ROW;
    } while (event.kind != T5G_EVENT_END);
    CHECK(rows == 2 && strcmp(spoken[0], SPOKEN[0]) == 0 && strcmp(spoken[1], SPOKEN[1]) == 0);
    WELL(t5g_request_poll(request, 0, &event));
    CHECK(event.kind == T5G_EVENT_END);
    FAILS(t5g_request_poll(request, -1, &event), T5G_ERROR_ARGUMENT, "seconds", "-1");
    event.size = 0;
    FAILS(t5g_request_poll(request, 0, &event), T5G_ERROR_ARGUMENT, "event.size", "found 0");
    event = t5g_event_default();
    const char *text;
    for (int time = 0; time < 2; time++) {
        WELL(t5g_request_result(time ? request : second, &result));
        WELL(t5g_result_text(result, 1, 0, &text, NULL));
        CHECK(strcmp(text, SPOKEN[1]) == 0);
        t5g_result_free(result);
    }
    CHECK(t5g_request_free(request) == T5G_OK && t5g_request_free(request) == T5G_ERROR_HANDLE);
    FAILS(t5g_request_result(request, &result), T5G_ERROR_HANDLE, "request", "freed");
    t5g_request_free(second);

    /* By callback; stopped by a piece, by a cancellation, by a deadline. */
    struct answered answered;
    memset(&answered, 0, sizeof answered);
    call.user = &answered;
    call.on_piece = on_piece;
    FAILS(t5g_engine_submit(engine, &sources, &options, &call, &request), T5G_ERROR_ARGUMENT, "call.on_piece", "poll");
    FAILS(t5g_engine_call(engine, &sources, &options, &call, NULL), T5G_ERROR_ARGUMENT, "done", "NULL");
    call.on_step = on_step;
    FAILS(t5g_engine_call(engine, &sources, &options, &call, done), T5G_ERROR_ARGUMENT, "call.on_step", "on_piece");
    call.on_step = NULL;
    call.priority = T5G_PRIORITY_LOW;
    call.tenant = "a client";
    WELL(t5g_engine_call(engine, &sources, &options, &call, done));
    wait_for(&answered);
    WELL(answered.error);
    t5g_request_stats stats = t5g_request_stats_default();
    WELL(t5g_result_stats(answered.result, &stats));
    CHECK(0 <= stats.queued_seconds && stats.queued_seconds < stats.total_seconds && stats.new_tokens > 2);
    stats.size = 1;
    FAILS(t5g_result_stats(answered.result, &stats), T5G_ERROR_ARGUMENT, "stats.size", "found 1");
    CHECK(strcmp(answered.seen.text[1], SPOKEN[1]) == 0 && t5g_result_rows(answered.result) == 2);
    t5g_result_free(answered.result);

    memset(&answered, 0, sizeof answered);
    call.on_piece = NULL;
    t5g_generation_options endless = t5g_generation_options_default();
    int64_t end = 1;
    endless.max_new_tokens = 500;
    endless.suppress_tokens = &end;
    endless.suppress_tokens_count = 1;
    WELL(t5g_cancellation_new(&call.cancellation));
    call.logits_processor = hold;
    WELL(t5g_engine_call(engine, &sources, &endless, &call, done));
    WELL(t5g_cancellation_cancel(call.cancellation));
    let_go(1);
    wait_for(&answered);
    let_go(0);
    FAILS(answered.error, T5G_ERROR_CANCELLED, NULL, "cancelled");
    t5g_request *refused;
    FAILS(t5g_engine_submit(engine, &sources, &endless, &call, &refused), T5G_ERROR_CANCELLED, NULL, "cancelled");
    t5g_cancellation_free(call.cancellation);
    call = t5g_call_default();
    /* One that passes on the way, one that had passed before. */
    for (int time = 0; time < 2; time++) {
        call.deadline_seconds = time ? -1 : 0.001;
        WELL(t5g_engine_submit(engine, &sources, &endless, &call, &request));
        FAILS(t5g_request_result(request, &result), T5G_ERROR_DEADLINE, "deadline_seconds", "deadline has");
        t5g_request_free(request);
    }

    options.num_beams = 5;
    FAILS(t5g_engine_submit(engine, &sources, &options, NULL, &request), T5G_ERROR_TOO_LARGE, NULL, "4");
    options.num_beams = 0;
    FAILS(t5g_engine_submit(engine, &sources, &options, NULL, &request), T5G_ERROR_OPTIONS, "num_beams", "found 0");
    options.num_beams = T5G_UNSET;
    call = t5g_call_default();
    call.logits_processor = hold;
    WELL(t5g_engine_submit(engine, &sources, &endless, &call, &request));
    WELL(t5g_request_cancel(request));
    let_go(1);
    FAILS(t5g_request_result(request, &result), T5G_ERROR_CANCELLED, NULL, "cancelled");
    t5g_request_free(request);
    FAILS(t5g_request_cancel(request), T5G_ERROR_HANDLE, "request", "freed");
    WELL(t5g_engine_submit(engine, &sources, &endless, NULL, &request));
    t5g_request_free(request); /* cancels it */
    WELL(t5g_engine_drain(engine));
    FAILS(t5g_engine_submit(engine, &sources, &options, NULL, &request), T5G_ERROR_CLOSED, NULL, "no more");
    t5g_engine_counts counts = t5g_engine_counts_default();
    WELL(t5g_engine_stats(engine, &counts));
    /* Final when it has been waited for. */
    CHECK(counts.submitted == 8 && counts.finished + counts.failed == 8 && counts.max_rows == 4);
    CHECK(counts.finished >= 3 && counts.failed >= 4); /* the last may have been faster than its end */
    CHECK(counts.rows == 0 && counts.sources == 0 && counts.planned_bytes == 0);
    CHECK(counts.waiting_requests == 0 && counts.waiting_sources == 0);
    CHECK(counts.steps > 0 && counts.stepped_rows > counts.steps);
    WELL(t5g_engine_shutdown(engine));
    CHECK(t5g_engine_free(engine) == T5G_OK && t5g_engine_free(engine) == T5G_ERROR_HANDLE);
    FAILS(t5g_engine_drain(engine), T5G_ERROR_HANDLE, "engine", "freed");

    /* Two copies of the model, which take from one line. */
    int64_t devices[] = {0, 0};
    size_t copy_rows = 0;
    bounds.devices = devices;
    bounds.device_count = 2;
    devices[1] = -1;
    FAILS(t5g_engine_new(model, &bounds, &engine), T5G_ERROR_ARGUMENT, "options.devices[1]", "-1");
    devices[1] = 3;
    FAILS(t5g_engine_new(model, &bounds, &engine), T5G_ERROR_OPTIONS, "options.devices[1]", "one cpu");
    devices[1] = 0;
    bounds.max_rows = 1;
    WELL(t5g_engine_new(model, &bounds, &engine));
    WELL(t5g_engine_submit(engine, &sources, &options, NULL, &request));
    WELL(t5g_request_result(request, &result));
    for (size_t row = 0; row < 2; row++) {
        WELL(t5g_result_text(result, row, 0, &text, NULL));
        CHECK(strcmp(text, SPOKEN[row]) == 0);
    }
    t5g_result_free(result);
    t5g_request_free(request);
    WELL(t5g_engine_drain(engine));
    for (size_t copy = 0; copy < 2; copy++) {
        WELL(t5g_engine_stats_of_copy(engine, copy, &counts));
        CHECK(counts.copies == 2 && counts.finished == 1);
        copy_rows += counts.stepped_rows;
    }
    WELL(t5g_engine_stats(engine, &counts));
    /* Which copy takes a row is the system's affair: one that is slow to wake finds none. */
    CHECK(copy_rows > 0 && counts.stepped_rows == copy_rows && counts.copies == 2);
    FAILS(t5g_engine_stats_of_copy(engine, 2, &counts), T5G_ERROR_ARGUMENT, "copy", "less than 2");
    FAILS(t5g_engine_stats_of_copy(NULL, 0, &counts), T5G_ERROR_ARGUMENT, "engine", "NULL");
    t5g_engine_free(engine);

    /* What is left when an engine is freed fails, unless it was done. */
    WELL(t5g_engine_new(model, NULL, &engine));
    WELL(t5g_engine_submit(engine, &sources, &endless, NULL, &request));
    t5g_engine_free(engine);
    t5g_error *error = t5g_request_result(request, &result);
    if (error == NULL) t5g_result_free(result);
    else CHECK(t5g_error_code(error) == T5G_ERROR_CANCELLED || t5g_error_code(error) == T5G_ERROR_CLOSED);
    t5g_error_free(error);
    t5g_request_free(request);
}

static void check_errors(void) {
    t5g_model *model;
    t5g_error *error = t5g_model_open(NULL, NULL, &model);
    CHECK(t5g_error_code(error) == T5G_ERROR_ARGUMENT);
    CHECK(t5g_error_free(error) == T5G_OK && t5g_error_free(error) == T5G_ERROR_HANDLE && t5g_error_free(NULL) == T5G_OK);
    CHECK(t5g_error_code(error) == T5G_ERROR_HANDLE && t5g_error_field(error) == NULL);
    CHECK(strstr(t5g_error_message(error), "freed") != NULL && t5g_error_message(NULL) != NULL);
}

int main(int argc, char **argv) {
    CHECK(argc == 4);
    int messages = 0;
    const char *demo = argv[1], *classifier = argv[2];
    check_versions();
    WELL(t5g_log_set(T5G_SEVERITY_INFO, log_message, &messages));
    check_errors();
    check_opening(demo, classifier, argv[3]);
    check_onnxruntime();
    CHECK(messages > 0);
    WELL(t5g_log_set(T5G_SEVERITY_WARNING, NULL, NULL));

    t5g_model *model;
    WELL(t5g_model_open(demo, NULL, &model));
    check_generation(model);
    check_sources(model);
    check_calls(model);
    check_scores(model);
    check_encoding(model, demo, classifier);
    check_tokenizer(model, demo);
    check_engine(model);

    /* A result keeps its model, so that its text can be had later. */
    t5g_sources sources = texts();
    t5g_generation_options options = short_options();
    t5g_result *result;
    const char *text;
    WELL(t5g_model_generate(model, &sources, &options, NULL, &result));
    CHECK(t5g_model_free(model) == T5G_OK);
    FAILS(t5g_model_generate(model, &sources, &options, NULL, &result), T5G_ERROR_HANDLE, "model", "freed");
    WELL(t5g_result_text(result, 0, 0, &text, NULL));
    CHECK(strcmp(text, SPOKEN[0]) == 0);
    t5g_result_free(result);
    CHECK(t5g_live_handles() == 0);
    puts("well");
    return 0;
}
