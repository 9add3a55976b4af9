"""The Python package in an event loop: capi_python_asyncio.py DEMO CLASSIFIER."""

import asyncio
import gc
import sys
import threading
import time

import t5gemma
from capi_python import SPOKEN, TEXTS, fails

ENDLESS = {"suppress_tokens": [1], "max_new_tokens": 500}
CANCELLED, DEADLINE, FULL = 15, 16, 19


async def raises(kind, part, awaitable):
    try:
        await awaitable
    except kind as error:
        assert part in str(error), f"expected {part!r} in {error!r}"
        return error
    raise AssertionError(f"expected {kind.__name__} with {part!r}")


async def joined(stream):
    return "".join([piece async for piece in stream])


async def ended(engine, before, count=1):
    """Waits until so many more requests have failed and no row is in flight, without one having been finished."""
    until = time.monotonic() + 10
    while (now := engine.stats)["failed"] < before["failed"] + count or now["rows"]:
        assert time.monotonic() < until, f"{before} {now}"
        await asyncio.sleep(0.001)
    assert (now["failed"], now["finished"]) == (before["failed"] + count, before["finished"]), f"{before} {now}"


async def streams(engine):
    stream = engine.stream(TEXTS[0], max_new_tokens=40)
    pieces = [piece async for piece in stream]
    assert "".join(pieces) == SPOKEN[0] and all(pieces)
    (hypothesis,), = await stream.result()
    assert hypothesis.text == SPOKEN[0] and hypothesis.finish_reason == "eos"
    assert (await stream.stats())["new_tokens"] == hypothesis.tokens.size
    assert await joined(stream) == "", "what was read is gone"

    # The result does not need a reader, and what was not read can still be.
    stream = engine.stream(TEXTS[1], max_new_tokens=40, num_beams=2, priority="high", tenant="a")
    assert (await stream.result())[0][0].text == SPOKEN[1] == await joined(stream)
    assert (await asyncio.gather(stream.result(), stream.result()))[1][0][0].text == SPOKEN[1]

    # A slow reader gets the pieces that have come meanwhile as one.
    stream = engine.stream(TEXTS[0], max_new_tokens=40)
    await stream.result()
    assert await anext(stream) == SPOKEN[0]

    # No request has a thread.
    before = threading.active_count()
    waiting = [engine.stream(TEXTS[at % 2], max_new_tokens=40, tenant=str(at % 3)) for at in range(300)]
    texts = await asyncio.gather(*map(joined, waiting))
    assert threading.active_count() == before
    assert texts == SPOKEN * 150
    rows = await asyncio.gather(*(engine.future(text, max_new_tokens=40) for text in TEXTS * 20))
    assert threading.active_count() <= before + 1
    assert [row[0][0].text for row in rows] == SPOKEN * 20


async def cancellations(engine):
    """Every way to leave a request ends its row."""

    async def read():
        async for _ in engine.stream(TEXTS[0], **ENDLESS):
            began.set()

    async def work_meanwhile():
        async for _ in engine.stream(TEXTS[0], **ENDLESS):
            began.set()
            await asyncio.sleep(100)

    async def wait_for_result():
        began.set()
        await engine.stream(TEXTS[0], **ENDLESS).result()

    async def wait_for_future():
        began.set()
        await engine.future(TEXTS[0], **ENDLESS)

    for work in (read, work_meanwhile, wait_for_result, wait_for_future):
        before, began = engine.stats, asyncio.Event()
        task = asyncio.create_task(work())
        await began.wait()
        task.cancel()
        await raises(asyncio.CancelledError, "", task)
        await ended(engine, before)

    async def leave():
        async for _ in engine.stream(TEXTS[0], **ENDLESS):
            break

    async def fail():
        async for _ in engine.stream(TEXTS[0], **ENDLESS):
            raise LookupError("on purpose")

    async def close():
        stream = engine.stream(TEXTS[0], **ENDLESS)
        assert await anext(stream) and await anext(stream)
        await stream.aclose()
        await raises(StopAsyncIteration, "", anext(stream))
        await stream.aclose()

    async def drop():
        engine.stream(TEXTS[0], **ENDLESS)

    async def run_out_of_time():
        await asyncio.wait_for(joined(engine.stream(TEXTS[0], **ENDLESS)), 0.05)

    async def stop():
        stream = engine.stream(TEXTS[0], **ENDLESS)
        threading.Timer(0.02, stream.cancel).start()
        await joined(stream)

    for work, error in (
        (leave, None),
        (fail, LookupError),
        (close, None),
        (drop, None),
        (run_out_of_time, asyncio.TimeoutError),
        (stop, t5gemma.Error),
    ):
        before = engine.stats
        if error is None:
            await work()
        else:
            code = getattr(await raises(error, "", work()), "code", CANCELLED)
            assert code == CANCELLED
        await ended(engine, before)


async def errors(model, engine):
    for wrong, kind, part in (
        ({"num_beams": 0}, t5gemma.Error, "num_beams"),
        ({"on_piece": print}, TypeError, "on_piece"),
        ({"priority": "urgent"}, ValueError, "priority"),
        ({"tenant": 1}, TypeError, "tenant"),
    ):
        fails(kind, part, lambda: engine.stream("x", **wrong))
        fails(kind, part, lambda: engine.submit("x", **wrong))
    fails(ValueError, "expected one, found 2", lambda: engine.stream(TEXTS))
    late = engine.stream(TEXTS[0], deadline=0.001, **ENDLESS)
    for read in (joined(late), late.result(), late.stats()):
        assert (await raises(t5gemma.Error, "deadline", read)).code == DEADLINE
    assert await joined(late) == "", "an error ends the iteration"
    assert (await raises(t5gemma.Error, "deadline", engine.future(TEXTS[0], deadline=0.001, **ENDLESS))).code == DEADLINE

    with t5gemma.Engine(model, max_rows=1, max_waiting=2) as small:
        held = []
        full = fails(t5gemma.Error, "waiting", lambda: [held.append(small.stream(TEXTS[0], **ENDLESS)) for _ in range(9)])
        assert full.code == FULL and full.retry_after > 0 and 2 <= len(held) <= 3, (full, len(held))
        small.shutdown()
        for one in held:
            await raises(t5gemma.Error, "", joined(one))


def loops(engine):
    """Streams belong to a loop, and end with it."""
    fails(RuntimeError, "no running event loop", lambda: engine.stream("x"))

    async def begun():
        streams = [engine.stream(TEXTS[0], **ENDLESS) for _ in range(3)]
        assert all([await anext(stream) for stream in streams])
        return streams

    while engine.stats["rows"]:
        time.sleep(0.001)
    before = engine.stats
    left = asyncio.run(begun())  # Their loop is closed, and they are not: the next piece ends each.
    asyncio.run(ended(engine, before, len(left)))
    for stream in left:
        assert fails(RuntimeError, "another one", lambda: asyncio.run(joined(stream)))


async def all_of(model, engine):
    await streams(engine)
    await cancellations(engine)
    await errors(model, engine)
    # A task that is left when the loop ends is cancelled by asyncio.run.
    left = asyncio.create_task(joined(engine.stream(TEXTS[0], **ENDLESS)))
    await asyncio.sleep(0.02)
    return left


def main(demo, _):
    # The engine's threads and the loop take turns as often as they can.
    sys.setswitchinterval(1e-6)
    model = t5gemma.Model.open(demo)
    with t5gemma.Engine(model, max_rows=16) as engine:
        # Streams are ended by the count of references, not by the garbage collector.
        gc.disable()
        assert asyncio.run(all_of(model, engine)).cancelled()
        loops(engine)
        gc.enable()
        engine.drain()
        counts = engine.stats
        assert counts["submitted"] == counts["finished"] + counts["failed"] and counts["rows"] == 0
    print("well")


if __name__ == "__main__":
    main(*sys.argv[1:])
