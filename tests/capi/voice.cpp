// T5Gemma-TTS through C++ and so through C: voice MODEL END STEPS < rows. A row is the estimate of its target, its length and its ids;
// the tokens of each are written to a line.
#include <iostream>

#include <t5gemma.hpp>

int main(int argc, char **argv) {
    if (argc != 4) return 2;
    const auto model = t5g::Model::open(argv[1]);
    std::vector<std::vector<std::int64_t>> rows;
    std::vector<std::int64_t> totals;
    for (std::int64_t total, length; std::cin >> total >> length;) {
        totals.push_back(total);
        auto &row = rows.emplace_back(static_cast<std::size_t>(length));
        for (auto &id : row) std::cin >> id;
    }
    t5g::GenerationOptions options;
    options.suppress_tokens = std::vector<std::int64_t>{std::stol(argv[2])};
    options.max_new_tokens = std::stol(argv[3]);
    const auto result = model.generate(t5g::Sources::ids(rows).progress_totals(totals), options);
    for (std::size_t row = 0; row < rows.size(); row++) {
        for (const auto token : result.hypothesis(row, 0).tokens) std::cout << token << ' ';
        std::cout << '\n';
    }
    try {
        model.generate(t5g::Sources::ids(rows), options);
        return 1;
    } catch (const t5g::Error &error) {
        return error.field() == "progress_total[0]" ? 0 : 1;
    }
}
