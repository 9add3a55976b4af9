"""The Python package in processes that end, are interrupted, fork, or are given its objects, each case in a process of its own:
capi_python_process.py DEMO CLASSIFIER."""

import asyncio
import concurrent.futures
import copy
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import t5gemma
from capi_python import fails

TEXT = "Dr. Smith paid $3.50 on May 3, 2019."
ENDLESS = {"suppress_tokens": [1], "max_new_tokens": 400}
LONG = {"suppress_tokens": [1], "max_new_tokens": 500, "num_beams": 4}


# Ends while something runs. What is returned keeps it alive until the very end.


def begun(model, **callbacks):
    """A daemon thread that generates again and again, after its first callback."""
    has_begun = threading.Event()

    def seen(name):
        def told(*arguments):
            has_begun.set()
            return callbacks[name](*arguments)

        return told

    def work():
        while True:
            model.generate([TEXT] * 8, **{name: seen(name) for name in callbacks}, **ENDLESS)

    threading.Thread(target=work, daemon=True).start()
    has_begun.wait()


def stream(model):
    pieces = model.stream(TEXT, **ENDLESS)
    assert next(pieces)
    return pieces


def stream_in_a_thread(model):
    has_begun = threading.Event()

    def work():
        for _ in model.stream(TEXT, **ENDLESS):
            has_begun.set()

    threading.Thread(target=work, daemon=True).start()
    has_begun.wait()


def thread_with_pieces(model):
    begun(model, on_piece=lambda row, token, text: None)


def thread_with_scores(model):
    begun(model, logits_processor=lambda target, scores: None)


def thread_with_allowed_tokens(model):
    begun(model, prefix_allowed_tokens_fn=lambda row, target: [40, 41])


def thread_in_an_endless_callback(model):
    def endless(*_):
        while True:
            pass

    begun(model, on_piece=endless)


def thread_without_callbacks(model):
    threading.Thread(target=lambda: model.generate([TEXT] * 8, **LONG), daemon=True).start()


def engine(model):
    engine = t5gemma.Engine(model)
    requests = [engine.submit([TEXT] * 4, stream_text=True, **ENDLESS) for _ in range(3)]
    next(iter(requests[0]))
    return engine, requests


UNFINISHED = (
    stream,
    stream_in_a_thread,
    thread_with_pieces,
    thread_with_scores,
    thread_with_allowed_tokens,
    thread_in_an_endless_callback,
    thread_without_callbacks,
    engine,
)


def ends(model, case, way):
    global kept
    kept = next(begin for begin in UNFINISHED if begin.__name__ == case)(model)
    if way == "exit":
        sys.exit(3)
    if way == "raise":
        raise LookupError("on purpose")


# Interrupted


def interrupted(work, model, number=signal.SIGINT, kind=KeyboardInterrupt):
    """The seconds until a signal that is sent while the work is under way, which is without an end, has ended it."""

    def endless():
        while True:
            work()

    has_ended = threading.Event()

    def interrupt():
        wait = 0.3
        while not has_ended.wait(wait):
            # Python drops what a handler raises in a __del__. A Ctrl-C comes through in any case.
            if wait > 1 and kind is KeyboardInterrupt:
                print("a KeyboardInterrupt was lost", file=sys.stderr)
                os._exit(4)
            os.kill(os.getpid(), number)
            wait = 20

    threading.Thread(target=interrupt, daemon=True).start()
    began = time.monotonic()
    fails(kind, "", endless)
    has_ended.set()
    assert model.generate([[5]], max_new_tokens=1), "the model is free again"
    return time.monotonic() - began


def drained(engine, texts):
    engine.submit(texts, **ENDLESS), engine.submit(texts, **ENDLESS)
    engine.drain()


def interrupts(model):
    # A shell that has started this in the background has it ignore the signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    texts = [TEXT] * 32
    targets = [list(range(40, 340))] * 256
    engine = t5gemma.Engine(model)
    works = {
        "generate": lambda: model.generate(texts, **LONG),
        "generate with on_piece": lambda: model.generate(texts, on_piece=lambda *_: None, **ENDLESS),
        "generate with scores": lambda: model.generate(texts, logits_processor=lambda *_: None, **LONG),
        "stream": lambda: [None for _ in model.stream(TEXT, **LONG)],
        "score": lambda: model.score([[40] * 300] * 256, targets),
        "encode": lambda: model.encode([[40] * 500] * 256),
        "warm_up": lambda: model.warm_up(),
        "open": lambda: t5gemma.Model.open(sys.argv[1]),
        "result": lambda: engine.submit(texts, **ENDLESS).result(),
        "drain": lambda: drained(t5gemma.Engine(model), texts),
    }
    for name, work in works.items():
        taken = interrupted(work, model)
        print(f"{name}: {taken:.2f} s", file=sys.stderr)
    engine.close()

    # One that comes while something is freed, in a finalizer.
    from t5gemma._library import Handle

    handles = [Handle(1, lambda _: os.kill(os.getpid(), signal.SIGINT))]
    fails(KeyboardInterrupt, "", lambda: (handles.clear(), time.sleep(20)))

    # What another signal's handler does is done meanwhile, and what it raises comes out.
    heard = []
    signal.signal(signal.SIGUSR1, lambda *_: heard.append(threading.current_thread()))
    threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
    cancellation = t5gemma.Cancellation()
    signal.signal(signal.SIGUSR2, lambda *_: cancellation.cancel())
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGUSR2)).start()
    fails(t5gemma.Error, "cancelled", lambda: model.generate(texts, cancellation=cancellation, **LONG))
    assert heard == [threading.main_thread()]

    def late(*_):
        raise TimeoutError("late")

    signal.signal(signal.SIGALRM, late)
    interrupted(lambda: model.generate(texts, **LONG), model, signal.SIGALRM, TimeoutError)
    # Callbacks come on the thread that has made the call.
    threads = set()
    model.generate("x", on_piece=lambda *_: threads.add(threading.get_ident()), max_new_tokens=3)
    assert threads == {threading.get_ident()}


# Forks


def in_a_child(work):
    """How a child that does this ends, normally or by an exception."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        work()
        sys.exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


async def streamed(engine):
    stream = engine.stream(TEXT, **ENDLESS)
    assert await anext(stream)
    return stream


async def awaited(future):
    return await future


def forks(model):
    expected = model.generate(TEXT, max_new_tokens=5)[0][0].text
    tokenizer = model.tokenizer

    def same():
        assert model.generate(TEXT, max_new_tokens=5)[0][0].text == expected
        assert tokenizer.encode(TEXT).size
        model.close()

    def anew():
        with t5gemma.Model.open(sys.argv[1]) as mine:
            assert mine.generate(TEXT, max_new_tokens=5)[0][0].text == expected
        with t5gemma.Engine(t5gemma.Model.open(sys.argv[1])) as engine:
            assert engine.submit(TEXT, max_new_tokens=5).result()[0][0].text == expected

    assert [in_a_child(work) for work in (lambda: None, same, anew, lambda: sys.exit(7))] == [0, 0, 0, 7]

    engine = t5gemma.Engine(model)
    request = engine.submit(TEXT, **ENDLESS)
    future = engine.future(TEXT, **ENDLESS)
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    stream = loop.run_until_complete(streamed(engine))
    pieces = model.stream(TEXT, **ENDLESS)
    next(pieces)

    def refused():
        for work in (anext(stream), stream.result(), stream.stats()):
            fails(t5gemma.Error, "stream: this Stream was made before a fork", lambda: asyncio.run(work))
        for work in (future.result, future.exception, lambda: asyncio.run(awaited(future))):
            fails(t5gemma.Error, "future: this Future was made before a fork", work)
        for work in (lambda: engine.submit("x"), engine.drain, lambda: engine.stats, engine.shutdown):
            fails(t5gemma.Error, "engine: this Engine was made before a fork", work)
        for work in (request.result, request.cancel, lambda: next(iter(request))):
            fails(t5gemma.Error, "request: this Request was made before a fork", work)
        fails(t5gemma.Error, "in use in the parent", lambda: model.generate("x"))
        fails(t5gemma.Error, "fork", lambda: list(pieces))
        engine.close()
        request.close()

    assert [in_a_child(work) for work in (refused, anew)] == [0, 0]
    pieces.close()
    request.cancel()
    stream.cancel()
    future.cancel()
    assert engine.submit(TEXT, max_new_tokens=5).result()[0][0].text == expected, "the parent's go on"


# Copies and pickles


def failing(path):
    t5gemma.Model.open(path)


def answer(model):
    return model.generate(TEXT, max_new_tokens=5)[0][0].text


def copies(model):
    expected = answer(model)
    for make in (copy.copy, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))):
        made = make(model)
        assert answer(made) == expected
        made.close()
        assert answer(model) == expected, "the original is its own"
        assert make(model.tokenizer).decode(model.tokenizer.encode("a b")) == "a b"
        with t5gemma.Encoder.open(sys.argv[1], threads=1) as encoder:
            assert make(encoder).encode("x")[0].shape == encoder.encode("x")[0].shape
        engine = t5gemma.Engine(model)
        of_engine = engine.submit("x", max_new_tokens=1), engine.future("x", max_new_tokens=1)
        for owner in (engine, *of_engine, t5gemma.Cancellation()):
            fails(TypeError, type(owner).__name__, lambda: make(owner))
        result = make(model.generate("x", max_new_tokens=2, output_logprobs=True)[0][0])
        assert result.tokens.size == 2 == result.logprobs.size

        error = fails(t5gemma.Error, "num_beams", lambda: model.generate("x", num_beams=0))
        again = make(error)
        assert (again.code, str(again), again.field) == (error.code, str(error), error.field)
    closed = copy.copy(model)
    closed.close()
    fails(t5gemma.Error, "model: this Model is closed", lambda: pickle.dumps(closed))

    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(1) as pool:
        error = fails(t5gemma.Error, "manifest.json", lambda: pool.map_async(failing, ["/no/such/model"]).get(120))
        assert error.code and error.field is None
        assert pool.apply_async(answer, [model]).get(120) == expected
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        fails(t5gemma.Error, "manifest.json", lambda: pool.submit(failing, "/no/such/model").result(120))


def process(*arguments):
    """A case in a process of its own: its exit code, and what it has to say for itself."""
    command = [sys.executable, __file__, *sys.argv[1:3], *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


def main():
    if len(sys.argv) > 3:
        model, case = t5gemma.Model.open(sys.argv[1], threads=1), sys.argv[3]
        if case in (begin.__name__ for begin in UNFINISHED):
            return ends(model, case, sys.argv[4])
        return {"interrupts": interrupts, "forks": forks, "copies": copies}[case](model)
    for case in ("interrupts", "forks", "copies"):
        code, said = process(case)
        assert code == 0, f"{case}: {code}\n{said}"
    for begin in UNFINISHED:
        for way, expected in (("return", 0), ("exit", 3), ("raise", 1)):
            code, said = process(begin.__name__, way)
            own = said if way != "raise" else said.partition("Traceback")[0]
            assert code == expected and own == "", f"{begin.__name__} {way}: {code}\n{said}"
    print("well")


if __name__ == "__main__":
    main()
