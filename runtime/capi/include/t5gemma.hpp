// t5gemma.hpp: the C++17 interface of t5gemma.h, which is the reference. Header only.
//
//     #include <iostream>
//     #include <t5gemma.hpp>
//
//     int main(int argc, char **argv) try {
//         auto model = t5g::Model::open(argv[1]);
//         t5g::GenerationOptions options;
//         options.num_beams = 4;
//         auto sources = t5g::Sources::texts({"Dr. Smith paid $3.50 on May 3, 2019.", "The meeting starts at 9:05 am."});
//         auto result = model.generate(sources, options);
//         for (std::size_t row = 0; row < result.rows(); row++) std::cout << result.text(row) << '\n';
//     } catch (const t5g::Error &error) {
//         std::cerr << error.what() << '\n';
//         return 1;
//     }
//
// OBJECTS own their handles and can be moved. Move assignment frees the previous handle; passing a moved-from object is
// an error that names it. Options, sources and targets own their data, except that encoder_outputs passed as an lvalue
// are not copied. Spans and string_views point into the object that returned them, which therefore cannot be a
// temporary. Sizes that belong together are compared before anything is read.
//
// ERRORS are thrown as t5g::Error. With T5GEMMA_EXPECTED defined before this header, functions return t5g::Expected<T>
// instead, which holds a value or an Error, and this header throws nothing (also for -fno-exceptions). Files of both
// modes can be linked together: their classes are different types.
//
// CALLBACKS are any callables. An exception thrown by one ends the call and is rethrown by it; in a call of the engine
// it is the cause() of the Error passed to on_done. on_done itself must not throw: std::terminate is called.
#ifndef T5GEMMA_HPP
#define T5GEMMA_HPP

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include "t5gemma.h"

// The inline namespace is named after the mode, so that the linker does not merge code of different modes.
#if !defined(T5GEMMA_EXPECTED)
#define T5GEMMA_MODE throwing
#elif defined(__cpp_exceptions)
#define T5GEMMA_MODE returning
#else
#define T5GEMMA_MODE returning_without_exceptions
#endif

namespace t5g {

/// A view of numbers, convertible to std::span where there is one.
template <class T>
class Span {
public:
    Span() = default;
    Span(T *data, std::size_t size) : data_(data), size_(size) {}
    Span(std::vector<std::remove_const_t<T>> &numbers) : Span(numbers.data(), numbers.size()) {}
    template <class U = T, std::enable_if_t<std::is_const_v<U>, int> = 0>
    Span(const std::vector<std::remove_const_t<T>> &numbers) : Span(numbers.data(), numbers.size()) {}
    Span(std::vector<std::remove_const_t<T>> &&) = delete;
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

/// An error: t5g_error as a value.
class Error : public std::runtime_error {
public:
    explicit Error(t5g_error *error)
        : std::runtime_error(t5g_error_message(error)), code_(t5g_error_code(error)) {
        if (const char *name = t5g_error_field(error)) field_ = name;
        retry_after_ = t5g_error_retry_after(error);
        t5g_error_free(error);
    }
    Error(t5g_code code, const std::string &message, std::string field = {}, std::exception_ptr cause = nullptr)
        : std::runtime_error(message), code_(code), field_(std::move(field)), cause_(std::move(cause)) {}

    t5g_code code() const { return code_; }
    /// The field at fault; empty if there is none.
    const std::string &field() const & { return field_; }
    std::string field() && { return std::move(field_); }
    /// The exception of the callback that ended the call, if there is one.
    std::exception_ptr cause() const { return cause_; }
    /// With T5G_ERROR_FULL, in how many seconds to try again; 0 for other errors.
    double retry_after() const { return retry_after_; }

private:
    t5g_code code_;
    std::string field_;
    double retry_after_ = 0;
    std::exception_ptr cause_;
};

inline namespace T5GEMMA_MODE {

class Result;
class TextStream;

namespace detail {

/// Whether a class returns views into itself.
template <class T>
struct GivesViews : std::false_type {};
template <>
struct GivesViews<Result> : std::true_type {};
template <>
struct GivesViews<TextStream> : std::true_type {};

[[noreturn]] inline void raise(const Error &error) {
#if defined(__cpp_exceptions)
    if (error.cause()) std::rethrow_exception(error.cause());
    throw error;
#else
    std::fprintf(stderr, "t5g::Expected has no value: %s\n", error.what());
    std::abort();
#endif
}

} // namespace detail

/// A value or an error.
template <class T>
class Expected {
public:
    Expected(T value) : held_(std::in_place_index<0>, std::move(value)) {}
    Expected(Error error) : held_(std::in_place_index<1>, std::move(error)) {}
    explicit operator bool() const { return has_value(); }
    bool has_value() const { return held_.index() == 0; }
    /// The value. There must be one.
    T &operator*() & { return *std::get_if<0>(&held_); }
    const T &operator*() const & { return *std::get_if<0>(&held_); }
    T &&operator*() && { return std::move(*std::get_if<0>(&held_)); }
    T *operator->() & { return std::get_if<0>(&held_); }
    const T *operator->() const & { return std::get_if<0>(&held_); }
    template <class U = T, std::enable_if_t<!detail::GivesViews<U>::value, int> = 0>
    U *operator->() && {
        return std::get_if<0>(&held_);
    }
    /// Views into a temporary would outlive it.
    template <class U = T, std::enable_if_t<detail::GivesViews<U>::value, int> = 0>
    U *operator->() && = delete;
    /// The value. Without one, throws the error, or ends the program where exceptions are disabled.
    T &value() & {
        if (!has_value()) detail::raise(error());
        return **this;
    }
    const T &value() const & {
        if (!has_value()) detail::raise(error());
        return **this;
    }
    T value() && {
        if (!has_value()) detail::raise(*std::get_if<1>(&held_));
        return std::move(*std::get_if<0>(&held_));
    }
    /// The error. There must be one.
    const Error &error() const & { return *std::get_if<1>(&held_); }
    Error error() && { return std::move(*std::get_if<1>(&held_)); }

private:
    std::variant<T, Error> held_;
};

template <>
class Expected<void> {
public:
    Expected() = default;
    Expected(Error error) : error_(std::move(error)) {}
    explicit operator bool() const { return has_value(); }
    bool has_value() const { return !error_; }
    void value() const {
        if (error_) detail::raise(*error_);
    }
    const Error &error() const & { return *error_; }
    Error error() && { return std::move(*error_); }

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

/// The error of an argument that is invalid before any C function is called.
template <class T>
Returned<T> refused(Error error) {
#ifdef T5GEMMA_EXPECTED
    return error;
#else
    throw error;
#endif
}

/// The return value of a function: that of `make` if there is no error.
template <class T, class Make>
Returned<T> returned(t5g_error *error, Make make) {
    if (error != nullptr) return refused<T>(Error(error));
    return make();
}

inline Returned<void> returned(t5g_error *error) {
    if (error != nullptr) return refused<void>(Error(error));
    return Returned<void>();
}

/// The first error, if there is one.
inline std::optional<Error> first(std::optional<Error> wrong) { return wrong; }
template <class... More>
std::optional<Error> first(std::optional<Error> wrong, More... more) {
    return wrong ? wrong : first(std::move(more)...);
}

inline std::optional<Error> expected(t5g_code code, const std::string &field, const std::string &what,
                                     const std::string &found) {
    return Error(code, field + ": expected " + what + ", found " + found, field);
}

inline std::optional<Error> of_size(const std::string &field, std::size_t found, std::size_t wanted, const char *what) {
    if (found == wanted) return std::nullopt;
    return expected(T5G_ERROR_INPUT, field, std::to_string(wanted) + " (" + what + ")", std::to_string(found));
}

/// A zero-terminated text for C.
inline std::optional<Error> without_zero(const std::string &field, const std::string &text) {
    const std::size_t at = text.find('\0');
    if (at == std::string::npos) return std::nullopt;
    return expected(T5G_ERROR_ARGUMENT, field, "text without a zero byte", "one at " + std::to_string(at));
}

inline std::optional<Error> without_zero(const std::string &field, const std::optional<std::string> &text) {
    return text ? without_zero(field, *text) : std::nullopt;
}

template <class N>
void set(N &field, const std::optional<N> &given) {
    if (given) field = *given;
}

inline void set(const char *&field, const std::optional<std::string> &given) {
    if (given) field = given->c_str();
}

inline void set(const std::int64_t *&field, std::size_t &count, const std::optional<std::vector<std::int64_t>> &given) {
    // An empty list is set, not unset.
    static const std::int64_t none = 0;
    if (!given) return;
    field = given->empty() ? &none : given->data();
    count = given->size();
}

template <class T, t5g_code (*Free)(T *)>
class Handle {
public:
    explicit Handle(T *handle = nullptr) : handle_(handle) {}
    Handle(Handle &&other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Handle &operator=(Handle &&other) noexcept {
        if (this != &other) Free(std::exchange(handle_, std::exchange(other.handle_, nullptr)));
        return *this;
    }
    ~Handle() { Free(handle_); }
    T *get() const { return handle_; }

private:
    T *handle_;
};

/// The text that a function returns.
template <class Give>
Returned<std::string> text(Give give) {
    t5g_text *given = nullptr;
    t5g_error *error = give(&given);
    Handle<t5g_text, t5g_text_free> owned(given);
    return returned<std::string>(error, [&] { return std::string(t5g_text_data(given), t5g_text_size(given)); });
}

} // namespace detail

inline std::string version() { return t5g_version(); }

/// Whether the loaded library has this header's ABI major version.
inline bool is_compatible() { return t5g_abi_version() >> 16 == T5G_ABI_MAJOR; }

/// Where ONNX Runtime was searched for and which library is used, as JSON.
inline Returned<std::string> onnxruntime_report(const std::optional<std::string> &library = std::nullopt) {
    if (auto wrong = detail::without_zero("library", library)) return detail::refused<std::string>(std::move(*wrong));
    return detail::text([&](t5g_text **json) {
        return t5g_onnxruntime_report(library ? library->c_str() : nullptr, json);
    });
}

/// The last messages of ONNX Runtime.
inline Returned<std::string> recent_log() { return detail::text(t5g_log_recent); }

/// t5g_open_options; an empty field is unset.
struct OpenOptions {
    std::optional<std::string> library, provider;
    std::optional<std::int64_t> device, threads, check_weights, encoder_cache_bytes;
    std::optional<std::string> json;

    std::optional<Error> wrong() const {
        return detail::first(detail::without_zero("library", library), detail::without_zero("provider", provider),
                             detail::without_zero("json", json));
    }
    /// Calls `use` with the struct of t5gemma.h.
    template <class Use>
    auto with(Use use) const {
        t5g_open_options given = t5g_open_options_default();
        detail::set(given.library, library);
        detail::set(given.provider, provider);
        detail::set(given.device, device);
        detail::set(given.threads, threads);
        detail::set(given.check_weights, check_weights);
        detail::set(given.encoder_cache_bytes, encoder_cache_bytes);
        detail::set(given.json, json);
        return use(&given);
    }
};

/// t5g_generation_options; an empty field is unset. Flags are 0 or 1.
struct GenerationOptions {
    std::optional<std::string> json;
    std::optional<std::int64_t> max_new_tokens, max_length, min_new_tokens, min_length;
    std::optional<std::int64_t> num_beams, num_return_sequences, do_sample, seed;
    std::optional<double> temperature;
    std::optional<std::int64_t> top_k;
    std::optional<double> top_p, min_p, top_h, top_n_sigma, typical_p, epsilon_cutoff, eta_cutoff;
    std::optional<std::int64_t> num_beam_groups;
    std::optional<double> diversity_penalty, length_penalty;
    /// 0, 1, or 2 for "never".
    std::optional<std::int64_t> early_stopping;
    std::optional<double> repetition_penalty, encoder_repetition_penalty, frequency_penalty, presence_penalty;
    std::optional<std::int64_t> no_repeat_ngram_size, encoder_no_repeat_ngram_size;
    std::optional<double> max_time;
    std::optional<std::int64_t> return_alternatives, renormalize_logits, remove_invalid_values;
    std::optional<std::int64_t> output_logprobs, top_logprobs;
    std::optional<std::int64_t> prompt_lookup_num_tokens, max_matching_ngram_size;
    std::optional<std::int64_t> decoder_start_token_id, bos_token_id, pad_token_id, forced_bos_token_id;
    std::optional<std::vector<std::int64_t>> eos_token_id, forced_eos_token_id, suppress_tokens, begin_suppress_tokens;
    /// With the next field: exponential_decay_length_penalty.
    std::optional<std::int64_t> exponential_decay_start;
    std::optional<double> exponential_decay_factor;
    std::optional<std::vector<std::string>> stop_strings;
    std::optional<std::string> json_schema, regex, grammar;
    std::optional<double> coverage_penalty, patience;
    std::optional<std::int64_t> output_attentions;
    std::optional<std::string> adapter;

    std::optional<Error> wrong() const {
        for (std::size_t at = 0; stop_strings && at < stop_strings->size(); at++)
            if (auto found = detail::without_zero("stop_strings[" + std::to_string(at) + "]", (*stop_strings)[at]))
                return found;
        return detail::first(detail::without_zero("json", json), detail::without_zero("json_schema", json_schema),
                             detail::without_zero("regex", regex), detail::without_zero("grammar", grammar),
                             detail::without_zero("adapter", adapter));
    }
    /// Calls `use` with the struct of t5gemma.h.
    template <class Use>
    auto with(Use use) const {
        t5g_generation_options given = t5g_generation_options_default();
        std::vector<const char *> stops;
        detail::set(given.max_new_tokens, max_new_tokens);
        detail::set(given.max_length, max_length);
        detail::set(given.min_new_tokens, min_new_tokens);
        detail::set(given.min_length, min_length);
        detail::set(given.num_beams, num_beams);
        detail::set(given.num_return_sequences, num_return_sequences);
        detail::set(given.do_sample, do_sample);
        detail::set(given.seed, seed);
        detail::set(given.temperature, temperature);
        detail::set(given.top_k, top_k);
        detail::set(given.top_p, top_p);
        detail::set(given.min_p, min_p);
        detail::set(given.top_h, top_h);
        detail::set(given.top_n_sigma, top_n_sigma);
        detail::set(given.typical_p, typical_p);
        detail::set(given.epsilon_cutoff, epsilon_cutoff);
        detail::set(given.eta_cutoff, eta_cutoff);
        detail::set(given.num_beam_groups, num_beam_groups);
        detail::set(given.diversity_penalty, diversity_penalty);
        detail::set(given.length_penalty, length_penalty);
        detail::set(given.early_stopping, early_stopping);
        detail::set(given.repetition_penalty, repetition_penalty);
        detail::set(given.encoder_repetition_penalty, encoder_repetition_penalty);
        detail::set(given.frequency_penalty, frequency_penalty);
        detail::set(given.presence_penalty, presence_penalty);
        detail::set(given.no_repeat_ngram_size, no_repeat_ngram_size);
        detail::set(given.encoder_no_repeat_ngram_size, encoder_no_repeat_ngram_size);
        detail::set(given.max_time, max_time);
        detail::set(given.return_alternatives, return_alternatives);
        detail::set(given.renormalize_logits, renormalize_logits);
        detail::set(given.remove_invalid_values, remove_invalid_values);
        detail::set(given.output_logprobs, output_logprobs);
        detail::set(given.top_logprobs, top_logprobs);
        detail::set(given.prompt_lookup_num_tokens, prompt_lookup_num_tokens);
        detail::set(given.max_matching_ngram_size, max_matching_ngram_size);
        detail::set(given.decoder_start_token_id, decoder_start_token_id);
        detail::set(given.bos_token_id, bos_token_id);
        detail::set(given.pad_token_id, pad_token_id);
        detail::set(given.forced_bos_token_id, forced_bos_token_id);
        detail::set(given.exponential_decay_start, exponential_decay_start);
        detail::set(given.exponential_decay_factor, exponential_decay_factor);
        detail::set(given.json, json);
        detail::set(given.json_schema, json_schema);
        detail::set(given.regex, regex);
        detail::set(given.grammar, grammar);
        detail::set(given.coverage_penalty, coverage_penalty);
        detail::set(given.patience, patience);
        detail::set(given.output_attentions, output_attentions);
        detail::set(given.adapter, adapter);
        detail::set(given.eos_token_id, given.eos_token_id_count, eos_token_id);
        detail::set(given.forced_eos_token_id, given.forced_eos_token_id_count, forced_eos_token_id);
        detail::set(given.suppress_tokens, given.suppress_tokens_count, suppress_tokens);
        detail::set(given.begin_suppress_tokens, given.begin_suppress_tokens_count, begin_suppress_tokens);
        if (stop_strings) {
            for (const auto &stop : *stop_strings) stops.push_back(stop.c_str());
            stops.push_back(nullptr); // so that an empty list is set, not unset
            given.stop_strings = stops.data();
            given.stop_strings_count = stop_strings->size();
        }
        return use(&given);
    }
};

/// Cancels calls from any thread. A moved-from one cancels nothing, and calls reject it.
class Cancellation {
public:
    Cancellation() {
        t5g_cancellation *made = nullptr;
        t5g_error *error = t5g_cancellation_new(&made);
        handle_ = detail::Handle<t5g_cancellation, t5g_cancellation_free>(made);
#ifdef T5GEMMA_EXPECTED
        // Without a handle, using it is an error.
        t5g_error_free(error);
#else
        if (error != nullptr) throw Error(error);
#endif
    }
    Returned<void> cancel() const { return detail::returned(t5g_cancellation_cancel(handle_.get())); }
    bool is_cancelled() const { return t5g_cancellation_is_cancelled(handle_.get()) == 1; }
    t5g_cancellation *get() const { return handle_.get(); }

private:
    detail::Handle<t5g_cancellation, t5g_cancellation_free> handle_;
};

/// Numbers, [rows, length, width], and the attention mask, [rows, mask_length].
struct States {
    std::vector<float> values;
    std::vector<std::int64_t> attention_mask;
    std::size_t rows = 0, length = 0, width = 0, mask_length = 0;
};

/// A picture: a JPEG, PNG or WebP file, or rows of red, green and blue.
struct Image {
    /// The bytes of the file, or 3 a pixel.
    std::vector<std::uint8_t> bytes;
    /// 0 for a file; the pixels of a row otherwise.
    std::size_t width = 0;
};

/// The sources of a call. They are owned by this object, except for encoder_outputs given as a view.
class Sources {
public:
    static Sources texts(std::vector<std::string> texts) {
        Sources sources;
        sources.rows_ = texts.size();
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
        sources.rows_ = rows.size();
        sources.kind_ = Kind::Ragged;
        return sources;
    }
    /// [rows, length], with a mask of the same shape or none.
    static Sources ids(Span<const std::int64_t> ids, std::size_t rows, std::size_t length,
                       Span<const std::int64_t> mask = {}) {
        Sources sources;
        sources.ids_.assign(ids.begin(), ids.end());
        sources.mask_.assign(mask.begin(), mask.end());
        sources.rows_ = rows;
        sources.length_ = length;
        sources.kind_ = Kind::Rectangle;
        return sources;
    }
    /// A conversation: a JSON list of {"role", "content"}.
    static Sources messages(std::string json) {
        Sources sources;
        sources.messages_ = std::move(json);
        sources.rows_ = 1;
        return sources;
    }
    /// The beginnings of the targets.
    Sources &decoder_texts(std::vector<std::string> texts) {
        decoder_texts_ = std::move(texts);
        return *this;
    }
    /// The same as token ids, rows of equal length.
    Sources &decoder_ids(const std::vector<std::vector<std::int64_t>> &rows) {
        decoder_ids_.emplace();
        decoder_length_ = rows.empty() ? 0 : rows.front().size();
        unequal_ = std::nullopt;
        for (std::size_t row = 0; row < rows.size(); row++) {
            if (rows[row].size() != decoder_length_ && !unequal_) {
                unequal_ = detail::of_size("sources.decoder_input_ids[" + std::to_string(row) + "]", rows[row].size(),
                                           decoder_length_, "tokens, as many as row 0 has");
            }
            decoder_ids_->insert(decoder_ids_->end(), rows[row].begin(), rows[row].end());
        }
        return *this;
    }
    /// [rows, length].
    Sources &decoder_ids(Span<const std::int64_t> ids, std::size_t length) {
        decoder_ids_.emplace(ids.begin(), ids.end());
        decoder_length_ = length;
        unequal_ = std::nullopt;
        return *this;
    }
    /// The expected length of each target in tokens, the start token included, for models whose positions depend on it.
    Sources &progress_totals(std::vector<std::int64_t> totals) {
        totals_ = std::move(totals);
        return *this;
    }
    /// The result of Model::encode for these sources, [rows, length, width]; must outlive the call.
    Sources &encoder_outputs(Span<const float> states, std::size_t rows, std::size_t length, std::size_t width) {
        states_ = nullptr;
        outputs_ = Outputs{states, rows, length, width, false};
        return *this;
    }
    Sources &encoder_outputs(const States &states) {
        return encoder_outputs(states.values, states.rows, states.length, states.width);
    }
    Sources &encoder_outputs(States &&states) {
        auto kept = std::make_shared<const States>(std::move(states));
        encoder_outputs(*kept);
        states_ = std::move(kept);
        outputs_->is_kept = true;
        return *this;
    }

    /// The images of each row, in the order of the start-of-image tokens of its text.
    Sources &images(std::vector<std::vector<Image>> images) {
        images_ = std::move(images);
        return *this;
    }
    /// Exact numbers for the image tokens of all rows, [images, 3, image_size, image_size].
    Sources &pixel_values(std::vector<float> values) {
        pixel_values_ = std::move(values);
        return *this;
    }
    /// Whether crops follow images that are much wider than high or the reverse.
    Sources &pan_and_scan(bool value) {
        pan_and_scan_ = value ? 1 : 2;
        return *this;
    }

    /// The LoRA adapter of all rows, by the name that it was loaded under.
    Sources &adapter(std::string name) {
        adapter_ = std::move(name);
        return *this;
    }

    std::size_t rows() const { return rows_; }
    /// The first fields with contradictory sizes, if any.
    std::optional<Error> wrong() const {
        if ((kind_ == Kind::Ragged && lengths_.size() != rows_) || (outputs_ && outputs_->is_kept && !states_))
            return detail::expected(T5G_ERROR_INPUT, "sources", "sources", "a moved-from object");
        if (kind_ == Kind::Rectangle) {
            const auto size = product("sources.input_ids", rows_, length_);
            if (!size) return size.error();
            const char *what = "rows times length";
            if (auto found = detail::of_size("sources.input_ids", ids_.size(), *size, what)) return found;
            if (!mask_.empty())
                if (auto found = detail::of_size("sources.attention_mask", mask_.size(), *size, what)) return found;
        }
        if (decoder_texts_)
            if (auto found = detail::of_size("sources.decoder_texts", decoder_texts_->size(), rows_, EACH)) return found;
        if (unequal_) return unequal_;
        if (decoder_ids_) {
            const auto size = product("sources.decoder_input_ids", rows_, decoder_length_);
            if (!size) return size.error();
            const char *what = "as many tokens for each source";
            if (auto found = detail::of_size("sources.decoder_input_ids", decoder_ids_->size(), *size, what)) return found;
        }
        if (images_)
            if (auto found = detail::of_size("sources.images", images_->size(), rows_, EACH)) return found;
        if (totals_)
            if (auto found = detail::of_size("sources.progress_totals", totals_->size(), rows_, EACH)) return found;
        if (outputs_) {
            if (auto found = detail::of_size("sources.encoder_outputs", outputs_->rows, rows_, EACH)) return found;
            const auto vectors = product("sources.encoder_outputs", outputs_->rows, outputs_->length);
            if (!vectors) return vectors.error();
            const auto size = product("sources.encoder_outputs", *vectors, outputs_->width);
            if (!size) return size.error();
            const char *what = "rows times length times width";
            if (auto found = detail::of_size("sources.encoder_outputs", outputs_->values.size(), *size, what)) return found;
        }
        return detail::first(detail::without_zero("sources.messages", messages_),
                             detail::without_zero("sources.adapter", adapter_));
    }

    /// Calls `use` with the struct of t5gemma.h.
    template <class Use>
    auto with(Use use) const {
        t5g_sources given = t5g_sources_default();
        std::vector<const char *> texts, decoder_texts;
        std::vector<std::size_t> sizes, decoder_sizes;
        given.rows = rows_;
        for (const auto &text : texts_) {
            texts.push_back(text.data());
            sizes.push_back(text.size());
        }
        if (!texts.empty()) {
            given.texts = texts.data();
            given.text_sizes = sizes.data();
        }
        if (decoder_texts_) {
            // Libraries of ABI 1.2 do not have the size field.
            bool has_zero = false;
            for (const auto &text : *decoder_texts_) {
                decoder_texts.push_back(text.c_str());
                decoder_sizes.push_back(text.size());
                has_zero |= text.find('\0') != std::string::npos;
            }
            given.decoder_texts = decoder_texts.data();
            if (has_zero) given.decoder_text_sizes = decoder_sizes.data();
        }
        if (kind_ != Kind::Texts) given.input_ids = ids_.empty() ? &NONE : ids_.data();
        if (kind_ == Kind::Ragged) given.lengths = lengths_.data();
        if (kind_ == Kind::Rectangle) {
            given.length = length_;
            if (!mask_.empty()) given.attention_mask = mask_.data();
        }
        if (decoder_ids_) {
            given.decoder_input_ids = decoder_ids_->data();
            given.decoder_length = decoder_length_;
        }
        if (messages_) given.messages = messages_->c_str();
        if (adapter_) given.adapter = adapter_->c_str();
        if (totals_ && !totals_->empty()) given.progress_totals = totals_->data();
        std::vector<const std::uint8_t *> images;
        std::vector<std::size_t> image_sizes, image_widths, image_counts;
        if (images_) {
            for (const auto &row : *images_) {
                image_counts.push_back(row.size());
                for (const auto &image : row) {
                    images.push_back(image.bytes.data());
                    image_sizes.push_back(image.bytes.size());
                    image_widths.push_back(image.width);
                }
            }
            // A list without images is given too: the library checks that the texts have no places for any.
            if (images.empty()) images.reserve(1);
            given.images = images.data();
            given.image_sizes = image_sizes.data();
            given.image_widths = image_widths.data();
            given.image_counts = image_counts.data();
            given.images_count = images.size();
        }
        if (pixel_values_) {
            given.pixel_values = pixel_values_->data();
            given.pixel_values_size = pixel_values_->size();
        }
        given.pan_and_scan = pan_and_scan_;
        if (outputs_) {
            given.encoder_outputs = outputs_->values.data();
            given.encoder_rows = outputs_->rows;
            given.encoder_length = outputs_->length;
            given.encoder_width = outputs_->width;
        }
        return use(&given);
    }

private:
    enum class Kind { Texts, Ragged, Rectangle };
    struct Outputs {
        Span<const float> values;
        std::size_t rows, length, width;
        /// The encoder outputs are in states_.
        bool is_kept;
    };
    static constexpr const char *EACH = "one for each source";
    static constexpr std::int64_t NONE = 0;

    static Expected<std::size_t> product(const char *field, std::size_t left, std::size_t right) {
        if (right == 0 || left <= SIZE_MAX / right) return left * right;
        const auto found = std::to_string(left) + " times " + std::to_string(right);
        return *detail::expected(T5G_ERROR_INPUT, field, "a size that fits into memory", found);
    }

    Kind kind_ = Kind::Texts;
    std::size_t rows_ = 0, length_ = 0, decoder_length_ = 0;
    std::vector<std::string> texts_;
    std::optional<std::vector<std::string>> decoder_texts_;
    std::optional<std::string> messages_, adapter_;
    std::vector<std::int64_t> ids_, mask_;
    std::vector<std::size_t> lengths_;
    std::optional<std::vector<std::int64_t>> decoder_ids_, totals_;
    std::optional<Error> unequal_;
    std::optional<Outputs> outputs_;
    std::shared_ptr<const States> states_;
    std::optional<std::vector<std::vector<Image>>> images_;
    std::optional<std::vector<float>> pixel_values_;
    std::int64_t pan_and_scan_ = 0;
};

/// Targets to score, one for each source.
class Targets {
public:
    /// Texts; the end token is appended and scored, unless `without_end`.
    static Targets texts(std::vector<std::string> texts, bool without_end = false) {
        Targets targets;
        targets.texts_ = std::move(texts);
        targets.without_end_ = without_end;
        return targets;
    }
    static Targets ids(const std::vector<std::vector<std::int64_t>> &rows) {
        Targets targets;
        targets.are_ids_ = true;
        for (const auto &row : rows) {
            targets.lengths_.push_back(row.size());
            targets.ids_.insert(targets.ids_.end(), row.begin(), row.end());
        }
        return targets;
    }
    /// Also returns cross_attentions.
    Targets &output_attentions(bool told = true) {
        output_attentions_ = told;
        return *this;
    }
    std::size_t rows() const { return are_ids_ ? lengths_.size() : texts_.size(); }
    /// The error of using them as the targets of this many sources, if there is one.
    std::optional<Error> wrong(std::size_t sources) const {
        return detail::of_size(are_ids_ ? "targets.target_ids" : "targets.texts", rows(), sources, "one for each source");
    }
    template <class Use>
    auto with(Use use) const {
        static const std::int64_t none = 0;
        t5g_targets given = t5g_targets_default();
        std::vector<const char *> texts;
        std::vector<std::size_t> sizes;
        given.without_end = without_end_ ? 1 : 0;
        given.output_attentions = output_attentions_ ? 1 : 0;
        if (are_ids_) {
            given.target_ids = ids_.empty() ? &none : ids_.data();
            given.lengths = lengths_.data();
        } else {
            for (const auto &text : texts_) {
                texts.push_back(text.data());
                sizes.push_back(text.size());
            }
            given.texts = texts.data();
            given.text_sizes = sizes.data();
        }
        return use(&given);
    }

private:
    std::vector<std::string> texts_;
    std::vector<std::int64_t> ids_;
    std::vector<std::size_t> lengths_;
    bool are_ids_ = false, without_end_ = false, output_attentions_ = false;
};

/// A piece of a row's first hypothesis.
struct Piece {
    std::size_t row;
    /// -1 with the last text of a row.
    std::int64_t token;
    std::string_view text;
};

/// The position of scores in a target.
struct Position {
    Span<const std::int64_t> source, target;
    std::size_t prompt_length;
};

/// The time limit of a call, from now. A limit of 0 or less has already passed.
using Deadline = std::optional<std::chrono::duration<double>>;

/// Cancellation, deadline and callbacks of one call of a model, an encoder or the engine. A callback that would never
/// be called is an error.
struct Call {
    /// Must outlive the call.
    Cancellation *cancellation = nullptr;
    /// None by default.
    Deadline deadline;
    /// Whether pieces and events have text.
    bool stream_text = true;
    /// False ends the call.
    std::function<bool(const Piece &)> on_piece;
    /// False ends the call.
    std::function<bool()> on_step;
    /// In calls of the engine, these run on its threads.
    std::function<void(const Position &, Span<float>)> logits_processor;
    std::function<std::vector<std::int64_t>(std::size_t row, Span<const std::int64_t> target)> prefix_allowed_tokens;
    /// Only for Engine::call and Engine::async: a row has left the queue. False ends the call.
    std::function<bool(std::size_t row)> on_admitted;
    /// T5G_PRIORITY_…, for requests of an engine while they wait.
    std::int64_t priority = T5G_PRIORITY_NORMAL;
    /// The user or client of a request of an engine: tenants get equal shares.
    std::string tenant;
};

namespace detail {

/// The callbacks of a running call, and the first exception thrown by one of them.
class Callbacks {
public:
    /// For a call that has ended when the function returns.
    explicit Callbacks(const Call &call) : call_(call), given_(t5g_call_default()) {
        given_.user = this;
        given_.cancellation = call.cancellation ? call.cancellation->get() : nullptr;
        // In C, 0 is no deadline.
        if (call.deadline) given_.deadline_seconds = call.deadline->count() <= 0 ? -1 : call.deadline->count();
        if (call.on_piece) {
            given_.stream_text = call.stream_text ? 1 : 0;
            given_.on_piece = piece;
        }
        if (call.on_step) given_.on_step = step;
        if (call.on_admitted) given_.on_admitted = admitted;
        given_.priority = call.priority;
        if (!call.tenant.empty()) given_.tenant = call.tenant.c_str();
        if (call.logits_processor) {
            given_.logits_processor = [](void *user, const t5g_position *at, float *scores, std::size_t count) {
                auto *own = static_cast<Callbacks *>(user);
                own->guard("logits_processor", 0, [&] {
                    Position position{{at->source, at->source_length}, {at->target, at->target_length}, at->prompt_length};
                    own->call_.logits_processor(position, Span<float>(scores, count));
                    return 0;
                });
            };
        }
        if (call.prefix_allowed_tokens) {
            given_.prefix_allowed_tokens = [](void *user, std::size_t row, const std::int64_t *target, std::size_t length,
                                              const std::int64_t **allowed) -> std::size_t {
                static thread_local std::vector<std::int64_t> tokens;
                auto *own = static_cast<Callbacks *>(user);
                const auto ask = [&] {
                    tokens = own->call_.prefix_allowed_tokens(row, {target, length});
                    return 1;
                };
                if (own->guard("prefix_allowed_tokens", 0, ask) == 0) tokens.clear();
                *allowed = tokens.data();
                return tokens.size();
            };
        }
    }
    Callbacks(const Callbacks &) = delete;
    Callbacks &operator=(const Callbacks &) = delete;

    /// Ends a call of a model at its next step after a callback without a return value has thrown.
    Callbacks &ended_by_steps() {
        if (changes_scores()) given_.on_step = step;
        return *this;
    }

    /// Ends a call of the engine at its next piece after a callback without a return value has thrown.
    void ended_by_pieces() {
        if (!changes_scores()) return;
        given_.on_piece = piece;
        if (given_.cancellation == nullptr) given_.cancellation = own_.emplace().get();
    }

    /// The request to cancel after a callback has thrown.
    void ends(t5g_request *request) {
        request_ = request;
        if (has_thrown_) t5g_error_free(t5g_request_cancel(request));
    }

    t5g_call *get() { return &given_; }
    bool streams_text() const { return call_.stream_text; }

    std::optional<Error> wrong() const {
        if (call_.cancellation == nullptr || call_.cancellation->get() != nullptr) return std::nullopt;
        return expected(T5G_ERROR_HANDLE, "call.cancellation", "a live t5g_cancellation", "one that was moved from");
    }

    /// Rethrows the exception of a callback in place of the error that it caused.
    t5g_error *passed(t5g_error *error) const {
#if defined(__cpp_exceptions)
        if (has_thrown_) {
            t5g_error_free(error);
            std::rethrow_exception(thrown_);
        }
#endif
        return error;
    }

    /// The exception of a callback as an error.
    std::optional<Error> thrown() const {
        if (!has_thrown_) return std::nullopt;
        std::string message = "call." + thrown_by_ + ": threw an exception";
#if defined(__cpp_exceptions)
        try {
            std::rethrow_exception(thrown_);
        } catch (const std::exception &error) {
            message += std::string(": ") + error.what();
        } catch (...) {
        }
#endif
        return Error(T5G_ERROR_CANCELLED, message, "call." + thrown_by_, thrown_);
    }

private:
    bool changes_scores() const { return call_.logits_processor || call_.prefix_allowed_tokens; }

    static std::int32_t piece(void *user, const t5g_piece *shown) {
        auto *own = static_cast<Callbacks *>(user);
        if (own->has_thrown_) return 1;
        if (!own->call_.on_piece) return 0;
        std::string_view text = shown->text ? std::string_view(shown->text, shown->text_size) : std::string_view();
        return own->guard("on_piece", 1, [&] { return own->call_.on_piece(Piece{shown->row, shown->token, text}) ? 0 : 1; });
    }

    static std::int32_t step(void *user) {
        auto *own = static_cast<Callbacks *>(user);
        if (own->has_thrown_) return 1;
        return own->guard("on_step", 1, [&] { return !own->call_.on_step || own->call_.on_step() ? 0 : 1; });
    }

    static std::int32_t admitted(void *user, std::size_t row) {
        auto *own = static_cast<Callbacks *>(user);
        if (own->has_thrown_) return 1;
        return own->guard("on_admitted", 1, [&] { return own->call_.on_admitted(row) ? 0 : 1; });
    }

    template <class Work>
    std::int32_t guard(const char *name, std::int32_t otherwise, Work work) {
#if defined(__cpp_exceptions)
        // After the first exception, no further callback is called: the call is about to end.
        if (has_thrown_) return otherwise;
        try {
            return work();
        } catch (...) {
            const std::lock_guard<std::mutex> lock(first_);
            if (!has_thrown_) {
                thrown_ = std::current_exception();
                thrown_by_ = name;
                has_thrown_ = true;
                if (own_) t5g_error_free(t5g_cancellation_cancel(own_->get()));
                if (t5g_request *request = request_) t5g_error_free(t5g_request_cancel(request));
            }
            return otherwise;
        }
#else
        (void)name;
        (void)otherwise;
        return work();
#endif
    }

    const Call &call_;
    t5g_call given_;
    std::optional<Cancellation> own_;
    std::atomic<t5g_request *> request_{nullptr};
    std::mutex first_;
    std::exception_ptr thrown_;
    std::string thrown_by_;
    std::atomic<bool> has_thrown_{false};
};

struct OwnCall {
    Call own;
};

/// The callbacks of a call that continues after the function has returned.
class KeptCallbacks : private OwnCall, public Callbacks {
public:
    explicit KeptCallbacks(Call call) : OwnCall{std::move(call)}, Callbacks(own) {}
};

} // namespace detail

/// A target of a result; its views are valid as long as the result.
struct Hypothesis {
    Span<const std::int64_t> tokens;
    /// T5G_FINISH_….
    std::int64_t finish_reason;
    /// NAN if there is none, like the next two.
    double score, logprob, perplexity;
    Span<const float> logprobs;
    /// The number of most likely tokens at each position, best first.
    std::size_t top_count;
    Span<const std::int64_t> top_tokens;
    Span<const float> top_logprobs;
    /// The number of source tokens as given, padding included, and the attention of each token to each of them.
    std::size_t source_length;
    Span<const float> cross_attentions;
};

class Result {
public:
    explicit Result(t5g_result *result) : handle_(result) {}
    std::size_t rows() const { return t5g_result_rows(handle_.get()); }
    std::size_t count(std::size_t row) const { return t5g_result_count(handle_.get(), row); }
    /// Times and counts; times are NAN unless an engine made the result.
    Returned<t5g_request_stats> stats() const {
        t5g_request_stats stats = t5g_request_stats_default();
        return detail::returned<t5g_request_stats>(t5g_result_stats(handle_.get(), &stats), [&] { return stats; });
    }
    Returned<Hypothesis> hypothesis(std::size_t row, std::size_t index = 0) const & {
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
    Returned<Hypothesis> hypothesis(std::size_t row, std::size_t index = 0) const && = delete;
    Returned<std::string_view> text(std::size_t row, std::size_t index = 0) const & {
        const char *found = nullptr;
        std::size_t size = 0;
        return detail::returned<std::string_view>(t5g_result_text(handle_.get(), row, index, &found, &size),
                                                  [&] { return std::string_view(found, size); });
    }
    Returned<std::string_view> text(std::size_t row, std::size_t index = 0) const && = delete;
    /// JSON, as written by `t5gemma generate --jsonl`.
    Returned<std::string> json() const {
        return detail::text([&](t5g_text **json) { return t5g_result_json(handle_.get(), json); });
    }
    t5g_result *get() const { return handle_.get(); }

private:
    detail::Handle<t5g_result, t5g_result_free> handle_;
};

namespace detail {

/// Queries the sizes, then computes the numbers.
template <class Compute>
Returned<States> states(const Callbacks &callbacks, Compute compute) {
    t5g_states given = t5g_states_default();
    States found;
    t5g_error *error = compute(&given);
    if (error == nullptr) {
        found.values.resize(given.rows * given.length * given.width);
        found.attention_mask.resize(given.rows * given.mask_length);
        given.values = found.values.data();
        given.capacity = found.values.size();
        given.attention_mask = found.attention_mask.data();
        given.mask_capacity = found.attention_mask.size();
        error = compute(&given);
    }
    return returned<States>(callbacks.passed(error), [&] {
        found.rows = given.rows;
        found.length = given.length;
        found.width = given.width;
        found.mask_length = given.mask_length;
        return std::move(found);
    });
}

} // namespace detail

/// Decodes tokens one by one; for one thread at a time.
class TextStream {
public:
    explicit TextStream(t5g_stream *stream) : handle_(stream) {}
    /// Valid until the next call.
    Returned<std::string_view> push(std::int64_t token) & {
        const char *found = nullptr;
        std::size_t size = 0;
        return detail::returned<std::string_view>(t5g_stream_push(handle_.get(), token, &found, &size),
                                                  [&] { return std::string_view(found, size); });
    }
    Returned<std::string_view> push(std::int64_t token) && = delete;
    Returned<std::string_view> finish() & {
        const char *found = nullptr;
        std::size_t size = 0;
        return detail::returned<std::string_view>(t5g_stream_finish(handle_.get(), &found, &size),
                                                  [&] { return std::string_view(found, size); });
    }
    Returned<std::string_view> finish() && = delete;

private:
    detail::Handle<t5g_stream, t5g_stream_free> handle_;
};

class Tokenizer {
public:
    explicit Tokenizer(t5g_tokenizer *tokenizer) : handle_(tokenizer) {}
    static Returned<Tokenizer> open(const std::string &path) {
        if (auto wrong = detail::without_zero("path", path)) return detail::refused<Tokenizer>(std::move(*wrong));
        t5g_tokenizer *made = nullptr;
        return detail::returned<Tokenizer>(t5g_tokenizer_open(path.c_str(), &made), [&] { return Tokenizer(made); });
    }
    Returned<std::vector<std::int64_t>> encode(std::string_view text, std::int32_t kind = T5G_TEXT_SOURCE) const {
        t5g_tokens *tokens = nullptr;
        t5g_error *error = t5g_tokenizer_encode(handle_.get(), text.data(), text.size(), kind, &tokens);
        return detail::returned<std::vector<std::int64_t>>(error, [&] {
            detail::Handle<t5g_tokens, t5g_tokens_free> owned(tokens);
            const std::int64_t *data = t5g_tokens_data(tokens);
            return std::vector<std::int64_t>(data, data + t5g_tokens_size(tokens));
        });
    }
    Returned<std::string> decode(Span<const std::int64_t> tokens, bool special = false) const {
        return detail::text([&](t5g_text **given) {
            return t5g_tokenizer_decode(handle_.get(), tokens.data(), tokens.size(), special ? 1 : 0, given);
        });
    }
    Returned<std::string> decode(const std::vector<std::int64_t> &tokens, bool special = false) const {
        return decode(Span<const std::int64_t>(tokens.data(), tokens.size()), special);
    }
    Returned<std::string> token(std::int64_t id) const {
        return detail::text([&](t5g_text **piece) { return t5g_tokenizer_token(handle_.get(), id, piece); });
    }
    Returned<TextStream> stream(bool special = false) const {
        t5g_stream *made = nullptr;
        return detail::returned<TextStream>(t5g_stream_new(handle_.get(), special ? 1 : 0, &made),
                                            [&] { return TextStream(made); });
    }

private:
    detail::Handle<t5g_tokenizer, t5g_tokenizer_free> handle_;
};

/// A model. Any number of threads may use it at once.
class Model {
public:
    explicit Model(t5g_model *model) : handle_(model) {}
    static Returned<Model> open(const std::string &path, const OpenOptions &options = {}) {
        if (auto wrong = detail::first(detail::without_zero("path", path), options.wrong()))
            return detail::refused<Model>(std::move(*wrong));
        t5g_model *made = nullptr;
        t5g_error *error =
            options.with([&](const t5g_open_options *way) { return t5g_model_open(path.c_str(), way, &made); });
        return detail::returned<Model>(error, [&] { return Model(made); });
    }
    Returned<std::string> describe() const {
        return detail::text([&](t5g_text **json) { return t5g_model_describe(handle_.get(), json); });
    }
    Returned<Tokenizer> tokenizer() const {
        t5g_tokenizer *made = nullptr;
        return detail::returned<Tokenizer>(t5g_model_tokenizer(handle_.get(), &made), [&] { return Tokenizer(made); });
    }
    Returned<std::string> chat(const std::string &messages) const {
        if (auto wrong = detail::without_zero("messages", messages)) return detail::refused<std::string>(std::move(*wrong));
        return detail::text([&](t5g_text **given) { return t5g_model_chat(handle_.get(), messages.c_str(), given); });
    }
    /// Loads the PEFT LoRA adapter in `folder` as `name`, for GenerationOptions::adapter and Sources::adapter.
    Returned<void> load_adapter(const std::string &name, const std::string &folder) const {
        if (auto wrong = detail::first(detail::without_zero("name", name), detail::without_zero("folder", folder)))
            return detail::refused<void>(std::move(*wrong));
        return detail::returned(t5g_model_load_adapter(handle_.get(), name.c_str(), folder.c_str()));
    }
    Returned<void> unload_adapter(const std::string &name) const {
        if (auto wrong = detail::without_zero("name", name)) return detail::refused<void>(std::move(*wrong));
        return detail::returned(t5g_model_unload_adapter(handle_.get(), name.c_str()));
    }
    /// The names of the loaded adapters: a JSON list of strings.
    Returned<std::string> adapters() const {
        return detail::text([&](t5g_text **json) { return t5g_model_adapters(handle_.get(), json); });
    }
    /// Runs typical shapes once, so that the first request does not take longer than others.
    Returned<void> warm_up(const Call &call = {}) const {
        detail::Callbacks callbacks(call);
        if (auto wrong = callbacks.wrong()) return detail::refused<void>(std::move(*wrong));
        return detail::returned(callbacks.passed(t5g_model_warm_up(handle_.get(), callbacks.get())));
    }
    Returned<Result> generate(const Sources &sources, const GenerationOptions &options = {}, const Call &call = {}) const {
        detail::Callbacks callbacks(call);
        if (auto wrong = detail::first(sources.wrong(), options.wrong(), callbacks.wrong()))
            return detail::refused<Result>(std::move(*wrong));
        t5g_result *made = nullptr;
        t5g_error *error = sources.with([&](const t5g_sources *given) {
            return options.with([&](const t5g_generation_options *way) {
                return t5g_model_generate(handle_.get(), given, way, callbacks.ended_by_steps().get(), &made);
            });
        });
        Result result(made);
        return detail::returned<Result>(callbacks.passed(error), [&] { return std::move(result); });
    }
    Returned<Result> score(const Sources &sources, const Targets &targets, std::size_t top_logprobs = 0,
                           const Call &call = {}) const {
        detail::Callbacks callbacks(call);
        if (auto wrong = detail::first(sources.wrong(), targets.wrong(sources.rows()), callbacks.wrong()))
            return detail::refused<Result>(std::move(*wrong));
        t5g_result *made = nullptr;
        t5g_error *error = sources.with([&](const t5g_sources *given) {
            return targets.with([&](const t5g_targets *wanted) {
                return t5g_model_score(handle_.get(), given, wanted, top_logprobs, callbacks.get(), &made);
            });
        });
        Result result(made);
        return detail::returned<Result>(callbacks.passed(error), [&] { return std::move(result); });
    }
    Returned<States> encode(const Sources &sources, const Call &call = {}) const {
        detail::Callbacks callbacks(call);
        if (auto wrong = detail::first(sources.wrong(), callbacks.wrong()))
            return detail::refused<States>(std::move(*wrong));
        return sources.with([&](const t5g_sources *given) {
            return detail::states(callbacks, [&](t5g_states *states) {
                return t5g_model_encode(handle_.get(), given, callbacks.get(), states);
            });
        });
    }
    t5g_model *get() const { return handle_.get(); }

private:
    detail::Handle<t5g_model, t5g_model_free> handle_;
};

/// t5g_engine_options; an empty field is unset.
struct EngineOptions {
    std::optional<std::int64_t> max_rows, max_bytes, max_waiting;
    /// More limits of the queue, unlimited by default.
    std::optional<std::int64_t> max_waiting_rows, max_waiting_tokens, max_waiting_bytes;
    /// The GPUs, each with a copy of the model; all take rows from one queue.
    std::vector<std::int64_t> devices;

    /// Calls `use` with the struct of t5gemma.h.
    template <class Use>
    auto with(Use use) const {
        t5g_engine_options given = t5g_engine_options_default();
        detail::set(given.max_rows, max_rows);
        detail::set(given.max_bytes, max_bytes);
        detail::set(given.max_waiting, max_waiting);
        detail::set(given.max_waiting_rows, max_waiting_rows);
        detail::set(given.max_waiting_tokens, max_waiting_tokens);
        detail::set(given.max_waiting_bytes, max_waiting_bytes);
        if (!devices.empty()) {
            given.devices = devices.data();
            given.device_count = devices.size();
        }
        return use(&given);
    }
};

/// An event of a request: T5G_EVENT_…. The text is valid until the next call with the request.
struct Event {
    std::int64_t kind;
    std::size_t row;
    std::int64_t token;
    std::string_view text;
};

/// A request submitted to an engine; for one thread at a time. Destroying it before its end cancels it.
class Request {
public:
    explicit Request(t5g_request *request, std::unique_ptr<detail::KeptCallbacks> callbacks = nullptr)
        : callbacks_(std::move(callbacks)), handle_(request) {}
    Request(Request &&) = default;
    Request &operator=(Request &&other) noexcept {
        // The engine may run callbacks until the handle is freed.
        handle_ = std::move(other.handle_);
        callbacks_ = std::move(other.callbacks_);
        return *this;
    }
    Returned<Event> poll(std::chrono::duration<double> wait) & {
        t5g_event event = t5g_event_default();
        // A time that has passed leaves 0.
        const double seconds = wait.count() < 0 ? 0 : wait.count();
        t5g_error *error = t5g_request_poll(handle_.get(), seconds, &event);
        if (callbacks_ && (error != nullptr || event.kind == T5G_EVENT_END)) error = callbacks_->passed(error);
        return detail::returned<Event>(error, [&] {
            std::string_view text = event.text ? std::string_view(event.text, event.text_size) : std::string_view();
            return Event{event.kind, event.row, event.token, text};
        });
    }
    Returned<Event> poll(std::chrono::duration<double> wait) && = delete;
    /// May be called from any thread.
    Returned<void> cancel() const { return detail::returned(t5g_request_cancel(handle_.get())); }
    Returned<Result> result() {
        t5g_result *made = nullptr;
        t5g_error *error = t5g_request_result(handle_.get(), &made);
        Result result(made);
        if (callbacks_) error = callbacks_->passed(error);
        return detail::returned<Result>(error, [&] { return std::move(result); });
    }

private:
    std::unique_ptr<detail::KeptCallbacks> callbacks_;
    detail::Handle<t5g_request, t5g_request_free> handle_;
};

/// Continuous batching: generates for many requests at once. Any number of threads may submit requests.
class Engine {
public:
    explicit Engine(t5g_engine *engine) : handle_(engine) {}
    static Returned<Engine> start(const Model &model, const EngineOptions &options = {}) {
        t5g_engine *made = nullptr;
        t5g_error *error =
            options.with([&](const t5g_engine_options *way) { return t5g_engine_new(model.get(), way, &made); });
        return detail::returned<Engine>(error, [&] { return Engine(made); });
    }
    /// Uses `devices`, if there are any.
    static Returned<Engine> start(const Model &model, EngineOptions options, std::vector<std::int64_t> devices) {
        if (!devices.empty()) options.devices = std::move(devices);
        return start(model, options);
    }
    /// Submits a request, whose events the caller polls.
    Returned<Request> submit(const Sources &sources, const GenerationOptions &options, Call call) const {
        auto kept = std::make_unique<detail::KeptCallbacks>(std::move(call));
        if (auto wrong = detail::first(sources.wrong(), options.wrong(), kept->wrong()))
            return detail::refused<Request>(std::move(*wrong));
        kept->get()->stream_text = kept->streams_text() ? 1 : 0;
        t5g_request *made = nullptr;
        t5g_error *error = sources.with([&](const t5g_sources *given) {
            return options.with([&](const t5g_generation_options *way) {
                return t5g_engine_submit(handle_.get(), given, way, kept->get(), &made);
            });
        });
        if (error == nullptr) kept->ends(made);
        Request request(made, std::move(kept));
        return detail::returned<Request>(error, [&] { return std::move(request); });
    }
    Returned<Request> submit(const Sources &sources, const GenerationOptions &options = {}, bool stream_text = false,
                             Deadline deadline = std::nullopt, Cancellation *cancellation = nullptr) const {
        Call call;
        call.stream_text = stream_text;
        call.deadline = deadline;
        call.cancellation = cancellation;
        return submit(sources, options, std::move(call));
    }
    /// Submits a request with callbacks on the engine's threads, which must not block, because all rows in flight wait
    /// for them: on_admitted and on_piece of `call`, then once `on_done` with the result or the error, after which no
    /// callback is called.
    Returned<void> call(const Sources &sources, const GenerationOptions &options,
                        std::function<void(Expected<Result>)> on_done, Call call = {}) const {
        struct Told : detail::KeptCallbacks {
            Told(Call given, std::function<void(Expected<Result>)> told)
                : KeptCallbacks(std::move(given)), on_done(std::move(told)) {}
            std::function<void(Expected<Result>)> on_done;
        };
        if (!on_done) {
            auto wrong = detail::expected(T5G_ERROR_ARGUMENT, "on_done", "a function", "none");
            return detail::refused<void>(std::move(*wrong));
        }
        auto told = std::make_unique<Told>(std::move(call), std::move(on_done));
        if (auto wrong = detail::first(sources.wrong(), options.wrong(), told->wrong()))
            return detail::refused<void>(std::move(*wrong));
        told->ended_by_pieces();
        t5g_error *error = sources.with([&](const t5g_sources *given) {
            return options.with([&](const t5g_generation_options *way) {
                return t5g_engine_call(handle_.get(), given, way, told->get(),
                                       [](void *user, t5g_result *made, t5g_error *failed) noexcept {
                                           auto *callbacks = static_cast<detail::Callbacks *>(user);
                                           std::unique_ptr<Told> own(static_cast<Told *>(callbacks));
                                           Result result(made);
                                           if (auto thrown = own->thrown()) {
                                               t5g_error_free(failed);
                                               own->on_done(std::move(*thrown));
                                           } else if (failed != nullptr) {
                                               own->on_done(Error(failed));
                                           } else {
                                               own->on_done(std::move(result));
                                           }
                                       });
            });
        });
        // From here on, on_done frees it.
        if (error == nullptr) (void)told.release();
        return detail::returned(error);
    }
    Returned<void> call(const Sources &sources, const GenerationOptions &options,
                        std::function<void(Expected<Result>)> on_done, std::function<bool(const Piece &)> on_piece,
                        Deadline deadline = std::nullopt, Cancellation *cancellation = nullptr) const {
        Call given;
        given.on_piece = std::move(on_piece);
        given.deadline = deadline;
        given.cancellation = cancellation;
        return call(sources, options, std::move(on_done), std::move(given));
    }
    /// Submits sources and waits for the result.
    Returned<std::future<Returned<Result>>> async(const Sources &sources, const GenerationOptions &options = {},
                                                  Call call = {}) const {
        auto promise = std::make_shared<std::promise<Returned<Result>>>();
        auto future = promise->get_future();
        auto on_done = [promise](Expected<Result> done) {
#ifdef T5GEMMA_EXPECTED
            promise->set_value(std::move(done));
#else
            if (done) promise->set_value(*std::move(done));
            else promise->set_exception(done.error().cause() ? done.error().cause() : std::make_exception_ptr(done.error()));
#endif
        };
#ifdef T5GEMMA_EXPECTED
        auto taken = this->call(sources, options, std::move(on_done), std::move(call));
        if (!taken) return std::move(taken).error();
#else
        this->call(sources, options, std::move(on_done), std::move(call));
#endif
        return future;
    }
    Returned<t5g_engine_counts> stats() const {
        t5g_engine_counts counts = t5g_engine_counts_default();
        return detail::returned<t5g_engine_counts>(t5g_engine_stats(handle_.get(), &counts), [&] { return counts; });
    }
    /// The same for one copy of the model: its rows in flight and its steps.
    Returned<t5g_engine_counts> stats_of_copy(std::size_t copy) const {
        t5g_engine_counts counts = t5g_engine_counts_default();
        t5g_error *error = t5g_engine_stats_of_copy(handle_.get(), copy, &counts);
        return detail::returned<t5g_engine_counts>(error, [&] { return counts; });
    }
    /// Stops accepting requests and waits until all accepted ones have ended.
    Returned<void> drain() const { return detail::returned(t5g_engine_drain(handle_.get())); }
    /// Cancels all requests and ends the engine.
    Returned<void> shutdown() const { return detail::returned(t5g_engine_shutdown(handle_.get())); }

private:
    detail::Handle<t5g_engine, t5g_engine_free> handle_;
};

/// An encoder or classifier. Any number of threads may use it at once.
class Encoder {
public:
    explicit Encoder(t5g_encoder *encoder) : handle_(encoder) {}
    static Returned<Encoder> open(const std::string &path, const OpenOptions &options = {}) {
        if (auto wrong = detail::first(detail::without_zero("path", path), options.wrong()))
            return detail::refused<Encoder>(std::move(*wrong));
        t5g_encoder *made = nullptr;
        t5g_error *error =
            options.with([&](const t5g_open_options *way) { return t5g_encoder_open(path.c_str(), way, &made); });
        return detail::returned<Encoder>(error, [&] { return Encoder(made); });
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
        if (auto wrong = detail::first(sources.wrong(), callbacks.wrong()))
            return detail::refused<States>(std::move(*wrong));
        return sources.with([&](const t5g_sources *given) {
            return detail::states(callbacks, [&](t5g_states *states) {
                return t5g_encoder_encode(handle_.get(), given, pooling, normalize ? 1 : 0, callbacks.get(), states);
            });
        });
    }
    Returned<States> classify(const Sources &sources, std::int32_t function = T5G_SCORES_DEFAULT,
                              const Call &call = {}) const {
        detail::Callbacks callbacks(call);
        if (auto wrong = detail::first(sources.wrong(), callbacks.wrong()))
            return detail::refused<States>(std::move(*wrong));
        return sources.with([&](const t5g_sources *given) {
            return detail::states(callbacks, [&](t5g_states *states) {
                return t5g_encoder_classify(handle_.get(), given, function, callbacks.get(), states);
            });
        });
    }

private:
    detail::Handle<t5g_encoder, t5g_encoder_free> handle_;
};

} // inline namespace
} // namespace t5g

#undef T5GEMMA_MODE

#endif
