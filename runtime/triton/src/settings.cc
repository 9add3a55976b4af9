#include "settings.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <climits>
#include <cstdlib>

#include "failure.h"

namespace {

/// The parameters of an opened folder and its engine.
constexpr std::array SHARED = {"adapters",    "check_weights",    "device",             "devices",           "encoder_cache_bytes",
                               "library",     "max_bytes",        "max_rows",           "max_waiting",       "max_waiting_bytes",
                               "max_waiting_rows", "max_waiting_tokens", "open_options", "provider",         "threads"};
/// Those of one Triton model.
constexpr std::array OWN = {"model", "options", "task", "warm_up"};

class Parameters {
public:
    explicit Parameters(const Place &place) : place_(place) {}

    std::optional<std::string> text(const std::string &key) const {
        const Json *found = place_.config.at("parameters").find(key);
        const Json *value = found ? found->find("string_value") : place_.backend_config.at("cmdline").find(key);
        if (!value) return std::nullopt;
        return value->scalar();
    }
    std::optional<std::int64_t> integer(const std::string &key) const {
        const auto given = text(key);
        if (!given) return std::nullopt;
        return number(key, *given);
    }
    std::vector<std::int64_t> integers(const std::string &key) const {
        std::vector<std::int64_t> numbers;
        const auto given = text(key);
        for (std::size_t at = 0; given && at <= given->size();) {
            const std::size_t comma = std::min(given->find(',', at), given->size());
            numbers.push_back(number(key, given->substr(at, comma - at)));
            at = comma + 1;
        }
        return numbers;
    }
    std::optional<bool> flag(const std::string &key) const {
        const auto given = text(key);
        if (!given) return std::nullopt;
        if (*given != "true" && *given != "false") wrong(key, "true or false", *given);
        return *given == "true";
    }
    std::optional<Json> object(const std::string &key) const {
        const auto given = text(key);
        if (!given) return std::nullopt;
        try {
            Json json = Json::parse(*given);
            if (json.kind() != Json::Kind::Object) wrong(key, "a JSON object", *given);
            return json;
        } catch (const std::invalid_argument &error) {
            throw Failure(TRITONSERVER_ERROR_INVALID_ARG, "parameters." + key + ": " + error.what());
        }
    }
    [[noreturn]] static void wrong(const std::string &key, const std::string &expected, const std::string &found) {
        throw Failure::invalid("parameters." + key, expected, "'" + found + "'");
    }

private:
    static std::int64_t number(const std::string &key, const std::string &text) {
        char *end = nullptr;
        errno = 0;
        const long long value = std::strtoll(text.c_str(), &end, 10);
        if (text.empty() || *end || errno) wrong(key, "an integer", text);
        return value;
    }

    const Place &place_;
};

/// A path of the configuration, which may be relative to the folder of config.pbtxt.
std::string resolved(const Place &place, const std::string &path) {
    return path.empty() || path.front() == '/' ? path : place.repository + "/" + path;
}

/// Typing errors are told of, but no error: Triton and its tools keep parameters here, too.
void warn_of_unknown(const Place &place) {
    for (const auto &[key, value] : place.config.at("parameters").members()) {
        std::string known;
        bool is_known = false;
        for (const auto &names : {std::vector<std::string>(OWN.begin(), OWN.end()),
                                  std::vector<std::string>(SHARED.begin(), SHARED.end())}) {
            for (const auto &name : names) {
                is_known |= name == key;
                known += (known.empty() ? "" : ", ") + name;
            }
        }
        if (!is_known)
            log(TRITONSERVER_LOG_WARN, "model '" + place.name + "': parameters." + key + " is ignored; known are " + known);
    }
}

} // namespace

Settings Settings::read(const Place &place) {
    warn_of_unknown(place);
    const Parameters parameters(place);
    Settings settings;
    settings.name = place.name;

    const std::string named = resolved(place, parameters.text("model").value_or(std::to_string(place.version)));
    char canonical[PATH_MAX];
    if (!realpath(named.c_str(), canonical))
        throw Failure(TRITONSERVER_ERROR_NOT_FOUND, "parameters.model: expected a model folder, found nothing at " + named);
    settings.folder = canonical;

    for (const char *key : SHARED)
        if (const auto given = parameters.text(key)) settings.shared[key] = *given;
    settings.open.library = parameters.text("library");
    settings.open.provider = parameters.text("provider");
    settings.open.device = parameters.integer("device");
    settings.open.threads = parameters.integer("threads");
    if (const auto checks = parameters.flag("check_weights")) settings.open.check_weights = *checks ? 1 : 0;
    settings.open.encoder_cache_bytes = parameters.integer("encoder_cache_bytes");
    if (const auto more = parameters.object("open_options")) settings.open.json = more->write();
    settings.engine.devices = parameters.integers("devices");
    settings.engine.max_rows = parameters.integer("max_rows");
    settings.engine.max_bytes = parameters.integer("max_bytes");
    settings.engine.max_waiting = parameters.integer("max_waiting");
    settings.engine.max_waiting_rows = parameters.integer("max_waiting_rows");
    settings.engine.max_waiting_tokens = parameters.integer("max_waiting_tokens");
    settings.engine.max_waiting_bytes = parameters.integer("max_waiting_bytes");
    // The first of several devices is where the model itself is opened.
    if (!settings.engine.devices.empty() && !settings.open.device) settings.open.device = settings.engine.devices.front();
    if (const auto adapters = parameters.object("adapters"))
        for (const auto &[name, folder] : adapters->members()) settings.adapters[name] = resolved(place, folder.scalar());

    if (const auto task = parameters.text("task")) {
        if (*task != "feature-extraction") Parameters::wrong("task", "feature-extraction or none", *task);
        settings.is_encoder = true;
    }
    const Json &warm_up_requests = place.config.at("model_warmup");
    settings.warms_up = parameters.flag("warm_up").value_or(warm_up_requests.items().empty());
    if (auto options = parameters.object("options")) settings.options = *std::move(options);
    settings.complete(place.config);
    return settings;
}

void Settings::complete(const Json &config) {
    outputs = config.at("output").items().size();
    is_decoupled = config.at("model_transaction_policy.decoupled").is_true();
    const Json &batch = config.at("max_batch_size");
    is_batched = batch.kind() == Json::Kind::Number && batch.scalar() != "0";
}
