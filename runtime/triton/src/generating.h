// Models that generate: requests go to the engine, which answers from its own threads.
#ifndef T5GEMMA_TRITON_GENERATING_H
#define T5GEMMA_TRITON_GENERATING_H

#include <memory>

#include "request.h"

/// Begins a request and returns; the engine ends it.
void generate(std::unique_ptr<Request> request);

/// Outputs as config.pbtxt lists them, as JSON.
const char *outputs_of_generators();

#endif
