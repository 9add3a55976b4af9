// An on_done that throws: throws DEMO.
#include <cstdio>
#include <stdexcept>

#include <t5gemma.hpp>

int main(int, char **argv) {
    const auto model = t5g::Model::open(argv[1]);
    const auto engine = t5g::Engine::start(model);
    engine.call(t5g::Sources::texts({"in 1990"}), {},
                [](t5g::Expected<t5g::Result>) { throw std::runtime_error("mine of on_done"); });
    engine.drain();
    // The thread that calls on_done ends the program.
    std::promise<void>().get_future().wait();
}
