// The entry points that Triton calls. A model of Triton is a `Hosted`; what it opens is a `Served`; a request is a `Request`.
#include <memory>
#include <string>

#include "encoding.h"
#include "failure.h"
#include "generating.h"
#include "hosted.h"
#include "settings.h"
#include "sources.h"

#define ENTRY extern "C" __attribute__((visibility("default"))) TRITONSERVER_Error *

namespace {

/// The backend's own state.
struct Backend {
    std::shared_ptr<const Families> families = std::make_shared<const Families>();
    Json config;
};

Json json_of(TRITONSERVER_Message *message) {
    const char *text = nullptr;
    std::size_t size = 0;
    take(TRITONSERVER_MessageSerializeToJson(message, &text, &size));
    return Json::parse(std::string_view(text, size));
}

Backend &backend_of(TRITONBACKEND_Model *model) {
    TRITONBACKEND_Backend *backend = nullptr;
    void *state = nullptr;
    take(TRITONBACKEND_ModelBackend(model, &backend));
    take(TRITONBACKEND_BackendState(backend, &state));
    return *static_cast<Backend *>(state);
}

Place place_of(TRITONBACKEND_Model *model) {
    Place place;
    const char *name = nullptr, *repository = nullptr;
    TRITONBACKEND_ArtifactType type{};
    take(TRITONBACKEND_ModelName(model, &name));
    take(TRITONBACKEND_ModelVersion(model, &place.version));
    take(TRITONBACKEND_ModelRepository(model, &type, &repository));
    if (type != TRITONBACKEND_ARTIFACT_FILESYSTEM)
        throw Failure(TRITONSERVER_ERROR_UNSUPPORTED, "expected a model repository in the file system");
    place.name = name;
    place.repository = repository;
    TRITONSERVER_Message *config = nullptr;
    take(TRITONBACKEND_ModelConfig(model, 1, &config));
    place.config = json_of(config);
    log_failed(TRITONSERVER_MessageDelete(config));
    place.backend_config = backend_of(model).config;
    return place;
}

bool ends_with(const std::string &text, const std::string &end) {
    return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

/// Fills in what config.pbtxt leaves out, and returns whether there was anything.
bool complete(Json &config, const std::string &name, const Served &served) {
    bool is_changed = false;
    const auto fill = [&](const char *list, const std::string &json) {
        if (!config.at(list).items().empty()) return;
        config.set(list, Json::parse(json));
        is_changed = true;
    };
    fill("input", served.generates() ? inputs_of_generators() : inputs_of_encoders());
    fill("output", served.generates() ? outputs_of_generators() : outputs_of_encoders(served));
    const bool is_stream = ends_with(name, "_stream") || ends_with(name, "_stream.t5gemma");
    if (served.generates() && is_stream && !config.find("model_transaction_policy")) {
        config.set("model_transaction_policy", Json::parse(R"({"decoupled":true})"));
        is_changed = true;
    }
    return is_changed;
}

} // namespace

ENTRY TRITONBACKEND_Initialize(TRITONBACKEND_Backend *backend) {
    return guarded([&] {
        std::uint32_t major = 0, minor = 0;
        take(TRITONBACKEND_ApiVersion(&major, &minor));
        // 1.18 has other numbers of parameter types than those before it.
        if (major != 1 || minor < 18) {
            const std::string found = std::to_string(major) + "." + std::to_string(minor);
            throw Failure(TRITONSERVER_ERROR_UNSUPPORTED, "expected Triton's backend API 1.18 (release 24.02) or later, found " + found);
        }
        if (!t5g::is_compatible())
            throw Failure(TRITONSERVER_ERROR_UNSUPPORTED, "expected libt5gemma of ABI " + std::to_string(T5G_ABI_MAJOR) + ", found " + t5g::version());
        auto state = std::make_unique<Backend>();
        // The backend owns this message.
        TRITONSERVER_Message *config = nullptr;
        take(TRITONBACKEND_BackendConfig(backend, &config));
        state->config = json_of(config);
        take(TRITONBACKEND_BackendSetState(backend, state.get()));
        (void)state.release();
        log(TRITONSERVER_LOG_INFO, "backend t5gemma " + t5g::version());
    });
}

ENTRY TRITONBACKEND_Finalize(TRITONBACKEND_Backend *backend) {
    return guarded([&] {
        void *state = nullptr;
        take(TRITONBACKEND_BackendState(backend, &state));
        delete static_cast<Backend *>(state);
    });
}

/// One engine serves all instances, so one is enough, and GPUs are chosen by parameters.
ENTRY TRITONBACKEND_GetBackendAttribute(TRITONBACKEND_Backend *, TRITONBACKEND_BackendAttribute *attributes) {
    return TRITONBACKEND_BackendAttributeAddPreferredInstanceGroup(attributes, TRITONSERVER_INSTANCEGROUPKIND_MODEL, 1, nullptr, 0);
}

ENTRY TRITONBACKEND_ModelInitialize(TRITONBACKEND_Model *model) {
    return guarded([&] {
        Place place = place_of(model);
        auto hosted = std::make_unique<Hosted>(Settings::read(place), backend_of(model).families);
        bool is_wanted = false;
        take(TRITONBACKEND_ModelAutoCompleteConfig(model, &is_wanted));
        if (is_wanted && complete(place.config, place.name, hosted->served())) {
            const std::string config = place.config.write();
            TRITONSERVER_Message *message = nullptr;
            take(TRITONSERVER_MessageNewFromSerializedJson(&message, config.data(), config.size()));
            TRITONSERVER_Error *refused = TRITONBACKEND_ModelSetConfig(model, 1, message);
            log_failed(TRITONSERVER_MessageDelete(message));
            take(refused);
        }
        hosted->completed(place.config);
        take(TRITONBACKEND_ModelSetState(model, hosted.get()));
        (void)hosted.release();
    });
}

ENTRY TRITONBACKEND_ModelFinalize(TRITONBACKEND_Model *model) {
    return guarded([&] {
        void *state = nullptr;
        take(TRITONBACKEND_ModelState(model, &state));
        delete static_cast<Hosted *>(state);
    });
}

ENTRY TRITONBACKEND_ModelInstanceInitialize(TRITONBACKEND_ModelInstance *instance) {
    return guarded([&] {
        TRITONSERVER_InstanceGroupKind kind{};
        take(TRITONBACKEND_ModelInstanceKind(instance, &kind));
        if (kind == TRITONSERVER_INSTANCEGROUPKIND_GPU)
            log(TRITONSERVER_LOG_WARN, "instances of KIND_GPU share one engine: its GPUs are those of parameters.provider and "
                                       "parameters.devices; KIND_MODEL says so");
    });
}

ENTRY TRITONBACKEND_ModelInstanceFinalize(TRITONBACKEND_ModelInstance *) { return nullptr; }

/// Takes all requests, and answers each: Triton gets no error for the whole. Those of an engine are answered after this has
/// returned, so that Triton passes on the next ones meanwhile.
ENTRY TRITONBACKEND_ModelInstanceExecute(TRITONBACKEND_ModelInstance *instance, TRITONBACKEND_Request **requests,
                                         const std::uint32_t count) {
    return guarded([&] {
        TRITONBACKEND_Model *model = nullptr;
        void *state = nullptr;
        take(TRITONBACKEND_ModelInstanceModel(instance, &model));
        take(TRITONBACKEND_ModelState(model, &state));
        Hosted &hosted = *static_cast<Hosted *>(state);
        for (std::uint32_t at = 0; at < count; at++) {
            std::unique_ptr<Request> request;
            try {
                request = std::make_unique<Request>(hosted, instance, requests[at]);
            } catch (...) {
                // Without a response factory there is no way to answer.
                log_failed(error_of(std::current_exception()));
                log_failed(TRITONBACKEND_RequestRelease(requests[at], TRITONSERVER_REQUEST_RELEASE_ALL));
                continue;
            }
            if (hosted.served().generates()) generate(std::move(request));
            else encode(std::move(request));
        }
    });
}
