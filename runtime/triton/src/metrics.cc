#include "metrics.h"

#include "failure.h"

namespace {

struct Kind {
    TRITONSERVER_MetricKind kind;
    const char *name, *help;
    double (*value)(const t5g_engine_counts &counts);
};

/// The names are those of `t5gemma serve`.
constexpr Kind OF_ENGINES[] = {
    {TRITONSERVER_METRIC_KIND_GAUGE, "t5gemma_requests_waiting", "Requests with a source that has not been admitted.",
     [](const t5g_engine_counts &it) { return static_cast<double>(it.waiting_requests); }},
    {TRITONSERVER_METRIC_KIND_GAUGE, "t5gemma_sources_waiting", "Sources that have not been admitted.",
     [](const t5g_engine_counts &it) { return static_cast<double>(it.waiting_sources); }},
    {TRITONSERVER_METRIC_KIND_GAUGE, "t5gemma_rows_waiting", "Target rows that these will have.",
     [](const t5g_engine_counts &it) { return static_cast<double>(it.waiting_rows); }},
    {TRITONSERVER_METRIC_KIND_GAUGE, "t5gemma_sources_in_flight", "Sources in flight.",
     [](const t5g_engine_counts &it) { return static_cast<double>(it.sources); }},
    {TRITONSERVER_METRIC_KIND_GAUGE, "t5gemma_rows_in_flight", "Target rows in flight.",
     [](const t5g_engine_counts &it) { return static_cast<double>(it.rows); }},
    {TRITONSERVER_METRIC_KIND_GAUGE, "t5gemma_planned_bytes", "Bytes that the rows in flight may need.",
     [](const t5g_engine_counts &it) { return static_cast<double>(it.planned_bytes); }},
    {TRITONSERVER_METRIC_KIND_COUNTER, "t5gemma_steps_total", "Runs of a decoder graph.",
     [](const t5g_engine_counts &it) { return static_cast<double>(it.steps); }},
    {TRITONSERVER_METRIC_KIND_COUNTER, "t5gemma_stepped_rows_total", "Target rows of all runs.",
     [](const t5g_engine_counts &it) { return static_cast<double>(it.stepped_rows); }},
    {TRITONSERVER_METRIC_KIND_COUNTER, "t5gemma_source_tokens_total", "Tokens of the sources that were admitted.",
     [](const t5g_engine_counts &it) { return static_cast<double>(it.source_tokens); }},
    {TRITONSERVER_METRIC_KIND_COUNTER, "t5gemma_target_tokens_total", "Tokens of the finished targets.",
     [](const t5g_engine_counts &it) { return static_cast<double>(it.new_tokens); }},
};

TRITONSERVER_MetricFamily *family(TRITONSERVER_MetricKind kind, const char *name, const char *help) {
    TRITONSERVER_MetricFamily *made = nullptr;
    TRITONSERVER_Error *error = TRITONSERVER_MetricFamilyNew(&made, kind, name, help);
    if (!error) return made;
    // As when Triton was started or built without metrics.
    TRITONSERVER_ErrorDelete(error);
    return nullptr;
}

} // namespace

Families::Families()
    : in_flight_(family(TRITONSERVER_METRIC_KIND_GAUGE, "t5gemma_requests_in_flight", "Requests that are not answered yet.")) {
    for (const Kind &kind : OF_ENGINES) of_engines_.push_back(family(kind.kind, kind.name, kind.help));
    if (!in_flight_) log(TRITONSERVER_LOG_WARN, "Triton has no metrics for backends: there will be no t5gemma_... metrics");
}

Families::~Families() {
    if (in_flight_) log_failed(TRITONSERVER_MetricFamilyDelete(in_flight_));
    for (TRITONSERVER_MetricFamily *family : of_engines_)
        if (family) log_failed(TRITONSERVER_MetricFamilyDelete(family));
}

Metric::Metric(TRITONSERVER_MetricFamily *family, const char *label, const std::string &value) {
    if (!family) return;
    TRITONSERVER_Parameter *given = TRITONSERVER_ParameterNew(label, TRITONSERVER_PARAMETER_STRING, value.c_str());
    const TRITONSERVER_Parameter *labels[] = {given};
    log_failed(TRITONSERVER_MetricNew(&metric_, family, labels, 1));
    TRITONSERVER_ParameterDelete(given);
}

Metric::~Metric() {
    if (metric_) log_failed(TRITONSERVER_MetricDelete(metric_));
}

void Metric::set(double value) {
    if (metric_) log_failed(TRITONSERVER_MetricSet(metric_, value));
}

void Metric::raise_to(double total) {
    if (metric_ && total > total_) log_failed(TRITONSERVER_MetricIncrement(metric_, total - total_));
    total_ = total;
}

EngineMetrics::EngineMetrics(const std::shared_ptr<const Families> &families, const std::string &engine)
    : families_(families) {
    for (TRITONSERVER_MetricFamily *family : families_->of_engines()) metrics_.emplace_back(family, "engine", engine);
}

void EngineMetrics::update(const t5g_engine_counts &counts) {
    std::size_t at = 0;
    for (const Kind &kind : OF_ENGINES) {
        Metric &metric = metrics_[at++];
        if (kind.kind == TRITONSERVER_METRIC_KIND_GAUGE) metric.set(kind.value(counts));
        else metric.raise_to(kind.value(counts));
    }
}
