#include "sources.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "failure.h"

namespace {

constexpr std::array OF_ENCODERS = {"text_input", "input_ids", "attention_mask"};
constexpr std::array OF_GENERATORS = {"text_input", "input_ids",    "attention_mask", "messages", "decoder_text", "decoder_input_ids",
                                      "images",     "image_counts", "pixel_values",   "progress_totals"};

/// Rows of token ids, [rows, length] or [length].
struct Rows {
    std::size_t rows, length;

    explicit Rows(const Tensor &tensor) {
        const auto &shape = tensor.shape();
        if (shape.empty() || shape.size() > 2 || tensor.count() == 0) tensor.wrong_shape("[rows, length], at least one token");
        rows = shape.size() == 2 ? static_cast<std::size_t>(shape[0]) : 1;
        length = static_cast<std::size_t>(shape.back());
    }
};

/// A picture of JSON, in which bytes cannot be: data:image/png;base64,...
std::vector<std::uint8_t> picture(const std::string &bytes) {
    const std::string_view whole = bytes;
    const std::size_t comma = whole.find(',');
    const bool is_uri = whole.substr(0, 5) == "data:" && comma != std::string_view::npos &&
                        comma >= 7 && whole.substr(comma - 7, 7) == ";base64";
    if (!is_uri) return {whole.begin(), whole.end()};
    const std::string_view alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    std::vector<std::uint8_t> out;
    std::uint32_t bits = 0;
    int count = 0;
    std::string_view text = whole.substr(comma + 1);
    while (!text.empty() && text.back() == '=') text.remove_suffix(1);
    for (const char c : text) {
        const std::size_t value = alphabet.find(c);
        if (value == std::string_view::npos) throw Failure::invalid("images", "base64 after data:", std::string(1, c));
        bits = bits << 6 | static_cast<std::uint32_t>(value);
        count += 6;
        if (count < 8) continue;
        count -= 8;
        out.push_back(static_cast<std::uint8_t>(bits >> count));
    }
    return out;
}

std::vector<std::vector<t5g::Image>> images_of(const Tensor &images, const Tensor *counts, std::size_t rows) {
    const std::vector<std::string> files = images.texts();
    std::vector<std::int64_t> of_rows(1, static_cast<std::int64_t>(files.size()));
    if (counts) of_rows = counts->integers();
    else if (rows != 1) throw Failure::invalid("image_counts", "the images of each of " + std::to_string(rows) + " rows", "none");
    std::vector<std::vector<t5g::Image>> all;
    std::size_t at = 0;
    for (const std::int64_t count : of_rows) {
        if (count < 0 || static_cast<std::size_t>(count) > files.size() - at) break;
        auto &row = all.emplace_back();
        for (std::int64_t image = 0; image < count; image++) row.push_back({picture(files[at++]), 0});
    }
    if (all.size() != of_rows.size() || at != files.size())
        throw Failure::invalid("image_counts", "numbers with the sum " + std::to_string(files.size()) + ", the images", "others");
    return all;
}

} // namespace

t5g::Sources sources_of(const std::vector<Tensor> &inputs, bool generates) {
    const auto find = [&](const char *name) -> const Tensor * {
        const auto is_it = [&](const Tensor &tensor) { return tensor.name() == name; };
        const auto found = std::find_if(inputs.begin(), inputs.end(), is_it);
        return found == inputs.end() ? nullptr : &*found;
    };
    for (const Tensor &tensor : inputs) {
        const auto is_it = [&](const char *name) { return tensor.name() == name; };
        if (generates ? std::none_of(OF_GENERATORS.begin(), OF_GENERATORS.end(), is_it)
                      : std::none_of(OF_ENCODERS.begin(), OF_ENCODERS.end(), is_it)) {
            std::string known;
            for (const char *name : OF_ENCODERS) known += (known.empty() ? "" : ", ") + std::string(name);
            for (std::size_t at = OF_ENCODERS.size(); generates && at < OF_GENERATORS.size(); at++)
                known += std::string(", ") + OF_GENERATORS[at];
            throw Failure::invalid("inputs", known, tensor.name());
        }
    }
    const Tensor *texts = find("text_input"), *ids = find("input_ids"), *messages = find("messages"), *mask = find("attention_mask");
    const int given = (texts != nullptr) + (ids != nullptr) + (messages != nullptr);
    if (given != 1) {
        std::string found;
        for (const Tensor *tensor : {texts, ids, messages})
            if (tensor) found += (found.empty() ? "" : " and ") + tensor->name();
        const char *expected = generates ? "one of text_input, input_ids and messages" : "one of text_input and input_ids";
        throw Failure::invalid("inputs", expected, given ? found : "none");
    }
    if (mask && !ids) throw Failure::invalid("attention_mask", "input_ids beside it", "none");

    t5g::Sources sources = t5g::Sources::texts({});
    if (texts) {
        texts->rows_of_one();
        sources = t5g::Sources::texts(texts->texts());
    } else if (messages) {
        if (messages->rows_of_one() != 1) messages->wrong_shape("one conversation, [1]");
        sources = t5g::Sources::messages(messages->texts().front());
    } else {
        const Rows rows(*ids);
        const std::vector<std::int64_t> numbers = ids->integers();
        std::vector<std::int64_t> seen;
        if (mask) {
            if (mask->shape() != ids->shape()) mask->wrong_shape("the shape of input_ids");
            seen = mask->integers();
        }
        sources = t5g::Sources::ids(numbers, rows.rows, rows.length, seen);
    }
    if (const Tensor *decoder = find("decoder_text")) {
        decoder->rows_of_one();
        sources.decoder_texts(decoder->texts());
    }
    if (const Tensor *decoder = find("decoder_input_ids")) {
        const Rows rows(*decoder);
        if (rows.rows != sources.rows()) decoder->wrong_shape(std::to_string(sources.rows()) + " rows, one for each source");
        const std::vector<std::int64_t> numbers = decoder->integers();
        sources.decoder_ids(numbers, rows.length);
    }
    if (const Tensor *images = find("images")) sources.images(images_of(*images, find("image_counts"), sources.rows()));
    else if (find("image_counts")) throw Failure::invalid("image_counts", "images beside it", "none");
    if (const Tensor *pixels = find("pixel_values")) sources.pixel_values(pixels->floats());
    if (const Tensor *totals = find("progress_totals")) sources.progress_totals(totals->integers());
    return sources;
}

const char *inputs_of_generators() {
    return R"([{"name":"text_input","data_type":"TYPE_STRING","dims":[-1],"optional":true},
        {"name":"input_ids","data_type":"TYPE_INT64","dims":[-1,-1],"optional":true},
        {"name":"attention_mask","data_type":"TYPE_INT64","dims":[-1,-1],"optional":true},
        {"name":"messages","data_type":"TYPE_STRING","dims":[1],"optional":true},
        {"name":"decoder_text","data_type":"TYPE_STRING","dims":[-1],"optional":true},
        {"name":"decoder_input_ids","data_type":"TYPE_INT64","dims":[-1,-1],"optional":true},
        {"name":"images","data_type":"TYPE_STRING","dims":[-1],"optional":true},
        {"name":"image_counts","data_type":"TYPE_INT64","dims":[-1],"optional":true},
        {"name":"pixel_values","data_type":"TYPE_FP32","dims":[-1,3,-1,-1],"optional":true},
        {"name":"progress_totals","data_type":"TYPE_INT64","dims":[-1],"optional":true}])";
}

const char *inputs_of_encoders() {
    return R"([{"name":"text_input","data_type":"TYPE_STRING","dims":[-1],"optional":true},
        {"name":"input_ids","data_type":"TYPE_INT64","dims":[-1,-1],"optional":true},
        {"name":"attention_mask","data_type":"TYPE_INT64","dims":[-1,-1],"optional":true}])";
}
