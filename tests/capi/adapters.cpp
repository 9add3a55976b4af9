// What adapters.c does, through t5gemma.hpp.
#include <iostream>

#include <t5gemma.hpp>

#define CHECK(condition)                                                                   \
    if (!(condition)) {                                                                    \
        std::cerr << __FILE__ << ":" << __LINE__ << ": " << #condition << std::endl;       \
        std::exit(1);                                                                      \
    }

template <class Work>
static std::string refused(Work work) {
    try {
        work();
    } catch (const t5g::Error &error) {
        return error.what();
    }
    return "nothing";
}

static void print(const t5g::Result &result) {
    for (std::size_t row = 0; row < result.rows(); row++)
        for (const auto token : result.hypothesis(row, 0).tokens) std::cout << token << " ";
    std::cout << std::endl;
}

int main(int argc, char **argv) {
    CHECK(argc == 3);
    const auto model = t5g::Model::open(argv[1]);
    std::size_t rows, length;
    std::cin >> rows >> length;
    std::vector<std::int64_t> ids(rows * length), mask(rows * length);
    for (auto *all : {&ids, &mask})
        for (auto &number : *all) std::cin >> number;
    auto sources = t5g::Sources::ids(ids, rows, length, mask);
    t5g::GenerationOptions options;
    options.max_new_tokens = 14;
    options.eos_token_id = {63};
    const auto plain = options;
    options.adapter = "mine";
    CHECK(refused([&] { model.generate(sources, options); }).find("there is none") != std::string::npos);
    CHECK(refused([&] { model.load_adapter(std::string("a\0b", 3), argv[2]); }).find("name") != std::string::npos);
    model.load_adapter("mine", argv[2]);
    CHECK(model.adapters() == "[\"mine\"]");
    print(model.generate(sources, options));
    options.adapter = std::nullopt;
    options.json = "{\"adapter\": \"mine\"}";
    print(model.generate(sources, options));
    sources.adapter("mine");
    print(model.generate(sources, plain));
    const auto engine = t5g::Engine::start(model);
    auto request = engine.submit(sources, plain);
    model.unload_adapter("mine");
    CHECK(refused([&] { model.generate(sources, plain); }).find("there is none") != std::string::npos);
    print(request.result());
}
