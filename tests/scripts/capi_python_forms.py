"""The forms in which the Python package takes sources, targets, options and paths, and how it refuses others:
capi_python_forms.py DEMO CLASSIFIER. Forms are tables, of which every function that takes them is asked."""

import array
import collections
import enum
import pathlib
import sys

import numpy as np
import t5gemma

TEXTS = ["Dr. Smith paid $3.50.", "It is 9:05 am."]


def fails(kind, part, work, name=""):
    try:
        found = work()
    except kind as error:
        assert part in str(error), f"{name}: expected {part!r} in {error!r}"
        return error
    except Exception as error:
        raise AssertionError(f"{name}: expected {kind.__name__} with {part!r}, found {error!r}") from error
    raise AssertionError(f"{name}: expected {kind.__name__} with {part!r}, found {found!r:.300}")


class Label(str, enum.Enum):
    FULL_STOP = "."


class Colour(enum.Enum):
    RED = 1


class ReadAsArray:
    """What other libraries' tensors and columns are to numpy."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def __array__(self, dtype=None, copy=None):
        return self.values if dtype is None else self.values.astype(dtype)


class Text(str):
    pass


def rows_of(ids):
    """Forms of one row of ids, by name."""
    square = np.array([ids, ids])
    return {
        "a flat list": ids,
        "a tuple": tuple(ids),
        "a deque": collections.deque(ids),
        "a list of a list": [ids],
        "numpy's integers": [np.int32(number) for number in ids],
        "an array of one dimension": np.array(ids),
        "an array of two": np.array([ids]),
        "an array in a list": [np.array(ids)],
        "int16": np.array([ids], np.int16),
        "uint64": np.array([ids], np.uint64),
        "big-endian": np.array([ids], ">i4"),
        "every second": np.repeat(ids, 2)[::2],
        "backwards": np.array(ids[::-1])[::-1],
        "a column": square.T[:, 0],
        "Fortran's order": np.asfortranarray(square)[:1],
        "read-only": np.frombuffer(np.array(ids).tobytes(), np.int64),
        "an array.array": array.array("q", ids),
        "what numpy reads": ReadAsArray([ids]),
        "what numpy reads, in a list": [ReadAsArray(ids)],
    }


# Of ids: what is given, the exception, and a part of what it says after the argument's name.
NO_IDS = {
    "bytes": (b"ab", TypeError, ": expected"),
    "a bytearray": (bytearray(b"ab"), TypeError, ": expected"),
    "a memoryview": (memoryview(b"ab"), TypeError, ": expected"),
    "an integer": (5, TypeError, ": expected"),
    "a float": (5.0, TypeError, ": expected"),
    "a dictionary": ({"input_ids": [[5]]}, TypeError, ": expected"),
    "a set": ({5, 6}, TypeError, ": expected"),
    "a generator": ((number for number in [5]), TypeError, ": expected"),
    "a function": (len, TypeError, ": expected"),
    "bytes in a list": ([b"ab"], ValueError, "[0]: expected"),
    "None in a list": ([None], ValueError, "[0]: expected"),
    "None in a row": ([[5, None]], ValueError, "[0][1]: expected a token id (an integer), found None"),
    "a float in a row": ([5, 6.0], ValueError, "[1]: expected a token id (an integer), found 6.0"),
    "a bool in a row": ([[5, True]], ValueError, "[0][1]: expected a token id (an integer), found True"),
    "numpy's bool in a row": ([[np.bool_(True)]], ValueError, "[0][0]: expected a token id"),
    "a text in a row": ([[5, "6"]], ValueError, "[0][1]: expected a token id (an integer), found '6'"),
    "an id behind a text": (["a", 5], ValueError, "[1]: expected a text, found 5"),
    "a text behind an id": ([5, "a"], ValueError, "[1]: expected a token id (an integer), found 'a'"),
    "a row behind an id": ([5, [6]], ValueError, "[1]: expected a token id (an integer), found list"),
    "an id behind a row": ([[5], 6], ValueError, "[1]: expected a row of token ids, found 6"),
    "a text behind a row": ([[5], "a"], ValueError, "[1]: expected a row of token ids, found 'a'"),
    "nested rows": ([[[5, 6]]], ValueError, "[0][0]: expected a token id"),
    "an array of two dimensions as a row": ([np.array([[5, 6]])], ValueError, "[0]: expected one row"),
    "three dimensions": (np.zeros((1, 1, 2), np.int64), ValueError, "[rows, length]"),
    "floats": (np.zeros((1, 2)), ValueError, ": expected int64 token ids, found float64"),
    "bools": (np.ones((1, 2), bool), ValueError, ": expected int64 token ids, found bool"),
    "numpy's texts": (np.array(["a"]), ValueError, ".tolist() makes a list of it"),
    "an array of objects": (np.array(["a", "b"], object), ValueError, ".tolist() makes a list of it"),
    "what numpy reads as floats": (ReadAsArray([[5.0]]), ValueError, ": expected int64"),
    "too large for 64 bits": ([[2**63]], ValueError, "[0][0]: expected a token id, found 9223372036854775808"),
    "too large an unsigned": (np.array([[2**63]], np.uint64), ValueError, "found 9223372036854775808"),
    "masked elements": (np.ma.masked_array([[5, 6]], [[0, 1]]), ValueError, "without masked elements"),
    "a surrogate": ("a\ud800", ValueError, ": expected text that can be written as UTF-8"),
    "a surrogate in a list": (["a", "\udc80b"], ValueError, "[1]: expected text that can be written as UTF-8"),
}


def sources(model, encoder, classifier, engine):
    wanted = {"max_new_tokens": 8}
    [ids, other] = [model.tokenizer.encode(text).tolist() for text in TEXTS]

    def count(given):
        return 1 if isinstance(given, str) or np.ndim(given[0]) == 0 and not isinstance(given[0], str) else len(given)

    doors = {
        "generate": lambda given, **more: [row[0].text for row in model.generate(given, **more, **wanted)],
        "submit": lambda given, **more: [row[0].text for row in engine.submit(given, **more, **wanted).result()],
        "score": lambda given, **more: [one.logprob for one in model.score(given, ["x"] * count(given), **more)],
        "encode": lambda given, **more: list(model.encode(given, **more)[0][:, 0, 0]),
        "Encoder.encode": lambda given, **more: list(encoder.encode(given, **more)[0][:, 0, 0]),
        "embed": lambda given, **more: list(encoder.embed(given, **more)[:, 0]),
    }

    def same(name, found, expected):
        assert len(found) == len(expected) and all(
            np.isclose(one, two, atol=1e-4) if not isinstance(one, str) else one == two for one, two in zip(found, expected)
        ), f"{name}: {found} and not {expected}"

    for door, ask in doors.items():
        one, both = ask([ids]), ask([ids, other])
        same(f"{door}: texts", ask(TEXTS), both)
        same(f"{door}: a tuple of texts", ask(tuple(TEXTS)), both)
        same(f"{door}: a text", ask(TEXTS[0]), one)
        same(f"{door}: a kind of str", ask([Text(TEXTS[0]), np.str_(TEXTS[1])]), both)
        same(f"{door}: rows of any lengths", ask([np.array(ids), tuple(other)]), both)
        masks = [[1] * len(ids), [True] * len(other)]
        same(f"{door}: rows and masks", ask([ids, other], attention_mask=masks), both)
        for form, given in rows_of(ids).items():
            if door != "score" or isinstance(given, list):
                same(f"{door}: {form}", ask(given), one)
        same(f"{door}: a row and a mask", ask(ids, attention_mask=np.ones(len(ids), bool)), one)
    doors["classify"] = lambda given, **more: classifier.classify(given, **more)
    doors["stream"] = lambda given, **more: model.stream(given, **more)
    doors["score"] = lambda given, **more: model.score(given, ["x"], **more)
    for door, ask in doors.items():
        argument = "sources"
        for form, (given, kind, part) in NO_IDS.items():
            fails(kind, argument, lambda: ask(given), f"{door}: {form}")
            fails(kind, part, lambda: ask(given), f"{door}: {form}")
        for empty in ([], (), np.zeros((0, 3), np.int64), np.zeros((2, 0), np.int64)):
            fails(ValueError, "sources: expected at least one", lambda: ask(empty), f"{door}: nothing")
        fails(TypeError, "sources: expected", lambda: ask(None), f"{door}: None")
        fails(t5gemma.Error, "at least one token", lambda: list(ask([[]])), f"{door}: an empty row")

        # Masks belong to ids, and have their sizes.
        for mask, part in (
            ([[1, 1]], "attention_mask[0]: expected 3 elements"),
            ([1, 1, 1, 1], "attention_mask[0]: expected 3 elements"),
            ([[1, 1, 1]] * 2, "attention_mask: expected 1 row, as many as sources, found 2"),
            (np.ones((2, 3), bool), "attention_mask: expected 1 row"),
            (np.ones((1, 3)), "attention_mask: expected int64 zeros and ones, found float64"),
            ([], "attention_mask: expected 1 row"),
        ):
            fails(ValueError, part, lambda: ask([[5, 6, 7]], attention_mask=mask), door)
            fails(ValueError, part, lambda: ask(np.array([[5, 6, 7]]), attention_mask=mask), door)
        fails(ValueError, "attention_mask requires token ids", lambda: ask("a", attention_mask=[[1]]), door)
        fails(ValueError, "attention_mask requires token ids", lambda: ask(["a"], attention_mask=[[1]]), door)
        fails(TypeError, "attention_mask: expected", lambda: ask([[5]], attention_mask="1"), door)
    fails(ValueError, "source: expected one, found 2", lambda: model.stream(TEXTS))
    fails(TypeError, "on_piece", lambda: model.stream("a", on_piece=print))

    # Conversations are told from texts; this model has no template for them.
    fails(t5gemma.Error, "chat", lambda: model.generate([{"role": "user", "content": "a"}]))
    fails(ValueError, "sources[1]: expected a message", lambda: model.generate([{"role": "user", "content": "a"}, "b"]))
    fails(TypeError, "content", lambda: model.generate([{"role": "user", "content": b"a"}]))
    fails(ValueError, "content", lambda: model.chat([{"role": "user", "content": "\ud800"}]))
    fails(TypeError, "messages: expected a list of messages", lambda: model.chat("a"))


def what_belongs_to_sources(model, engine):
    """Prompts and the encoder's results, each of the sizes of their sources."""
    states, _ = model.encode(TEXTS)
    wanted = {"max_new_tokens": 8}
    expected = [row[0].text for row in model.generate(TEXTS, **wanted)]
    ids = [model.tokenizer.encode(text) for text in TEXTS]
    for given in (TEXTS, ids):
        for outputs in (states, states.astype(np.float64), np.asfortranarray(states), states.astype(">f4")):
            assert [row[0].text for row in model.generate(given, encoder_outputs=outputs, **wanted)] == expected
        for outputs, part in (
            (states[:1], "found shape (1,"),
            (states[:, :-1], "[rows, length, hidden_size]"),
            (states[:, :, :-1], "[rows, length, hidden_size]"),
            (np.concatenate([states, states]), "found shape (4,"),
            (states[0], "[rows, length, hidden_size]"),
            (states.astype(np.int64), "expected float32, found int64"),
            (states.astype(np.complex64), "expected float32, found complex64"),
            (states.astype(object), "expected float32, found object"),
        ):
            name = f"{outputs.dtype} {outputs.shape}"
            error = fails(ValueError, part, lambda: model.generate(given, encoder_outputs=outputs), name)
            assert str(error).startswith("encoder_outputs: "), error
        fails(TypeError, "encoder_outputs: expected", lambda: model.generate(given, encoder_outputs=states.tolist()))
    fails(TypeError, "encoder_outputs", lambda: engine.submit(TEXTS, encoder_outputs=states))

    [begin] = {tuple(model.tokenizer.encode("the", target=True).tolist())}
    expected = [row[0].tokens.tolist() for row in model.generate(TEXTS, decoder_text="the", **wanted)]
    doors = {
        "generate": lambda **more: [row[0].tokens.tolist() for row in model.generate(TEXTS, **more, **wanted)],
        "submit": lambda **more: [row[0].tokens.tolist() for row in engine.submit(TEXTS, **more, **wanted).result()],
    }
    for door, ask in doors.items():
        for prompts in ([begin, begin], np.array([begin, begin], np.int16), [np.array(begin)] * 2):
            assert ask(decoder_input_ids=prompts) == expected, door
        assert ask(decoder_text=["the", "the"]) == expected, door
        for prompts, part in (
            ([begin], "expected 2 rows, one for each source, found 1"),
            (begin, "expected 2 rows, one for each source, found 1"),
            ([begin] * 3, "expected 2 rows, one for each source, found 3"),
            ([[5], [5, 6]], "decoder_input_ids[1]: expected 1 tokens, as decoder_input_ids[0] has, found 2"),
            ([], "found 0"),
            (np.zeros((2, 1)), "expected int64"),
            ([[5], [True]], "decoder_input_ids[1][0]"),
        ):
            fails(ValueError, part, lambda: ask(decoder_input_ids=prompts), f"{door}: {prompts}")
        for texts, kind, part in (
            (["the"], ValueError, "expected 2 rows, one for each source, found 1"),
            (["the"] * 3, ValueError, "expected 2 rows, one for each source, found 3"),
            ([], ValueError, "found 0"),
            (["the", 5], ValueError, "decoder_text[1]: expected a text, found 5"),
            (b"the", TypeError, "decoder_text: expected a text or a list of texts, found bytes"),
            ({"the"}, TypeError, "decoder_text: expected a text or a list of texts, found set"),
            (["the", "\ud800"], ValueError, "decoder_text[1]: expected text that can be written as UTF-8"),
        ):
            fails(kind, part, lambda: ask(decoder_text=texts), f"{door}: {texts}")
        both = {"decoder_text": "a", "decoder_input_ids": [[5]] * 2}
        fails(ValueError, "decoder_text cannot be used with decoder_input_ids", lambda: ask(**both))
    # A zero is a character as any other.
    prompt = model.tokenizer.encode("the\0 end", target=True)
    assert prompt.size > len(begin)
    for text in ("the\0 end", ["the\0 end"]):
        found = model.generate(TEXTS[0], decoder_text=text, **wanted)[0][0].tokens.tolist()
        assert found == model.generate(TEXTS[0], decoder_input_ids=prompt, **wanted)[0][0].tokens.tolist()


def targets(model):
    target = "doctor smith"
    ids = model.tokenizer.encode(target, target=True).tolist()
    one = model.score([TEXTS[0]], [target], without_end=True)[0].logprob
    for form, given in {"a text": target, "a tuple": (target,), **rows_of(ids)}.items():
        [found] = model.score(TEXTS[0], given, without_end=True)
        assert np.isclose(found.logprob, one, atol=1e-4) and found.tokens.tolist() == ids, f"{form}: {found}"
    for rows in ([ids, ids[:2]], [np.array(ids), tuple(ids[:2])]):
        assert [found.tokens.tolist() for found in model.score(TEXTS, rows)] == [ids, ids[:2]]
    for form, (given, kind, part) in NO_IDS.items():
        fails(kind, part, lambda: model.score([TEXTS[0]], given), f"targets: {form}")
    for rows, given in (
        (2, target),
        (2, [target]),
        (2, [target] * 3),
        (1, [target] * 2),
        (64, [target]),
        (2, ids),
        (2, [ids]),
        (1, [ids, ids]),
        (2, np.array([ids])),
        (2, np.array([ids] * 3)),
        (1, []),
        (2, []),
    ):
        count = "1 row" if rows == 1 else f"{rows} rows"
        part = f"targets: expected {count}, one for each source, found "
        fails(ValueError, part, lambda: model.score(["a"] * rows, given), f"{rows} sources, targets {given}")
    fails(TypeError, "targets: expected", lambda: model.score("a", None))
    for value, kind in ((-1, ValueError), (1.0, TypeError), (True, TypeError), ("1", TypeError)):
        fails(kind, "top_logprobs: expected", lambda: model.score("a", "b", top_logprobs=value))
    for name in ("without_end", "output_attentions"):
        fails(TypeError, f"{name}: expected True or False", lambda: model.score("a", "b", **{name: "no"}))
    assert model.score("a", "b", without_end=np.bool_(True), top_logprobs=np.int8(2))[0].top_tokens.shape[1] == 2


def options(model, engine):
    doors = {
        "generate": lambda **more: [row[0].tokens.tolist() for row in model.generate("Dr. Smith", **more)],
        "submit": lambda **more: [row[0].tokens.tolist() for row in engine.submit("Dr. Smith", **more).result()],
    }
    # As numpy and others have them, and as Python has them.
    taken = (
        ({"temperature": None}, {}),
        ({"max_new_tokens": np.int64(2)}, {"max_new_tokens": 2}),
        ({"max_new_tokens": np.array(2)}, {"max_new_tokens": 2}),
        ({"do_sample": np.bool_(False)}, {"do_sample": False}),
        ({"num_beams": np.int32(2), "length_penalty": np.float32(0.5)}, {"num_beams": 2, "length_penalty": 0.5}),
        ({"suppress_tokens": np.array([5, 6])}, {"suppress_tokens": [5, 6]}),
        ({"suppress_tokens": (np.int64(5), 6)}, {"suppress_tokens": [5, 6]}),
        ({"suppress_tokens": ReadAsArray([5, 6])}, {"suppress_tokens": [5, 6]}),
        ({"bad_words_ids": np.array([[5], [6]])}, {"bad_words_ids": [[5], [6]]}),
        ({"sequence_bias": {(5,): np.float32(9.0)}}, {"sequence_bias": [[[5], 9.0]]}),
        ({"stop_strings": Label.FULL_STOP}, {"stop_strings": "."}),
        ({"stop_strings": np.array([".", "!"])}, {"stop_strings": [".", "!"]}),
    )
    refused = (
        ("length_penalty", float("nan"), ValueError, ": expected a finite number, found nan"),
        ("length_penalty", np.float32("inf"), ValueError, ": expected a finite number, found inf"),
        ("suppress_tokens", [5, float("nan")], ValueError, "[1]: expected a finite number"),
        ("suppress_tokens", np.array([5, np.nan]), ValueError, "[1]: expected a finite number"),
        ("suppress_tokens", {5, 6}, TypeError, "list() makes a list of it"),
        ("suppress_tokens", (number for number in [5]), TypeError, "list() makes a list of it"),
        ("suppress_tokens", np.array([5j]), TypeError, ": expected an array of numbers, found complex128"),
        ("stop_strings", b".", TypeError, "found bytes (decode it first)"),
        ("stop_strings", ["a", b"."], TypeError, "[1]: expected"),
        ("stop_strings", ["a", "\ud800"], ValueError, "[1]: expected text that can be written as UTF-8"),
        ("regex", pathlib.Path("a"), TypeError, "str() makes a text of it"),
        ("num_beams", 1j, TypeError, ": expected numbers"),
        ("num_beams", Colour.RED, TypeError, ": expected numbers"),
        ("num_beams", len, TypeError, ": expected numbers"),
        ("num_beams", "2", t5gemma.Error, ": expected"),
        ("num_beams", 2.5, t5gemma.Error, ": expected"),
        ("max_new_tokens", 10**30, t5gemma.Error, ": expected"),
        ("json_schema", {1: "a"}, TypeError, ": expected texts as keys, found 1"),
    )
    for door, ask in doors.items():
        for given, plain in taken:
            short = {"max_new_tokens": 3}
            assert ask(**short | given) == ask(**short | plain), f"{door}: {given}"
        for name, value, kind, part in refused:
            error = fails(kind, part, lambda: ask(**{name: value}), f"{door}: {name}={value!r}")
            assert str(error).startswith(name), error
    for name in ("on_piece", "logits_processor", "prefix_allowed_tokens_fn"):
        fails(TypeError, f"{name}: not supported by an engine", lambda: engine.submit("a", **{name: print}))
        fails(TypeError, f"{name}: expected a function, found 5", lambda: model.generate("a", **{name: 5}))

    for name in ("max_rows", "max_bytes", "max_waiting"):
        for kind, values in ((ValueError, (0, -1, 2**63)), (TypeError, (1.5, True, "8"))):
            for value in values:
                fails(kind, f"{name}: expected", lambda: t5gemma.Engine(model, **{name: value}), f"{name}={value}")
    t5gemma.Engine(model, max_rows=np.int64(8)).close()
    for devices in ("0", [0.0], [True], 0, {0}):
        fails((TypeError, ValueError), "devices", lambda: t5gemma.Engine(model, devices=devices), f"devices={devices}")
    fails(TypeError, "model: expected a Model", lambda: t5gemma.Engine("model"))


def deadlines(model, encoder, classifier, engine):
    doors = {
        "generate": lambda **more: model.generate("a", max_new_tokens=2, **more),
        "stream": lambda **more: list(model.stream("a", max_new_tokens=2, **more)),
        "score": lambda **more: model.score("a", "b", **more),
        "encode": lambda **more: model.encode("a", **more),
        "warm_up": lambda **more: model.warm_up(**more),
        "submit": lambda **more: engine.submit("a", max_new_tokens=2, **more).result(),
        "Encoder.encode": lambda **more: encoder.encode("a", **more),
        "embed": lambda **more: encoder.embed("a", **more),
        "classify": lambda **more: classifier.classify([[5]], **more),
    }
    used = t5gemma.Cancellation()
    used.cancel()
    closed = t5gemma.Cancellation()
    closed.close()
    for door, ask in doors.items():
        for deadline in (None, 100, 100.5, np.float32(100), float("inf"), 10**400):
            ask(deadline=deadline)
        for deadline in (0, 0.0, -0.0, -1, -1e300, float("-inf"), -(10**400), np.int64(0)):
            error = fails(t5gemma.Error, "deadline", lambda: ask(deadline=deadline), f"{door}: {deadline}")
            assert (error.code, error.field) == (16, "deadline_seconds"), door
        fails(ValueError, "deadline: expected seconds from now, or None, found nan", lambda: ask(deadline=float("nan")), door)
        for deadline in ("1", True, [1], 1j):
            fails(TypeError, "deadline: expected seconds", lambda: ask(deadline=deadline), f"{door}: {deadline}")
        assert fails(t5gemma.Error, "cancelled", lambda: ask(cancellation=used), door).code == 15
        fails(t5gemma.Error, "cancellation: this Cancellation is closed", lambda: ask(cancellation=closed), door)
        fails(TypeError, "cancellation: expected a Cancellation", lambda: ask(cancellation=5), door)
    pieces = []
    late = {"deadline": 0, "on_piece": lambda *piece: pieces.append(piece)}
    fails(t5gemma.Error, "deadline", lambda: model.generate("a", **late))
    assert pieces == []


def callbacks(model):
    ask = lambda **more: model.generate("Dr. Smith", max_new_tokens=3, **more)  # noqa: E731
    expected = ask()[0][0].tokens.tolist()
    for answer in (None, True, np.bool_(True), 0, 5, ""):
        assert ask(on_piece=lambda *_: answer)[0][0].tokens.tolist() == expected, f"on_piece gives {answer!r}"
    for answer in (False, np.bool_(False)):
        fails(t5gemma.Error, "cancelled", lambda: ask(on_piece=lambda *_: answer), f"on_piece gives {answer!r}")
    assert ask(logits_processor=lambda target, scores: scores)[0][0].tokens.tolist() == expected
    for answer in (lambda target, scores: scores + 1, lambda target, scores: True, lambda target, scores: scores[:5]):
        fails(TypeError, "logits_processor: expected the scores to be changed in place", lambda: ask(logits_processor=answer))
    # A copy, which stays as it was.
    kept = []
    ask(logits_processor=lambda target, scores: kept.append((target, scores)))
    assert len({scores.tobytes() for _, scores in kept}) == len(kept) == 3
    for answer in ([40, 41], (40, 41), np.array([40, 41], np.int16), range(40, 42)):
        tokens = ask(prefix_allowed_tokens_fn=lambda row, target: answer)[0][0].tokens.tolist()
        assert len(tokens) == 3 and set(tokens) <= {40, 41}, f"{answer!r}: {tokens}"
    for answer, kind in (
        (None, TypeError),
        (5, TypeError),
        ("5", TypeError),
        ({5}, TypeError),
        ([5.0], ValueError),
        (["5"], ValueError),
        ([[5]], ValueError),
        ([True], ValueError),
        ([None], ValueError),
        (np.array([5.0]), ValueError),
        (np.array([[5]]), ValueError),
        ([2**70], ValueError),
    ):
        fails(kind, "prefix_allowed_tokens_fn", lambda: ask(prefix_allowed_tokens_fn=lambda row, target: answer), f"{answer!r}")

    class Own(BaseException):
        pass

    def raises(*_):
        raise Own("mine") from ValueError("its cause")

    for name in ("on_piece", "logits_processor", "prefix_allowed_tokens_fn"):
        error = fails(Own, "mine", lambda: ask(**{name: raises}), name)
        assert isinstance(error.__cause__, ValueError), name
        if name != "on_piece":
            fails(Own, "mine", lambda: list(model.stream("a", **{name: raises})), name)
    assert ask()[0][0].tokens.tolist() == expected


def paths(demo, model):
    for path in (demo, pathlib.Path(demo)):
        with t5gemma.Model.open(path, threads=1) as opened:
            assert opened.describe()["task"] == "text2text-generation"
    for open in (t5gemma.Model.open, t5gemma.Encoder.open, t5gemma.Tokenizer.open):
        fails(ValueError, "path: expected no zero character", lambda: open(f"{demo}\0/elsewhere"))
        fails(ValueError, "path: expected text that can be written as UTF-8", lambda: open("\udcff"))
        for path in (demo.encode(), 5, None):
            fails(TypeError, "path: expected str or os.PathLike", lambda: open(path))
    fails(ValueError, "library: expected no zero character", lambda: t5gemma.Model.open(demo, library="a\0b"))
    fails(TypeError, "library: expected str or os.PathLike", lambda: t5gemma.onnxruntime_report(b"a"))
    fails(TypeError, "check_weights: expected True or False", lambda: t5gemma.Model.open(demo, check_weights="no"))
    fails(ValueError, "device: expected a finite number", lambda: t5gemma.Model.open(demo, device=float("nan")))
    with t5gemma.Model.open(demo, threads=np.int64(1), encoder_cache_bytes=np.int32(0)) as opened:
        opened.close()
        for work in (opened.describe, lambda: opened.generate("a"), lambda: opened.tokenizer, opened.__enter__):
            fails(t5gemma.Error, "model: this Model is closed", work)


def tokens(model):
    tokenizer = model.tokenizer
    ids = tokenizer.encode("a b").tolist()
    for form, given in rows_of(ids).items():
        if form not in ("a list of a list", "an array of two", "an array in a list", "int16", "uint64", "big-endian",
                        "Fortran's order", "what numpy reads", "what numpy reads, in a list"):
            assert tokenizer.decode(given) == "a b", form
    assert tokenizer.decode([]) == ""
    for given in ([ids], np.array([ids]), "a", 5, None, [5.0], [True], b"a"):
        fails((TypeError, ValueError), "tokens", lambda: tokenizer.decode(given), f"{given!r}")
    assert tokenizer.token(np.int64(ids[0])) == tokenizer.token(ids[0]) != ""
    for given, kind in ((5.7, TypeError), ("5", TypeError), (True, TypeError), (2**64, ValueError)):
        fails(kind, "token: expected", lambda: tokenizer.token(given))
    for given in (b"a", None, ["a"], 5):
        fails(TypeError, "text: expected a text", lambda: tokenizer.encode(given))
    fails(ValueError, "text: expected text that can be written as UTF-8", lambda: tokenizer.encode("\ud800"))
    assert tokenizer.encode("a\0b").size > tokenizer.encode("a").size
    fails(TypeError, "target: expected True or False", lambda: tokenizer.encode("a", target="yes"))


def main(demo, classifier):
    model, engine = t5gemma.Model.open(demo, threads=1), None
    with t5gemma.Encoder.open(demo, threads=1) as encoder, t5gemma.Encoder.open(classifier, threads=1) as classifying:
        with t5gemma.Engine(model) as engine:
            sources(model, encoder, classifying, engine)
            what_belongs_to_sources(model, engine)
            targets(model)
            options(model, engine)
            deadlines(model, encoder, classifying, engine)
        callbacks(model)
        paths(demo, model)
        tokens(model)
        for pooling in ("none", "median", None, 1):
            fails(ValueError, "pooling: expected one of mean, first, last", lambda: encoder.embed("a", pooling))
        fails(TypeError, "normalize: expected True or False", lambda: encoder.embed("a", normalize="no"))
        fails(ValueError, "function: expected one of", lambda: classifying.classify([[5]], "max"))
    print("well")


main(*sys.argv[1:])
