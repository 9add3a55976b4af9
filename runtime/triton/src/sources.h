// The sources of a request: its tensors by their names.
#ifndef T5GEMMA_TRITON_SOURCES_H
#define T5GEMMA_TRITON_SOURCES_H

#include <vector>

#include <t5gemma.hpp>

#include "tensors.h"

/// The inputs of models that generate, or only those of encoders; throws Failure for contradictory ones.
t5g::Sources sources_of(const std::vector<Tensor> &inputs, bool generates);

/// Inputs as config.pbtxt lists them, as JSON.
const char *inputs_of_generators();
const char *inputs_of_encoders();

#endif
