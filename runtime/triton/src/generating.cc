#include "generating.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string_view>

#include "failure.h"
#include "sources.h"

namespace {

constexpr const char *FINISH_REASONS[] = {"", "eos", "length", "stop_string", "time", "constraint", "constraint_incomplete"};

/// Options whose value is a text, even if it could be read as a number or a flag.
bool is_text(std::string_view option) {
    return option == "regex" || option == "grammar" || option == "adapter" || option == "early_stopping";
}

/// Generation options: those of the model, of the parameter `options`, and of the parameters of their names. Parameters of
/// Triton hold no lists or objects, so these may be JSON in a text.
Json options_of(const Settings &settings, Json parameters) {
    Json options = settings.options;
    std::optional<Json> more;
    if (const auto text = parameters.remove("options")) {
        try {
            more = Json::parse(text->scalar());
        } catch (const std::invalid_argument &error) {
            throw Failure(TRITONSERVER_ERROR_INVALID_ARG, std::string("parameters.options: ") + error.what());
        }
        if (more->kind() != Json::Kind::Object)
            throw Failure::invalid("parameters.options", "a JSON object of generation options", more->write());
        for (auto &[name, value] : more->members()) options.set(name, value);
    }
    for (auto &[name, value] : parameters.members()) {
        if (more && more->find(name))
            throw Failure::invalid("parameters." + name, "the option in one place", "it in parameters.options, too");
        if (value.kind() == Json::Kind::Text && !is_text(name)) {
            try {
                Json parsed = Json::parse(value.scalar());
                // A stop string may look like a number.
                const bool is_compound = parsed.kind() == Json::Kind::List || parsed.kind() == Json::Kind::Object;
                if (is_compound || name != "stop_strings") value = std::move(parsed);
            } catch (const std::invalid_argument &) {
                // Then it is a text, about which the library decides.
            }
        }
        options.set(name, std::move(value));
    }
    return options;
}

/// A tensor of all hypotheses, those of shorter targets filled up.
template <class Number, class Source>
Output padded(const char *name, std::vector<std::int64_t> shape, const std::vector<t5g::Hypothesis> &all, std::size_t width,
              Number filler, Source source) {
    std::vector<Number> numbers;
    numbers.reserve(all.size() * width);
    for (const auto &hypothesis : all) {
        const auto values = source(hypothesis);
        numbers.insert(numbers.end(), values.begin(), values.end());
        numbers.resize(numbers.size() + width - std::min(width, values.size()), filler);
    }
    return Output::of(name, std::move(shape), numbers);
}

/// Every output that the result has numbers for. Of a stream, `text` and `tokens` are what has not been sent.
struct Unsent {
    std::string text;
    std::vector<std::int64_t> tokens;
};

std::vector<Output> outputs_of(const Request &request, const t5g::Result &result, const Unsent *unsent) {
    const Served &served = request.hosted().served();
    const std::size_t rows = result.rows(), count = unsent ? 1 : rows ? result.count(0) : 0;
    std::vector<t5g::Hypothesis> all;
    std::vector<std::string> texts, reasons;
    std::vector<std::int64_t> lengths;
    std::size_t longest = 0, widest = 0;
    for (std::size_t row = 0; row < rows; row++) {
        for (std::size_t at = 0; at < count; at++) {
            const t5g::Hypothesis &hypothesis = all.emplace_back(result.hypothesis(row, at));
            if (served.has_tokenizer()) texts.emplace_back(result.text(row, at));
            const auto reason = static_cast<std::size_t>(hypothesis.finish_reason);
            reasons.emplace_back(reason < std::size(FINISH_REASONS) ? FINISH_REASONS[reason] : "");
            lengths.push_back(static_cast<std::int64_t>(hypothesis.tokens.size()));
            longest = std::max(longest, hypothesis.tokens.size());
            widest = std::max(widest, hypothesis.source_length);
        }
    }
    std::vector<std::int64_t> shape = {static_cast<std::int64_t>(rows)};
    if (count != 1 || request.hosted().settings().is_batched) shape.push_back(static_cast<std::int64_t>(count));
    const auto with = [&](std::initializer_list<std::size_t> more) {
        std::vector<std::int64_t> whole = shape;
        for (const std::size_t size : more) whole.push_back(static_cast<std::int64_t>(size));
        return whole;
    };

    std::vector<Output> outputs;
    if (unsent && served.has_tokenizer()) texts = {unsent->text};
    if (served.has_tokenizer()) outputs.push_back(Output::of("text_output", shape, texts));
    if (unsent) outputs.push_back(Output::of("output_ids", with({unsent->tokens.size()}), unsent->tokens));
    else outputs.push_back(padded("output_ids", with({longest}), all, longest, served.pad_token_id(), [](const auto &it) { return it.tokens; }));
    outputs.push_back(Output::of("finish_reason", shape, reasons));
    if (request.names("output_lengths")) outputs.push_back(Output::of("output_lengths", shape, lengths));
    const auto numbers = [&](const char *name, double t5g::Hypothesis::*field) {
        std::vector<float> values;
        for (const auto &hypothesis : all) values.push_back(static_cast<float>(hypothesis.*field));
        // Not a number: the request did not ask for it.
        if (!values.empty() && !std::isnan(values.front())) outputs.push_back(Output::of(name, shape, values));
    };
    numbers("scores", &t5g::Hypothesis::score);
    numbers("sequence_logprobs", &t5g::Hypothesis::logprob);
    if (all.empty()) return outputs;
    const std::size_t top = all.front().top_count;
    if (!all.front().logprobs.empty())
        outputs.push_back(padded("logprobs", with({longest}), all, longest, 0.0f, [](const auto &it) { return it.logprobs; }));
    if (top) {
        const auto pad = served.pad_token_id();
        outputs.push_back(padded("top_ids", with({longest, top}), all, longest * top, pad, [](const auto &it) { return it.top_tokens; }));
        outputs.push_back(padded("top_logprobs", with({longest, top}), all, longest * top, 0.0f, [](const auto &it) { return it.top_logprobs; }));
    }
    if (widest) {
        const auto attentions = [&](const t5g::Hypothesis &it) {
            std::vector<float> wide;
            for (std::size_t token = 0; token < it.tokens.size(); token++) {
                const float *own = it.cross_attentions.begin() + token * it.source_length;
                wide.insert(wide.end(), own, own + it.source_length);
                wide.resize((token + 1) * widest);
            }
            return wide;
        };
        outputs.push_back(padded("cross_attentions", with({longest, widest}), all, longest * widest, 0.0f, attentions));
    }
    if (request.names("result")) outputs.push_back(Output::of("result", {1}, std::vector<std::string>{result.json()}));
    return outputs;
}

/// Sends the tokens of a request one by one, those without whole characters with the next.
void stream(Request &request, const t5g::Piece &piece, Unsent &unsent) {
    if (piece.token >= 0) unsent.tokens.push_back(piece.token);
    unsent.text += piece.text;
    const bool has_tokenizer = request.hosted().served().has_tokenizer();
    // The last text of a row goes with the final response.
    if (piece.token < 0 || (has_tokenizer ? unsent.text.empty() : unsent.tokens.empty())) return;
    std::vector<std::int64_t> shape = {1}, wide = {1};
    if (request.hosted().settings().is_batched) {
        shape.push_back(1);
        wide.push_back(1);
    }
    wide.push_back(static_cast<std::int64_t>(unsent.tokens.size()));
    std::vector<Output> outputs;
    if (has_tokenizer) outputs.push_back(Output::of("text_output", shape, std::vector<std::string>{unsent.text}));
    outputs.push_back(Output::of("output_ids", wide, unsent.tokens));
    request.send(outputs);
    unsent = Unsent();
}

bool take_stream(Json &parameters, bool is_decoupled) {
    const auto given = parameters.remove("stream");
    if (!given) return is_decoupled;
    if (given->scalar() != "true" && given->scalar() != "false")
        throw Failure::invalid("parameters.stream", "true or false", given->write());
    return is_decoupled && given->scalar() == "true";
}

} // namespace

void generate(std::unique_ptr<Request> request) {
    Request *const running = request.get();
    try {
        const Settings &settings = request->hosted().settings();
        Json parameters = request->parameters();
        const bool streams = take_stream(parameters, settings.is_decoupled);
        t5g::Call call = request->call(parameters);
        t5g::GenerationOptions options;
        const Json wanted = options_of(settings, std::move(parameters));
        options.json = wanted.write();
        const t5g::Sources sources = sources_of(request->inputs(), true);
        const std::string targets = wanted.at("num_return_sequences").scalar();
        if (streams && (sources.rows() != 1 || (!targets.empty() && targets != "1")))
            throw Failure::invalid("parameters.stream", "false for several targets", "true");

        // Callbacks come from the engine's thread, one at a time.
        const auto unsent = streams ? std::make_shared<Unsent>() : nullptr;
        call.on_admitted = [running](std::size_t) {
            running->admitted();
            return true;
        };
        if (streams) {
            call.stream_text = request->hosted().served().has_tokenizer();
            call.on_piece = [running, unsent](const t5g::Piece &piece) {
                stream(*running, piece, *unsent);
                return true;
            };
        }
        const auto on_done = [running, unsent](t5g::Expected<t5g::Result> done) {
            std::unique_ptr<Request> own(running);
            if (done) Request::end(std::move(own), [&] { return outputs_of(*running, *done, unsent.get()); });
            else Request::fail(std::move(own), done.error().cause() ? done.error().cause() : std::make_exception_ptr(done.error()));
        };
        request->hosted().served().engine().call(sources, options, on_done, std::move(call));
        // on_done owns it now, and may have ended it.
        (void)request.release();
    } catch (...) {
        Request::fail(std::move(request), std::current_exception());
    }
}

const char *outputs_of_generators() {
    return R"([{"name":"text_output","data_type":"TYPE_STRING","dims":[-1]},
        {"name":"output_ids","data_type":"TYPE_INT64","dims":[-1,-1]},
        {"name":"finish_reason","data_type":"TYPE_STRING","dims":[-1]},
        {"name":"output_lengths","data_type":"TYPE_INT64","dims":[-1]},
        {"name":"scores","data_type":"TYPE_FP32","dims":[-1]},
        {"name":"sequence_logprobs","data_type":"TYPE_FP32","dims":[-1]},
        {"name":"logprobs","data_type":"TYPE_FP32","dims":[-1,-1]},
        {"name":"top_ids","data_type":"TYPE_INT64","dims":[-1,-1,-1]},
        {"name":"top_logprobs","data_type":"TYPE_FP32","dims":[-1,-1,-1]},
        {"name":"cross_attentions","data_type":"TYPE_FP32","dims":[-1,-1,-1]},
        {"name":"result","data_type":"TYPE_STRING","dims":[1]}])";
}
