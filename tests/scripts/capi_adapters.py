"""What capi/adapters.c does, through the Python package: capi_adapters.py MODEL ADAPTER."""

import pickle
import sys

import numpy as np
import t5gemma

model = t5gemma.Model.open(sys.argv[1])
rows, length, *numbers = map(int, sys.stdin.read().split())
ids, mask = np.array(numbers, np.int64).reshape(2, rows, length)
options = {"attention_mask": mask, "max_new_tokens": 14, "eos_token_id": 63}


def show(found):
    print(*(token for row in found for token in row[0].tokens))


def refused(part, work, *arguments, **keywords):
    try:
        work(*arguments, **keywords)
    except (ValueError, TypeError, OSError, t5gemma.Error) as error:
        assert part in str(error), error
        return
    raise AssertionError(f"{part}: not refused")


refused("there is none", model.generate, ids, adapter="mine", **options)
refused("expected a text, found", model.load_adapter, 5, sys.argv[2])
refused("expected no zero character", model.load_adapter, "a\0b", sys.argv[2])
refused("cannot be read", model.load_adapter, "mine", "/no/such")
model.load_adapter("mine", sys.argv[2])
assert model.adapters == ["mine"]
refused("no loaded adapter has", model.load_adapter, "mine", sys.argv[2])
show(model.generate(ids, adapter="mine", **options))
# A copy in another process has the adapters too.
show(pickle.loads(pickle.dumps(model)).generate(ids, adapter="mine", **options))
base, states = model.encode(ids, attention_mask=mask)[0], model.encode(ids, attention_mask=mask, adapter="mine")[0]
assert np.abs(base - states).max() > 1e-3
score = lambda **keywords: model.score(ids, [[3, 5]] * rows, attention_mask=mask, **keywords)[0].logprob
assert score() != score(adapter="mine")
refused("the name of a loaded adapter: mine", score, adapter="other")
show(model.generate(ids, adapter="mine", encoder_outputs=states, **options))
with t5gemma.Engine(model) as engine:
    request = engine.submit(ids, adapter="mine", **options)
    model.unload_adapter("mine")
    refused("there is none", engine.submit, ids, adapter="mine", **options)
    show(request.result())
