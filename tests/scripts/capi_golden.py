"""What capi/golden.c does, through the Python package."""

import json
import sys

import numpy as np
import t5gemma

model = t5gemma.Model.open(sys.argv[1])
for line in sys.stdin:
    numbers, _, options = line.partition("{")
    numbers = iter([int(number) for number in numbers.split()])
    rows, length = next(numbers), next(numbers)
    rectangle = lambda width: np.array([[next(numbers) for _ in range(width)] for _ in range(rows)], np.int64)
    ids, mask = rectangle(length), rectangle(length)
    width = next(numbers)
    prompts = rectangle(width) if width else None
    found = model.generate(ids, attention_mask=mask, decoder_input_ids=prompts, **json.loads("{" + options))
    sequence = lambda one: {"tokens": one.tokens.tolist(), **({} if one.score is None else {"score": one.score})}
    print(json.dumps({"sequences": [[sequence(one) for one in row] for row in found]}))
