// Models that encode or classify: ordinary tensors in and out, computed on the thread of Triton's instance.
#ifndef T5GEMMA_TRITON_ENCODING_H
#define T5GEMMA_TRITON_ENCODING_H

#include <memory>
#include <string>

#include "request.h"

/// Answers a request.
void encode(std::unique_ptr<Request> request);

/// Outputs as config.pbtxt lists them, as JSON.
std::string outputs_of_encoders(const Served &served);

#endif
