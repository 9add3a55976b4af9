"""T5Gemma-TTS through the Python package: capi_python_voice.py MODEL < CASE, a JSON object with input_ids, attention_mask,
progress_total, end and the tokens of greedy search."""

import json
import sys

import numpy as np
import t5gemma

case = json.load(sys.stdin)
model = t5gemma.Model.open(sys.argv[1])
options = {"suppress_tokens": [case["end"]], "max_new_tokens": len(case["tokens"][0])}
ids, mask, totals = np.array(case["input_ids"]), np.array(case["attention_mask"]), case["progress_total"]

found = model.generate(ids, attention_mask=mask, progress_total=totals, **options)
assert [row[0].tokens.tolist() for row in found] == case["tokens"]
for row, total in enumerate(totals):
    source = [ids[row][mask[row] != 0].tolist()]
    for given in (total, [total], np.array([total])):
        (alone,) = model.generate(source, progress_total=given, **options)
        assert alone[0].tokens.tolist() == case["tokens"][row]
with t5gemma.Engine(model) as engine:
    request = engine.submit(ids, attention_mask=mask, progress_total=totals, **options)
    assert [row[0].tokens.tolist() for row in request.result()] == case["tokens"]
scored = model.score(ids, case["tokens"], attention_mask=mask, progress_total=totals)
assert all(len(one.logprobs) == len(case["tokens"][0]) for one in scored)


def fails(kind, message, call):
    try:
        call()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)


fails(t5gemma.Error, "progress_total[0]: expected an estimate", lambda: model.generate(ids, attention_mask=mask))
fails(ValueError, "progress_total: expected", lambda: model.generate(ids, attention_mask=mask, progress_total=totals[:1]))
fails(Exception, "progress_total", lambda: model.generate(ids, attention_mask=mask, progress_total="9"))
print("well")
