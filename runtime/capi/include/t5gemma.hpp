// t5gemma.hpp: t5gemma.h for C++17. Header only; what each thing means is said there.
//
//     #include <iostream>
//     #include <t5gemma.hpp>
//
//     int main(int argc, char **argv) try {
//         auto model = t5g::Model::open(argv[1]);
//         t5g::GenerationOptions options;
//         options.num_beams = 4;
//         auto sources = t5g::Sources::texts({"Dr. Smith paid $3.50 on May 3, 2019.", "Prof. Lee lives in Boston."});
//         auto result = model.generate(sources, options);
//         for (std::size_t row = 0; row < result.rows(); row++) std::cout << result.text(row) << '\n';
//     } catch (const t5g::Error &error) {
//         std::cerr << error.what() << '\n';
//         return 1;
//     }
//
// Objects own their handles and can be moved. Failures are thrown as t5g::Error; with T5GEMMA_EXPECTED defined before this
// header, functions return t5g::Expected<T> instead, which holds a value or an Error, and nothing is thrown (also for
// -fno-exceptions). Callbacks are any callables; an exception that one throws ends the call and comes out of it. Spans and
// string_views point into the object that they were got from, nothing is copied.
#ifndef T5GEMMA_HPP
#define T5GEMMA_HPP

#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "t5gemma.h"

namespace t5g {

/// A view of numbers, for std::span to be made of where there is one.
template <class T>
class Span {
public:
    Span() = default;
    Span(T *data, std::size_t size) : data_(data), size_(size) {}
    T *data() const { return data_; }
    std::size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }
    T *begin() const { return data_; }
    T *end() const { return data_ + size_; }
    T &operator[](std::size_t at) const { return data_[at]; }

private:
    T *data_ = nullptr;
    std::size_t size_ = 0;
};

/// What went wrong: t5g_error as a value.
class Error : public std::runtime_error {
public:
    explicit Error(t5g_error *error)
        : std::runtime_error(t5g_error_message(error)), code_(t5g_error_code(error)) {
        if (const char *field = t5g_error_field(error)) field_ = field;
        t5g_error_free(error);
    }
    Error(t5g_code code, const std::string &message) : std::runtime_error(message), code_(code) {}

    t5g_code code() const { return code_; }
    /// Empty where there is none.
    const std::string &field() const { return field_; }

private:
    t5g_code code_;
    std::string field_;
};

/// A value, or the error in its place.
template <class T>
class Expected {
public:
    Expected(T value) : held_(std::in_place_index<0>, std::move(value)) {}
    Expected(Error error) : held_(std::in_place_index<1>, std::move(error)) {}
    explicit operator bool() const { return held_.index() == 0; }
    /// The value, which has to be there.
    T &operator*() & { return *std::get_if<0>(&held_); }
    T &&operator*() && { return std::move(*std::get_if<0>(&held_)); }
    T *operator->() { return std::get_if<0>(&held_); }
    /// The error, which has to be there.
    const Error &error() const { return *std::get_if<1>(&held_); }

private:
    std::variant<T, Error> held_;
};

template <>
class Expected<void> {
public:
    Expected() = default;
    Expected(Error error) : error_(std::move(error)) {}
    explicit operator bool() const { return !error_; }
    const Error &error() const { return *error_; }

private:
    std::optional<Error> error_;
};

#ifdef T5GEMMA_EXPECTED
template <class T>
using Returned = Expected<T>;
#else
template <class T>
using Returned = T;
#endif

namespace detail {

/// What a function returns: `make`'s value if there is no error.
template <class T, class Make>
Returned<T> returned(t5g_error *error, Make make) {
#ifdef T5GEMMA_EXPECTED
    if (error != nullptr) return Error(error);
#else
    if (error != nullptr) throw Error(error);
#endif
    return make();
}

inline Returned<void> returned(t5g_error *error) {
#ifdef T5GEMMA_EXPECTED
    if (error != nullptr) return Error(error);
    return {};
#else
    if (error != nullptr) throw Error(error);
#endif
}

template <class T, t5g_code (*Free)(T *)>
class Handle {
public:
    explicit Handle(T *handle = nullptr) : handle_(handle) {}
    Handle(Handle &&other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Handle &operator=(Handle &&other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    ~Handle() { Free(handle_); }
    T *get() const { return handle_; }

private:
    T *handle_;
};

/// The text of a function that gives one.
template <class Give>
Returned<std::string> text(Give give) {
    t5g_text *text = nullptr;
    t5g_error *error = give(&text);
    return returned<std::string>(error, [&] {
        std::string copy(t5g_text_data(text), t5g_text_size(text));
        t5g_text_free(text);
        return copy;
    });
}

} // namespace detail

inline std::string version() { return t5g_version(); }

/// Whether the library that was loaded is of this header's major version.
inline bool is_compatible() { return t5g_abi_version() >> 16 == T5G_ABI_MAJOR; }

/// Where ONNX Runtime was looked for and what is used, as JSON.
inline Returned<std::string> onnxruntime_report(const std::optional<std::string> &library = std::nullopt) {
    return detail::text([&](t5g_text **json) {
        return t5g_onnxruntime_report(library ? library->c_str() : nullptr, json);
    });
}

/// The last messages of ONNX Runtime.
inline Returned<std::string> recent_log() { return detail::text(t5g_log_recent); }

struct OpenOptions : t5g_open_options {
    OpenOptions() : t5g_open_options(t5g_open_options_default()) {}
};

struct GenerationOptions : t5g_generation_options {
    GenerationOptions() : t5g_generation_options(t5g_generation_options_default()) {}
};

/// Stops calls from any thread.
class Cancellation {
public:
    Cancellation() {
        t5g_cancellation *made = nullptr;
        if (t5g_error *error = t5g_cancellation_new(&made)) t5g_error_free(error);
        handle_ = detail::Handle<t5g_cancellation, t5g_cancellation_free>(made);
    }
    void cancel() {
        if (t5g_error *error = t5g_cancellation_cancel(handle_.get())) t5g_error_free(error);
    }
    bool is_cancelled() const { return t5g_cancellation_is_cancelled(handle_.get()) == 1; }
    t5g_cancellation *get() const { return handle_.get(); }

private:
    detail::Handle<t5g_cancellation, t5g_cancellation_free> handle_;
};

/// The sources of a call. What is given by pointer has to live until the call is over; the rest is kept here.
class Sources {
public:
    static Sources texts(std::vector<std::string> texts) {
        Sources sources;
        sources.texts_ = std::move(texts);
        return sources;
    }
    /// Rows of any lengths.
    static Sources ids(const std::vector<std::vector<std::int64_t>> &rows) {
        Sources sources;
        for (const auto &row : rows) {
            sources.lengths_.push_back(row.size());
            sources.ids_.insert(sources.ids_.end(), row.begin(), row.end());
        }
        sources.given_.rows = rows.size();
        sources.is_ragged_ = true;
        return sources;
    }
    /// [rows, length], with a mask of the same shape or none.
    static Sources ids(const std::int64_t *ids, std::size_t rows, std::size_t length, const std::int64_t *mask = nullptr) {
        Sources sources;
        sources.given_.rows = rows;
        sources.given_.length = length;
        sources.given_.input_ids = ids;
        sources.given_.attention_mask = mask;
        return sources;
    }
    /// A conversation: a JSON list of {"role", "content"}.
    static Sources messages(std::string json) {
        Sources sources;
        sources.messages_ = std::move(json);
        sources.given_.rows = 1;
        return sources;
    }
    /// How the targets begin.
    Sources &decoder_texts(std::vector<std::string> texts) {
        decoder_texts_ = std::move(texts);
        return *this;
    }
    /// The same as tokens, [rows, length].
    Sources &decoder_ids(const std::int64_t *ids, std::size_t length) {
        given_.decoder_input_ids = ids;
        given_.decoder_length = length;
        return *this;
    }
    /// What Model::encode gave for these sources.
    Sources &encoder_outputs(const float *states) {
        given_.encoder_outputs = states;
        return *this;
    }

    /// Calls `use` with what t5gemma.h takes.
    template <class Use>
    auto with(Use use) const {
        t5g_sources given = given_;
        std::vector<const char *> texts, decoder_texts;
        std::vector<std::size_t> sizes;
        for (const auto &text : texts_) {
            texts.push_back(text.data());
            sizes.push_back(text.size());
        }
        for (const auto &text : decoder_texts_) decoder_texts.push_back(text.c_str());
        if (!texts.empty()) {
            given.rows = texts.size();
            given.texts = texts.data();
            given.text_sizes = sizes.data();
        }
        if (!decoder_texts.empty()) given.decoder_texts = decoder_texts.data();
        if (is_ragged_) {
            given.input_ids = ids_.data();
            given.lengths = lengths_.data();
        }
        if (messages_) given.messages = messages_->c_str();
        return use(&given);
    }

private:
    t5g_sources given_ = t5g_sources_default();
    std::vector<std::string> texts_, decoder_texts_;
    std::optional<std::string> messages_;
    std::vector<std::int64_t> ids_;
    std::vector<std::size_t> lengths_;
    bool is_ragged_ = false;
};

/// Targets to score, one for each source.
class Targets {
public:
    /// Behind which the end token is scored too, unless `without_end`.
    static Targets texts(std::vector<std::string> texts, bool without_end = false) {
        Targets targets;
        targets.texts_ = std::move(texts);
        targets.without_end_ = without_end;
        return targets;
    }
    static Targets ids(const std::vector<std::vector<std::int64_t>> &rows) {
        Targets targets;
        for (const auto &row : rows) {
            targets.lengths_.push_back(row.size());
            targets.ids_.insert(targets.ids_.end(), row.begin(), row.end());
        }
        return targets;
    }
    /// Tells what the targets attend to, too.
    Targets &output_attentions(bool told = true) {
        output_attentions_ = told;
        return *this;
    }
    template <class Use>
    auto with(Use use) const {
        t5g_targets given = t5g_targets_default();
        std::vector<const char *> texts;
        std::vector<std::size_t> sizes;
        for (const auto &text : texts_) {
            texts.push_back(text.data());
            sizes.push_back(text.size());
        }
        given.without_end = without_end_ ? 1 : 0;
        given.output_attentions = output_attentions_ ? 1 : 0;
        if (lengths_.empty()) {
            given.texts = texts.data();
            given.text_sizes = sizes.data();
        } else {
            given.target_ids = ids_.data();
            given.lengths = lengths_.data();
        }
        return use(&given);
    }

private:
    std::vector<std::string> texts_;
    std::vector<std::int64_t> ids_;
    std::vector<std::size_t> lengths_;
    bool without_end_ = false, output_attentions_ = false;
};

/// A piece of a row's first hypothesis.
struct Piece {
    std::size_t row;
    /// -1 with the last text of a row.
    std::int64_t token;
    std::string_view text;
};

/// Where scores belong.
struct Position {
    Span<const std::int64_t> source, target;
    std::size_t prompt_length;
};

/// What concerns one call only.
struct Call {
    /// Has to outlive the call.
    Cancellation *cancellation = nullptr;
    /// 0: none.
    std::chrono::duration<double> deadline{0};
    /// Whether pieces come with text.
    bool stream_text = true;
    /// False ends the call.
    std::function<bool(const Piece &)> on_piece;
    /// False ends the call.
    std::function<bool()> on_step;
    std::function<void(const Position &, Span<float>)> logits_processor;
    std::function<std::vector<std::int64_t>(std::size_t row, Span<const std::int64_t> target)> prefix_allowed_tokens;
};

namespace detail {

/// The callbacks of a call for the time of it, with what one of them has thrown.
class Callbacks {
public:
    explicit Callbacks(const Call &call) : call_(call), given_(t5g_call_default()) {
        given_.user = this;
        given_.cancellation = call.cancellation ? call.cancellation->get() : nullptr;
        given_.deadline_seconds = call.deadline.count();
        if (call.on_piece) {
            given_.stream_text = call.stream_text ? 1 : 0;
            given_.on_piece = [](void *user, const t5g_piece *piece) -> std::int32_t {
                auto *own = static_cast<Callbacks *>(user);
                std::string_view text = piece->text ? std::string_view(piece->text, piece->text_size) : std::string_view();
                return own->guard(1, [&] { return own->call_.on_piece(Piece{piece->row, piece->token, text}) ? 0 : 1; });
            };
        }
        // Also without an on_step of the caller's: it ends a call in which a callback without a result has thrown.
        given_.on_step = [](void *user) -> std::int32_t {
            auto *own = static_cast<Callbacks *>(user);
            if (own->thrown_) return 1;
            return own->guard(1, [&] { return !own->call_.on_step || own->call_.on_step() ? 0 : 1; });
        };
        if (call.logits_processor) {
            given_.logits_processor = [](void *user, const t5g_position *at, float *scores, std::size_t count) {
                auto *own = static_cast<Callbacks *>(user);
                own->guard(0, [&] {
                    Position position{{at->source, at->source_length}, {at->target, at->target_length}, at->prompt_length};
                    own->call_.logits_processor(position, Span<float>(scores, count));
                    return 0;
                });
            };
        }
        if (call.prefix_allowed_tokens) {
            given_.prefix_allowed_tokens = [](void *user, std::size_t row, const std::int64_t *target, std::size_t length,
                                              const std::int64_t **allowed) -> std::size_t {
                auto *own = static_cast<Callbacks *>(user);
                own->guard(0, [&] {
                    own->allowed_ = own->call_.prefix_allowed_tokens(row, {target, length});
                    return 0;
                });
                *allowed = own->allowed_.data();
                return own->allowed_.size();
            };
        }
    }

    const t5g_call *get() const { return &given_; }

    /// Throws what a callback has thrown, in place of the error that came of it.
    t5g_error *passed(t5g_error *error) {
#if defined(__cpp_exceptions)
        if (thrown_) {
            t5g_error_free(error);
            std::rethrow_exception(std::exchange(thrown_, nullptr));
        }
#endif
        return error;
    }

    /// After an exception, results that came all the same are dropped.
    bool has_thrown() const { return thrown_ != nullptr; }

private:
    template <class Work>
    std::int32_t guard(std::int32_t otherwise, Work work) {
#if defined(__cpp_exceptions)
        try {
            return work();
        } catch (...) {
            if (!thrown_) thrown_ = std::current_exception();
            return otherwise;
        }
#else
        (void)otherwise;
        return work();
#endif
    }

    const Call &call_;
    t5g_call given_;
    std::vector<std::int64_t> allowed_;
    std::exception_ptr thrown_;
};

} // namespace detail

/// A target of a result, whose views live as long as that.
struct Hypothesis {
    Span<const std::int64_t> tokens;
    /// T5G_FINISH_….
    std::int64_t finish_reason;
    /// NAN where there is none, as the next two.
    double score, logprob, perplexity;
    Span<const float> logprobs;
    /// How many of the likeliest tokens there are at each place, best first.
    std::size_t top_count;
    Span<const std::int64_t> top_tokens;
    Span<const float> top_logprobs;
    /// How many tokens the source has, with padding of its own, and how much each token attended to each of them.
    std::size_t source_length;
    Span<const float> cross_attentions;
};

class Result {
public:
    explicit Result(t5g_result *result) : handle_(result) {}
    std::size_t rows() const { return t5g_result_rows(handle_.get()); }
    std::size_t count(std::size_t row) const { return t5g_result_count(handle_.get(), row); }
    Returned<Hypothesis> hypothesis(std::size_t row, std::size_t index = 0) const {
        t5g_hypothesis found = t5g_hypothesis_default();
        return detail::returned<Hypothesis>(t5g_result_get(handle_.get(), row, index, &found), [&] {
            std::size_t top = found.token_count * found.top_count;
            return Hypothesis{{found.tokens, found.token_count},
                              found.finish_reason,
                              found.score,
                              found.logprob,
                              found.perplexity,
                              {found.logprobs, found.logprobs ? found.token_count : 0},
                              found.top_count,
                              {found.top_tokens, top},
                              {found.top_logprobs, top},
                              found.source_length,
                              {found.cross_attentions, found.token_count * found.source_length}};
        });
    }
    Returned<std::string_view> text(std::size_t row, std::size_t index = 0) const {
        const char *text = nullptr;
        std::size_t size = 0;
        return detail::returned<std::string_view>(t5g_result_text(handle_.get(), row, index, &text, &size),
                                                  [&] { return std::string_view(text, size); });
    }
    /// As `t5gemma generate --jsonl` writes it.
    Returned<std::string> json() const {
        return detail::text([&](t5g_text **json) { return t5g_result_json(handle_.get(), json); });
    }
    t5g_result *get() const { return handle_.get(); }

private:
    detail::Handle<t5g_result, t5g_result_free> handle_;
};

/// Numbers, [rows, length, width], and which tokens took part, [rows, mask_length].
struct States {
    std::vector<float> values;
    std::vector<std::int64_t> attention_mask;
    std::size_t rows = 0, length = 0, width = 0, mask_length = 0;
};

namespace detail {

/// Asks for the sizes, then for the numbers.
template <class Compute>
Returned<States> states(Compute compute) {
    t5g_states given = t5g_states_default();
    States states;
    t5g_error *error = compute(&given);
    if (error == nullptr) {
        states.values.resize(given.rows * given.length * given.width);
        states.attention_mask.resize(given.rows * given.mask_length);
        given.values = states.values.data();
        given.capacity = states.values.size();
        given.attention_mask = states.attention_mask.data();
        given.mask_capacity = states.attention_mask.size();
        error = compute(&given);
    }
    return returned<States>(error, [&] {
        states.rows = given.rows;
        states.length = given.length;
        states.width = given.width;
        states.mask_length = given.mask_length;
        return std::move(states);
    });
}

} // namespace detail

/// Makes text of tokens that come one by one; for one thread at a time.
class TextStream {
public:
    explicit TextStream(t5g_stream *stream) : handle_(stream) {}
    /// Lives until the next call.
    Returned<std::string_view> push(std::int64_t token) {
        const char *text = nullptr;
        std::size_t size = 0;
        return detail::returned<std::string_view>(t5g_stream_push(handle_.get(), token, &text, &size),
                                                  [&] { return std::string_view(text, size); });
    }
    Returned<std::string_view> finish() {
        const char *text = nullptr;
        std::size_t size = 0;
        return detail::returned<std::string_view>(t5g_stream_finish(handle_.get(), &text, &size),
                                                  [&] { return std::string_view(text, size); });
    }

private:
    detail::Handle<t5g_stream, t5g_stream_free> handle_;
};

class Tokenizer {
public:
    explicit Tokenizer(t5g_tokenizer *tokenizer) : handle_(tokenizer) {}
    static Returned<Tokenizer> open(const std::string &path) {
        t5g_tokenizer *made = nullptr;
        return detail::returned<Tokenizer>(t5g_tokenizer_open(path.c_str(), &made), [&] { return Tokenizer(made); });
    }
    Returned<std::vector<std::int64_t>> encode(std::string_view text, std::int32_t kind = T5G_TEXT_SOURCE) const {
        t5g_tokens *tokens = nullptr;
        t5g_error *error = t5g_tokenizer_encode(handle_.get(), text.data(), text.size(), kind, &tokens);
        return detail::returned<std::vector<std::int64_t>>(error, [&] {
            const std::int64_t *data = t5g_tokens_data(tokens);
            std::vector<std::int64_t> copy(data, data + t5g_tokens_size(tokens));
            t5g_tokens_free(tokens);
            return copy;
        });
    }
    Returned<std::string> decode(Span<const std::int64_t> tokens, bool special = false) const {
        return detail::text([&](t5g_text **text) {
            return t5g_tokenizer_decode(handle_.get(), tokens.data(), tokens.size(), special ? 1 : 0, text);
        });
    }
    Returned<std::string> decode(const std::vector<std::int64_t> &tokens, bool special = false) const {
        return decode(Span<const std::int64_t>(tokens.data(), tokens.size()), special);
    }
    Returned<std::string> token(std::int64_t token) const {
        return detail::text([&](t5g_text **piece) { return t5g_tokenizer_token(handle_.get(), token, piece); });
    }
    Returned<TextStream> stream(bool special = false) const {
        t5g_stream *made = nullptr;
        return detail::returned<TextStream>(t5g_stream_new(handle_.get(), special ? 1 : 0, &made),
                                            [&] { return TextStream(made); });
    }

private:
    detail::Handle<t5g_tokenizer, t5g_tokenizer_free> handle_;
};

/// An opened model, for any number of threads.
class Model {
public:
    explicit Model(t5g_model *model) : handle_(model) {}
    static Returned<Model> open(const std::string &path, const OpenOptions &options = {}) {
        t5g_model *made = nullptr;
        return detail::returned<Model>(t5g_model_open(path.c_str(), &options, &made), [&] { return Model(made); });
    }
    Returned<std::string> describe() const {
        return detail::text([&](t5g_text **json) { return t5g_model_describe(handle_.get(), json); });
    }
    Returned<Tokenizer> tokenizer() const {
        t5g_tokenizer *made = nullptr;
        return detail::returned<Tokenizer>(t5g_model_tokenizer(handle_.get(), &made), [&] { return Tokenizer(made); });
    }
    Returned<std::string> chat(const std::string &messages) const {
        return detail::text([&](t5g_text **text) { return t5g_model_chat(handle_.get(), messages.c_str(), text); });
    }
    Returned<Result> generate(const Sources &sources, const GenerationOptions &options = {}, const Call &call = {}) const {
        detail::Callbacks callbacks(call);
        t5g_result *made = nullptr;
        t5g_error *error = sources.with([&](const t5g_sources *given) {
            return t5g_model_generate(handle_.get(), given, &options, callbacks.get(), &made);
        });
        if (callbacks.has_thrown()) t5g_result_free(made);
        return detail::returned<Result>(callbacks.passed(error), [&] { return Result(made); });
    }
    Returned<Result> score(const Sources &sources, const Targets &targets, std::size_t top_logprobs = 0,
                           const Call &call = {}) const {
        detail::Callbacks callbacks(call);
        t5g_result *made = nullptr;
        t5g_error *error = sources.with([&](const t5g_sources *given) {
            return targets.with([&](const t5g_targets *wanted) {
                return t5g_model_score(handle_.get(), given, wanted, top_logprobs, callbacks.get(), &made);
            });
        });
        return detail::returned<Result>(error, [&] { return Result(made); });
    }
    Returned<States> encode(const Sources &sources, const Call &call = {}) const {
        detail::Callbacks callbacks(call);
        return sources.with([&](const t5g_sources *given) {
            return detail::states([&](t5g_states *states) {
                return t5g_model_encode(handle_.get(), given, callbacks.get(), states);
            });
        });
    }
    t5g_model *get() const { return handle_.get(); }

private:
    detail::Handle<t5g_model, t5g_model_free> handle_;
};

struct EngineOptions : t5g_engine_options {
    EngineOptions() : t5g_engine_options(t5g_engine_options_default()) {}
};

/// What happened to a request: T5G_EVENT_…. The text lives until the next call with the request.
struct Event {
    std::int64_t kind;
    std::size_t row;
    std::int64_t token;
    std::string_view text;
};

/// A request that an engine was given; for one thread at a time. It is cancelled when it goes before its end.
class Request {
public:
    explicit Request(t5g_request *request) : handle_(request) {}
    Returned<Event> poll(std::chrono::duration<double> wait) {
        t5g_event event = t5g_event_default();
        t5g_error *error = t5g_request_poll(handle_.get(), wait.count(), &event);
        return detail::returned<Event>(error, [&] {
            std::string_view text = event.text ? std::string_view(event.text, event.text_size) : std::string_view();
            return Event{event.kind, event.row, event.token, text};
        });
    }
    /// From any thread.
    Returned<void> cancel() const { return detail::returned(t5g_request_cancel(handle_.get())); }
    Returned<Result> result() {
        t5g_result *made = nullptr;
        return detail::returned<Result>(t5g_request_result(handle_.get(), &made), [&] { return Result(made); });
    }

private:
    detail::Handle<t5g_request, t5g_request_free> handle_;
};

/// Generates for many requests in one batch, for any number of threads.
class Engine {
public:
    explicit Engine(t5g_engine *engine) : handle_(engine) {}
    /// On `devices`, if there are any, each with a copy of the model; all take rows from one line.
    static Returned<Engine> start(const Model &model, EngineOptions options = {},
                                  const std::vector<std::int64_t> &devices = {}) {
        t5g_engine *made = nullptr;
        if (!devices.empty()) {
            options.devices = devices.data();
            options.device_count = devices.size();
        }
        return detail::returned<Engine>(t5g_engine_new(model.get(), &options, &made), [&] { return Engine(made); });
    }
    /// Submits sources, to be polled.
    Returned<Request> submit(const Sources &sources, const GenerationOptions &options = {}, bool stream_text = false,
                             std::chrono::duration<double> deadline = {}, Cancellation *cancellation = nullptr) const {
        t5g_call call = t5g_call_default();
        call.stream_text = stream_text ? 1 : 0;
        call.deadline_seconds = deadline.count();
        call.cancellation = cancellation ? cancellation->get() : nullptr;
        t5g_request *made = nullptr;
        t5g_error *error = sources.with(
            [&](const t5g_sources *given) { return t5g_engine_submit(handle_.get(), given, &options, &call, &made); });
        return detail::returned<Request>(error, [&] { return Request(made); });
    }
    /// Submits sources, to be told of on another thread: `on_piece` as they come (false ends the request), then once
    /// `on_done` with the result or the error. Neither may throw.
    Returned<void> call(const Sources &sources, const GenerationOptions &options,
                        std::function<void(Expected<Result>)> on_done,
                        std::function<bool(const Piece &)> on_piece = nullptr,
                        std::chrono::duration<double> deadline = {}, Cancellation *cancellation = nullptr) const {
        struct Told {
            std::function<void(Expected<Result>)> on_done;
            std::function<bool(const Piece &)> on_piece;
        };
        auto told = std::make_unique<Told>(Told{std::move(on_done), std::move(on_piece)});
        t5g_call call = t5g_call_default();
        call.user = told.get();
        call.deadline_seconds = deadline.count();
        call.cancellation = cancellation ? cancellation->get() : nullptr;
        if (told->on_piece) {
            call.stream_text = 1;
            call.on_piece = [](void *user, const t5g_piece *piece) -> std::int32_t {
                std::string_view text(piece->text ? piece->text : "", piece->text_size);
                return static_cast<Told *>(user)->on_piece(Piece{piece->row, piece->token, text}) ? 0 : 1;
            };
        }
        t5g_error *error = sources.with([&](const t5g_sources *given) {
            return t5g_engine_call(handle_.get(), given, &options, &call,
                                   [](void *user, t5g_result *result, t5g_error *error) {
                                       std::unique_ptr<Told> told(static_cast<Told *>(user));
                                       if (error != nullptr) told->on_done(Error(error));
                                       else told->on_done(Result(result));
                                   });
        });
        if (error == nullptr) told.release();
        return detail::returned(error);
    }
    Returned<t5g_engine_counts> stats() const {
        t5g_engine_counts counts = t5g_engine_counts_default();
        return detail::returned<t5g_engine_counts>(t5g_engine_stats(handle_.get(), &counts), [&] { return counts; });
    }
    /// The same with what one copy of the model has in flight and its steps.
    Returned<t5g_engine_counts> stats_of_copy(std::size_t copy) const {
        t5g_engine_counts counts = t5g_engine_counts_default();
        t5g_error *error = t5g_engine_stats_of_copy(handle_.get(), copy, &counts);
        return detail::returned<t5g_engine_counts>(error, [&] { return counts; });
    }
    /// Takes no more requests, and waits until all that were taken have ended.
    Returned<void> drain() const { return detail::returned(t5g_engine_drain(handle_.get())); }
    /// Ends everything at once.
    Returned<void> shutdown() const { return detail::returned(t5g_engine_shutdown(handle_.get())); }

private:
    detail::Handle<t5g_engine, t5g_engine_free> handle_;
};

/// An opened encoder or classifier, for any number of threads.
class Encoder {
public:
    explicit Encoder(t5g_encoder *encoder) : handle_(encoder) {}
    static Returned<Encoder> open(const std::string &path, const OpenOptions &options = {}) {
        t5g_encoder *made = nullptr;
        return detail::returned<Encoder>(t5g_encoder_open(path.c_str(), &options, &made), [&] { return Encoder(made); });
    }
    Returned<std::string> describe() const {
        return detail::text([&](t5g_text **json) { return t5g_encoder_describe(handle_.get(), json); });
    }
    Returned<Tokenizer> tokenizer() const {
        t5g_tokenizer *made = nullptr;
        return detail::returned<Tokenizer>(t5g_encoder_tokenizer(handle_.get(), &made), [&] { return Tokenizer(made); });
    }
    Returned<States> encode(const Sources &sources, std::int32_t pooling = T5G_POOLING_NONE, bool normalize = false,
                            const Call &call = {}) const {
        detail::Callbacks callbacks(call);
        return sources.with([&](const t5g_sources *given) {
            return detail::states([&](t5g_states *states) {
                return t5g_encoder_encode(handle_.get(), given, pooling, normalize ? 1 : 0, callbacks.get(), states);
            });
        });
    }
    Returned<States> classify(const Sources &sources, std::int32_t function = T5G_SCORES_DEFAULT,
                              const Call &call = {}) const {
        detail::Callbacks callbacks(call);
        return sources.with([&](const t5g_sources *given) {
            return detail::states([&](t5g_states *states) {
                return t5g_encoder_classify(handle_.get(), given, function, callbacks.get(), states);
            });
        });
    }

private:
    detail::Handle<t5g_encoder, t5g_encoder_free> handle_;
};

} // namespace t5g

#endif
