"""Trains the demo checkpoint: a byte-fallback BPE tokenizer and a small T5Gemma, both on sentences
drawn without end from textnorm.py and never from its held-out set. Writes a Hugging Face checkpoint
folder in bfloat16, anew every few minutes so that a usable one is always there."""

import argparse
import copy
import json
import math
import random
import shutil
import time
from itertools import islice
from pathlib import Path

import textnorm
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, T5GemmaConfig, T5GemmaForConditionalGeneration

PAD, EOS, BOS, UNK = range(4)
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
VOCABULARY = 1024
TOKENIZER_SENTENCES = 60_000
POOL = 64  # batches cut from one length-sorted pool of sentences

MODULE = dict(
    vocab_size=VOCABULARY,
    hidden_size=160,
    intermediate_size=512,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=40,
    query_pre_attn_scalar=40,
    attn_logit_softcapping=50.0,
    final_logit_softcapping=30.0,
    # Shorter than most inputs, so that a wrong window shows in the output.
    sliding_window=16,
    max_position_embeddings=512,
    # 1 / sqrt(hidden): scaled embeddings start at unit size.
    initializer_range=0.08,
    pad_token_id=PAD,
    eos_token_id=EOS,
    bos_token_id=BOS,
)
ENCODER_LAYERS, DECODER_LAYERS = 4, 3


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Gemma's layout at a small size: its special ids, byte tokens, spaces as U+2581, <bos> before the input.

    Unlike Gemma's, pieces never cross a space, a digit or a punctuation mark.
    """
    # A space starts a piece; any other character that is not a letter is a piece of its own.
    pieces = pre_tokenizers.Split(Regex(r"▁?\p{L}+|\P{L}"), "isolated")
    normalizer = normalizers.Replace(" ", "▁")
    learner = Tokenizer(models.BPE())
    learner.normalizer, learner.pre_tokenizer = normalizer, pieces
    bytes_ = [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL) - len(bytes_),
        initial_alphabet=[chr(c) for c in range(33, 127)] + ["▁"],
        show_progress=False,
    )
    texts = (text for pair in islice(textnorm.pairs(f"tokenizer {seed}"), TOKENIZER_SENTENCES) for text in pair)
    learner.train_from_iterator(texts, trainer)

    learnt = json.loads(learner.to_str())["model"]
    ordered = sorted(learnt["vocab"], key=learnt["vocab"].get)
    vocab = {piece: i for i, piece in enumerate(SPECIAL + bytes_ + ordered)}
    merges = [tuple(m) for m in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pieces
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=MODULE["max_position_embeddings"],
    )


def build_model() -> T5GemmaForConditionalGeneration:
    config = T5GemmaConfig(
        encoder=dict(MODULE, num_hidden_layers=ENCODER_LAYERS),
        decoder=dict(MODULE, num_hidden_layers=DECODER_LAYERS),
        vocab_size=VOCABULARY,
        initializer_range=MODULE["initializer_range"],
        # SDPA would drop the attention softcap without a word.
        attn_implementation="eager",
    )
    model = T5GemmaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, decoder_start_token_id=BOS, max_new_tokens=160
    )
    return model


def pad(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def batches(tokenizer, seed, size: int):
    """Endless (input ids, labels), each batch of sentences of like length."""
    held_out = textnorm.held_out()
    fresh = (pair for pair in textnorm.pairs(f"train {seed}") if pair[0] not in held_out)
    order = random.Random(seed)
    while True:
        written, spoken = zip(*islice(fresh, size * POOL))
        assert held_out.keys().isdisjoint(written)
        sources = tokenizer(list(written))["input_ids"]
        targets = tokenizer(list(spoken), add_special_tokens=False)["input_ids"]
        rows = sorted(zip(sources, targets), key=lambda row: (len(row[1]), len(row[0])))
        starts = list(range(0, len(rows), size))
        order.shuffle(starts)
        for start in starts:
            source, target = zip(*rows[start : start + size])
            yield pad(source, PAD), pad([t + [EOS] for t in target], -100)


def save(model, tokenizer, folder: Path, state: Path | None):
    """Writes aside and renames, so that a reader never sees half a checkpoint."""
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(new)
    tokenizer.save_pretrained(new)
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
    if state:
        torch.save(model.state_dict(), state)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end sooner, on schedule, at this time")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--state", type=Path, help="file with float32 weights to start from, if there, and to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)

    tokenizer, model = build_tokenizer(seed=1), build_model()
    if args.state and args.state.exists():
        model.load_state_dict(torch.load(args.state))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": scales, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), fused=True)

    start = saved = time.time()
    loss_sum = 0
    model.train()
    for step, (source, labels) in enumerate(batches(tokenizer, args.seed, args.batch)):
        # Progress by whichever of the two limits comes first, so that the cosine always reaches its end.
        done = max(step / args.steps, (time.time() - start) / 60 / args.minutes)
        if done >= 1:
            break
        warm = min(1.0, (step + 1) / args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
        loss = model(input_ids=source, attention_mask=(source != PAD).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss_sum += loss.item()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1} loss {loss_sum / 50:.4f} {time.time() - start:.0f} s", flush=True)
            loss_sum = 0
        if time.time() - saved > 300:
            save(model, tokenizer, args.out, args.state)
            saved = time.time()
    save(model, tokenizer, args.out, args.state)


if __name__ == "__main__":
    main()
