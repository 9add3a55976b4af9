// t5gemma.hpp, used well and badly: surface DEMO. Compiled a second time with T5GEMMA_EXPECTED, which throws nothing.
#include <cmath>
#include <cstdio>
#include <future>
#include <thread>

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

    // What is refused before C is asked comes as an error, too.
    auto unequal = model->score(t5g::Sources::texts({TEXT, TEXT}), t5g::Targets::texts({SPOKEN}));
    CHECK(!unequal.has_value() && unequal.error().code() == T5G_ERROR_INPUT && unequal.error().field() == "targets.texts");
    CHECK(model->warm_up() && (*t5g::Model::open(demo)).describe().value().size() > 10);

    const auto kept = model->generate(t5g::Sources::texts({TEXT}));
    CHECK(kept.has_value() && kept->rows() == 1 && (*kept).count(0) == 1 && kept.value().text(0).value() == SPOKEN);
    auto engine = t5g::Engine::start(*model);
    auto future = engine->async(t5g::Sources::texts({TEXT}));
    auto waited = future->get();
    CHECK(waited && *waited->text(0) == SPOKEN);
    t5g::Call late;
    late.deadline = std::chrono::seconds(0);
    auto passed = engine->async(t5g::Sources::texts({TEXT}), {}, late);
    CHECK(passed && passed->get().error().code() == T5G_ERROR_DEADLINE);
    t5g::Cancellation cancellation;
    auto moved = std::move(cancellation);
    CHECK(!cancellation.cancel() && moved.cancel() && moved.is_cancelled());
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

// What belongs together and is of unequal sizes is refused by name, before anything is read.
static void check_sizes(const t5g::Model &model, const std::vector<std::int64_t> &ids) {
    using Rows = std::vector<std::vector<std::int64_t>>;
    const auto sources = t5g::Sources::texts({TEXT, TEXT});
    const auto unequal = [](const char *field, const char *expected, const char *found, auto work) {
        const auto error = thrown(work);
        const std::string message = std::string(field) + ": expected " + expected + ", found " + found;
        if (error.what() != message) std::fprintf(stderr, "%s\n", error.what());
        CHECK(error.code() == T5G_ERROR_INPUT && error.field() == field && error.what() == message);
    };
    const std::vector<std::string> one{SPOKEN}, three(3, SPOKEN);
    const char *each = "2 (one for each source)";
    unequal("targets.texts", each, "1", [&] { model.score(sources, t5g::Targets::texts(one)); });
    unequal("targets.texts", each, "3", [&] { model.score(sources, t5g::Targets::texts(three)); });
    unequal("targets.texts", each, "0", [&] { model.score(sources, t5g::Targets::texts({})); });
    unequal("targets.target_ids", each, "1", [&] { model.score(sources, t5g::Targets::ids({{40, 41}})); });
    unequal("targets.target_ids", each, "0", [&] { model.score(sources, t5g::Targets::ids(Rows{})); });

    const auto with = [&](auto change) {
        auto changed = t5g::Sources::texts({TEXT, TEXT});
        change(changed);
        return changed;
    };
    t5g::States states = model.encode(sources);
    const auto engine = t5g::Engine::start(model);
    const auto use = [&](const char *field, const char *expected, const char *found, const t5g::Sources &wrong) {
        unequal(field, expected, found, [&] { model.generate(wrong); });
        unequal(field, expected, found, [&] { model.encode(wrong); });
        unequal(field, expected, found, [&] { model.score(wrong, t5g::Targets::texts({SPOKEN, SPOKEN})); });
        unequal(field, expected, found, [&] { engine.submit(wrong); });
        unequal(field, expected, found, [&] { engine.call(wrong, {}, [](auto) {}); });
        unequal(field, expected, found, [&] { engine.async(wrong); });
    };
    use("sources.decoder_texts", each, "1", with([&](auto &to) { to.decoder_texts(one); }));
    use("sources.decoder_texts", each, "3", with([&](auto &to) { to.decoder_texts(three); }));
    use("sources.decoder_texts", each, "0", with([&](auto &to) { to.decoder_texts({}); }));
    use("sources.progress_totals", each, "1", with([&](auto &to) { to.progress_totals({9}); }));
    use("sources.decoder_input_ids[1]", "2 (tokens, as many as row 0 has)", "1",
        with([&](auto &to) { to.decoder_ids(Rows{{2, 40}, {2}}); }));
    use("sources.decoder_input_ids", "4 (as many tokens for each source)", "2",
        with([&](auto &to) { to.decoder_ids(Rows{{2, 40}}); }));
    const std::vector<std::int64_t> prompt{2, 40, 41};
    use("sources.decoder_input_ids", "4 (as many tokens for each source)", "3",
        with([&](auto &to) { to.decoder_ids(prompt, 2); }));
    use("sources.input_ids", "6 (rows times length)", "3", t5g::Sources::ids(prompt, 2, 3));
    use("sources.input_ids", "a size that fits into memory", "18446744073709551615 times 2",
        t5g::Sources::ids(prompt, SIZE_MAX, 2));
    const std::vector<std::int64_t> mask{1, 1};
    use("sources.attention_mask", "3 (rows times length)", "2", t5g::Sources::ids(prompt, 1, 3, mask));
    const t5g::Span<const float> half(states.values.data(), states.values.size() / 2);
    use("sources.encoder_outputs", each, "1",
        with([&](auto &to) { to.encoder_outputs(half, 1, states.length, states.width); }));
    const auto whole = std::to_string(states.values.size()) + " (rows times length times width)";
    use("sources.encoder_outputs", whole.c_str(), std::to_string(half.size()).c_str(),
        with([&](auto &to) { to.encoder_outputs(half, 2, states.length, states.width); }));
    // The tokens of texts are C's to count.
    const auto shorter = with([&](auto &to) { to.encoder_outputs(half, 2, states.length / 2, states.width); });
    if (states.length % 2 == 0) CHECK(thrown([&] { model.generate(shorter); }).field() == "sources.encoder_length");
    const t5g::Span<const float> narrow(states.values.data(), 2 * states.length);
    const auto narrower = with([&](auto &to) { to.encoder_outputs(narrow, 2, states.length, 1); });
    CHECK(thrown([&] { model.generate(narrower); }).field() == "sources.encoder_width");

    // What is right is right in every form, and what is kept may go.
    auto result = model.generate(t5g::Sources::texts({TEXT, TEXT}).encoder_outputs(model.encode(sources)));
    CHECK(result.rows() == 2 && result.text(1) == SPOKEN);
    auto alone = [&] {
        std::vector<std::int64_t> own = ids, of_ones(ids.size(), 1);
        return t5g::Sources::ids(own, 1, own.size(), of_ones).decoder_ids(Rows{{2}});
    }();
    result = model.generate(alone);
    CHECK(result.text(0) == SPOKEN);
}

// Texts keep their zeros or are refused; nothing is cut.
static void check_zeros(const t5g::Model &model, const std::string &demo) {
    using namespace std::string_literals;
    const auto refused = [](const char *field, auto work) {
        const auto error = thrown(work);
        CHECK(error.code() == T5G_ERROR_ARGUMENT && error.field() == field);
        CHECK(std::string(error.what()).find("zero byte") != std::string::npos);
    };
    const auto cut = demo + "\0/elsewhere"s;
    refused("path", [&] { t5g::Model::open(cut); });
    refused("path", [&] { t5g::Encoder::open(cut); });
    refused("path", [&] { t5g::Tokenizer::open(demo + "/tokenizer.json\0x"s); });
    refused("library", [&] { t5g::onnxruntime_report("a\0b"s); });
    refused("messages", [&] { model.chat("[]\0"s); });
    refused("sources.messages", [&] { model.generate(t5g::Sources::messages("[]\0"s)); });
    t5g::OpenOptions opening;
    opening.provider = "cpu\0"s;
    refused("provider", [&] { t5g::Model::open(demo, opening); });
    for (auto [field, name] : {std::pair{&t5g::GenerationOptions::json, "json"}, {&t5g::GenerationOptions::regex, "regex"},
                               {&t5g::GenerationOptions::grammar, "grammar"},
                               {&t5g::GenerationOptions::json_schema, "json_schema"}}) {
        t5g::GenerationOptions options;
        options.*field = "a\0b"s;
        refused(name, [&] { model.generate(t5g::Sources::texts({TEXT}), options); });
    }
    t5g::GenerationOptions options;
    options.stop_strings = {"good", "b\0d"s};
    refused("stop_strings[1]", [&] { model.generate(t5g::Sources::texts({TEXT}), options); });

    options = {};
    options.max_new_tokens = 1;
    const auto prompt = [&](const std::string &text) {
        return model.generate(t5g::Sources::texts({TEXT}).decoder_texts({text}), options).json();
    };
    const auto tokens = [&](const std::string &text) {
        const auto tokenizer = model.tokenizer();
        return t5g::Sources::texts({TEXT}).decoder_ids({tokenizer.encode(text, T5G_TEXT_TARGET)});
    };
    CHECK(prompt("doctor\0 smith"s) == model.generate(tokens("doctor\0 smith"s), options).json());
}

// Exceptions of callbacks come out of the call that they end.
struct Mine : std::runtime_error {
    Mine() : std::runtime_error("mine") {}
};

template <class Work>
static void passes_mine(Work work) {
    bool passed = false;
    try {
        work();
    } catch (const Mine &) {
        passed = true;
    }
    CHECK(passed);
}

static void check_exceptions(const t5g::Model &model) {
    const auto sources = t5g::Sources::texts({TEXT});
    const auto engine = t5g::Engine::start(model);
    t5g::Call pieces, steps, scores, allowed;
    pieces.on_piece = [](const t5g::Piece &) -> bool { throw Mine(); };
    steps.on_step = []() -> bool { throw Mine(); };
    scores.logits_processor = [](const t5g::Position &, t5g::Span<float>) { throw Mine(); };
    allowed.prefix_allowed_tokens = [](std::size_t, t5g::Span<const std::int64_t>) -> std::vector<std::int64_t> {
        throw Mine();
    };
    for (const auto &call : {pieces, steps, scores, allowed}) passes_mine([&] { model.generate(sources, {}, call); });
    passes_mine([&] { model.score(sources, t5g::Targets::texts({SPOKEN}), 0, steps); });
    passes_mine([&] { model.encode(sources, steps); });
    passes_mine([&] { model.warm_up(steps); });

    t5g::Cancellation unused;
    for (auto call : {pieces, scores, allowed}) {
        for (auto *cancellation : {static_cast<t5g::Cancellation *>(nullptr), &unused}) {
            call.cancellation = cancellation;
            passes_mine([&] { engine.async(sources, {}, call).get(); });
            std::promise<std::string> told;
            const auto on_done = [&](t5g::Expected<t5g::Result> done) {
                CHECK(!done && done.error().code() == T5G_ERROR_CANCELLED && done.error().cause());
                passes_mine([&] { done.value(); });
                told.set_value(done.error().field() + " " + done.error().what());
            };
            engine.call(sources, {}, on_done, call);
            const auto text = told.get_future().get();
            CHECK(text.find("threw an exception: mine") != std::string::npos);
            if (call.on_piece) continue;
            auto request = engine.submit(sources, {}, call);
            passes_mine([&] { request.result(); });
            passes_mine([&] { request.result(); });
        }
    }
    CHECK(!unused.is_cancelled());

    // A callback that would never be called is refused by name, and one that is called is obeyed.
    const auto refused = [](const char *field, auto work) {
        const auto error = thrown(work);
        CHECK(error.code() == T5G_ERROR_ARGUMENT && error.field() == field);
    };
    const auto targets = t5g::Targets::texts({SPOKEN});
    refused("call.on_piece", [&] { model.score(sources, targets, 0, pieces); });
    refused("call.logits_processor", [&] { model.score(sources, targets, 0, scores); });
    refused("call.prefix_allowed_tokens", [&] { model.encode(sources, allowed); });
    refused("call.on_piece", [&] { model.warm_up(pieces); });
    refused("call.on_piece", [&] { engine.submit(sources, {}, pieces); });
    refused("call.on_step", [&] { engine.submit(sources, {}, steps); });
    refused("call.on_step", [&] { engine.call(sources, {}, [](auto) {}, steps); });
    refused("on_done", [&] { engine.call(sources, {}, std::function<void(t5g::Expected<t5g::Result>)>()); });
    std::size_t count = 0;
    t5g::Call counted;
    counted.on_step = [&] { return ++count > 0; };
    model.score(sources, targets, 0, counted);
    CHECK(count > 3);
    counted.on_step = [&] { return ++count < 3; };
    count = 0;
    CHECK(thrown([&] { model.score(sources, targets, 0, counted); }).code() == T5G_ERROR_CANCELLED && count == 3);
}

// What the engine's callbacks do to scores is what they do alone.
static void check_engine_callbacks(const t5g::Model &model) {
    t5g::GenerationOptions two;
    two.max_new_tokens = 2;
    const auto sources = t5g::Sources::texts({TEXT, TEXT});
    const auto engine = t5g::Engine::start(model);
    t5g::Call call;
    call.prefix_allowed_tokens = [](std::size_t row, t5g::Span<const std::int64_t> target) {
        return std::vector<std::int64_t>{static_cast<std::int64_t>(40 + 10 * row + target.size())};
    };
    const auto alone = model.generate(sources, two, call).json();
    CHECK(engine.async(sources, two, call).get().json() == alone);
    auto request = engine.submit(sources, two, call);
    auto other = engine.submit(sources, two, call);
    request = std::move(other);
    auto last = std::move(request);
    CHECK(last.result().json() == alone);
    CHECK(last.poll(std::chrono::seconds(-1)).kind == T5G_EVENT_END);
    CHECK(thrown([&] { request.result(); }).code() == T5G_ERROR_ARGUMENT);
    // Times, counts and what the queue is told.
    call = {};
    std::atomic<int> admitted{0};
    call.priority = T5G_PRIORITY_HIGH;
    call.tenant = "a client";
    call.on_admitted = [&](std::size_t row) { return row == static_cast<std::size_t>(admitted++); };
    const auto timed = engine.async(sources, two, call).get();
    const auto times = timed.stats();
    CHECK(admitted == 2 && times.new_tokens == 4 && times.source_tokens > 4);
    CHECK(times.queued_seconds <= times.first_token_seconds && times.first_token_seconds <= times.total_seconds);
    CHECK(times.encoding_seconds > 0);
    CHECK(std::isnan(model.generate(sources, two).stats().total_seconds));
    call.priority = 3;
    CHECK(thrown([&] { engine.async(sources, two, call); }).field() == "call.priority");
    call.priority = T5G_PRIORITY_LOW;
    CHECK(thrown([&] { engine.submit(sources, two, call); }).field() == "call.on_admitted");
    CHECK(thrown([&] { model.generate(sources, two, call); }).field() == "call.on_admitted");
    call.on_admitted = [](std::size_t) { return false; };
    CHECK(thrown([&] { engine.async(sources, two, call).get(); }).code() == T5G_ERROR_CANCELLED);
    call.on_admitted = [](std::size_t) -> bool { throw std::runtime_error("as asked"); };
    auto refused = engine.async(sources, two, call);
    std::string told;
    try {
        refused.get();
    } catch (const std::runtime_error &error) {
        told = error.what();
    }
    CHECK(told == "as asked");
    std::atomic<int> asked{0};
    call = {};
    call.logits_processor = [&](const t5g::Position &, t5g::Span<float> scores) {
        // Callbacks may call back, but not wait for the thread that they are on.
        CHECK(thrown([&] { engine.drain(); }).code() == T5G_ERROR_UNSUPPORTED);
        CHECK(thrown([&] { engine.shutdown(); }).code() == T5G_ERROR_UNSUPPORTED);
        scores[41] = 1000;
        asked++;
    };
    auto forced = engine.async(sources, two, call).get();
    CHECK(asked == 4 && forced.hypothesis(1).tokens[1] == 41);
}

// A deadline that has passed is one, whatever it was computed from.
static void check_deadlines(const t5g::Model &model) {
    using std::chrono::nanoseconds;
    using std::chrono::seconds;
    const auto sources = t5g::Sources::texts({TEXT});
    const auto engine = t5g::Engine::start(model);
    const auto encoder_call = [&](const t5g::Call &call) { model.encode(sources, call); };
    const auto late = [](auto work) {
        const auto error = thrown(work);
        CHECK(error.code() == T5G_ERROR_DEADLINE && error.what() == std::string("the deadline has passed"));
        CHECK(error.field() == "deadline_seconds");
    };
    const t5g::Deadline passed[] = {seconds(0), seconds(-1), nanoseconds(1), nanoseconds(-1),
                                    std::chrono::duration<double>(-1e300), std::chrono::duration<double>(-INFINITY)};
    for (const auto deadline : passed) {
        t5g::Call call;
        call.deadline = deadline;
        late([&] { model.generate(sources, {}, call); });
        late([&] { model.score(sources, t5g::Targets::texts({SPOKEN}), 0, call); });
        late([&] { encoder_call(call); });
        late([&] { model.warm_up(call); });
        late([&] { engine.submit(sources, {}, call).result(); });
        late([&] { engine.submit(sources, {}, false, deadline).result(); });
        late([&] { engine.async(sources, {}, call).get(); });
    }
    t5g::Call nan;
    nan.deadline = std::chrono::duration<double>(NAN);
    CHECK(thrown([&] { model.generate(sources, {}, nan); }).field() == "call.deadline_seconds");
    t5g::Call never;
    never.deadline = std::chrono::duration<double>(INFINITY);
    CHECK(model.generate(sources, {}, never).rows() == 1);

    t5g::Cancellation cancellation, taken = std::move(cancellation);
    t5g::Call moved;
    moved.cancellation = &cancellation;
    for (const auto &error : {thrown([&] { model.generate(sources, {}, moved); }), thrown([&] { encoder_call(moved); }),
                              thrown([&] { engine.submit(sources, {}, moved); }),
                              thrown([&] { engine.call(sources, {}, [](auto) {}, moved); })})
        CHECK(error.code() == T5G_ERROR_HANDLE && error.field() == "call.cancellation");
    CHECK(thrown([&] { cancellation.cancel(); }).field() == "cancellation" && !taken.is_cancelled());
}

// What was moved from is empty, and what is moved into gives up what it had.
static void check_moves(const char *demo) {
    auto first = t5g::Model::open(demo), second = t5g::Model::open(demo);
    CHECK(t5g_live_handles() == 2);
    first = std::move(second);
    CHECK(t5g_live_handles() == 1 && second.get() == nullptr);
    auto &itself = first;
    first = std::move(itself);
    CHECK(first.describe().size() > 10);
    const auto sources = t5g::Sources::texts({TEXT});
    CHECK(thrown([&] { second.describe(); }).code() == T5G_ERROR_ARGUMENT);
    CHECK(thrown([&] { second.generate(sources); }).field() == "model");
    CHECK(thrown([&] { t5g::Engine::start(second); }).field() == "model");
    auto engine = t5g::Engine::start(first), other = t5g::Engine::start(first);
    engine = std::move(other);
    CHECK(t5g_live_handles() == 2 && thrown([&] { other.submit(sources); }).field() == "engine");
    auto ids = t5g::Sources::ids({{5, 6}, {7}}), texts = sources;
    texts.encoder_outputs(first.encode(texts));
    const auto kept_ids = std::move(ids), kept_texts = std::move(texts);
    for (const auto &left : {ids, texts}) {
        const auto error = thrown([&] { first.generate(left); });
        CHECK(error.code() == T5G_ERROR_INPUT && error.field() == "sources");
    }
    CHECK(first.generate(kept_texts).rows() == 1);
    auto tokenizer = first.tokenizer();
    auto stream = tokenizer.stream();
    auto moved = std::move(stream);
    CHECK(thrown([&] { stream.push(5); }).field() == "stream");
}

// Views into temporaries do not compile.
template <class T, class = void>
struct GivesText : std::false_type {};
template <class T>
struct GivesText<T, std::void_t<decltype(std::declval<T>().text(0))>> : std::true_type {};
template <class T, class = void>
struct GivesHypothesis : std::false_type {};
template <class T>
struct GivesHypothesis<T, std::void_t<decltype(std::declval<T>().hypothesis(0))>> : std::true_type {};
template <class T, class = void>
struct Pushes : std::false_type {};
template <class T>
struct Pushes<T, std::void_t<decltype(std::declval<T>().push(0))>> : std::true_type {};
template <class T, class = void>
struct Finishes : std::false_type {};
template <class T>
struct Finishes<T, std::void_t<decltype(std::declval<T>().finish())>> : std::true_type {};
template <class T, class = void>
struct Polls : std::false_type {};
template <class T>
struct Polls<T, std::void_t<decltype(std::declval<T>().poll(std::chrono::seconds(0)))>> : std::true_type {};
template <class T, class = void>
struct Points : std::false_type {};
template <class T>
struct Points<T, std::void_t<decltype(std::declval<T>().operator->())>> : std::true_type {};
static_assert(GivesText<t5g::Result &>::value && GivesText<const t5g::Result &>::value);
static_assert(!GivesText<t5g::Result>::value && !GivesText<const t5g::Result>::value);
static_assert(GivesHypothesis<t5g::Result &>::value && !GivesHypothesis<t5g::Result>::value);
static_assert(Pushes<t5g::TextStream &>::value && !Pushes<t5g::TextStream>::value);
static_assert(Finishes<t5g::TextStream &>::value && !Finishes<t5g::TextStream>::value);
static_assert(Polls<t5g::Request &>::value && !Polls<t5g::Request>::value);
static_assert(Points<t5g::Expected<t5g::Result> &>::value && !Points<t5g::Expected<t5g::Result>>::value);
static_assert(Points<t5g::Expected<t5g::Model>>::value);
static_assert(!std::is_constructible_v<t5g::Span<const float>, std::vector<float>>);
static_assert(std::is_same_v<decltype(std::declval<t5g::Error>().field()), std::string>);

static void check(const char *demo) {
    check_moves(demo);
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
    auto again = model.generate(t5g::Sources::ids({ids}).encoder_outputs(states), options);
    CHECK(again.text(0) == SPOKEN);
    auto likely = model.score(t5g::Sources::texts({TEXT}), t5g::Targets::texts({SPOKEN}));
    CHECK(likely.hypothesis(0).perplexity < 1.1);
    check_sizes(model, ids);
    check_zeros(model, demo);
    check_exceptions(model);
    check_engine_callbacks(model);
    check_deadlines(model);
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
    for (auto event = request.poll(std::chrono::hours(1)); event.kind != T5G_EVENT_END;
         event = request.poll(std::chrono::hours(1)))
        polled += event.text;
    auto asked = request.result();
    CHECK(polled == SPOKEN && asked.text(0) == SPOKEN && told.get_future().get() == SPOKEN && pieces == SPOKEN);
    engine.drain();
    CHECK(engine.stats().finished == 2);
    CHECK(thrown([&] { engine.submit(t5g::Sources::texts({TEXT})); }).code() == T5G_ERROR_CLOSED);
    auto pair = t5g::Engine::start(model, {}, {0, 0});
    auto one = pair.submit(t5g::Sources::texts({TEXT}), plain).result();
    CHECK(one.text(0) == SPOKEN && pair.stats().copies == 2);
    pair.drain();
    CHECK(pair.stats_of_copy(0).steps + pair.stats_of_copy(1).steps == pair.stats().steps);
    CHECK(thrown([&] { t5g::Engine::start(model, {}, {-1}); }).field() == "options.devices[0]");
    t5g::EngineOptions bounds;
    for (auto [bound, name] : {std::pair{&t5g::EngineOptions::max_rows, "options.max_rows"},
                               {&t5g::EngineOptions::max_bytes, "options.max_bytes"},
                               {&t5g::EngineOptions::max_waiting, "options.max_waiting"}}) {
        bounds = {};
        bounds.*bound = 0;
        const auto error = thrown([&] { t5g::Engine::start(model, bounds); });
        CHECK(error.field() == name && std::string(error.what()).find("at least 1") != std::string::npos);
    }
    CHECK(thrown([&] { model.chat("[]"); }).code() == T5G_ERROR_FILE);
}

#endif

int main(int, char **argv) {
    check(argv[1]);
    CHECK(t5g_live_handles() == 0);
    std::puts("well");
}
