// Lines of stdin answered by several threads over one model: batch MODEL [THREADS] < lines.txt. Each thread takes the next
// few lines as a batch; the first line of each is shown on stderr as it is written. Ctrl-C stops all of them in the middle of
// a step.
#include <atomic>
#include <csignal>
#include <iostream>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include <t5gemma.hpp>

namespace {

volatile std::sig_atomic_t interrupted = 0;

void interrupt(int) { interrupted = 1; }

constexpr std::size_t BATCH = 4;

} // namespace

int main(int argc, char **argv) {
    if (argc < 2) {
        std::cerr << "usage: batch MODEL [THREADS] < lines.txt\n";
        return 2;
    }
    try {
        const auto model = t5g::Model::open(argv[1]);
        const int workers = argc > 2 ? std::stoi(argv[2]) : 4;
        std::vector<std::string> lines;
        for (std::string line; std::getline(std::cin, line);) lines.push_back(line);

        t5g::GenerationOptions options;
        options.max_new_tokens = 128;
        t5g::Cancellation cancellation;
        std::signal(SIGINT, interrupt);

        std::vector<std::string> answers(lines.size());
        std::atomic<std::size_t> next{0};
        std::atomic<bool> failed{false};
        std::mutex out;
        auto work = [&] {
            try {
                for (std::size_t first; (first = next.fetch_add(BATCH)) < lines.size() && !failed;) {
                    const std::size_t end = std::min(first + BATCH, lines.size());
                    std::string written;
                    t5g::Call call;
                    call.cancellation = &cancellation;
                    call.on_piece = [&](const t5g::Piece &piece) {
                        if (piece.row == 0) written += piece.text;
                        return true;
                    };
                    call.on_step = [&] {
                        if (interrupted) cancellation.cancel();
                        return true;
                    };
                    auto result = model.generate(
                        t5g::Sources::texts({lines.begin() + static_cast<std::ptrdiff_t>(first),
                                             lines.begin() + static_cast<std::ptrdiff_t>(end)}),
                        options, call);
                    for (std::size_t row = 0; row < result.rows(); row++) answers[first + row] = result.text(row);
                    const std::lock_guard<std::mutex> lock(out);
                    std::cerr << "line " << first << ": " << written << '\n';
                }
            } catch (const t5g::Error &error) {
                const std::lock_guard<std::mutex> lock(out);
                std::cerr << error.what() << '\n';
                failed = true;
            }
        };
        std::vector<std::thread> threads;
        for (int worker = 0; worker < workers; worker++) threads.emplace_back(work);
        for (auto &thread : threads) thread.join();
        if (failed) return interrupted ? 130 : 1;
        for (const auto &answer : answers) std::cout << answer << '\n';
    } catch (const std::exception &error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
}
