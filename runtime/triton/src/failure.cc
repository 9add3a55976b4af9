#include "failure.h"

#include <cmath>
#include <new>

#include <t5gemma.hpp>

void take(TRITONSERVER_Error *error) {
    if (!error) return;
    Failure failure(TRITONSERVER_ErrorCode(error), TRITONSERVER_ErrorMessage(error));
    TRITONSERVER_ErrorDelete(error);
    throw failure;
}

void log_failed(TRITONSERVER_Error *error) noexcept {
    if (!error) return;
    log(TRITONSERVER_LOG_ERROR, TRITONSERVER_ErrorMessage(error));
    TRITONSERVER_ErrorDelete(error);
}

void log(TRITONSERVER_LogLevel level, const std::string &message) noexcept {
    if (TRITONSERVER_Error *error = TRITONSERVER_LogMessage(level, "t5gemma", 0, message.c_str()))
        TRITONSERVER_ErrorDelete(error);
}

/// Triton answers these by HTTP 400, 503, 501 and 500.
static TRITONSERVER_Error_Code code_of(t5g_code code) {
    switch (code) {
    case T5G_ERROR_ARGUMENT:
    case T5G_ERROR_INPUT:
    case T5G_ERROR_OPTIONS:
    case T5G_ERROR_CONSTRAINT:
    case T5G_ERROR_TOKENIZER:
    case T5G_ERROR_TOO_LARGE: return TRITONSERVER_ERROR_INVALID_ARG;
    case T5G_ERROR_FULL:
    case T5G_ERROR_CLOSED: return TRITONSERVER_ERROR_UNAVAILABLE;
    case T5G_ERROR_CANCELLED:
    case T5G_ERROR_DEADLINE: return TRITONSERVER_ERROR_CANCELLED;
    case T5G_ERROR_UNSUPPORTED: return TRITONSERVER_ERROR_UNSUPPORTED;
    default: return TRITONSERVER_ERROR_INTERNAL;
    }
}

TRITONSERVER_Error *error_of(std::exception_ptr thrown) noexcept {
    try {
        std::rethrow_exception(thrown);
    } catch (const Failure &failure) {
        return TRITONSERVER_ErrorNew(failure.code(), failure.what());
    } catch (const t5g::Error &error) {
        std::string message = error.what();
        if (error.retry_after() > 0)
            message += "; try again in " + std::to_string(std::lround(std::ceil(error.retry_after()))) + " s";
        return TRITONSERVER_ErrorNew(code_of(error.code()), message.c_str());
    } catch (const std::bad_alloc &) {
        return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_UNAVAILABLE, "out of memory");
    } catch (const std::exception &other) {
        return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_INTERNAL, other.what());
    } catch (...) {
        return TRITONSERVER_ErrorNew(TRITONSERVER_ERROR_INTERNAL, "unknown exception");
    }
}
