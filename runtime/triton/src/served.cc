#include "served.h"

#include <sys/stat.h>

#include <cstdlib>
#include <set>

#include "failure.h"

namespace {

/// A folder that is being opened or is open.
struct Slot {
    std::mutex opening;
    std::weak_ptr<Served> served;
};

/// The slot of a folder. One that was exported anew is another one, so that reloading a model opens the new files.
std::shared_ptr<Slot> slot_of(const Settings &settings) {
    struct stat manifest {};
    if (stat((settings.folder + "/manifest.json").c_str(), &manifest) != 0)
        throw Failure(TRITONSERVER_ERROR_NOT_FOUND, "model: expected the manifest.json of a model folder in " + settings.folder);
    const std::string key = settings.folder + '\0' + std::to_string(manifest.st_dev) + '\0' + std::to_string(manifest.st_ino) +
                            '\0' + std::to_string(manifest.st_mtim.tv_sec) + '\0' + std::to_string(manifest.st_mtim.tv_nsec) + '\0' +
                            (settings.is_encoder ? "e" : "g");
    static std::mutex mutex;
    static std::map<std::string, std::shared_ptr<Slot>> slots;
    const std::lock_guard<std::mutex> lock(mutex);
    for (auto it = slots.begin(); it != slots.end();)
        it = it->second.use_count() == 1 && it->second->served.expired() ? slots.erase(it) : std::next(it);
    auto &slot = slots[key];
    if (!slot) slot = std::make_shared<Slot>();
    return slot;
}

/// Whether a tokenizer can be loaded; models for token ids have none.
template <class Load>
bool is_there(Load load) {
    try {
        load();
        return true;
    } catch (const t5g::Error &error) {
        if (error.code() != T5G_ERROR_TOKENIZER) throw;
        return false;
    }
}

std::int64_t integer(const Json &json) { return std::strtoll(json.scalar().c_str(), nullptr, 10); }

} // namespace

std::shared_ptr<Served> Served::open(const Settings &settings, const std::shared_ptr<const Families> &families) {
    const std::shared_ptr<Slot> slot = slot_of(settings);
    const std::lock_guard<std::mutex> lock(slot->opening);
    if (auto served = slot->served.lock()) {
        served->check_same(settings);
        log(TRITONSERVER_LOG_INFO, "model '" + settings.name + "' shares what '" + served->opened_by_ + "' has opened");
        return served;
    }
    std::shared_ptr<Served> served(new Served(settings, families));
    slot->served = served;
    return served;
}

Served::Served(const Settings &settings, const std::shared_ptr<const Families> &families)
    : opened_by_(settings.name), options_(settings.shared) {
    std::optional<t5g::Model> model;
    if (!settings.is_encoder) {
        try {
            model = t5g::Model::open(settings.folder, settings.open);
        } catch (const t5g::Error &error) {
            // A folder for another task, or none that can be used: the encoder will say.
            if (error.code() != T5G_ERROR_MODEL) throw;
        }
    }
    if (!model) {
        encoder_ = t5g::Encoder::open(settings.folder, settings.open);
        describe(Json::parse(encoder_->describe()));
        const t5g::Sources sources = t5g::Sources::ids({{pad_token_id_}});
        if (settings.warms_up && labels_.empty()) (void)encoder_->encode(sources, pooling_);
        if (settings.warms_up && !labels_.empty()) (void)encoder_->classify(sources);
        return;
    }
    has_tokenizer_ = is_there([&] { (void)model->tokenizer(); });
    for (const auto &[name, folder] : settings.adapters) model->load_adapter(name, folder);
    describe(Json::parse(model->describe()));
    if (settings.warms_up) model->warm_up();
    t5g::Engine engine = t5g::Engine::start(*model, settings.engine);
    generator_.emplace(Generator{*std::move(model), std::move(engine)});
    metrics_.emplace(families, settings.name);
    update_metrics();
}

void Served::describe(const Json &described) {
    task_ = described.at("task").scalar();
    pad_token_id_ = integer(described.at("pad_token_id"));
    hidden_size_ = integer(described.at("hidden_size"));
    // Without pooling of its own, a model's states are pooled by their mean, as by `t5gemma serve`.
    const std::string &pooling = described.at("pooling").scalar();
    pooling_ = pooling == "first" ? T5G_POOLING_FIRST : pooling == "last" ? T5G_POOLING_LAST : T5G_POOLING_MEAN;
    for (const Json &label : described.at("labels").items()) labels_.push_back(label.scalar());
}

void Served::check_same(const Settings &settings) const {
    // Not only those of `settings`: which model opens the folder is a matter of chance.
    std::set<std::string> keys;
    for (const auto *options : {&settings.shared, &options_})
        for (const auto &[key, value] : *options) keys.insert(key);
    const auto written = [](const std::map<std::string, std::string> &options, const std::string &key) {
        const auto found = options.find(key);
        return found == options.end() ? "none" : "'" + found->second + "'";
    };
    for (const std::string &key : keys) {
        const std::string own = written(options_, key), other = written(settings.shared, key);
        if (own == other) continue;
        throw Failure::invalid("parameters." + key,
                               own + " as in model '" + opened_by_ + "', with which this one shares the engine of " + settings.folder,
                               other);
    }
}

bool Served::update_metrics() {
    if (!generator_) return true;
    const std::lock_guard<std::mutex> lock(updating_);
    const auto stats = generator_->engine.stats();
    metrics_->update(stats);
    return stats.sources == 0 && stats.waiting_requests == 0;
}
