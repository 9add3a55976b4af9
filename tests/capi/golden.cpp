// What golden.c does, through t5gemma.hpp, and written from the hypotheses as C++ sees them.
#include <iostream>
#include <sstream>

#include <t5gemma.hpp>

static std::vector<std::int64_t> numbers(std::istream &in, std::size_t count) {
    std::vector<std::int64_t> read(count);
    for (auto &number : read) in >> number;
    return read;
}

int main(int, char **argv) {
    const auto model = t5g::Model::open(argv[1]);
    for (std::string line; std::getline(std::cin, line);) {
        std::istringstream in(line);
        std::size_t rows, length, prompt;
        in >> rows >> length;
        const auto ids = numbers(in, rows * length), mask = numbers(in, rows * length);
        in >> prompt;
        const auto prompts = numbers(in, rows * prompt);
        std::string json;
        std::getline(in, json);
        auto sources = t5g::Sources::ids(ids, rows, length, mask);
        if (prompt > 0) sources.decoder_ids(prompts, prompt);
        t5g::GenerationOptions options;
        options.json = json;
        const auto result = model.generate(sources, options);
        std::cout.precision(9);
        std::cout << "{\"sequences\": [";
        for (std::size_t row = 0; row < result.rows(); row++) {
            std::cout << (row ? ", [" : "[");
            for (std::size_t at = 0; at < result.count(row); at++) {
                const auto found = result.hypothesis(row, at);
                std::cout << (at ? ", {\"tokens\": [" : "{\"tokens\": [");
                for (std::size_t token = 0; token < found.tokens.size(); token++)
                    std::cout << (token ? ", " : "") << found.tokens[token];
                std::cout << "]";
                if (!std::isnan(found.score)) std::cout << ", \"score\": " << found.score;
                std::cout << "}";
            }
            std::cout << "]";
        }
        std::cout << "]}" << std::endl;
    }
}
