/* t5gemma.h: T5Gemma models from C. C11, and C++17 by t5gemma.hpp on top of it.
 *
 *     #include <stdio.h>
 *     #include "t5gemma.h"
 *
 *     static int failed(t5g_error *error) {
 *         if (error == NULL) return 0;
 *         fprintf(stderr, "%s\n", t5g_error_message(error));
 *         t5g_error_free(error);
 *         return 1;
 *     }
 *
 *     int main(int argc, char **argv) {
 *         t5g_model *model;
 *         if (argc < 2 || failed(t5g_model_open(argv[1], NULL, &model))) return 1;
 *
 *         const char *texts[] = {"Dr. Smith paid $3.50 on May 3, 2019.", "The meeting starts at 9:05 am on Elm St."};
 *         t5g_sources sources = t5g_sources_default();
 *         sources.rows = 2;
 *         sources.texts = texts;
 *         t5g_generation_options options = t5g_generation_options_default();
 *         options.max_new_tokens = 64;
 *         options.num_beams = 4;
 *
 *         t5g_result *result;
 *         if (failed(t5g_model_generate(model, &sources, &options, NULL, &result))) return 1;
 *         for (size_t row = 0; row < t5g_result_rows(result); row++) {
 *             const char *text;
 *             if (failed(t5g_result_text(result, row, 0, &text, NULL))) return 1;
 *             puts(text);
 *         }
 *         t5g_result_free(result);
 *         t5g_model_free(model);
 *         return 0;
 *     }
 *
 * LINKING. `pkg-config --cflags --libs t5gemma`, or CMake's find_package(t5gemma) and the target t5gemma::t5gemma. ONNX
 * Runtime is no dependency of the linker's: it is loaded when the first model is opened, from t5g_open_options.library if
 * that is set, or else the first of: the environment's ORT_DYLIB_PATH, beside libt5gemma, beside the program,
 * .cache/onnxruntime/lib here or in a folder above, ~/.local/share/t5gemma. A process has one ONNX Runtime.
 *
 * ERRORS. Functions that can fail return an error, which is the caller's to free, or NULL when all is well. Their outputs
 * come last, are required unless the function says otherwise, and are not touched on failure. Nothing that is passed in
 * makes the library crash if it can be helped: NULL where something is needed, a freed handle or one of another kind, a
 * wrong size field, a number that is no enum's, text that is not UTF-8 are T5G_ERROR_ARGUMENT or T5G_ERROR_HANDLE, which
 * name the argument. A bug of the library's own is T5G_ERROR_INTERNAL, after which the objects that took part refuse to
 * serve. Memory that a pointer and a length promise has to be there.
 *
 * LIFETIMES. A handle (t5g_model *, t5g_result *, ...) is a number in a pointer's clothes, never given twice; it points at
 * nothing. Each belongs to the caller and has its _free, which takes NULL for nothing to do and returns T5G_ERROR_HANDLE for
 * what was freed before. What a function reads it has copied when it returns. Pointers that a function gives (the text of
 * t5g_text_data, the tokens of a hypothesis) live as long as the handle they were got from. A handle may be freed while
 * another thread is in a call with it: that call ends well, and the object goes after it. A result keeps its model.
 * dlclose leaves the library's code where it is, because ONNX Runtime's threads and environment outlive every model;
 * opening it again costs and leaks nothing.
 *
 * THREADS. Every function may be called from any thread at any time, and every object may be used by several at once,
 * but for t5g_stream and t5g_request, which are one thread's at a time: T5G_ERROR_BUSY tells of a second. One model runs each
 * of its graphs for one call at a time, so calls from several threads take turns; t5g_engine has them share steps. Callbacks
 * come on the thread of the call, in which they may call this library; t5g_engine_call and log messages say otherwise.
 *
 * FORK. A process that is forked has none of its parent's threads. In the child t5g_engine_new gives engines that work; with an
 * engine of the parent, and its requests, everything but freeing fails at once with T5G_ERROR_CLOSED, and callbacks of
 * t5g_engine_call do not come. A model that was opened before can be used if no call was using it when the process was forked:
 * ONNX Runtime's own threads are missing, so that calls compute with one thread. To fork before the first model is opened, or to
 * exec, is better.
 *
 * STRUCTS. The first field of each is its size, so that they can grow: t5g_..._default() sets it, and everything else to
 * "not given". All fields are 8 bytes wide. A program runs with any library of the same T5G_ABI_MAJOR, older ones included as
 * long as it sets no field that they lack.
 *
 * TEXT is UTF-8. Where a text comes with its size, T5G_ZERO_TERMINATED is a size too. Texts that the library gives have a
 * size and a zero behind them. */
#ifndef T5GEMMA_H
#define T5GEMMA_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

#define T5G_ABI_MAJOR 1
#define T5G_ABI_MINOR 3

/* The size of a text that ends at its first zero. */
#define T5G_ZERO_TERMINATED SIZE_MAX
/* A whole number that is not given, so that the model's own setting holds. Of floating point numbers NAN is the same. */
#define T5G_UNSET INT64_MIN
#ifdef __cplusplus
#define T5G_UNSET_NUMBER static_cast<double>(NAN)
#else
#define T5G_UNSET_NUMBER ((double)NAN)
#endif

typedef struct t5g_error t5g_error;
typedef struct t5g_text t5g_text;
typedef struct t5g_tokens t5g_tokens;
typedef struct t5g_model t5g_model;
typedef struct t5g_encoder t5g_encoder;
typedef struct t5g_tokenizer t5g_tokenizer;
typedef struct t5g_stream t5g_stream;
typedef struct t5g_cancellation t5g_cancellation;
typedef struct t5g_result t5g_result;
typedef struct t5g_engine t5g_engine;
typedef struct t5g_request t5g_request;

/* The library's version, such as "0.1.0". The text is static. */
const char *t5g_version(void);

/* T5G_ABI_MAJOR and T5G_ABI_MINOR of the library, as major * 65536 + minor. */
uint32_t t5g_abi_version(void);

/* How many handles are not freed, in the whole process; 0 at the end of a program that leaks none. Errors count. */
size_t t5g_live_handles(void);


/* ---- Errors ---- */

typedef int32_t t5g_code;
enum {
    T5G_OK = 0,
    T5G_ERROR_ARGUMENT = 1,     /* an argument that this header forbids */
    T5G_ERROR_HANDLE = 2,       /* a handle that was freed, or is of another kind */
    T5G_ERROR_BUSY = 3,         /* an object that another thread is using */
    T5G_ERROR_BUFFER = 4,       /* a buffer of the caller's that is too small */
    T5G_ERROR_LIBRARY = 5,      /* no usable ONNX Runtime; the message says how to get one */
    T5G_ERROR_FILE = 6,         /* a file that cannot be read, or is not of its kind */
    T5G_ERROR_MODEL = 7,        /* a model folder that contradicts itself, or is for another task */
    T5G_ERROR_UNSUPPORTED = 8,  /* well-formed, but not for this machine or version */
    T5G_ERROR_TOKENIZER = 9,    /* text, and the model has no usable tokenizer */
    T5G_ERROR_INPUT = 10,       /* sources, targets or lengths that are not acceptable */
    T5G_ERROR_OPTIONS = 11,     /* a generation option that is not acceptable */
    T5G_ERROR_CONSTRAINT = 12,  /* a constraint that cannot be followed, as a grammar that became too complex */
    T5G_ERROR_NOT_FINITE = 13,  /* the model, or a logits_processor, computed scores that no token can be chosen by */
    T5G_ERROR_ONNXRUNTIME = 14, /* ONNX Runtime failed */
    T5G_ERROR_CANCELLED = 15,   /* a cancellation was used, or a callback asked to stop */
    T5G_ERROR_DEADLINE = 16,    /* t5g_call.deadline_seconds have passed */
    T5G_ERROR_INTERNAL = 17,    /* a bug of the library */
    T5G_ERROR_TOO_LARGE = 18,   /* a request that an engine can never hold */
    T5G_ERROR_FULL = 19,        /* an engine with as many requests waiting as it may have */
    T5G_ERROR_CLOSED = 20       /* an engine that takes no more requests, or belongs to the process this one was forked from */
};

/* What kind of error it is; T5G_ERROR_HANDLE if it is no error's handle. */
t5g_code t5g_error_code(const t5g_error *error);

/* What went wrong, what was expected and what was found, for people. Never NULL. */
const char *t5g_error_message(const t5g_error *error);

/* The argument, option, or part of the input at fault, such as "num_beams" or "input_ids[1][3]"; NULL if there is none. */
const char *t5g_error_field(const t5g_error *error);

t5g_code t5g_error_free(t5g_error *error);


/* ---- Texts and tokens that the library gives ---- */

const char *t5g_text_data(const t5g_text *text);
size_t t5g_text_size(const t5g_text *text);
t5g_code t5g_text_free(t5g_text *text);

const int64_t *t5g_tokens_data(const t5g_tokens *tokens);
size_t t5g_tokens_size(const t5g_tokens *tokens);
t5g_code t5g_tokens_free(t5g_tokens *tokens);


/* ---- ONNX Runtime ---- */

typedef int32_t t5g_severity;
enum {
    T5G_SEVERITY_VERBOSE = 0,
    T5G_SEVERITY_INFO = 1,
    T5G_SEVERITY_WARNING = 2,
    T5G_SEVERITY_ERROR = 3,
    T5G_SEVERITY_FATAL = 4
};

typedef void (*t5g_log)(void *user, t5g_severity severity, const char *message);

/* Gives ONNX Runtime's messages of at least `severity` to `log`, from any thread, until it is set anew; NULL gives them to
 * no one. Below T5G_SEVERITY_WARNING nothing comes once a model is open, unless this was called before. `log` may be called
 * for a moment after it was replaced. */
t5g_error *t5g_log_set(t5g_severity severity, t5g_log log, void *user);

/* The last messages of ONNX Runtime and its providers, warnings and graver, a line each, oldest first; 64 are kept. */
t5g_error *t5g_log_recent(t5g_text **text);

/* Loads ONNX Runtime if none is loaded (from `library`, or NULL to search) and tells where it was looked for, as JSON:
 * {"places": [{"why", "path", "found"}...], "library": {"path", "build", "providers"} or null, "error": text or null}.
 * It fails only for wrong arguments. */
t5g_error *t5g_onnxruntime_report(const char *library, t5g_text **json);


/* ---- Opening a model ---- */

typedef struct t5g_open_options {
    size_t size;
    const char *library;         /* the file of ONNX Runtime; NULL: searched for */
    const char *provider;        /* what computes: "cpu", "cuda", "tensorrt", "nv-tensorrt-rtx"; NULL: "cpu" */
    int64_t device;              /* the number of the GPU; T5G_UNSET: the first */
    int64_t threads;             /* T5G_UNSET: as many as the machine has cores */
    int64_t check_weights;       /* 1: hash the whole file of weights, however large */
    int64_t encoder_cache_bytes; /* what may be kept of the encoder's results for sources that come again; 0: nothing */
    const char *json;            /* the same as a JSON object under the same names, and "provider_options", an object with
                                    options of the provider by ONNX Runtime's names; "engines", the folder with the engines of
                                    the model's serving plan; "max_sources", "max_tokens" (source tokens) and "max_bytes", what
                                    one call runs at a time, its rows in pieces that fit: on the CPU 4 GiB unless given. NULL:
                                    nothing. Each at most once */
} t5g_open_options;

static inline t5g_open_options t5g_open_options_default(void) {
    t5g_open_options options;
    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    options.device = options.threads = options.check_weights = options.encoder_cache_bytes = T5G_UNSET;
    return options;
}

/* Opens a model folder that t5gemma-export has written, to be generated with. `options` may be NULL. The folder is held to
 * its manifest; it has to stay as it is while the model is open. */
t5g_error *t5g_model_open(const char *path, const t5g_open_options *options, t5g_model **model);

/* The folder's manifest, configuration and default generation options, as JSON:
 * {"path", "task", "target", "dtype", "parameters", "exporter", "source_vocab_size", "target_vocab_size", "hidden_size",
 * "max_source_length", "max_target_length", "decoder_start_token_id", "eos_token_id", "pad_token_id", "labels",
 * "elsewhere"}; the last lists the operators that another provider computes than the one asked for. */
t5g_error *t5g_model_describe(const t5g_model *model, t5g_text **json);

/* The model's tokenizer, read when first asked for. */
t5g_error *t5g_model_tokenizer(const t5g_model *model, t5g_tokenizer **tokenizer);

/* A conversation as the text that an instruction-tuned model continues: `messages` is a JSON list of {"role", "content"},
 * written by the folder's chat template. */
t5g_error *t5g_model_chat(const t5g_model *model, const char *messages, t5g_text **text);

t5g_code t5g_model_free(t5g_model *model);


/* ---- What a call is given ---- */

/* The sources of a call, a row each: `texts`, or a conversation, or token ids. */
typedef struct t5g_sources {
    size_t size;
    size_t rows;
    const char *const *texts;         /* [rows] */
    const size_t *text_sizes;         /* [rows]; NULL: all end at their zero */
    const char *messages;             /* a conversation as for t5g_model_chat; rows is 1 */
    const int64_t *input_ids;         /* the tokens of all rows, one row after the other */
    const size_t *lengths;            /* [rows]: how many tokens each row has; NULL: `length` */
    size_t length;
    const int64_t *attention_mask;    /* [rows, length], 0 where a token takes no part; NULL: all do. Not with `lengths` */
    const char *const *decoder_texts; /* [rows], how the targets begin; NULL: as usual */
    const int64_t *decoder_input_ids; /* [rows, decoder_length], the same as tokens */
    size_t decoder_length;
    const float *encoder_outputs;     /* [rows, longest row, hidden_size], as t5g_model_encode gave them; NULL: computed */
    const size_t *decoder_text_sizes; /* [rows]; NULL: all end at their zero */
    /* How much there is where the above point, to be compared with what is read: T5G_ERROR_INPUT if it differs. 0: unchecked */
    size_t decoder_rows;        /* of decoder_texts or decoder_input_ids */
    size_t input_ids_size;      /* tokens in input_ids */
    size_t attention_mask_size; /* numbers in attention_mask */
    size_t encoder_rows;        /* of encoder_outputs, as t5g_states tells them */
    size_t encoder_length;
    size_t encoder_width;
} t5g_sources;

static inline t5g_sources t5g_sources_default(void) {
    t5g_sources sources;
    memset(&sources, 0, sizeof sources);
    sources.size = sizeof sources;
    return sources;
}

/* Hugging Face's generation options under their names and with their meanings; `t5gemma generate --help` explains each.
 * What is not given is the model's own setting. `json` takes the same and the rest (bad_words_ids, sequence_bias,
 * allowed_sequences, required_phrases) as an object; an option may be given in one of the two ways. */
typedef struct t5g_generation_options {
    size_t size;
    const char *json;
    int64_t max_new_tokens, max_length, min_new_tokens, min_length;
    int64_t num_beams, num_return_sequences;
    int64_t do_sample; /* 0 or 1, as all that are true or false */
    int64_t seed;
    double temperature;
    int64_t top_k;
    double top_p, min_p, top_h, top_n_sigma, typical_p, epsilon_cutoff, eta_cutoff;
    int64_t num_beam_groups;
    double diversity_penalty, length_penalty;
    int64_t early_stopping; /* 0, 1, or 2 for "never" */
    double repetition_penalty, encoder_repetition_penalty, frequency_penalty, presence_penalty;
    int64_t no_repeat_ngram_size, encoder_no_repeat_ngram_size;
    double max_time;
    int64_t return_alternatives, renormalize_logits, remove_invalid_values;
    int64_t output_logprobs, top_logprobs;
    int64_t prompt_lookup_num_tokens, max_matching_ngram_size;
    int64_t decoder_start_token_id, bos_token_id, pad_token_id, forced_bos_token_id;
    const int64_t *eos_token_id;
    size_t eos_token_id_count;
    const int64_t *forced_eos_token_id;
    size_t forced_eos_token_id_count;
    const int64_t *suppress_tokens;
    size_t suppress_tokens_count;
    const int64_t *begin_suppress_tokens;
    size_t begin_suppress_tokens_count;
    int64_t exponential_decay_start; /* with the next, exponential_decay_length_penalty */
    double exponential_decay_factor;
    const char *const *stop_strings; /* each ending at its zero */
    size_t stop_strings_count;
    const char *json_schema, *regex, *grammar;
    double coverage_penalty, patience;
    int64_t output_attentions;
} t5g_generation_options;

static inline t5g_generation_options t5g_generation_options_default(void) {
    t5g_generation_options o;
    memset(&o, 0, sizeof o);
    o.size = sizeof o;
    o.max_new_tokens = o.max_length = o.min_new_tokens = o.min_length = T5G_UNSET;
    o.num_beams = o.num_return_sequences = o.do_sample = o.seed = o.top_k = T5G_UNSET;
    o.num_beam_groups = o.early_stopping = o.no_repeat_ngram_size = o.encoder_no_repeat_ngram_size = T5G_UNSET;
    o.return_alternatives = o.renormalize_logits = o.remove_invalid_values = T5G_UNSET;
    o.output_logprobs = o.top_logprobs = o.prompt_lookup_num_tokens = o.max_matching_ngram_size = T5G_UNSET;
    o.decoder_start_token_id = o.bos_token_id = o.pad_token_id = o.forced_bos_token_id = T5G_UNSET;
    o.exponential_decay_start = o.output_attentions = T5G_UNSET;
    o.temperature = o.top_p = o.min_p = o.top_h = o.top_n_sigma = o.typical_p = T5G_UNSET_NUMBER;
    o.epsilon_cutoff = o.eta_cutoff = o.diversity_penalty = o.length_penalty = T5G_UNSET_NUMBER;
    o.repetition_penalty = o.encoder_repetition_penalty = o.coverage_penalty = o.patience = T5G_UNSET_NUMBER;
    o.frequency_penalty = o.presence_penalty = o.max_time = o.exponential_decay_factor = T5G_UNSET_NUMBER;
    return o;
}

/* Tokens and text of a row's first hypothesis as they become certain: with beams, what all of them agree on. */
typedef struct t5g_piece {
    size_t size;
    size_t row;
    int64_t token;    /* -1 with the last piece of a row's text, if there is one */
    const char *text; /* whole characters, possibly none; NULL without t5g_call.stream_text */
    size_t text_size;
} t5g_piece;

/* Where scores belong. */
typedef struct t5g_position {
    size_t size;
    const int64_t *source;
    size_t source_length;
    const int64_t *target; /* prompt and generated tokens so far */
    size_t target_length;
    size_t prompt_length; /* how many of these are the prompt */
} t5g_position;

/* What concerns one call only. Callbacks return 0 to go on; anything else ends the call with T5G_ERROR_CANCELLED. They are
 * given `user`, and must return: no longjmp, no C++ exception (t5gemma.hpp carries those past). What they are shown lives
 * until they return. A callback that a function would never call is refused. */
typedef struct t5g_call {
    size_t size;
    void *user;
    t5g_cancellation *cancellation; /* NULL: none */
    double deadline_seconds;        /* from now; 0: none; below 0: it has passed. In contrast to max_time, nothing is returned */
    int64_t stream_text;            /* 1: pieces come with text */
    int32_t (*on_piece)(void *user, const t5g_piece *piece);
    int32_t (*on_step)(void *user); /* all rows have chosen what a step brings them; what only encodes is one step */
    /* Changes the next token's scores, one for each of the target's vocabulary: logits, or log-probabilities with beams;
     * -INFINITY forbids; NaN, +INFINITY, and -INFINITY for all are T5G_ERROR_NOT_FINITE. It must depend on nothing but its
     * arguments. */
    void (*logits_processor)(void *user, const t5g_position *position, float *scores, size_t count);
    /* Hugging Face's prefix_allowed_tokens_fn: sets `*allowed` to the tokens that may follow, which have to live until it
     * is called again on the same thread or the call ends, and returns how many they are: none, or one that the vocabulary does
     * not have, is T5G_ERROR_CONSTRAINT. */
    size_t (*prefix_allowed_tokens)(void *user, size_t row, const int64_t *target, size_t length, const int64_t **allowed);
} t5g_call;

static inline t5g_call t5g_call_default(void) {
    t5g_call call;
    memset(&call, 0, sizeof call);
    call.size = sizeof call;
    return call;
}

/* Stops the calls that it is given to, from any thread, once and for all. */
t5g_error *t5g_cancellation_new(t5g_cancellation **cancellation);
t5g_error *t5g_cancellation_cancel(t5g_cancellation *cancellation);
/* 1 if it was used, 0 if not, -1 if it is no cancellation. */
int32_t t5g_cancellation_is_cancelled(const t5g_cancellation *cancellation);
t5g_code t5g_cancellation_free(t5g_cancellation *cancellation);


/* ---- Generating and scoring ---- */

/* Generates targets for each source. `options` and `call` may be NULL. */
t5g_error *t5g_model_generate(const t5g_model *model, const t5g_sources *sources, const t5g_generation_options *options,
                              const t5g_call *call, t5g_result **result);

/* Generates a few tokens of random sources of usual sizes, so that the first request does not pay for what only a first run
 * takes time for. Of `call`, which may be NULL, cancellation, deadline and on_step count. */
t5g_error *t5g_model_warm_up(const t5g_model *model, const t5g_call *call);

/* Targets to score, one for each source. */
typedef struct t5g_targets {
    size_t size;
    const char *const *texts;  /* [rows], behind which the end token is scored too */
    const size_t *text_sizes;  /* [rows]; NULL: all end at their zero */
    const int64_t *target_ids; /* or the tokens of all rows, one row after the other */
    const size_t *lengths;     /* [rows]: how many each row has */
    int64_t without_end;       /* 1: no end token behind texts */
    int64_t output_attentions; /* 1: tell what the targets attend to, with a model exported with --alignment */
    size_t rows;               /* how many targets there are, to be compared with the sources; 0: unchecked */
    size_t target_ids_size;    /* how many tokens target_ids has, to be compared with lengths; 0: unchecked */
} t5g_targets;

static inline t5g_targets t5g_targets_default(void) {
    t5g_targets targets;
    memset(&targets, 0, sizeof targets);
    targets.size = sizeof targets;
    return targets;
}

/* How likely targets are: a result with one hypothesis for each source, which has log-probabilities, and those of the
 * `top_logprobs` likeliest tokens at each place. Of `call`, which may be NULL, cancellation, deadline and on_step count. */
t5g_error *t5g_model_score(const t5g_model *model, const t5g_sources *sources, const t5g_targets *targets,
                           size_t top_logprobs, const t5g_call *call, t5g_result **result);

enum {
    T5G_FINISH_NONE = 0, /* a target that was scored */
    T5G_FINISH_EOS = 1,
    T5G_FINISH_LENGTH = 2,
    T5G_FINISH_STOP_STRING = 3,
    T5G_FINISH_TIME = 4,
    T5G_FINISH_CONSTRAINT = 5,
    T5G_FINISH_CONSTRAINT_INCOMPLETE = 6
};

/* A target, generated or scored. Its pointers live as long as the result. */
typedef struct t5g_hypothesis {
    size_t size;             /* set by the caller */
    const int64_t *tokens;   /* without prompt and padding, with the end token if there is one */
    size_t token_count;
    int64_t finish_reason;
    double score;            /* of beam search: sequences_scores; NAN elsewhere */
    double logprob;          /* of the whole target, with output_logprobs; NAN without */
    double perplexity;       /* the same */
    const float *logprobs;   /* [token_count], before any processing; NULL without output_logprobs */
    size_t top_count;        /* how many of the likeliest tokens at each place follow */
    const int64_t *top_tokens; /* [token_count, top_count], best first */
    const float *top_logprobs; /* [token_count, top_count] */
    size_t source_length;      /* how many tokens the source has, with padding of its own; 0 without output_attentions */
    const float *cross_attentions; /* [token_count, source_length]: how much each token attended to each of the source, the
                                    * mean over heads and the layers of the export; NULL without output_attentions */
} t5g_hypothesis;

static inline t5g_hypothesis t5g_hypothesis_default(void) {
    t5g_hypothesis hypothesis;
    memset(&hypothesis, 0, sizeof hypothesis);
    hypothesis.size = sizeof hypothesis;
    return hypothesis;
}

/* How many sources a result answers; 0 if it is no result. */
size_t t5g_result_rows(const t5g_result *result);
/* How many hypotheses a row has, best first; 0 if there is no such row. */
size_t t5g_result_count(const t5g_result *result, size_t row);
/* Fills in a hypothesis whose size is set. */
t5g_error *t5g_result_get(const t5g_result *result, size_t row, size_t index, t5g_hypothesis *hypothesis);
/* The text of a hypothesis, which lives as long as the result, without special tokens. `size` may be NULL. */
t5g_error *t5g_result_text(const t5g_result *result, size_t row, size_t index, const char **text, size_t *size);
/* The result as `t5gemma generate --jsonl` writes it: {"sequences": ..., "seed", "usage"}. */
t5g_error *t5g_result_json(const t5g_result *result, t5g_text **json);
t5g_code t5g_result_free(t5g_result *result);


/* ---- The engine: many requests in one batch ---- */

/* Its bounds, of rows and bytes for each device, at least 1; T5G_UNSET leaves those of the library. */
typedef struct t5g_engine_options {
    size_t size;
    int64_t max_rows;    /* target rows in flight: the beams or samples of all sources together */
    int64_t max_bytes;   /* what keys, values and logits of the rows in flight may come to need */
    int64_t max_waiting; /* requests that wait for all of their rows to be admitted */
    const int64_t *devices; /* [device_count]: the numbers of the GPUs to compute on, each with a copy of the model. That on the
                               model's own device is the model itself, once; the others are opened as it was, which takes as long */
    size_t device_count;    /* 0: the model's own device alone */
} t5g_engine_options;

static inline t5g_engine_options t5g_engine_options_default(void) {
    t5g_engine_options options;
    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    options.max_rows = options.max_bytes = options.max_waiting = T5G_UNSET;
    return options;
}

/* Starts a thread that generates for many requests at once: rows join between two steps and leave when they are finished, and
 * each gets what t5g_model_generate gives it alone. Best with models exported for --target cpu, whose rows share every
 * step. `options` may be NULL. Of several devices each has a thread, and all take rows from one line in the order of arrival, as
 * soon as they have room. */
t5g_error *t5g_engine_new(const t5g_model *model, const t5g_engine_options *options, t5g_engine **engine);

/* Submits sources, to be polled. `options` and `call` may be NULL; of the callbacks of `call` only those that change scores may
 * be given. They come on the engine's threads, for one row at a time on each, until the caller has been told the request's end
 * or has freed it. Its cancellation and deadline hold while the request waits, too; one whose deadline has passed is taken, and
 * fails by it. T5G_ERROR_FULL, T5G_ERROR_TOO_LARGE, T5G_ERROR_CLOSED and, with a cancellation that was used,
 * T5G_ERROR_CANCELLED refuse it. */
t5g_error *t5g_engine_submit(const t5g_engine *engine, const t5g_sources *sources, const t5g_generation_options *options,
                             const t5g_call *call, t5g_request **request);

enum {
    T5G_EVENT_NONE = 0,  /* nothing happened in that time */
    T5G_EVENT_PIECE = 1, /* a token of a row, or with token -1 the last of its text */
    T5G_EVENT_ROW = 2,   /* a row is finished */
    T5G_EVENT_END = 3    /* all are, and everything has been told */
};

typedef struct t5g_event {
    size_t size; /* set by the caller */
    int64_t kind;
    size_t row;
    int64_t token;
    const char *text; /* with t5g_call.stream_text, else NULL; lives until the next call with the request */
    size_t text_size;
} t5g_event;

static inline t5g_event t5g_event_default(void) {
    t5g_event event;
    memset(&event, 0, sizeof event);
    event.size = sizeof event;
    return event;
}

/* Waits up to `seconds` for what happens next to a request; fails if it failed. */
t5g_error *t5g_request_poll(t5g_request *request, double seconds, t5g_event *event);
/* Waits until a request has ended, passing over events, and gives its result, each time anew. */
t5g_error *t5g_request_result(t5g_request *request, t5g_result **result);
/* Ends a request, from any thread: it fails with T5G_ERROR_CANCELLED, unless it is done before. */
t5g_error *t5g_request_cancel(const t5g_request *request);
/* Frees a request, which is cancelled if it has not ended. */
t5g_code t5g_request_free(t5g_request *request);

/* Is given a result or an error, which are then the caller's to free. */
typedef void (*t5g_done)(void *user, t5g_result *result, t5g_error *error);

/* Submits sources, to be told of: pieces and in the end, exactly once, `done` come on a thread of the request's own, with
 * t5g_call.user; on_step is refused. Callbacks that change scores come as with t5g_engine_submit, and not any more when `done`
 * does. If this fails, `done` is not called. */
t5g_error *t5g_engine_call(const t5g_engine *engine, const t5g_sources *sources, const t5g_generation_options *options,
                           const t5g_call *call, t5g_done done);

typedef struct t5g_engine_counts {
    size_t size;             /* set by the caller */
    uint64_t submitted;      /* requests that were taken */
    uint64_t finished;       /* of them, those that were answered */
    uint64_t failed;         /* of them, those that ended with an error */
    size_t waiting_requests; /* requests of which a source has not been admitted */
    size_t waiting_sources;
    size_t sources;          /* in flight */
    size_t rows;             /* target rows in flight */
    size_t planned_bytes;    /* what these may come to need, as max_bytes counts */
    uint64_t steps;          /* runs of a decoder graph so far */
    uint64_t stepped_rows;   /* target rows in all of them together */
    size_t max_rows;         /* the bounds in force */
    size_t max_bytes;
    size_t max_waiting;
    size_t copies;           /* of the model: one for each device */
} t5g_engine_counts;

static inline t5g_engine_counts t5g_engine_counts_default(void) {
    t5g_engine_counts counts;
    memset(&counts, 0, sizeof counts);
    counts.size = sizeof counts;
    return counts;
}

t5g_error *t5g_engine_stats(const t5g_engine *engine, t5g_engine_counts *counts);
/* The same with what one copy of the model has in flight and its steps; the requests and sources that wait are those of all. */
t5g_error *t5g_engine_stats_of_copy(const t5g_engine *engine, size_t copy, t5g_engine_counts *counts);

/* Takes no more requests, and waits until all that were taken have ended; what t5g_engine_stats tells then is final. Callbacks
 * that change scores come on the engine's threads, where this and t5g_engine_shutdown are refused: they would wait for themselves. */
t5g_error *t5g_engine_drain(const t5g_engine *engine);
/* Ends everything at once: requests that are not done fail with T5G_ERROR_CANCELLED or T5G_ERROR_CLOSED. */
t5g_error *t5g_engine_shutdown(const t5g_engine *engine);
/* Shuts it down and frees it; in a callback that changes scores, without waiting for the end. */
t5g_code t5g_engine_free(t5g_engine *engine);


/* ---- Hidden states, vectors, labels ---- */

/* Numbers in a buffer of the caller's. With `values` NULL a call computes nothing and only tells the sizes. */
typedef struct t5g_states {
    size_t size;             /* set by the caller, as the next four */
    float *values;
    size_t capacity;         /* how many numbers there is room for */
    int64_t *attention_mask; /* gets [rows, length], 1 where a token takes part; NULL: not wanted */
    size_t mask_capacity;
    size_t rows;             /* set by the call: the shape of `values`, [rows, length, width] */
    size_t length;           /* 1 where there is one vector for each source */
    size_t width;
    size_t mask_length;      /* set by the call: the tokens of a row, padding included */
} t5g_states;

static inline t5g_states t5g_states_default(void) {
    t5g_states states;
    memset(&states, 0, sizeof states);
    states.size = sizeof states;
    return states;
}

/* The encoder's last hidden states, [rows, length, hidden_size]; those of padding mean nothing. */
t5g_error *t5g_model_encode(const t5g_model *model, const t5g_sources *sources, const t5g_call *call, t5g_states *states);

/* Opens a folder's encoder alone, or the only graph of a model that was exported for another task than generation. */
t5g_error *t5g_encoder_open(const char *path, const t5g_open_options *options, t5g_encoder **encoder);
t5g_error *t5g_encoder_describe(const t5g_encoder *encoder, t5g_text **json);
t5g_error *t5g_encoder_tokenizer(const t5g_encoder *encoder, t5g_tokenizer **tokenizer);

enum { T5G_POOLING_NONE = 0, T5G_POOLING_MEAN = 1, T5G_POOLING_FIRST = 2, T5G_POOLING_LAST = 3 };

/* Hidden states, [rows, length, hidden_size], or with a pooling one vector for each source, [rows, 1, hidden_size], of
 * Euclidean length 1 if `normalize` is 1. */
t5g_error *t5g_encoder_encode(const t5g_encoder *encoder, const t5g_sources *sources, int32_t pooling, int32_t normalize,
                              const t5g_call *call, t5g_states *states);

enum { T5G_SCORES_DEFAULT = 0, T5G_SCORES_NONE = 1, T5G_SCORES_SIGMOID = 2, T5G_SCORES_SOFTMAX = 3 };

/* The scores of a classifier's labels, [rows, 1, labels], or of each token's, [rows, length, labels]. `function` makes
 * scores of logits; T5G_SCORES_DEFAULT is as transformers' pipelines choose. The labels' names are in t5g_encoder_describe. */
t5g_error *t5g_encoder_classify(const t5g_encoder *encoder, const t5g_sources *sources, int32_t function,
                                const t5g_call *call, t5g_states *scores);
t5g_code t5g_encoder_free(t5g_encoder *encoder);


/* ---- Tokenizer ---- */

/* Reads a tokenizer.json; needs no ONNX Runtime. */
t5g_error *t5g_tokenizer_open(const char *path, t5g_tokenizer **tokenizer);

enum {
    T5G_TEXT_SOURCE = 0, /* with the special tokens that the tokenizer puts around a source */
    T5G_TEXT_TARGET = 1  /* without any */
};

t5g_error *t5g_tokenizer_encode(const t5g_tokenizer *tokenizer, const char *text, size_t size, int32_t kind,
                                t5g_tokens **tokens);
/* The text of tokens, without special tokens or, if `special` is 1, with them. */
t5g_error *t5g_tokenizer_decode(const t5g_tokenizer *tokenizer, const int64_t *tokens, size_t count, int32_t special,
                                t5g_text **text);
/* The piece of the vocabulary that an id stands for; empty if there is none. */
t5g_error *t5g_tokenizer_token(const t5g_tokenizer *tokenizer, int64_t token, t5g_text **piece);
t5g_code t5g_tokenizer_free(t5g_tokenizer *tokenizer);

/* Makes text of tokens that come one by one; for one thread at a time. */
t5g_error *t5g_stream_new(const t5g_tokenizer *tokenizer, int32_t special, t5g_stream **stream);
/* Gives the text that a token settles, which may be empty and lives until the next call. `size` may be NULL. */
t5g_error *t5g_stream_push(t5g_stream *stream, int64_t token, const char **text, size_t *size);
/* Gives the text of tokens that waited for more, after which the stream begins anew. */
t5g_error *t5g_stream_finish(t5g_stream *stream, const char **text, size_t *size);
t5g_code t5g_stream_free(t5g_stream *stream);

#ifdef __cplusplus
}
#endif
#endif
