#include "encoding.h"

#include <algorithm>

#include "failure.h"
#include "sources.h"

namespace {

bool flag(Json &parameters, const char *name, bool otherwise) {
    const auto given = parameters.remove(name);
    if (!given) return otherwise;
    if (given->scalar() != "true" && given->scalar() != "false")
        throw Failure::invalid(std::string("parameters.") + name, "true or false", given->write());
    return given->scalar() == "true";
}

std::int32_t pooling(Json &parameters, std::int32_t otherwise) {
    const auto given = parameters.remove("pooling");
    if (!given) return otherwise;
    const char *const names[] = {"none", "mean", "first", "last"};
    for (std::int32_t at = T5G_POOLING_NONE; at <= T5G_POOLING_LAST; at++)
        if (given->scalar() == names[at]) return at;
    throw Failure::invalid("parameters.pooling", "none, mean, first or last", given->write());
}

void expect_no_more(const Json &parameters) {
    if (parameters.members().empty()) return;
    throw Failure(TRITONSERVER_ERROR_INVALID_ARG,
                  "parameters." + parameters.members().front().first + ": expected no such parameter for a model that encodes");
}

std::vector<std::int64_t> shape(std::initializer_list<std::size_t> sizes) {
    std::vector<std::int64_t> shape;
    for (const std::size_t size : sizes) shape.push_back(static_cast<std::int64_t>(size));
    return shape;
}

std::vector<Output> vectors(const Served &served, const t5g::Sources &sources, Json &parameters, const t5g::Call &call) {
    const std::int32_t way = pooling(parameters, served.pooling());
    const bool normalizes = flag(parameters, "normalize", way != T5G_POOLING_NONE);
    expect_no_more(parameters);
    t5g::States states = served.encoder().encode(sources, way, normalizes, call);
    if (way != T5G_POOLING_NONE) return {Output::of("embedding", shape({states.rows, states.width}), states.values)};
    return {Output::of("last_hidden_state", shape({states.rows, states.length, states.width}), states.values),
            Output::of("output_mask", shape({states.rows, states.mask_length}), states.attention_mask)};
}

std::vector<Output> scores(const Served &served, const t5g::Sources &sources, Json &parameters, const t5g::Call &call) {
    const std::int32_t function = flag(parameters, "raw_scores", false) ? T5G_SCORES_NONE : T5G_SCORES_DEFAULT;
    expect_no_more(parameters);
    t5g::States states = served.encoder().classify(sources, function, call);
    if (served.task() == "token-classification")
        return {Output::of("scores", shape({states.rows, states.length, states.width}), states.values),
                Output::of("output_mask", shape({states.rows, states.mask_length}), states.attention_mask)};
    std::vector<std::string> best;
    for (std::size_t row = 0; row < states.rows; row++) {
        const auto first = states.values.begin() + static_cast<std::ptrdiff_t>(row * states.width);
        const auto at = static_cast<std::size_t>(std::max_element(first, first + static_cast<std::ptrdiff_t>(states.width)) - first);
        best.push_back(at < served.labels().size() ? served.labels()[at] : "");
    }
    std::vector<Output> outputs = {Output::of("scores", shape({states.rows, states.width}), states.values)};
    outputs.push_back(Output::of("label", shape({states.rows}), best));
    return outputs;
}

} // namespace

void encode(std::unique_ptr<Request> request) {
    Request &running = *request;
    running.admitted();
    std::vector<Output> outputs;
    try {
        Json parameters = running.parameters();
        const t5g::Call call = running.call(parameters);
        const t5g::Sources sources = sources_of(running.inputs(), false);
        const Served &served = running.hosted().served();
        outputs = served.task() == "feature-extraction" || running.hosted().settings().is_encoder
                      ? vectors(served, sources, parameters, call)
                      : scores(served, sources, parameters, call);
        if (running.hosted().settings().is_batched)
            for (Output &output : outputs)
                if (output.shape.size() == 1) output.shape.push_back(1);
    } catch (...) {
        Request::fail(std::move(request), std::current_exception());
        return;
    }
    Request::end(std::move(request), [&] { return std::move(outputs); });
}

std::string outputs_of_encoders(const Served &served) {
    const std::string width = std::to_string(served.hidden_size()), labels = std::to_string(served.labels().size());
    const std::string mask = R"({"name":"output_mask","data_type":"TYPE_INT64","dims":[-1,-1]})";
    if (served.task() == "token-classification")
        return R"([{"name":"scores","data_type":"TYPE_FP32","dims":[-1,-1,)" + labels + "]}," + mask + "]";
    if (served.task() == "text-classification")
        return R"([{"name":"scores","data_type":"TYPE_FP32","dims":[-1,)" + labels +
               R"(]},{"name":"label","data_type":"TYPE_STRING","dims":[-1]}])";
    return R"([{"name":"embedding","data_type":"TYPE_FP32","dims":[-1,)" + width +
           R"(]},{"name":"last_hidden_state","data_type":"TYPE_FP32","dims":[-1,-1,)" + width + "]}," + mask + "]";
}
