// Numbers of the engines on Triton's metrics port, beside those that Triton counts itself.
#ifndef T5GEMMA_TRITON_METRICS_H
#define T5GEMMA_TRITON_METRICS_H

#include <memory>
#include <string>
#include <vector>

#include <t5gemma.hpp>

#include "triton.h"

/// The metric families, made once for all models. Without metrics in Triton they are empty.
class Families {
public:
    Families();
    ~Families();
    Families(const Families &) = delete;
    Families &operator=(const Families &) = delete;

    TRITONSERVER_MetricFamily *in_flight() const { return in_flight_; }
    const std::vector<TRITONSERVER_MetricFamily *> &of_engines() const { return of_engines_; }

private:
    TRITONSERVER_MetricFamily *in_flight_;
    std::vector<TRITONSERVER_MetricFamily *> of_engines_;
};

/// A metric with a label.
class Metric {
public:
    Metric(TRITONSERVER_MetricFamily *family, const char *label, const std::string &value);
    ~Metric();
    Metric(Metric &&other) noexcept : metric_(std::exchange(other.metric_, nullptr)), total_(other.total_) {}
    Metric &operator=(Metric &&) = delete;

    void set(double value);
    /// Sets a counter, which only grows.
    void raise_to(double total);

private:
    TRITONSERVER_Metric *metric_ = nullptr;
    double total_ = 0;
};

/// The metrics of an engine; for one thread at a time.
class EngineMetrics {
public:
    EngineMetrics(const std::shared_ptr<const Families> &families, const std::string &engine);
    void update(const t5g_engine_counts &counts);

private:
    std::shared_ptr<const Families> families_;
    std::vector<Metric> metrics_;
};

#endif
