#include "tensors.h"

#include <cstring>

#include "failure.h"

namespace {

std::string text_of(const std::vector<std::int64_t> &shape) {
    std::string text = "[";
    for (const std::int64_t size : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
    return text + "]";
}

std::size_t size_of(TRITONSERVER_DataType type) {
    switch (type) {
    case TRITONSERVER_TYPE_INT64: return 8;
    case TRITONSERVER_TYPE_INT32:
    case TRITONSERVER_TYPE_FP32: return 4;
    default: return 0;
    }
}

template <class Number>
std::string bytes_of(const std::vector<Number> &numbers) {
    return std::string(reinterpret_cast<const char *>(numbers.data()), numbers.size() * sizeof(Number));
}

} // namespace

Tensor::Tensor(TRITONBACKEND_Input *input) {
    const char *name = nullptr;
    const std::int64_t *shape = nullptr;
    std::uint32_t dims = 0, buffers = 0;
    std::uint64_t bytes = 0;
    take(TRITONBACKEND_InputProperties(input, &name, &type_, &shape, &dims, &bytes, &buffers));
    name_ = name;
    shape_.assign(shape, shape + dims);
    for (const std::int64_t size : shape_) {
        if (size < 0 || (size > 0 && count_ > SIZE_MAX / static_cast<std::size_t>(size))) wrong_shape("a shape with a size");
        count_ *= static_cast<std::size_t>(size);
    }
    bytes_.reserve(bytes);
    for (std::uint32_t at = 0; at < buffers; at++) {
        const void *data = nullptr;
        std::uint64_t size = 0;
        TRITONSERVER_MemoryType memory = TRITONSERVER_MEMORY_CPU;
        std::int64_t id = 0;
        take(TRITONBACKEND_InputBuffer(input, at, &data, &size, &memory, &id));
        if (memory == TRITONSERVER_MEMORY_GPU)
            throw Failure(TRITONSERVER_ERROR_UNSUPPORTED, name_ + ": expected a tensor in CPU memory, found one on a GPU");
        if (size) bytes_.append(static_cast<const char *>(data), size);
    }
    const std::size_t size = size_of(type_);
    if (size && (count_ > SIZE_MAX / size || bytes_.size() != count_ * size))
        throw Failure::invalid(name_, "the data of shape " + text_of(shape_), std::to_string(bytes_.size()) + " bytes");
}

void Tensor::expect(bool is_right, const char *types) const {
    if (!is_right) throw Failure::invalid(name_, types, TRITONSERVER_DataTypeString(type_));
}

void Tensor::wrong_shape(const std::string &expected) const { throw Failure::invalid(name_, expected, text_of(shape_)); }

std::vector<std::string> Tensor::texts() const {
    expect(type_ == TRITONSERVER_TYPE_BYTES, "BYTES");
    std::vector<std::string> texts;
    std::size_t at = 0;
    while (at < bytes_.size()) {
        std::uint32_t length = 0;
        const std::size_t left = bytes_.size() - at;
        if (left >= sizeof length) std::memcpy(&length, bytes_.data() + at, sizeof length);
        if (left < sizeof length || left - sizeof length < length)
            throw Failure::invalid(name_, "each text after its length in 4 bytes", std::to_string(left) + " bytes for the last");
        texts.emplace_back(bytes_, at + sizeof length, length);
        at += sizeof length + length;
    }
    if (texts.size() != count_)
        throw Failure::invalid(name_, "the texts of shape " + text_of(shape_), std::to_string(texts.size()));
    return texts;
}

std::vector<std::int64_t> Tensor::integers() const {
    expect(type_ == TRITONSERVER_TYPE_INT64 || type_ == TRITONSERVER_TYPE_INT32, "INT64");
    std::vector<std::int64_t> numbers(count_);
    if (type_ == TRITONSERVER_TYPE_INT64) {
        if (count_) std::memcpy(numbers.data(), bytes_.data(), bytes_.size());
        return numbers;
    }
    for (std::size_t at = 0; at < count_; at++) {
        std::int32_t number = 0;
        std::memcpy(&number, bytes_.data() + at * sizeof number, sizeof number);
        numbers[at] = number;
    }
    return numbers;
}

std::vector<float> Tensor::floats() const {
    expect(type_ == TRITONSERVER_TYPE_FP32, "FP32");
    std::vector<float> numbers(count_);
    if (count_) std::memcpy(numbers.data(), bytes_.data(), bytes_.size());
    return numbers;
}

std::size_t Tensor::rows_of_one() const {
    if (shape_.empty() || shape_.size() > 2 || (shape_.size() == 2 && shape_[1] != 1)) wrong_shape("[rows] or [rows, 1]");
    if (count_ == 0) wrong_shape("at least one row");
    return count_;
}

Output Output::of(std::string name, std::vector<std::int64_t> shape, const std::vector<std::string> &texts) {
    std::string bytes;
    for (const auto &text : texts) {
        const auto length = static_cast<std::uint32_t>(text.size());
        bytes.append(reinterpret_cast<const char *>(&length), sizeof length).append(text);
    }
    return Output{std::move(name), TRITONSERVER_TYPE_BYTES, std::move(shape), std::move(bytes)};
}

Output Output::of(std::string name, std::vector<std::int64_t> shape, const std::vector<std::int64_t> &numbers) {
    return Output{std::move(name), TRITONSERVER_TYPE_INT64, std::move(shape), bytes_of(numbers)};
}

Output Output::of(std::string name, std::vector<std::int64_t> shape, const std::vector<float> &numbers) {
    return Output{std::move(name), TRITONSERVER_TYPE_FP32, std::move(shape), bytes_of(numbers)};
}

void Output::write(TRITONBACKEND_Response *response) const {
    TRITONBACKEND_Output *output = nullptr;
    take(TRITONBACKEND_ResponseOutput(response, &output, name.c_str(), type, shape.data(),
                                      static_cast<std::uint32_t>(shape.size())));
    void *buffer = nullptr;
    TRITONSERVER_MemoryType memory = TRITONSERVER_MEMORY_CPU;
    std::int64_t id = 0;
    take(TRITONBACKEND_OutputBuffer(output, &buffer, bytes.size(), &memory, &id));
    if (memory == TRITONSERVER_MEMORY_GPU)
        throw Failure(TRITONSERVER_ERROR_UNSUPPORTED, name + ": expected memory of the CPU for the output, found a GPU's");
    if (!bytes.empty()) std::memcpy(buffer, bytes.data(), bytes.size());
}
