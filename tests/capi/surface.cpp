// t5gemma.hpp, used well and badly: surface DEMO. Compiled a second time with T5GEMMA_EXPECTED, which throws nothing.
#include <cmath>
#include <cstdio>
#include <future>

#include <t5gemma.hpp>

#define CHECK(condition)                                                                                                \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                       \
            std::exit(1);                                                                                              \
        }                                                                                                              \
    } while (0)

static const std::string TEXT = "mr brown paid $5 on may 3rd", SPOKEN = "mister brown paid five dollars on may third";

#ifdef T5GEMMA_EXPECTED

static void check(const char *demo) {
    auto none = t5g::Model::open("/no/such/model");
    CHECK(!none && none.error().code() == T5G_ERROR_FILE);
    auto model = t5g::Model::open(demo);
    CHECK(model);
    auto result = model->generate(t5g::Sources::texts({TEXT}));
    CHECK(result && *result->text(0) == SPOKEN.substr(0, (*result->text(0)).size()));
    t5g::GenerationOptions options;
    options.num_beams = -1;
    auto failed = model->generate(t5g::Sources::texts({TEXT}), options);
    CHECK(!failed && failed.error().field() == "num_beams");
}

#else

template <class Work>
static t5g::Error thrown(Work work) {
    try {
        work();
    } catch (const t5g::Error &error) {
        return error;
    }
    std::fprintf(stderr, "expected a t5g::Error\n");
    std::exit(1);
}

static void check(const char *demo) {
    CHECK(t5g::is_compatible() && !t5g::version().empty());
    CHECK(thrown([] { t5g::Model::open("/no/such/model"); }).code() == T5G_ERROR_FILE);
    auto model = t5g::Model::open(demo);
    CHECK(t5g::onnxruntime_report().find("CPUExecutionProvider") != std::string::npos);
    CHECK(model.describe().find("\"vocab") == std::string::npos && !model.describe().empty());
    (void)t5g::recent_log();

    t5g::GenerationOptions options;
    options.max_new_tokens = 40;
    std::string streamed;
    std::size_t steps = 0;
    t5g::Call call;
    call.on_piece = [&](const t5g::Piece &piece) {
        streamed += piece.text;
        return true;
    };
    call.on_step = [&] { return ++steps > 0; };
    auto result = model.generate(t5g::Sources::texts({TEXT}), options, call);
    CHECK(result.text(0) == SPOKEN && streamed == SPOKEN && steps > 3);
    auto moved = std::move(result);
    CHECK(moved.rows() == 1 && moved.count(0) == 1 && moved.json().find("sequences") != std::string::npos);
    CHECK(thrown([&] { moved.text(1); }).field() == "row");
    CHECK(thrown([&] { result.text(0); }).code() == T5G_ERROR_ARGUMENT);

    options.num_beams = 3;
    options.num_return_sequences = 2;
    options.output_logprobs = 1;
    options.top_logprobs = 2;
    auto tokenizer = model.tokenizer();
    const auto ids = tokenizer.encode(TEXT);
    auto beams = model.generate(t5g::Sources::ids({ids}), options);
    const auto best = beams.hypothesis(0), second = beams.hypothesis(0, 1);
    CHECK(best.score > second.score && best.logprobs.size() == best.tokens.size());
    CHECK(best.top_tokens.size() == 2 * best.tokens.size() && tokenizer.decode(best.tokens) == SPOKEN);
    CHECK(best.source_length == 0 && best.cross_attentions.size() == 0);
    options.output_attentions = 1;
    auto attending = model.generate(t5g::Sources::ids({ids}), options);
    const auto aligned = attending.hypothesis(0);
    CHECK(aligned.source_length == ids.size());
    CHECK(aligned.cross_attentions.size() == aligned.tokens.size() * aligned.source_length);
    auto targets = t5g::Targets::texts({SPOKEN});
    auto scored = model.score(t5g::Sources::ids({ids}), targets.output_attentions());
    CHECK(scored.hypothesis(0).cross_attentions.size() == aligned.cross_attentions.size());

    auto stream = tokenizer.stream();
    std::string whole;
    for (auto token : best.tokens) whole += stream.push(token);
    whole += stream.finish();
    CHECK(whole == SPOKEN);

    // What a callback throws comes out of the call, with what was made by then.
    t5g::Call bad;
    bad.on_piece = [](const t5g::Piece &) -> bool { throw std::out_of_range("mine"); };
    bool passed = false;
    try {
        model.generate(t5g::Sources::texts({TEXT}), {}, bad);
    } catch (const std::out_of_range &error) {
        passed = std::string(error.what()) == "mine";
    }
    CHECK(passed);
    bad = {};
    bad.logits_processor = [](const t5g::Position &, t5g::Span<float>) { throw std::out_of_range("mine"); };
    passed = false;
    try {
        model.generate(t5g::Sources::texts({TEXT}), {}, bad);
    } catch (const std::out_of_range &) {
        passed = true;
    }
    CHECK(passed);

    t5g::Call limited;
    limited.prefix_allowed_tokens = [](std::size_t, t5g::Span<const std::int64_t> target) {
        return std::vector<std::int64_t>{static_cast<std::int64_t>(40 + target.size())};
    };
    t5g::GenerationOptions two;
    two.max_new_tokens = 2;
    auto allowed = model.generate(t5g::Sources::texts({TEXT}), two, limited);
    CHECK(allowed.hypothesis(0).tokens[0] == 41 && allowed.hypothesis(0).tokens[1] == 42);

    t5g::Cancellation cancellation;
    t5g::Call stopped;
    stopped.cancellation = &cancellation;
    stopped.on_step = [&] {
        cancellation.cancel();
        return true;
    };
    CHECK(thrown([&] { model.generate(t5g::Sources::texts({TEXT}), {}, stopped); }).code() == T5G_ERROR_CANCELLED);
    CHECK(cancellation.is_cancelled());
    t5g::Call late;
    late.deadline = std::chrono::nanoseconds(1);
    CHECK(thrown([&] { model.generate(t5g::Sources::texts({TEXT}), {}, late); }).code() == T5G_ERROR_DEADLINE);

    const auto states = model.encode(t5g::Sources::texts({TEXT}));
    CHECK(states.values.size() == states.length * states.width && states.length == ids.size());
    auto again = model.generate(t5g::Sources::ids({ids}).encoder_outputs(states.values.data()), options);
    CHECK(again.text(0) == SPOKEN);
    CHECK(model.score(t5g::Sources::texts({TEXT}), t5g::Targets::texts({SPOKEN})).hypothesis(0).perplexity < 1.1);
    auto encoder = t5g::Encoder::open(demo);
    const auto pooled = encoder.encode(t5g::Sources::texts({TEXT}), T5G_POOLING_MEAN, true);
    CHECK(pooled.length == 1 && pooled.values.size() == states.width);
    CHECK(thrown([&] { encoder.classify(t5g::Sources::texts({TEXT})); }).field() == "task");

    auto engine = t5g::Engine::start(model);
    t5g::GenerationOptions plain;
    plain.max_new_tokens = 40;
    auto request = engine.submit(t5g::Sources::texts({TEXT}), plain, true);
    std::promise<std::string> told;
    std::string pieces, polled;
    engine.call(
        t5g::Sources::texts({TEXT}), plain,
        [&](t5g::Expected<t5g::Result> done) { told.set_value(done ? std::string(done->text(0)) : done.error().what()); },
        [&](const t5g::Piece &piece) { return (pieces += piece.text).size() < 1000; });
    for (auto event = request.poll(std::chrono::seconds(10)); event.kind != T5G_EVENT_END;
         event = request.poll(std::chrono::seconds(10)))
        polled += event.text;
    CHECK(polled == SPOKEN && request.result().text(0) == SPOKEN && told.get_future().get() == SPOKEN && pieces == SPOKEN);
    engine.drain();
    CHECK(engine.stats().finished == 2);
    CHECK(thrown([&] { engine.submit(t5g::Sources::texts({TEXT})); }).code() == T5G_ERROR_CLOSED);
    auto pair = t5g::Engine::start(model, {}, {0, 0});
    CHECK(pair.submit(t5g::Sources::texts({TEXT}), plain).result().text(0) == SPOKEN && pair.stats().copies == 2);
    CHECK(pair.stats_of_copy(0).steps + pair.stats_of_copy(1).steps == pair.stats().steps);
    CHECK(thrown([&] { t5g::Engine::start(model, {}, {-1}); }).field() == "options.devices[0]");
    CHECK(thrown([&] { model.chat("[]"); }).code() == T5G_ERROR_FILE);
}

#endif

int main(int, char **argv) {
    check(argv[1]);
    CHECK(t5g_live_handles() == 0);
    std::puts("well");
}
