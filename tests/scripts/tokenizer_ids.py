#!/usr/bin/env python3
"""Prints what Python's `tokenizers` makes of texts, a line of JSON a text, for comparison with this project's programs:
`tokenizer_ids.py TOKENIZER_JSON TEXTS_JSONL`, where each line of TEXTS_JSONL has a `text`.

`ids` are with the special tokens that the tokenizer adds, `plain_ids` without, and `decoded` is the text of `ids` with
special tokens left out.
"""

import json
import sys

from tokenizers import Tokenizer


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    tokenizer = Tokenizer.from_file(sys.argv[1])
    with open(sys.argv[2], encoding="utf-8") as lines:
        for line in lines:
            text = json.loads(line)["text"]
            ids = tokenizer.encode(text).ids
            plain_ids = tokenizer.encode(text, add_special_tokens=False).ids
            print(json.dumps({"ids": ids, "plain_ids": plain_ids, "decoded": tokenizer.decode(ids)}))


if __name__ == "__main__":
    main()
