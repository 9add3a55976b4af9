"""Exact match of a T5Gemma checkpoint on eval.jsonl under transformers: greedy and beam 4, eager
attention, the saved weights upcast to float32. Can also write the predictions as JSONL, or the token
ids that other implementations are held against (expected.json)."""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, T5GemmaForConditionalGeneration

HERE = Path(__file__).parent
EXPECTED_SIZE = 100


def generate(model, tokenizer, texts: list[str], beams: int):
    """Input ids, output ids (no start token, no padding, <eos> included) and score of each text."""
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        out = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            num_beams=beams,
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
        )
    pad = model.generation_config.pad_token_id
    inputs = [[t for t in row if t != pad] for row in batch.input_ids.tolist()]
    outputs = [[t for t in row[1:] if t != pad] for row in out.sequences.tolist()]
    scores = out.sequences_scores.tolist() if beams > 1 else [None] * len(texts)
    return zip(inputs, outputs, scores)


def predict(model, tokenizer, texts: list[str], beams: int, size: int) -> list[str]:
    """Decoded outputs, in the order of texts; batches hold texts of like length."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        rows = generate(model, tokenizer, [texts[i] for i in chosen], beams)
        for i, (_, ids, _) in zip(chosen, rows):
            found[i] = tokenizer.decode(ids, skip_special_tokens=True)
    return [found[i] for i in range(len(texts))]


def expected(model, tokenizer, texts: list[str]) -> list[dict]:
    """Reference ids text by text, so that no padding takes part in them."""
    rows = []
    for text in texts:
        ((input_ids, greedy, _),) = generate(model, tokenizer, [text], 1)
        ((_, beam, score),) = generate(model, tokenizer, [text], 4)
        rows.append(dict(text=text, input_ids=input_ids, greedy=greedy, beam4=beam, beam4_score=score))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, default=HERE / "checkpoint")
    parser.add_argument("--limit", type=int, help="only the first so many lines of eval.jsonl")
    parser.add_argument("--beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--predictions", type=Path, help="JSONL file to write")
    parser.add_argument("--expected", type=Path, help=f"write {EXPECTED_SIZE} lines' reference ids here, nothing else")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = T5GemmaForConditionalGeneration.from_pretrained(
        args.checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    lines = [json.loads(line) for line in (HERE / "eval.jsonl").open(encoding="utf-8")][: args.limit]
    texts = [line["text"] for line in lines]

    if args.expected:
        rows = expected(model, tokenizer, texts[:EXPECTED_SIZE])
        body = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        args.expected.write_text(f"[\n{body}\n]\n", encoding="utf-8")
        return
    for beams in args.beams:
        start = time.time()
        name = "greedy" if beams == 1 else f"beam{beams}"
        right = 0
        for line, text in zip(lines, predict(model, tokenizer, texts, beams, args.batch)):
            line[name] = text
            right += text == line["target"]
        share = right / len(lines)
        print(f"{name}: {right} of {len(lines)} exact ({share:.1%}), {time.time() - start:.0f} s", flush=True)
    if args.predictions:
        with args.predictions.open("w", encoding="utf-8", newline="\n") as out:
            out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


if __name__ == "__main__":
    main()
