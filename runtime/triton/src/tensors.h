// The tensors of requests and responses, whatever they mean.
#ifndef T5GEMMA_TRITON_TENSORS_H
#define T5GEMMA_TRITON_TENSORS_H

#include <cstdint>
#include <string>
#include <vector>

#include "triton.h"

/// An input tensor, copied out of Triton's buffers.
class Tensor {
public:
    /// Throws Failure for data that is on a GPU or is not what type and shape say.
    explicit Tensor(TRITONBACKEND_Input *input);

    const std::string &name() const { return name_; }
    const std::vector<std::int64_t> &shape() const { return shape_; }
    /// Elements.
    std::size_t count() const { return count_; }
    /// The elements of a tensor of type BYTES.
    std::vector<std::string> texts() const;
    /// Those of INT64 or INT32.
    std::vector<std::int64_t> integers() const;
    /// Those of FP32.
    std::vector<float> floats() const;
    /// The number of rows of a tensor with one element for each, [rows] or [rows, 1].
    std::size_t rows_of_one() const;
    /// Fails for a shape, which is told.
    [[noreturn]] void wrong_shape(const std::string &expected) const;

private:
    void expect(bool is_right, const char *types) const;

    std::string name_;
    TRITONSERVER_DataType type_;
    std::vector<std::int64_t> shape_;
    std::size_t count_ = 1;
    std::string bytes_;
};

/// An output tensor.
struct Output {
    std::string name;
    TRITONSERVER_DataType type;
    std::vector<std::int64_t> shape;
    std::string bytes;

    static Output of(std::string name, std::vector<std::int64_t> shape, const std::vector<std::string> &texts);
    static Output of(std::string name, std::vector<std::int64_t> shape, const std::vector<std::int64_t> &numbers);
    static Output of(std::string name, std::vector<std::int64_t> shape, const std::vector<float> &numbers);
    /// Adds it to a response; throws Failure if the client wants it on a GPU.
    void write(TRITONBACKEND_Response *response) const;
};

#endif
