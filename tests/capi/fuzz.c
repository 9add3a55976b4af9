/* Random sequences of calls with random arguments: fuzz MODEL SECONDS CORPUS... runs the inputs in the files CORPUS, then
 * changed ones for SECONDS, from a fixed seed. An input is a program: each byte chooses a function or an argument, and an
 * empty input chooses 0. Handles that were freed, of other kinds, or none are passed on purpose; memory is as long as is
 * said. With -D LIBFUZZER it is a target for libFuzzer, with FUZZ_MODEL in the environment. Whatever comes, every output is
 * touched on success only, and at the end no handle is left. */
#define _POSIX_C_SOURCE 200809L
#include <time.h>

#include "check.h"

static const uint8_t *input;
static size_t left;

static uint8_t byte(void) {
    if (left == 0) return 0;
    left--;
    return *input++;
}

static size_t below(size_t limit) { return byte() % limit; }

enum { SLOTS = 6 };
/* Handles of all kinds side by side: what is taken from here may be of the right kind. */
static void *slots[SLOTS];
static int kinds[SLOTS];
enum { NONE, MODEL, ENCODER, TOKENIZER, STREAM, CANCELLATION, RESULT, TEXT, TOKENS, REQUEST, ENGINE };

static t5g_model *model;
static t5g_encoder *encoder;
static t5g_engine *engine;
static char *const UNTOUCHED = (char *)"untouched";

static void *handle(void) {
    size_t choice = below(SLOTS + 3);
    if (choice < SLOTS) return slots[choice];
    return choice == SLOTS ? NULL : choice == SLOTS + 1 ? (void *)UNTOUCHED : (void *)model;
}

/* Mostly a handle of the kind, if there is one. */
static void *likely(int kind) {
    if (byte() % 8 == 0) return handle();
    if (kind == MODEL) return model;
    if (kind == ENCODER) return encoder;
    if (kind == ENGINE) return engine;
    for (size_t at = 0; at < SLOTS; at++)
        if (kinds[at] == kind) return slots[at];
    return handle();
}

static t5g_code free_kind(int kind, void *it) {
    switch (kind) {
    case MODEL: return t5g_model_free(it);
    case ENCODER: return t5g_encoder_free(it);
    case TOKENIZER: return t5g_tokenizer_free(it);
    case STREAM: return t5g_stream_free(it);
    case CANCELLATION: return t5g_cancellation_free(it);
    case RESULT: return t5g_result_free(it);
    case TEXT: return t5g_text_free(it);
    case REQUEST: return t5g_request_free(it);
    case ENGINE: return t5g_engine_free(it);
    default: return t5g_tokens_free(it);
    }
}

/* Puts what a call gave into a slot, after checking that it was given on success only. */
static void keep(t5g_error *error, void *out, int kind) {
    if (error != NULL) {
        CHECK(out == (void *)UNTOUCHED);
        CHECK(t5g_error_code(error) != T5G_OK && t5g_error_code(error) != T5G_ERROR_INTERNAL);
        CHECK(strlen(t5g_error_message(error)) > 0);
        CHECK(t5g_error_free(error) == T5G_OK);
        return;
    }
    if (kind == NONE) return;
    CHECK(out != (void *)UNTOUCHED && out != NULL);
    size_t slot = below(SLOTS);
    if (kinds[slot] != NONE) CHECK(free_kind(kinds[slot], slots[slot]) == T5G_OK);
    slots[slot] = out;
    kinds[slot] = kind;
}

static const char *const TEXTS[] = {"mr brown paid $5", "", "a\xff", "{\"num_beams\": 2}", "[]", "{", "\xf0\x9f\x98\x80 \xe2\x82\xac",
                                    "[{\"role\": \"user\", \"content\": \"x\"}]"};

static const char *text(void) {
    size_t choice = below(sizeof TEXTS / sizeof *TEXTS + 1);
    return choice == 0 ? NULL : TEXTS[choice - 1];
}

static int64_t ids[64];
static size_t lengths[8];
static const char *rows[8];
static size_t sizes[8];
static float numbers[1 << 16];

static int64_t number(void) {
    static const int64_t SPECIAL[] = {0, 1, -1, INT64_MAX, INT64_MIN, 1 << 20, 2};
    uint8_t choice = byte();
    return choice < 200 ? choice : SPECIAL[choice % 7];
}

static double real(void) {
    static const double SPECIAL[] = {0, 1, -1, 1e300, 0.5, 2};
    uint8_t choice = byte();
    return choice % 8 < 6 ? SPECIAL[choice % 8] : choice % 8 == 6 ? (double)NAN : (double)INFINITY;
}

static size_t wrong_size(size_t right) { return byte() % 32 == 0 ? (size_t)number() : right; }

static t5g_sources *sources(t5g_sources *made) {
    *made = t5g_sources_default();
    made->size = wrong_size(made->size);
    made->rows = 1 + below(3);
    for (size_t at = 0; at < 64; at++) ids[at] = at < 24 ? number() : 5;
    for (size_t at = 0; at < 8; at++) {
        lengths[at] = below(8);
        rows[at] = at < 3 ? text() : "x";
        sizes[at] = byte() % 4 == 0 && rows[at] != NULL ? strlen(rows[at]) / 2 : T5G_ZERO_TERMINATED;
    }
    uint8_t parts = byte();
    if (parts & 1 || parts < 64) made->texts = rows;
    if (parts & 2) made->text_sizes = sizes;
    if (parts & 4 && parts >= 64) made->input_ids = ids;
    if (parts & 8) made->lengths = lengths;
    if (parts & 16) made->length = below(16);
    if (parts & 32 && made->length > 0) made->attention_mask = ids + 8;
    if (parts & 64 && byte() % 4 == 0) made->messages = text();
    if (parts & 128 && byte() % 2 == 0) {
        made->decoder_input_ids = ids + 2;
        made->decoder_length = below(4);
    }
    if (parts % 16 == 13) {
        size_t *told[] = {&made->decoder_rows, &made->input_ids_size, &made->attention_mask_size, &made->encoder_rows,
                          &made->encoder_length, &made->encoder_width};
        *told[below(6)] = (size_t)number();
    }
    return byte() % 32 == 0 ? NULL : made;
}

static t5g_generation_options *options(t5g_generation_options *made) {
    *made = t5g_generation_options_default();
    made->size = wrong_size(made->size);
    made->max_new_tokens = 1 + (int64_t)below(4);
    for (size_t count = below(4); count > 0; count--) {
        /* The struct is words; any of them may be a number, as long as it is none of the pointers. */
        int64_t *whole[] = {&made->max_new_tokens, &made->min_length, &made->num_beams, &made->num_return_sequences,
                            &made->do_sample, &made->seed, &made->top_k, &made->early_stopping, &made->output_logprobs,
                            &made->top_logprobs, &made->pad_token_id, &made->no_repeat_ngram_size, &made->num_beam_groups,
                            &made->exponential_decay_start, &made->forced_bos_token_id, &made->return_alternatives,
                            &made->output_attentions};
        double *reals[] = {&made->temperature, &made->top_p, &made->length_penalty, &made->repetition_penalty,
                           &made->max_time, &made->diversity_penalty, &made->exponential_decay_factor,
                           &made->coverage_penalty, &made->patience};
        int64_t *chosen = whole[below(17)];
        if (byte() % 2) *chosen = chosen == &made->max_new_tokens ? number() % 6 : chosen == &made->num_beams ? number() % 5 : number();
        else *reals[below(9)] = real();
    }
    if (byte() % 8 == 0) {
        made->suppress_tokens = ids;
        made->suppress_tokens_count = below(9);
        made->stop_strings = rows;
        made->stop_strings_count = below(4);
    }
    if (byte() % 16 == 0) made->json = text();
    if (byte() % 32 == 0) made->regex = text();
    if (byte() % 32 == 0) made->json_schema = text();
    return byte() % 32 == 0 ? NULL : made;
}

static int32_t on_piece(void *user, const t5g_piece *piece) {
    (void)user;
    CHECK(piece->row < 8 && (piece->text == NULL || strlen(piece->text) == piece->text_size));
    return byte() % 32 == 31;
}

static int32_t on_step(void *user) {
    /* Callbacks may call the library. */
    CHECK(user == (void *)slots);
    return t5g_cancellation_is_cancelled(likely(CANCELLATION)) == 7;
}

static t5g_call *call(t5g_call *made) {
    *made = t5g_call_default();
    made->size = wrong_size(made->size);
    made->user = slots;
    uint8_t parts = byte();
    if (parts & 1) made->on_piece = on_piece;
    if (parts & 2) made->on_step = on_step;
    if (parts & 4) made->stream_text = number() % 3;
    if (parts & 8) made->cancellation = likely(CANCELLATION);
    if (parts >= 224) made->deadline_seconds = real();
    return parts == 255 ? NULL : made;
}

static t5g_states *states(t5g_states *made) {
    *made = t5g_states_default();
    made->size = wrong_size(made->size);
    if (byte() % 2) {
        made->values = numbers;
        made->capacity = byte() % 4 ? sizeof numbers / sizeof *numbers : below(100);
    }
    return byte() % 32 == 0 ? NULL : made;
}

/* The call comes before what it gave. */
#define KEEP(made, kind)                                                                                                \
    do {                                                                                                               \
        t5g_error *error_ = (made);                                                                                    \
        keep(error_, out, (kind));                                                                                     \
    } while (0)

static void step(void) {
    void *out = UNTOUCHED;
    t5g_sources given;
    t5g_generation_options wanted;
    t5g_call way;
    t5g_states room;
    t5g_hypothesis found = t5g_hypothesis_default();
    t5g_targets targets = t5g_targets_default();
    const char *shown = UNTOUCHED;
    size_t size;
    switch (below(35)) {
    case 0:
    case 1: {
        t5g_sources *s = sources(&given);
        t5g_generation_options *o = options(&wanted);
        KEEP(t5g_model_generate(likely(MODEL), s, o, call(&way), (t5g_result **)&out), RESULT);
        break;
    }
    case 2: {
        t5g_sources *s = sources(&given);
        targets.size = wrong_size(targets.size);
        if (byte() % 2) targets.texts = rows;
        else targets.target_ids = ids, targets.lengths = lengths;
        targets.without_end = number() % 3;
        KEEP(t5g_model_score(likely(MODEL), s, &targets, below(4), call(&way), (t5g_result **)&out), RESULT);
        break;
    }
    case 3: {
        t5g_sources *s = sources(&given);
        t5g_call *c = call(&way);
        KEEP(t5g_model_encode(likely(MODEL), s, c, states(&room)), NONE);
        break;
    }
    case 4: {
        t5g_sources *s = sources(&given);
        t5g_call *c = call(&way);
        KEEP(t5g_encoder_encode(likely(ENCODER), s, (int32_t)below(5), byte() % 3, c, states(&room)), NONE);
        break;
    }
    case 5: KEEP(t5g_model_tokenizer(likely(MODEL), (t5g_tokenizer **)&out), TOKENIZER); break;
    case 6: KEEP(t5g_cancellation_new((t5g_cancellation **)&out), CANCELLATION); break;
    case 7: KEEP(t5g_cancellation_cancel(likely(CANCELLATION)), NONE); break;
    case 8: KEEP(t5g_stream_new(likely(TOKENIZER), byte() % 3, (t5g_stream **)&out), STREAM); break;
    case 9:
    case 10: KEEP(t5g_stream_push(likely(STREAM), number(), &shown, &size), NONE); break;
    case 11: KEEP(t5g_stream_finish(likely(STREAM), &shown, NULL), NONE); break;
    case 12: {
        const char *t = text();
        size = byte() % 2 && t != NULL ? strlen(t) : T5G_ZERO_TERMINATED;
        KEEP(t5g_tokenizer_encode(likely(TOKENIZER), t, size, byte() % 3, (t5g_tokens **)&out), TOKENS);
        break;
    }
    case 13: {
        for (size_t at = 0; at < 8; at++) ids[at] = number();
        KEEP(t5g_tokenizer_decode(likely(TOKENIZER), ids, below(9), byte() % 3, (t5g_text **)&out), TEXT);
        break;
    }
    case 14: KEEP(t5g_tokenizer_token(likely(TOKENIZER), number(), (t5g_text **)&out), TEXT); break;
    case 15: KEEP(t5g_result_json(likely(RESULT), (t5g_text **)&out), TEXT); break;
    case 16: {
        void *result = likely(RESULT);
        size_t row = below(4), index = below(3);
        found.size = wrong_size(found.size);
        t5g_error *error = t5g_result_get(result, row, index, &found);
        if (error == NULL && found.size == sizeof found) {
            CHECK(row < t5g_result_rows(result) && index < t5g_result_count(result, row));
            int64_t sum = 0;
            for (size_t at = 0; at < found.token_count; at++) sum += found.tokens[at];
            for (size_t at = 0; at < found.token_count * found.top_count; at++) sum += found.top_tokens[at];
            CHECK(sum >= 0);
        }
        KEEP(error, NONE);
        break;
    }
    case 17: {
        t5g_error *error = t5g_result_text(likely(RESULT), below(4), below(3), &shown, &size);
        CHECK(error != NULL ? shown == UNTOUCHED : shown[size] == 0);
        KEEP(error, NONE);
        break;
    }
    case 18: KEEP(t5g_model_describe(likely(MODEL), (t5g_text **)&out), TEXT); break;
    case 19: KEEP(t5g_model_chat(likely(MODEL), text(), (t5g_text **)&out), TEXT); break;
    case 20: KEEP(t5g_encoder_describe(likely(ENCODER), (t5g_text **)&out), TEXT); break;
    case 21: {
        void *it = likely(TOKENS);
        const int64_t *data = t5g_tokens_data(it);
        CHECK(data != NULL || t5g_tokens_size(it) == 0);
        break;
    }
    case 22: {
        void *it = likely(TEXT);
        CHECK(t5g_text_data(it)[t5g_text_size(it)] == 0);
        break;
    }
    case 23: {
        t5g_open_options open = t5g_open_options_default();
        open.size = wrong_size(open.size);
        open.threads = number();
        open.provider = text();
        KEEP(t5g_model_open(TEXTS[0], &open, (t5g_model **)&out), MODEL);
        break;
    }
    case 24: KEEP(t5g_log_set((t5g_severity)number(), NULL, NULL), NONE); break;
    case 25: KEEP(t5g_log_recent((t5g_text **)&out), TEXT); break;
    case 26: {
        t5g_sources *s = sources(&given);
        t5g_call *c = call(&way);
        KEEP(t5g_encoder_classify(likely(ENCODER), s, (int32_t)number(), c, states(&room)), NONE);
        break;
    }
    case 27:
    case 28: {
        t5g_sources *s = sources(&given);
        t5g_generation_options *o = options(&wanted);
        t5g_call *c = call(&way);
        /* Callbacks would be of this program's bytes, on another thread. */
        if (c != NULL && byte() % 8) c->on_piece = NULL, c->on_step = NULL;
        if (c != NULL) c->priority = byte() % 4 ? 0 : number(), c->tenant = byte() % 2 ? text() : NULL;
        KEEP(t5g_engine_submit(likely(ENGINE), s, o, c, (t5g_request **)&out), REQUEST);
        break;
    }
    case 29: {
        t5g_event event = t5g_event_default();
        event.size = wrong_size(event.size);
        KEEP(t5g_request_poll(likely(REQUEST), byte() % 4 ? 0.001 : real() - 0.5, &event), NONE);
        break;
    }
    case 30: KEEP(t5g_request_result(likely(REQUEST), (t5g_result **)&out), RESULT); break;
    case 31: {
        t5g_engine_counts counts = t5g_engine_counts_default();
        counts.size = wrong_size(counts.size);
        KEEP(byte() % 2 ? t5g_engine_stats_of_copy(likely(ENGINE), byte() % 3, &counts)
                        : t5g_engine_stats(likely(ENGINE), &counts), NONE);
        CHECK(counts.finished + counts.failed <= counts.submitted);
        break;
    }
    case 32: {
        t5g_engine_options bounds = t5g_engine_options_default();
        bounds.max_rows = number();
        bounds.max_bytes = number();
        int64_t devices[2] = {number(), 0};
        bounds.devices = byte() % 2 ? devices : NULL;
        bounds.device_count = byte() % 3;
        if (byte() % 8 == 0) KEEP(t5g_engine_new(likely(MODEL), &bounds, (t5g_engine **)&out), ENGINE);
        break;
    }
    default: {
        /* Frees something, possibly by the wrong function; a slot keeps what was freed. */
        size_t slot = below(SLOTS);
        int kind = byte() % 4 ? kinds[slot] : 1 + (int)below(10);
        if (slots[slot] == model || kind == NONE) break;
        t5g_code code = free_kind(kind, slots[slot]);
        CHECK(code == (kind == kinds[slot] || slots[slot] == NULL ? T5G_OK : T5G_ERROR_HANDLE));
        if (code == T5G_OK && slots[slot] != NULL) {
            CHECK(free_kind(kind, slots[slot]) == T5G_ERROR_HANDLE);
            kinds[slot] = NONE;
        }
    }
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (model == NULL) WELL(t5g_model_open(getenv("FUZZ_MODEL"), NULL, &model));
    input = data;
    left = size;
    if (encoder == NULL) WELL(t5g_encoder_open(getenv("FUZZ_MODEL"), NULL, &encoder));
    if (engine == NULL) WELL(t5g_engine_new(model, NULL, &engine));
    memset(slots, 0, sizeof slots);
    memset(kinds, 0, sizeof kinds);
    while (left > 0) step();
    for (size_t at = 0; at < SLOTS; at++)
        if (kinds[at] != NONE) CHECK(free_kind(kinds[at], slots[at]) == T5G_OK);
    CHECK(t5g_live_handles() == 3);
    return 0;
}

#ifndef LIBFUZZER
static uint64_t state = 0x9e3779b97f4a7c15u;

static uint64_t draw(void) {
    state ^= state << 13;
    state ^= state >> 7;
    return state ^= state << 17;
}

int main(int argc, char **argv) {
    CHECK(argc > 2 && setenv("FUZZ_MODEL", argv[1], 1) == 0);
    static uint8_t corpus[64][512], program[1024];
    size_t lengths_of[64], count = 0, runs = 0;
    for (int at = 3; at < argc && count < 64; at++) {
        FILE *file = fopen(argv[at], "rb");
        CHECK(file != NULL);
        lengths_of[count] = fread(corpus[count], 1, sizeof corpus[0], file);
        fclose(file);
        LLVMFuzzerTestOneInput(corpus[count], lengths_of[count]);
        count++;
    }
    for (time_t end = time(NULL) + atoi(argv[2]); time(NULL) < end; runs++) {
        size_t size;
        if (count > 0 && draw() % 2) {
            size_t chosen = draw() % count;
            size = lengths_of[chosen];
            memcpy(program, corpus[chosen], size);
            for (size_t changes = 1 + draw() % 8; size > 0 && changes > 0; changes--) program[draw() % size] = (uint8_t)draw();
        } else {
            size = draw() % 600;
            for (size_t at = 0; at < size; at++) program[at] = (uint8_t)draw();
        }
        /* What breaks it is left for the corpus. */
        if (getenv("FUZZ_LAST") != NULL) {
            FILE *file = fopen(getenv("FUZZ_LAST"), "wb");
            CHECK(file != NULL && fwrite(program, 1, size, file) == size);
            fclose(file);
        }
        LLVMFuzzerTestOneInput(program, size);
    }
    printf("well: %zu inputs of the corpus, %zu others\n", count, runs);
    return 0;
}
#endif
