// Errors: those of Triton and of libt5gemma as exceptions inside, as TRITONSERVER_Error at the edge.
#ifndef T5GEMMA_TRITON_FAILURE_H
#define T5GEMMA_TRITON_FAILURE_H

#include <exception>
#include <stdexcept>
#include <string>

#include "triton.h"

class Failure : public std::runtime_error {
public:
    Failure(TRITONSERVER_Error_Code code, const std::string &message) : std::runtime_error(message), code_(code) {}
    /// A value of a client or of a model's configuration that cannot be used.
    static Failure invalid(const std::string &field, const std::string &expected, const std::string &found) {
        return Failure(TRITONSERVER_ERROR_INVALID_ARG, field + ": expected " + expected + ", found " + found);
    }
    TRITONSERVER_Error_Code code() const { return code_; }

private:
    TRITONSERVER_Error_Code code_;
};

/// Throws an error of Triton, if it is one.
void take(TRITONSERVER_Error *error);
/// Writes an error of Triton to the log, if it is one: for calls that end something, after which nothing can be done.
void log_failed(TRITONSERVER_Error *error) noexcept;
/// Any exception as an error of Triton, which the caller deletes or gives to Triton.
TRITONSERVER_Error *error_of(std::exception_ptr thrown) noexcept;
void log(TRITONSERVER_LogLevel level, const std::string &message) noexcept;

/// Runs the body of an entry point.
template <class Body>
TRITONSERVER_Error *guarded(Body body) noexcept {
    try {
        body();
        return nullptr;
    } catch (...) {
        return error_of(std::current_exception());
    }
}

#endif
