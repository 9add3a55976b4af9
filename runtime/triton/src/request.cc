#include "request.h"

#include <strings.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "failure.h"

namespace {

/// The name under which a forwarded HTTP header means what a parameter does; others are not for this backend.
std::string name_of(const char *key) {
    if (strcasecmp(key, "x-priority") == 0) return "queue_priority";
    if (strcasecmp(key, "x-tenant") == 0) return "tenant";
    // No generation option has a dash. triton_... are those of Triton and its clients; `id` comes with the generate extension.
    if (std::strchr(key, '-') || std::strncmp(key, "triton_", 7) == 0 || std::strcmp(key, "id") == 0) return {};
    return key;
}

/// An error for a client, who need not know where files lie.
TRITONSERVER_Error *without_path(TRITONSERVER_Error *error, const std::string &folder) {
    std::string message = TRITONSERVER_ErrorMessage(error);
    for (const auto &[path, instead] : {std::pair<std::string, const char *>{folder + "/", ""}, {folder, "the model folder"}})
        for (std::size_t at = 0; (at = message.find(path, at)) != std::string::npos; at += std::strlen(instead))
            message.replace(at, path.size(), instead);
    TRITONSERVER_Error *shown = TRITONSERVER_ErrorNew(TRITONSERVER_ErrorCode(error), message.c_str());
    TRITONSERVER_ErrorDelete(error);
    return shown;
}

std::int64_t priority_of(const std::string &name) {
    if (name == "high") return T5G_PRIORITY_HIGH;
    if (name == "low") return T5G_PRIORITY_LOW;
    if (name == "normal") return T5G_PRIORITY_NORMAL;
    throw Failure::invalid("parameters.queue_priority", "high, normal or low", "'" + name + "'");
}

} // namespace

Request::Request(Hosted &hosted, TRITONBACKEND_ModelInstance *instance, TRITONBACKEND_Request *request)
    : hosted_(hosted), instance_(instance), request_(request) {
    std::uint32_t count = 0;
    take(TRITONBACKEND_RequestOutputCount(request_, &count));
    // Triton names all outputs for a client that names none.
    for (std::uint32_t at = 0; count < hosted.settings().outputs && at < count; at++) {
        const char *name = nullptr;
        take(TRITONBACKEND_RequestOutputName(request_, at, &name));
        named_.insert(name);
    }
    take(TRITONBACKEND_ResponseFactoryNew(&factory_, request_));
    hosted_.enter(*this);
}

std::uint64_t Request::now() {
    const auto since = std::chrono::steady_clock::now().time_since_epoch();
    return static_cast<std::uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(since).count());
}

std::vector<Tensor> Request::inputs() const {
    std::uint32_t count = 0;
    take(TRITONBACKEND_RequestInputCount(request_, &count));
    std::vector<Tensor> inputs;
    for (std::uint32_t at = 0; at < count; at++) {
        TRITONBACKEND_Input *input = nullptr;
        take(TRITONBACKEND_RequestInputByIndex(request_, at, &input));
        inputs.emplace_back(input);
    }
    return inputs;
}

Json Request::parameters() const {
    Json parameters = Json::object();
    std::uint32_t count = 0;
    take(TRITONBACKEND_RequestParameterCount(request_, &count));
    for (std::uint32_t at = 0; at < count; at++) {
        const char *key = nullptr;
        TRITONSERVER_ParameterType type{};
        const void *value = nullptr;
        take(TRITONBACKEND_RequestParameter(request_, at, &key, &type, &value));
        const std::string name = name_of(key);
        if (name.empty()) continue;
        switch (type) {
        case TRITONSERVER_PARAMETER_STRING: parameters.set(name, Json::text(static_cast<const char *>(value))); break;
        case TRITONSERVER_PARAMETER_BOOL: parameters.set(name, Json::flag(*static_cast<const bool *>(value))); break;
        case TRITONSERVER_PARAMETER_INT:
            parameters.set(name, Json::number(std::to_string(*static_cast<const std::int64_t *>(value))));
            break;
        case TRITONSERVER_PARAMETER_DOUBLE: {
            char text[32];
            std::snprintf(text, sizeof text, "%.17g", *static_cast<const double *>(value));
            parameters.set(name, Json::number(text));
            break;
        }
        default: throw Failure::invalid("parameters." + name, "a text, a number, true or false", "another type");
        }
    }
    return parameters;
}

t5g::Call Request::call(Json &parameters) {
    t5g::Call call;
    call.cancellation = &cancellation_;
    std::uint64_t timeout = 0;
    take(TRITONBACKEND_InferenceRequestTimeoutMicroseconds(request_, &timeout));
    // The generate extension leaves Triton's parameter to the backend. It has microseconds, too.
    if (const auto own = parameters.remove("timeout")) {
        char *end = nullptr;
        timeout = std::strtoull(own->scalar().c_str(), &end, 10);
        if (own->scalar().empty() || *end) throw Failure::invalid("parameters.timeout", "microseconds", own->write());
    }
    if (timeout) call.deadline = std::chrono::microseconds(timeout);
    if (const auto priority = parameters.remove("queue_priority")) call.priority = priority_of(priority->scalar());
    if (const auto tenant = parameters.remove("tenant")) call.tenant = tenant->scalar();
    return call;
}

void Request::cancel_if_told() {
    if (is_cancelled_) return;
    if (TRITONSERVER_Error *error = TRITONBACKEND_ResponseFactoryIsCancelled(factory_, &is_cancelled_))
        TRITONSERVER_ErrorDelete(error);
    // It fails only for a cancellation that is freed, and this one lives as long as the request.
    if (is_cancelled_) t5g_error_free(t5g_cancellation_cancel(cancellation_.get()));
}

bool Request::respond(const std::vector<Output> &outputs, std::uint32_t flags) {
    TRITONBACKEND_Response *response = nullptr;
    take(TRITONBACKEND_ResponseNewFromFactory(&response, factory_));
    const std::uint64_t written = now();
    TRITONSERVER_Error *failed = guarded([&] {
        for (const Output &output : outputs)
            if (wants(output.name)) output.write(response);
    });
    // Triton takes the response, but not the error.
    TRITONSERVER_Error *unsent = TRITONBACKEND_ResponseSend(response, flags, failed);
    const bool well = !failed;
    report(written, failed);
    if (failed) TRITONSERVER_ErrorDelete(failed);
    take(unsent);
    return well;
}

void Request::respond(std::exception_ptr error) noexcept {
    TRITONBACKEND_Response *response = nullptr;
    TRITONSERVER_Error *failed = without_path(error_of(error), hosted_.settings().folder);
    if (TRITONSERVER_Error *none = TRITONBACKEND_ResponseNewFromFactory(&response, factory_)) log_failed(none);
    else log_failed(TRITONBACKEND_ResponseSend(response, TRITONSERVER_RESPONSE_COMPLETE_FINAL, failed));
    report(now(), failed);
    TRITONSERVER_ErrorDelete(failed);
}

void Request::report(std::uint64_t written, TRITONSERVER_Error *error) noexcept {
    if (!hosted_.settings().is_decoupled || !TRITONBACKEND_ModelInstanceResponseStatisticsNew) return;
    const std::uint64_t end = now();
    const std::uint64_t begun = responded_ ? responded_ : admitted_ ? admitted_ : written ? written : end;
    responded_ = end;
    TRITONBACKEND_ModelInstanceResponseStatistics *statistics = nullptr;
    TRITONSERVER_Error *failed = guarded([&] {
        take(TRITONBACKEND_ModelInstanceResponseStatisticsNew(&statistics));
        take(TRITONBACKEND_ModelInstanceResponseStatisticsSetModelInstance(statistics, instance_));
        take(TRITONBACKEND_ModelInstanceResponseStatisticsSetResponseFactory(statistics, factory_));
        take(TRITONBACKEND_ModelInstanceResponseStatisticsSetResponseStart(statistics, begun));
        if (written) take(TRITONBACKEND_ModelInstanceResponseStatisticsSetComputeOutputStart(statistics, written));
        take(TRITONBACKEND_ModelInstanceResponseStatisticsSetResponseEnd(statistics, end));
        if (error) take(TRITONBACKEND_ModelInstanceResponseStatisticsSetError(statistics, error));
        take(TRITONBACKEND_ModelInstanceReportResponseStatistics(statistics));
    });
    log_failed(failed);
    if (statistics) log_failed(TRITONBACKEND_ModelInstanceResponseStatisticsDelete(statistics));
}

// Any other order crashes or loses statistics: the watcher asks the factory until `forget`, the statistics read the request,
// and once `leave` has been called, the model may be gone.
void Request::close(bool success, std::uint64_t computed) noexcept {
    const std::uint64_t answered = now();
    // Triton counts what is before the first time as waiting.
    const std::uint64_t admitted = admitted_ ? admitted_ : computed;
    log_failed(TRITONBACKEND_ModelInstanceReportStatistics(instance_, request_, success, admitted, admitted, computed, answered));
    log_failed(TRITONBACKEND_ModelInstanceReportBatchStatistics(instance_, 1, admitted, admitted, computed, answered));
    log_failed(TRITONBACKEND_ResponseFactoryDelete(factory_));
    log_failed(TRITONBACKEND_RequestRelease(request_, TRITONSERVER_REQUEST_RELEASE_ALL));
    hosted_.leave();
}

void Request::end(std::unique_ptr<Request> request, const std::function<std::vector<Output>()> &outputs) noexcept {
    const std::uint64_t computed = now();
    request->hosted_.forget(*request);
    bool success = true;
    std::vector<Output> made;
    try {
        made = outputs();
    } catch (...) {
        success = false;
        request->respond(std::current_exception());
    }
    if (success) {
        try {
            // Clients of streams take the final response for an empty one.
            const bool is_decoupled = request->hosted_.settings().is_decoupled;
            success = request->respond(made, is_decoupled ? 0 : TRITONSERVER_RESPONSE_COMPLETE_FINAL);
            if (is_decoupled) {
                take(TRITONBACKEND_ResponseFactorySendFlags(request->factory_, TRITONSERVER_RESPONSE_COMPLETE_FINAL));
                request->report(0, nullptr);
            }
        } catch (...) {
            success = false;
            log_failed(error_of(std::current_exception()));
        }
    }
    request->close(success, computed);
}

void Request::fail(std::unique_ptr<Request> request, std::exception_ptr error) noexcept {
    const std::uint64_t computed = now();
    request->hosted_.forget(*request);
    request->respond(error);
    request->close(false, computed);
}
