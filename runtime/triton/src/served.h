// Opened model folders. All models of the process that name the same folder share what is opened, and with it one engine.
#ifndef T5GEMMA_TRITON_SERVED_H
#define T5GEMMA_TRITON_SERVED_H

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include <t5gemma.hpp>

#include "metrics.h"
#include "settings.h"

class Served {
public:
    /// Opens the folder, or returns what another model has opened. Throws Failure if that has other options.
    static std::shared_ptr<Served> open(const Settings &settings, const std::shared_ptr<const Families> &families);

    bool generates() const { return generator_.has_value(); }
    /// Only if it generates.
    const t5g::Engine &engine() const { return generator_->engine; }
    /// Only if it does not.
    const t5g::Encoder &encoder() const { return *encoder_; }
    const std::string &task() const { return task_; }
    /// T5G_POOLING_… of the vectors of task feature-extraction: the model's own, or mean.
    std::int32_t pooling() const { return pooling_; }
    bool has_tokenizer() const { return has_tokenizer_; }
    std::int64_t pad_token_id() const { return pad_token_id_; }
    std::int64_t hidden_size() const { return hidden_size_; }
    const std::vector<std::string> &labels() const { return labels_; }
    /// Brings the engine's numbers to Triton's metrics port. Returns whether nothing is in flight and nothing waits.
    bool update_metrics();

private:
    struct Generator {
        t5g::Model model;
        t5g::Engine engine;
    };
    Served(const Settings &settings, const std::shared_ptr<const Families> &families);
    void check_same(const Settings &settings) const;
    void describe(const Json &described);

    std::string opened_by_;
    std::map<std::string, std::string> options_;
    std::optional<Generator> generator_;
    std::optional<t5g::Encoder> encoder_;
    std::string task_;
    std::int32_t pooling_ = T5G_POOLING_MEAN;
    bool has_tokenizer_ = false;
    std::int64_t pad_token_id_ = 0, hidden_size_ = 0;
    std::vector<std::string> labels_;
    std::mutex updating_;
    std::optional<EngineMetrics> metrics_;
};

#endif
