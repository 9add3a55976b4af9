"""The Python package as its users have it: capi_python.py DEMO CLASSIFIER."""

import asyncio
import pickle
import sys
import threading
import time

import numpy as np
import t5gemma

TEXTS = ["mr brown paid $5 on may 3rd", "Prof. Lee lives at 1420 Elm St. in Boston."]
SPOKEN = ["mister brown paid five dollars on may third", "professor lee lives at fourteen twenty elm street in boston"]


def fails(kind, part, work):
    try:
        work()
    except kind as error:
        assert part in str(error), f"expected {part!r} in {error!r}"
        return error
    raise AssertionError(f"expected {kind.__name__} with {part!r}")


def futures(engine, endless):
    """Futures need no thread each, fail like calls, and cancel their requests."""
    before = threading.active_count()
    waiting = [engine.future(TEXTS, max_new_tokens=40, tenant=str(at % 3)) for at in range(49)]
    assert threading.active_count() <= before + 1
    assert all([row[0].text for row in one.result()] == SPOKEN for one in waiting)

    async def awaited():
        return await asyncio.wrap_future(engine.future(TEXTS[0], max_new_tokens=40))

    assert asyncio.run(awaited())[0][0].text == SPOKEN[0]
    late = engine.future(TEXTS * 8, deadline=0.001, **endless | {"num_beams": 1})
    fails(t5gemma.Error, "deadline", late.result)
    endless = engine.future(TEXTS, **endless | {"num_beams": 1})
    failed = engine.stats["failed"]
    assert endless.cancel() and endless.cancelled()
    while engine.stats["failed"] == failed:
        time.sleep(0.001)
    fails(t5gemma.Error, "num_beams", lambda: engine.future("x", num_beams=0))
    for wrong in ({"priority": "urgent"}, {"tenant": "a\0b"}):
        fails(ValueError, next(iter(wrong)), lambda: engine.future("x", **wrong))
    fails(TypeError, "tenant", lambda: engine.submit("x", tenant=1))


def main(demo, classifier):
    error = fails(t5gemma.Error, "manifest.json", lambda: t5gemma.Model.open("no/such/model"))
    assert error.field is None
    fails(t5gemma.Error, "expected an integer", lambda: t5gemma.Model.open(demo, threads="many"))
    model = t5gemma.Model.open(demo)
    assert "CPUExecutionProvider" in t5gemma.onnxruntime_report()["library"]["providers"]
    assert model.describe()["task"] == "text2text-generation"

    assert [row[0].text for row in model.generate(TEXTS, max_new_tokens=40)] == SPOKEN
    best = model.generate(TEXTS[0], max_new_tokens=40, num_beams=3, num_return_sequences=2, output_logprobs=True, top_logprobs=2)
    first, second = best[0]
    assert first.text == SPOKEN[0] and first.score > second.score and first.finish_reason == "eos"
    assert np.isclose(first.logprobs.sum(), first.logprob) and first.top_tokens.shape == (first.tokens.size, 2)
    assert first.cross_attentions is None
    covering = model.generate(TEXTS[0], max_new_tokens=40, num_beams=3, output_attentions=True, coverage_penalty=0.5)[0][0]
    attended = covering.cross_attentions
    assert attended.dtype == np.float32 and np.allclose(attended.sum(1), 1, atol=1e-5)
    assert attended.shape == (covering.tokens.size, len(model.tokenizer.encode(TEXTS[0])))
    scored = model.score([TEXTS[0]], [covering.tokens], output_attentions=True)[0]
    assert np.allclose(scored.cross_attentions, attended, atol=1e-5)
    expected = scored.logprob / covering.tokens.size + 0.5 * np.log(np.minimum(attended.sum(0), 1)).sum()
    assert np.isclose(covering.score, expected, atol=1e-4)
    assert fails(t5gemma.Error, "num_beams", lambda: model.generate("x", num_beams=0)).field == "num_beams"
    fails(t5gemma.Error, "num_beam", lambda: model.generate("x", num_beam=4))
    fails(ValueError, "expected int64", lambda: model.generate(np.zeros((1, 2))))
    fails(ValueError, "[rows, length]", lambda: model.generate(np.zeros((1, 2, 3), np.int64)))

    tokenizer = model.tokenizer
    ids = [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.decode(ids[0]) == TEXTS[0]
    padded = np.zeros((2, max(map(len, ids))), np.int64)
    mask = np.zeros_like(padded)
    for row, source in enumerate(ids):
        padded[row, : len(source)], mask[row, : len(source)] = source, 1
    for given in ({"sources": padded, "attention_mask": mask}, {"sources": ids}):
        assert [row[0].text for row in model.generate(**given, max_new_tokens=40)] == SPOKEN

    states, seen = model.encode(TEXTS)
    assert states.dtype == np.float32 and (seen == mask).all()
    again = model.generate(padded, attention_mask=mask, encoder_outputs=states, max_new_tokens=40)
    assert [row[0].text for row in again] == SPOKEN
    likely, unlikely = model.score(TEXTS, [SPOKEN[0], SPOKEN[0]])
    assert likely.perplexity < 1.1 < unlikely.perplexity
    assert np.isclose(model.score(TEXTS[:1], [likely.tokens])[0].logprob, likely.logprob, atol=1e-5)

    assert "".join(model.stream(TEXTS[0], max_new_tokens=40)) == SPOKEN[0]
    for _ in model.stream(TEXTS[0], max_new_tokens=40):
        break
    fails(t5gemma.Error, "num_beams", lambda: list(model.stream("x", num_beams=-1)))
    fails(ZeroDivisionError, "zero", lambda: model.generate("x", on_piece=lambda row, token, text: 1 / 0))
    fails(t5gemma.Error, "cancelled", lambda: model.generate("x", on_piece=lambda row, token, text: False))

    def only(target, scores):
        scores[:] = -np.inf
        scores[40] = 0

    assert model.generate("x", max_new_tokens=3, logits_processor=only)[0][0].tokens.tolist() == [40] * 3
    allowed = model.generate("x", max_new_tokens=2, prefix_allowed_tokens_fn=lambda row, target: [40 + len(target)])
    assert allowed[0][0].tokens.tolist() == [41, 42]

    # Callbacks may call the model, too.
    inner = []
    model.generate("x", max_new_tokens=2, on_piece=lambda *_: inner.extend(model.stream(TEXTS[0], max_new_tokens=40)))
    assert "".join(inner[: len(inner) // 2]) == SPOKEN[0]

    # Other threads go on while a call runs, and one of them ends it.
    cancellation, ticks = t5gemma.Cancellation(), []

    def tick():
        for _ in range(10):
            time.sleep(0.005)
            ticks.append(time.monotonic())
        cancellation.cancel()

    clock = threading.Thread(target=tick)
    clock.start()
    endless = {"max_new_tokens": 500, "suppress_tokens": [1], "num_beams": 8}
    fails(t5gemma.Error, "cancelled", lambda: [model.generate(TEXTS * 8, cancellation=cancellation, **endless) for _ in range(99)])
    clock.join()
    assert len(ticks) == 10
    error = fails(t5gemma.Error, "", lambda: [model.generate(TEXTS * 8, deadline=0.05, **endless) for _ in range(99)])
    assert (error.code, error.field) == (16, "deadline_seconds")

    with t5gemma.Engine(model, max_rows=8) as engine:
        streamed, waited = engine.submit(TEXTS, max_new_tokens=40, stream_text=True), engine.submit(TEXTS, max_new_tokens=40)
        told = ["", ""]
        for row, token, text in streamed:
            told[row] += text
        assert told == SPOKEN and [row[0].text for row in waited.result()] == SPOKEN == [row[0].text for row in streamed.result()]
        shared, found = engine.submit(TEXTS, max_new_tokens=40), []
        threads = [threading.Thread(target=lambda: found.append(shared.result()[1][0].text)) for _ in range(3)]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
        assert found == [SPOKEN[1]] * 3
        fails(t5gemma.Error, "num_beams", lambda: engine.submit("x", num_beams=0))
        times = engine.submit(TEXTS, max_new_tokens=40, priority="high", tenant="a").stats()
        assert 0 <= times["queued_seconds"] < times["first_token_seconds"] <= times["total_seconds"], times
        assert times["source_tokens"] > 2 and times["new_tokens"] > 2, times
        futures(engine, endless)
        fails(t5gemma.Error, "deadline", engine.submit(TEXTS * 8, deadline=0.001, **endless | {"num_beams": 1}).result)
        engine.drain()
        assert engine.stats["finished"] == 54 and engine.stats["max_rows"] == 8
    with t5gemma.Engine(model, max_rows=2, max_waiting_tokens=500) as engine:
        held = [engine.submit(TEXTS, **endless | {"num_beams": 1}) for _ in range(2)]
        try:
            while True:
                held.append(engine.submit(TEXTS, **endless | {"num_beams": 1}))
        except t5gemma.Error as full:
            assert full.code == 19 and full.retry_after > 0 and "source tokens" in str(full), full
            assert pickle.loads(pickle.dumps(full)).retry_after == full.retry_after
        [request.cancel() for request in held]
    with t5gemma.Engine(model) as engine:
        engine.drain()
        fails(t5gemma.Error, "no more", lambda: engine.submit("x"))

    with t5gemma.Engine(model, max_rows=1, devices=[0, 0]) as engine:
        assert len(engine.stats_of_copies) == engine.stats["copies"] == 2
        # A copy that is slow to wake finds the queue empty: which copy takes a row is the system's affair.
        while not all(copy["stepped_rows"] > 0 for copy in engine.stats_of_copies):
            assert [row[0].text for row in engine.submit(TEXTS, max_new_tokens=40).result()] == SPOKEN
        engine.drain()
        counts = engine.stats
        assert counts["finished"] > 0 and counts["stepped_rows"] == sum(copy["stepped_rows"] for copy in engine.stats_of_copies)
        fails(ValueError, "at least one", lambda: t5gemma.Engine(model, devices=[]))
        fails(t5gemma.Error, "options.devices[1]", lambda: t5gemma.Engine(model, devices=[0, -1]))

    with t5gemma.Encoder.open(demo) as encoder:
        vectors = encoder.embed(TEXTS, "mean", normalize=True)
        assert vectors.shape == (2, states.shape[2]) and np.allclose((vectors**2).sum(1), 1, atol=1e-5)
        fails(ValueError, "pooling", lambda: encoder.embed(TEXTS, "median"))
    with t5gemma.Encoder.open(classifier) as encoder:
        assert np.allclose(encoder.classify([[5, 6, 7], [8]], "softmax").sum(1), 1, atol=1e-5)
    fails(t5gemma.Error, "encoder", lambda: encoder.describe())
    print("well")


if __name__ == "__main__":
    main(*sys.argv[1:])
