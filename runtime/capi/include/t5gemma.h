/* t5gemma.h: T5Gemma models from C11. t5gemma.hpp is the C++17 interface on top of it.
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
 * Runtime is not linked: it is loaded when the first model is opened, from t5g_open_options.library if that is set, or
 * else from the first of: the environment variable ORT_DYLIB_PATH, the folder of libt5gemma, the folder of the program,
 * .cache/onnxruntime/lib in the working directory or in a folder above it, ~/.local/share/t5gemma. A process has one
 * ONNX Runtime.
 *
 * ERRORS. Fallible functions return an error, which the caller frees, or NULL on success. Outputs are the last
 * arguments, are required unless the function says otherwise, and are not touched on failure. Invalid arguments are
 * errors, not crashes: NULL for a required pointer, a handle that was freed or has another type, a wrong size field, a
 * number outside of its enum, and text that is not UTF-8 give T5G_ERROR_ARGUMENT or T5G_ERROR_HANDLE, which name the
 * argument. A bug of the library gives T5G_ERROR_INTERNAL, after which the objects that took part in the call refuse
 * further calls. The library cannot check that a pointer and a length describe valid memory.
 *
 * LIFETIMES. A handle (t5g_model *, t5g_result *, ...) is an opaque id, not an address; ids are never reused. Each
 * belongs to the caller and has a _free function, which ignores NULL and returns T5G_ERROR_HANDLE for a handle that was
 * freed before. Functions copy what they need of their arguments before they return. Pointers returned by a function
 * (the text of t5g_text_data, the tokens of a hypothesis) are valid until the handle they came from is freed. A handle
 * may be freed while another thread is in a call with it: the call finishes, then the object is destroyed. A result
 * keeps its model alive. dlclose does not unload the library, because ONNX Runtime's threads and environment outlive
 * every model; loading it again costs and leaks nothing.
 *
 * THREADS. Every function may be called from any thread at any time, and several threads may use one object at once,
 * except for t5g_stream and t5g_request: these are for one thread at a time, and a second one gets T5G_ERROR_BUSY. A
 * model runs each of its graphs for one call at a time, so calls from several threads take turns; with t5g_engine they
 * share steps. Callbacks run on the calling thread and may call this library, except for those of t5g_engine_submit and
 * t5g_engine_call and log messages, whose threads are described there.
 *
 * FORK. A forked process has none of its parent's threads. In the child, t5g_engine_new makes engines that work; with
 * an engine of the parent and its requests, everything but freeing fails at once with T5G_ERROR_CLOSED, and callbacks
 * of t5g_engine_call do not run. After a fork during a call of any thread, the objects of that call fail in the child at
 * once with T5G_ERROR_CLOSED, and so do all models and encoders opened before if it was a model's call; a request of an
 * engine counts as a call until it has ended and the engine is drained. Models that the child opens work. After other
 * forks, models opened before can be used too; ONNX Runtime's own threads are missing, so their calls compute with one
 * thread. It is better to fork before the first model is opened, or to exec.
 *
 * STRUCTS. The first field of each struct is its size, so that structs can grow: t5g_..._default() sets it, and
 * everything else to "unset". All fields are 8 bytes wide. A program runs with every library of the same T5G_ABI_MAJOR,
 * including older ones as long as it sets no field that they lack.
 *
 * TEXT is UTF-8. Where a text has a size argument, T5G_ZERO_TERMINATED is accepted too. Texts returned by the library
 * have a size and end with a zero. */
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
#define T5G_ABI_MINOR 5

/* The size of a zero-terminated text. */
#define T5G_ZERO_TERMINATED SIZE_MAX
/* An unset integer: the model's own setting or the default applies. An unset floating-point number is NAN. */
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

/* The number of live handles of the process, errors included; 0 at the end of a program without leaks. */
size_t t5g_live_handles(void);


/* ---- Errors ---- */

typedef int32_t t5g_code;
enum {
    T5G_OK = 0,
    T5G_ERROR_ARGUMENT = 1,     /* an argument that this header does not allow */
    T5G_ERROR_HANDLE = 2,       /* a handle that was freed, or has another type */
    T5G_ERROR_BUSY = 3,         /* an object that another thread is using */
    T5G_ERROR_BUFFER = 4,       /* the caller's buffer is too small */
    T5G_ERROR_LIBRARY = 5,      /* no usable ONNX Runtime; the message says how to get one */
    T5G_ERROR_FILE = 6,         /* a file that cannot be read or has the wrong format */
    T5G_ERROR_MODEL = 7,        /* an inconsistent model folder, or one for another task */
    T5G_ERROR_UNSUPPORTED = 8,  /* a valid model that this machine or version does not support */
    T5G_ERROR_TOKENIZER = 9,    /* text for a model without a usable tokenizer */
    T5G_ERROR_INPUT = 10,       /* invalid sources, targets or lengths */
    T5G_ERROR_OPTIONS = 11,     /* an invalid generation option */
    T5G_ERROR_CONSTRAINT = 12,  /* a constraint failed, such as a grammar that became too complex */
    T5G_ERROR_NOT_FINITE = 13,  /* NaN or infinite scores, from the model or a logits_processor */
    T5G_ERROR_ONNXRUNTIME = 14, /* ONNX Runtime failed */
    T5G_ERROR_CANCELLED = 15,   /* the call was cancelled, or a callback asked to stop */
    T5G_ERROR_DEADLINE = 16,    /* t5g_call.deadline_seconds has passed */
    T5G_ERROR_INTERNAL = 17,    /* a bug of the library */
    T5G_ERROR_TOO_LARGE = 18,   /* a request beyond the limits of the engine */
    T5G_ERROR_FULL = 19,        /* the waiting queue of the engine is full */
    T5G_ERROR_CLOSED = 20       /* an engine that accepts no more requests, or of the parent process */
};

/* The code of an error; T5G_ERROR_HANDLE if the handle is not an error. */
t5g_code t5g_error_code(const t5g_error *error);

/* The message: what was expected and what was found. Never NULL. */
const char *t5g_error_message(const t5g_error *error);

/* The argument, option or part of the input at fault, such as "num_beams" or "input_ids[1][3]"; NULL if there is
 * none. */
const char *t5g_error_field(const t5g_error *error);

/* With T5G_ERROR_FULL, in how many seconds the requests that wait now will have been admitted, so that the caller can
 * try again then; 0 for other errors. */
double t5g_error_retry_after(const t5g_error *error);

t5g_code t5g_error_free(t5g_error *error);


/* ---- Texts and tokens returned by the library ---- */

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

/* Sets the function that receives ONNX Runtime's messages of at least `severity`, from any thread; NULL for none.
 * Messages below T5G_SEVERITY_WARNING require that this is called before the first model is opened. `log` may still be
 * called shortly after it was replaced. */
t5g_error *t5g_log_set(t5g_severity severity, t5g_log log, void *user);

/* The last 64 messages of ONNX Runtime and its providers, warnings and above, one per line, oldest first. */
t5g_error *t5g_log_recent(t5g_text **text);

/* Loads ONNX Runtime if it is not loaded (from `library`, or NULL to search) and reports where it was searched for, as
 * JSON: {"places": [{"why", "path", "found"}...], "library": {"path", "build", "providers"} or null, "error": text or
 * null}. It fails only for invalid arguments. */
t5g_error *t5g_onnxruntime_report(const char *library, t5g_text **json);


/* ---- Opening a model ---- */

typedef struct t5g_open_options {
    size_t size;
    const char *library;         /* the file of ONNX Runtime; NULL: search */
    const char *provider;        /* "cpu", "cuda", "tensorrt" or "nv-tensorrt-rtx"; NULL: "cpu" */
    int64_t device;              /* the GPU index; T5G_UNSET: 0 */
    int64_t threads;             /* T5G_UNSET: one per core */
    int64_t check_weights;       /* 1: check the hash of the weights file */
    int64_t encoder_cache_bytes; /* size of the cache of encoder outputs, for repeated sources; 0: no cache */
    /* The options above by the same names, each in one place, and more: "provider_options", an object of provider
     * options by their ONNX Runtime names; "engines", the folder with the engines of the model's serving plan;
     * "max_sources", "max_tokens" (source tokens) and "max_bytes", limits for what one call runs at a time (its rows
     * run in pieces that fit; the default on the CPU is 4 GiB); "max_source_bytes", the estimated memory beyond which a
     * source is refused (the default on the CPU is what the machine or control group has). NULL: none */
    const char *json;
} t5g_open_options;

static inline t5g_open_options t5g_open_options_default(void) {
    t5g_open_options options;
    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    options.device = options.threads = options.check_weights = options.encoder_cache_bytes = T5G_UNSET;
    return options;
}

/* Opens a model folder written by t5gemma-export, for generation. `options` may be NULL. Opening verifies the
 * files against the manifest; they must not change while the model is open. */
t5g_error *t5g_model_open(const char *path, const t5g_open_options *options, t5g_model **model);

/* The folder's manifest, configuration and default generation options, as JSON: {"path", "task", "target", "dtype",
 * "parameters", "exporter", "source_vocab_size", "target_vocab_size", "hidden_size", "max_source_length",
 * "max_target_length", "decoder_start_token_id", "eos_token_id", "pad_token_id", "labels", "elsewhere"}; "elsewhere"
 * lists the operators that run on another provider than the selected one. */
t5g_error *t5g_model_describe(const t5g_model *model, t5g_text **json);

/* The model's tokenizer, loaded on the first use. */
t5g_error *t5g_model_tokenizer(const t5g_model *model, t5g_tokenizer **tokenizer);

/* Formats a conversation with the model's chat template: the text that an instruction-tuned model continues. `messages`
 * is a JSON list of {"role", "content"}. */
t5g_error *t5g_model_chat(const t5g_model *model, const char *messages, t5g_text **text);

/* Loads the PEFT LoRA adapter in `folder` (adapter_config.json and adapter_model.safetensors) as `name`, which calls can
 * then choose. The model must be exported with `t5gemma-export --lora-inputs RANK`. T5G_ERROR_INPUT if a loaded adapter
 * has the name; T5G_ERROR_FILE for a folder that cannot be read, or an adapter of another base model, of a greater rank,
 * or that changes more than linear layers. An engine uses the adapters of the model that it was created with. */
t5g_error *t5g_model_load_adapter(const t5g_model *model, const char *name, const char *folder);

/* Unloads an adapter. Calls and requests that use it already are not disturbed. */
t5g_error *t5g_model_unload_adapter(const t5g_model *model, const char *name);

/* The names of the loaded adapters: a JSON list of strings. */
t5g_error *t5g_model_adapters(const t5g_model *model, t5g_text **json);

t5g_code t5g_model_free(t5g_model *model);


/* ---- Arguments of calls ---- */

/* The sources of a call, one per row: texts, a conversation, or token ids. */
typedef struct t5g_sources {
    size_t size;
    size_t rows;
    const char *const *texts;         /* [rows] */
    const size_t *text_sizes;         /* [rows]; NULL: zero-terminated */
    const char *messages;             /* a conversation as for t5g_model_chat; rows is 1 */
    const int64_t *input_ids;         /* the token ids of all rows, concatenated */
    const size_t *lengths;            /* [rows]: the length of each row; NULL: `length` */
    size_t length;
    const int64_t *attention_mask;    /* [rows, length], 0 for padding; NULL: no padding. Not with `lengths` */
    const char *const *decoder_texts; /* [rows], the beginnings of the targets; NULL: none */
    const int64_t *decoder_input_ids; /* [rows, decoder_length], the same as token ids */
    size_t decoder_length;
    const float *encoder_outputs;     /* [rows, longest row, hidden_size], from t5g_model_encode; NULL: computed */
    const size_t *decoder_text_sizes; /* [rows]; NULL: zero-terminated */
    /* The sizes of the arrays above, for a check against what will be read: T5G_ERROR_INPUT if they differ. 0: not
     * checked */
    size_t decoder_rows;        /* of decoder_texts or decoder_input_ids */
    size_t input_ids_size;      /* tokens in input_ids */
    size_t attention_mask_size; /* numbers in attention_mask */
    size_t encoder_rows;        /* of encoder_outputs, as in t5g_states */
    size_t encoder_length;
    size_t encoder_width;
    const char *adapter; /* the name of the LoRA adapter of all rows; NULL: none. As t5g_generation_options.adapter */
    const int64_t *progress_totals; /* [rows], for models whose positions depend on it: the expected length of each target
                                     * in tokens, the start token included; NULL: none */
    size_t progress_rows;           /* of progress_totals; 0: not checked */
    /* Images, for models that read them. In a text, each start-of-image token (`<start_of_image>`) stands for one of its
     * row's; a text of no characters is one of nothing but the images. input_ids have the image tokens themselves */
    const uint8_t *const *images; /* [images_count], of all rows in their order: JPEG, PNG or WebP files; NULL: none */
    const size_t *image_sizes;    /* [images_count]: bytes of each */
    const size_t *image_widths;   /* [images_count]: 0 for a file, or the width of rows of red, green and blue, a byte
                                   * each; NULL: files */
    const size_t *image_counts;   /* [rows]: images of each row; NULL: rows is 1 */
    size_t images_count;
    const float *pixel_values;    /* exact numbers instead, for the image tokens of input_ids: [images, 3, size, size] */
    size_t pixel_values_size;     /* numbers in pixel_values */
    int64_t pan_and_scan; /* whether crops follow images that are much wider than high or the reverse: 0 as the model's
                           * settings say, 1 yes, 2 no */
} t5g_sources;

static inline t5g_sources t5g_sources_default(void) {
    t5g_sources sources;
    memset(&sources, 0, sizeof sources);
    sources.size = sizeof sources;
    return sources;
}

/* Generation options with their Hugging Face names and meanings; `t5gemma generate --help` describes each. Unset
 * options have the model's own setting. `json` is an object with the same options and the remaining ones
 * (bad_words_ids, sequence_bias, allowed_sequences, required_phrases, eos_on_argmax); each option may be set in one of the two
 * places. */
typedef struct t5g_generation_options {
    size_t size;
    const char *json;
    int64_t max_new_tokens, max_length, min_new_tokens, min_length;
    int64_t num_beams, num_return_sequences;
    int64_t do_sample; /* 0 or 1, like all flags */
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
    int64_t exponential_decay_start; /* with the next field: exponential_decay_length_penalty */
    double exponential_decay_factor;
    const char *const *stop_strings; /* zero-terminated */
    size_t stop_strings_count;
    const char *json_schema, *regex, *grammar;
    double coverage_penalty, patience;
    int64_t output_attentions;
    const char *adapter; /* the name that the adapter was loaded under */
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

/* A token and text of a row's first hypothesis, once they are final; with beams: once all beams agree. */
typedef struct t5g_piece {
    size_t size;
    size_t row;
    int64_t token;    /* -1 for the last piece of a row's text */
    const char *text; /* whole characters, possibly empty; NULL without t5g_call.stream_text */
    size_t text_size;
} t5g_piece;

/* The position of scores in a target. */
typedef struct t5g_position {
    size_t size;
    const int64_t *source;
    size_t source_length;
    const int64_t *target; /* the prompt and the tokens generated so far */
    size_t target_length;
    size_t prompt_length; /* the length of the prompt */
} t5g_position;

/* Cancellation, deadline and callbacks of one call. Callbacks return 0 to continue; any other value ends the call with
 * T5G_ERROR_CANCELLED. They receive `user`, and must return normally: no longjmp, no C++ exception (t5gemma.hpp passes
 * those on). Their arguments are valid until they return. A callback that a function would never call is an error. */
typedef struct t5g_call {
    size_t size;
    void *user;
    t5g_cancellation *cancellation; /* NULL: none */
    double deadline_seconds;        /* from now; 0: none; negative: passed. Unlike with max_time, the call fails */
    int64_t stream_text;            /* 1: pieces have text */
    int32_t (*on_piece)(void *user, const t5g_piece *piece);
    int32_t (*on_step)(void *user); /* after each decoder step; calls that only encode have one step */
    /* Changes the scores of the next token in place, one for each token of the target vocabulary: logits, or
     * log-probabilities with beams. -INFINITY forbids a token; NaN, +INFINITY, and -INFINITY for all tokens give
     * T5G_ERROR_NOT_FINITE. The result must depend on the arguments only. */
    void (*logits_processor)(void *user, const t5g_position *position, float *scores, size_t count);
    /* Hugging Face's prefix_allowed_tokens_fn: sets `*allowed` to the token ids that may follow and returns their
     * number. The array has to stay valid until the next call on the same thread or the end of the call. An empty
     * array, or an id outside of the vocabulary, gives T5G_ERROR_CONSTRAINT. */
    size_t (*prefix_allowed_tokens)(void *user, size_t row, const int64_t *target, size_t length, const int64_t **allowed);
    /* Only for t5g_engine_call: a row has left the queue and is about to be encoded. */
    int32_t (*on_admitted)(void *user, size_t row);
    /* For requests of an engine, while they wait; other functions ignore these. The highest T5G_PRIORITY_... goes first,
     * and while it waits, a lower one gets one turn for every eight of the next higher one. Tenants (users or clients;
     * NULL is one too) with requests of one priority get equal shares, however many each submits. */
    int64_t priority;
    const char *tenant;
} t5g_call;

enum {
    T5G_PRIORITY_NORMAL = 0, /* the default */
    T5G_PRIORITY_HIGH = 1,
    T5G_PRIORITY_LOW = 2
};

static inline t5g_call t5g_call_default(void) {
    t5g_call call;
    memset(&call, 0, sizeof call);
    call.size = sizeof call;
    return call;
}

/* Cancels the calls that it was passed to, from any thread. It cannot be reset. */
t5g_error *t5g_cancellation_new(t5g_cancellation **cancellation);
t5g_error *t5g_cancellation_cancel(t5g_cancellation *cancellation);
/* 1 if it was cancelled, 0 if not, -1 if the handle is not a cancellation. */
int32_t t5g_cancellation_is_cancelled(const t5g_cancellation *cancellation);
t5g_code t5g_cancellation_free(t5g_cancellation *cancellation);


/* ---- Generating and scoring ---- */

/* Generates targets for each source. `options` and `call` may be NULL. */
t5g_error *t5g_model_generate(const t5g_model *model, const t5g_sources *sources, const t5g_generation_options *options,
                              const t5g_call *call, t5g_result **result);

/* Generates a few tokens for random sources of typical shapes, so that the first request does not take longer than
 * others. `call` may be NULL; its cancellation, deadline and on_step are used. */
t5g_error *t5g_model_warm_up(const t5g_model *model, const t5g_call *call);

/* Targets to score, one for each source. */
typedef struct t5g_targets {
    size_t size;
    const char *const *texts;  /* [rows]; the end token is appended and scored */
    const size_t *text_sizes;  /* [rows]; NULL: zero-terminated */
    const int64_t *target_ids; /* or the token ids of all rows, concatenated */
    const size_t *lengths;     /* [rows]: the length of each row */
    int64_t without_end;       /* 1: append no end token to texts */
    int64_t output_attentions; /* 1: return cross_attentions; requires a model exported with alignment */
    size_t rows;               /* the number of targets, for a check against the sources; 0: not checked */
    size_t target_ids_size;    /* the size of target_ids, for a check against lengths; 0: not checked */
} t5g_targets;

static inline t5g_targets t5g_targets_default(void) {
    t5g_targets targets;
    memset(&targets, 0, sizeof targets);
    targets.size = sizeof targets;
    return targets;
}

/* Scores given targets. The result has one hypothesis for each source, with the log-probabilities of its tokens and of
 * the `top_logprobs` most likely tokens at each position. `call` may be NULL; its cancellation, deadline and on_step are
 * used. */
t5g_error *t5g_model_score(const t5g_model *model, const t5g_sources *sources, const t5g_targets *targets,
                           size_t top_logprobs, const t5g_call *call, t5g_result **result);

enum {
    T5G_FINISH_NONE = 0, /* a scored target */
    T5G_FINISH_EOS = 1,
    T5G_FINISH_LENGTH = 2,
    T5G_FINISH_STOP_STRING = 3,
    T5G_FINISH_TIME = 4,
    T5G_FINISH_CONSTRAINT = 5,
    T5G_FINISH_CONSTRAINT_INCOMPLETE = 6
};

/* A generated or scored target. Its pointers are valid as long as the result. */
typedef struct t5g_hypothesis {
    size_t size;             /* set by the caller */
    const int64_t *tokens;   /* without prompt and padding, with the end token if there is one */
    size_t token_count;
    int64_t finish_reason;
    double score;            /* with beam search, Hugging Face's sequences_scores; else NAN */
    double logprob;          /* of the whole target, with output_logprobs; else NAN */
    double perplexity;       /* with output_logprobs; else NAN */
    const float *logprobs;   /* [token_count], before score processing; NULL without output_logprobs */
    size_t top_count;        /* the number of most likely tokens at each position */
    const int64_t *top_tokens; /* [token_count, top_count], best first */
    const float *top_logprobs; /* [token_count, top_count] */
    size_t source_length;      /* the number of source tokens as given, padding included; 0 without output_attentions */
    /* [token_count, source_length]: the attention of each token to each source token, the mean over heads and the
     * layers of the export; NULL without output_attentions */
    const float *cross_attentions;
} t5g_hypothesis;

static inline t5g_hypothesis t5g_hypothesis_default(void) {
    t5g_hypothesis hypothesis;
    memset(&hypothesis, 0, sizeof hypothesis);
    hypothesis.size = sizeof hypothesis;
    return hypothesis;
}

/* The number of sources; 0 if the handle is not a result. */
size_t t5g_result_rows(const t5g_result *result);
/* The number of hypotheses of a row, best first; 0 if there is no such row. */
size_t t5g_result_count(const t5g_result *result, size_t row);
/* Fills in a hypothesis, whose size the caller has set. */
t5g_error *t5g_result_get(const t5g_result *result, size_t row, size_t index, t5g_hypothesis *hypothesis);
/* The text of a hypothesis without special tokens, valid as long as the result. `size` may be NULL. */
t5g_error *t5g_result_text(const t5g_result *result, size_t row, size_t index, const char **text, size_t *size);
/* Times and counts of a result. Times are from the submission of a request to an engine, NaN for results of other
 * functions. */
typedef struct t5g_request_stats {
    size_t size;                /* set by the caller */
    double queued_seconds;      /* until the first source was admitted */
    double encoding_seconds;    /* encoding the sources, all together */
    double first_token_seconds; /* until the first token was final; NaN if there was none */
    double total_seconds;       /* until the end */
    size_t source_tokens;       /* without padding */
    size_t new_tokens;          /* of all hypotheses */
} t5g_request_stats;

static inline t5g_request_stats t5g_request_stats_default(void) {
    t5g_request_stats stats;
    memset(&stats, 0, sizeof stats);
    stats.size = sizeof stats;
    return stats;
}

t5g_error *t5g_result_stats(const t5g_result *result, t5g_request_stats *stats);
/* The result as JSON, as written by `t5gemma generate --jsonl`: {"sequences": ..., "seed", "usage"}. */
t5g_error *t5g_result_json(const t5g_result *result, t5g_text **json);
t5g_code t5g_result_free(t5g_result *result);


/* ---- The engine: continuous batching of many requests ---- */

/* The limits of an engine, at least 1; those of rows and bytes are for each device. T5G_UNSET: the library's
 * default. */
typedef struct t5g_engine_options {
    size_t size;
    int64_t max_rows;    /* target rows in flight: the beams or samples of all sources */
    int64_t max_bytes;   /* memory for keys, values and logits of the rows in flight */
    int64_t max_waiting; /* requests in the queue: those with a source that has not been admitted */
    /* [device_count]: the indices of the GPUs to run on, each with a copy of the model. One copy on the model's own
     * device is the model itself; the others are opened by t5g_engine_new, which takes as long as t5g_model_open */
    const int64_t *devices;
    size_t device_count;    /* 0: the model's own device only */
    /* More limits of the queue, unlimited by default: target rows, source tokens, and memory as counted by max_bytes
     * with each source alone */
    int64_t max_waiting_rows;
    int64_t max_waiting_tokens;
    int64_t max_waiting_bytes;
} t5g_engine_options;

static inline t5g_engine_options t5g_engine_options_default(void) {
    t5g_engine_options options;
    memset(&options, 0, sizeof options);
    options.size = sizeof options;
    options.max_rows = options.max_bytes = options.max_waiting = T5G_UNSET;
    options.max_waiting_rows = options.max_waiting_tokens = options.max_waiting_bytes = T5G_UNSET;
    return options;
}

/* Starts a thread that generates for many requests at once: rows join between two steps and leave when they are
 * finished, and each gets the same result as alone with t5g_model_generate. Best with models exported for the target
 * cpu, whose rows share every step. `options` may be NULL. With several devices, each has a thread, and all take rows
 * from one queue, as soon as they have room. */
t5g_error *t5g_engine_new(const t5g_model *model, const t5g_engine_options *options, t5g_engine **engine);

/* Submits a request, whose events the caller polls. `options` and `call` may be NULL. The only callbacks that `call`
 * may have are logits_processor and prefix_allowed_tokens. They run on the engine's threads, on each for one row at a
 * time, until the caller has received the end of the request or has freed it. The cancellation and the deadline also
 * apply while the request waits; a request whose deadline has passed is accepted and then fails. Requests are rejected
 * with T5G_ERROR_FULL, T5G_ERROR_TOO_LARGE, T5G_ERROR_CLOSED or, if already cancelled, T5G_ERROR_CANCELLED. */
t5g_error *t5g_engine_submit(const t5g_engine *engine, const t5g_sources *sources, const t5g_generation_options *options,
                             const t5g_call *call, t5g_request **request);

enum {
    T5G_EVENT_NONE = 0,  /* no event within the given time */
    T5G_EVENT_PIECE = 1, /* a token of a row, or with token -1 the rest of its text */
    T5G_EVENT_ROW = 2,   /* a row is finished */
    T5G_EVENT_END = 3    /* all rows are finished, and all events were returned */
};

typedef struct t5g_event {
    size_t size; /* set by the caller */
    int64_t kind;
    size_t row;
    int64_t token;
    const char *text; /* with t5g_call.stream_text, else NULL; valid until the next call with the request */
    size_t text_size;
} t5g_event;

static inline t5g_event t5g_event_default(void) {
    t5g_event event;
    memset(&event, 0, sizeof event);
    event.size = sizeof event;
    return event;
}

/* Waits up to `seconds` for the next event of a request; fails if the request failed. */
t5g_error *t5g_request_poll(t5g_request *request, double seconds, t5g_event *event);
/* Waits until a request has ended, skipping events, and returns a new handle of its result. */
t5g_error *t5g_request_result(t5g_request *request, t5g_result **result);
/* Cancels a request, from any thread: it fails with T5G_ERROR_CANCELLED unless it has ended before. */
t5g_error *t5g_request_cancel(const t5g_request *request);
/* Frees a request, and cancels it if it has not ended. */
t5g_code t5g_request_free(t5g_request *request);

/* Receives a result or an error, which the caller frees. */
typedef void (*t5g_done)(void *user, t5g_result *result, t5g_error *error);

/* Submits a request with callbacks: on_admitted, on_piece and finally, exactly once, `done` run on the engine's threads
 * between two steps, one at a time, with t5g_call.user; on_step is an error. They must not block, because all rows in
 * flight wait for them, and cannot wait for the engine (t5g_engine_drain, t5g_engine_shutdown); they may submit and
 * cancel requests. logits_processor and prefix_allowed_tokens run as with t5g_engine_submit, but never after `done` is
 * called. `done` may be called before this function returns. If this function fails, `done` is not called. */
t5g_error *t5g_engine_call(const t5g_engine *engine, const t5g_sources *sources, const t5g_generation_options *options,
                           const t5g_call *call, t5g_done done);

typedef struct t5g_engine_counts {
    size_t size;             /* set by the caller */
    uint64_t submitted;      /* requests accepted so far */
    uint64_t finished;       /* requests that succeeded */
    uint64_t failed;         /* requests that ended with an error */
    size_t waiting_requests; /* requests with a source that has not been admitted */
    size_t waiting_sources;
    size_t sources;          /* in flight */
    size_t rows;             /* target rows in flight */
    size_t planned_bytes;    /* memory for these, as counted by max_bytes */
    uint64_t steps;          /* decoder steps so far */
    uint64_t stepped_rows;   /* target rows of all steps */
    size_t max_rows;         /* the limits */
    size_t max_bytes;
    size_t max_waiting;
    size_t copies;           /* copies of the model, one for each device */
    size_t waiting_rows;     /* target rows that the waiting sources will have */
    size_t waiting_tokens;   /* tokens of the waiting sources */
    size_t waiting_bytes;    /* memory for these, as counted by max_waiting_bytes */
    uint64_t source_tokens;  /* tokens of all sources that were admitted */
    uint64_t new_tokens;     /* tokens of all hypotheses of the rows that were finished */
    double retry_after_seconds; /* as t5g_error_retry_after */
} t5g_engine_counts;

static inline t5g_engine_counts t5g_engine_counts_default(void) {
    t5g_engine_counts counts;
    memset(&counts, 0, sizeof counts);
    counts.size = sizeof counts;
    return counts;
}

t5g_error *t5g_engine_stats(const t5g_engine *engine, t5g_engine_counts *counts);
/* The same for one copy of the model: its rows in flight and its steps; the waiting requests and sources are those of
 * all copies. */
t5g_error *t5g_engine_stats_of_copy(const t5g_engine *engine, size_t copy, t5g_engine_counts *counts);

/* Stops accepting requests and waits until all accepted ones have ended; t5g_engine_stats is final then. This and
 * t5g_engine_shutdown fail in callbacks on the engine's threads (logits_processor, prefix_allowed_tokens, and those of
 * t5g_engine_call), which would wait for themselves. */
t5g_error *t5g_engine_drain(const t5g_engine *engine);
/* Stops the engine immediately: unfinished requests fail with T5G_ERROR_CANCELLED or T5G_ERROR_CLOSED. */
t5g_error *t5g_engine_shutdown(const t5g_engine *engine);
/* Shuts the engine down and frees it; called on one of its own threads, it does not wait for the end. */
t5g_code t5g_engine_free(t5g_engine *engine);


/* ---- Hidden states, embeddings, labels ---- */

/* Results in the caller's buffers. If `values` is NULL, a call computes nothing and only sets the sizes. */
typedef struct t5g_states {
    size_t size;             /* set by the caller, like the next four */
    float *values;
    size_t capacity;         /* the size of `values`, in numbers */
    int64_t *attention_mask; /* receives [rows, length], 0 for padding; NULL: not wanted */
    size_t mask_capacity;
    size_t rows;             /* set by the call: the shape of `values`, [rows, length, width] */
    size_t length;           /* 1 for one vector per source */
    size_t width;
    size_t mask_length;      /* set by the call: the length of a row, padding included */
} t5g_states;

static inline t5g_states t5g_states_default(void) {
    t5g_states states;
    memset(&states, 0, sizeof states);
    states.size = sizeof states;
    return states;
}

/* The last hidden states of the encoder, [rows, length, hidden_size]; those of padding are meaningless. */
t5g_error *t5g_model_encode(const t5g_model *model, const t5g_sources *sources, const t5g_call *call, t5g_states *states);

/* Opens the encoder of a model, or the only graph of a model that was not exported for generation. */
t5g_error *t5g_encoder_open(const char *path, const t5g_open_options *options, t5g_encoder **encoder);
/* As t5g_model_describe, without the keys of a decoder, and "pooling": the model's own, "none", "mean", "first" or
 * "last"; null for a classifier. */
t5g_error *t5g_encoder_describe(const t5g_encoder *encoder, t5g_text **json);
t5g_error *t5g_encoder_tokenizer(const t5g_encoder *encoder, t5g_tokenizer **tokenizer);

enum { T5G_POOLING_NONE = 0, T5G_POOLING_MEAN = 1, T5G_POOLING_FIRST = 2, T5G_POOLING_LAST = 3 };

/* Hidden states, [rows, length, hidden_size], or with pooling one vector per source, [rows, 1, hidden_size],
 * L2-normalized if `normalize` is 1. `length` includes the padding up to the fixed length of a model that was exported
 * with one; the mask has the same length. */
t5g_error *t5g_encoder_encode(const t5g_encoder *encoder, const t5g_sources *sources, int32_t pooling, int32_t normalize,
                              const t5g_call *call, t5g_states *states);

enum { T5G_SCORES_DEFAULT = 0, T5G_SCORES_NONE = 1, T5G_SCORES_SIGMOID = 2, T5G_SCORES_SOFTMAX = 3 };

/* The label scores of a classifier, [rows, 1, labels], or of each token, [rows, length, labels]. `function` is applied
 * to the logits; T5G_SCORES_DEFAULT is the choice of transformers' pipelines. t5g_encoder_describe returns the
 * labels. */
t5g_error *t5g_encoder_classify(const t5g_encoder *encoder, const t5g_sources *sources, int32_t function,
                                const t5g_call *call, t5g_states *scores);
t5g_code t5g_encoder_free(t5g_encoder *encoder);


/* ---- Tokenizer ---- */

/* Reads a tokenizer.json. Does not need ONNX Runtime. */
t5g_error *t5g_tokenizer_open(const char *path, t5g_tokenizer **tokenizer);

enum {
    T5G_TEXT_SOURCE = 0, /* with the special tokens that the tokenizer adds to a source */
    T5G_TEXT_TARGET = 1  /* without special tokens */
};

t5g_error *t5g_tokenizer_encode(const t5g_tokenizer *tokenizer, const char *text, size_t size, int32_t kind,
                                t5g_tokens **tokens);
/* The text of tokens, without special tokens, or with them if `special` is 1. */
t5g_error *t5g_tokenizer_decode(const t5g_tokenizer *tokenizer, const int64_t *tokens, size_t count, int32_t special,
                                t5g_text **text);
/* The vocabulary entry of a token id; empty if there is none. */
t5g_error *t5g_tokenizer_token(const t5g_tokenizer *tokenizer, int64_t token, t5g_text **piece);
t5g_code t5g_tokenizer_free(t5g_tokenizer *tokenizer);

/* Decodes tokens one by one; for one thread at a time. */
t5g_error *t5g_stream_new(const t5g_tokenizer *tokenizer, int32_t special, t5g_stream **stream);
/* Returns the text that became final with a token; it may be empty, and is valid until the next call. `size` may be
 * NULL. */
t5g_error *t5g_stream_push(t5g_stream *stream, int64_t token, const char **text, size_t *size);
/* Returns the rest of the text and resets the stream. */
t5g_error *t5g_stream_finish(t5g_stream *stream, const char **text, size_t *size);
t5g_code t5g_stream_free(t5g_stream *stream);

#ifdef __cplusplus
}
#endif
#endif
