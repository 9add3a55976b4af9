"""Compares the three graphs of a model folder with the golden tensors of a fixture, whatever runs the graphs: an engine
is a function from a graph's path to a function from inputs to outputs, both by name. Used by `run_onnxruntime.py` and
`run_reference.py`.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

# A row whose beams are all alike must score as the row alone.
BEAMS = 2
# Tokens that a cache which is written in place has room for.
ROOM = 64


class Comparison:
    """The largest difference of each kind of tensor. What is no number counts as infinitely far off."""

    def __init__(self):
        self.worst = {}

    def close(self, kind, found, expected, where=True):
        """Compares two tensors, `found` in any floating type, where `where` holds."""
        found = found.astype(np.float32)
        if found.shape != expected.shape:
            sys.exit(f"{kind}: shape {list(found.shape)}, expected {list(expected.shape)}")
        distance = np.where(where, np.abs(found - expected), 0).max() if np.isfinite(found).all() else np.inf
        self.worst[kind] = max(self.worst.get(kind, 0.0), float(distance))


def compare(model, golden, engine):
    """Runs everything that the golden tensors cover and returns the largest differences by kind."""
    tensors = load_file(golden / "golden.safetensors")
    manifest = json.loads((model / "manifest.json").read_text())
    exclusive, in_place = manifest["encoder_window"] == "exclusive", manifest.get("cache") == "in_place"
    settings = json.loads((model / "generation_config.json").read_text())
    first_id = settings.get("decoder_start_token_id", settings["bos_token_id"])
    vision = manifest["facts"].get("vision")
    vision_encoder = engine(model / "vision_encoder.onnx") if vision else None
    encoder = engine(model / "encoder_model.onnx")
    decoder = engine(model / "decoder_model.onnx")
    decoder_with_past = engine(model / "decoder_with_past_model.onnx")
    comparison = Comparison()
    close = comparison.close

    for batch in sorted(name.split(".")[1] for name in tensors if name.endswith(".input_ids")):
        ids, mask = tensors[f"in.{batch}.input_ids"], tensors[f"in.{batch}.attention_mask"]
        images = {}
        if vision:
            width = manifest["facts"]["encoder"]["hidden_size"]
            images["image_features"] = np.zeros((0, vision["tokens_per_image"], width), np.float32)
        if f"in.{batch}.pixel_values" in tensors:
            images = vision_encoder({"pixel_values": tensors[f"in.{batch}.pixel_values"]})
            close("image features", images["image_features"], tensors[f"img.{batch}.features"])
        hidden = encoder({"input_ids": ids, "attention_mask": mask, **images})["last_hidden_state"]
        expected = tensors[f"enc.{batch}.last_hidden_state{'.window_exclusive' if exclusive else ''}"]
        close("hidden states", hidden, expected, mask[:, :, None] == 1)
        if exclusive:
            continue  # the golden tensors of the decoder come from the inclusive encoder

        def start(tokens):
            return decoder({"encoder_attention_mask": mask, "input_ids": tokens, "encoder_hidden_states": hidden})

        def step(tokens, cached):
            past = {name.replace("present", "past_key_values"): cached[name] for name in cached if name != "logits"}
            if in_place:
                return step_in_place(tokens, past, cached)
            present = decoder_with_past({"encoder_attention_mask": mask, "input_ids": tokens, **past})
            return {**cached, **present}

        def step_in_place(tokens, past, cached):
            length = past.pop("length", None) or past["past_key_values.0.decoder.key"].shape[2]
            if tokens.shape[1] > 1 and len(tokens) > 1:
                # The attention over such a cache takes several tokens of a single row only.
                for at in range(tokens.shape[1]):
                    cached = step(tokens[:, at : at + 1], cached)
                return cached
            for name, value in past.items():
                if ".decoder." in name:
                    past[name] = np.pad(value, [(0, 0), (0, 0), (0, ROOM - value.shape[2]), (0, 0)])
            positions = np.broadcast_to(np.arange(length, length + tokens.shape[1]), tokens.shape).astype(np.int64)
            inputs = {"encoder_attention_mask": mask, "input_ids": tokens, "cache_position": positions, **past}
            return {**cached, **decoder_with_past(inputs), "length": length + tokens.shape[1]}

        first_token = np.full((len(ids), 1), first_id)
        first = start(first_token)
        close("first logits", first["logits"], tensors[f"dec.{batch}.first.logits"])
        for name, value in first.items():
            if name == "logits" or f"dec.{batch}.cross_k.0" not in tensors:
                continue
            _, layer, side, part = name.split(".")
            if side == "decoder":
                close("first self cache", value, tensors[f"dec.{batch}.first.self_{part[0]}.{layer}"])
            else:
                expected = tensors[f"dec.{batch}.cross_{part[0]}.{layer}"]
                close("cross cache", value, expected, mask[:, None, :, None] == 1)

        forced, scores = tensors[f"dec.{batch}.forced_ids"], tensors[f"dec.{batch}.forced_logits"]
        state = first
        beams = start(np.repeat(first_token, BEAMS, axis=0))
        for at in range(forced.shape[1]):
            token = forced[:, at : at + 1]
            state = step(token, state)
            close("step logits", state["logits"], scores[:, at : at + 1])
            beams = step(np.repeat(token, BEAMS, axis=0), beams)
            close("beam logits", beams["logits"], np.repeat(scores[:, at : at + 1], BEAMS, axis=0))
        state = step(forced, first)
        close("logits of many tokens in a step", state["logits"], scores[:, -state["logits"].shape[1] :])

        expected = tensors[f"dec.{batch}.prefill.logits"]
        prompt = np.concatenate([first_token, forced[:, : expected.shape[1] - 1]], axis=1)
        prefill = start(prompt)
        close("prompt logits", prefill["logits"], expected[:, -prefill["logits"].shape[1] :])
        state = step(forced[:, prompt.shape[1] - 1 : prompt.shape[1]], prefill)
        close("logits of the step after a prompt", state["logits"], scores[:, prompt.shape[1] - 1 : prompt.shape[1]])
    return comparison.worst


def main(about, engine):
    """The command line of a script that runs the graphs with `engine`."""
    arguments = argparse.ArgumentParser(description=about)
    arguments.add_argument("model", type=Path, help="a folder that t5gemma-export wrote")
    arguments.add_argument("golden", type=Path, help="the fixture that the model was exported from")
    arguments.add_argument("--tolerance", type=float, default=5e-4, help="largest absolute difference (%(default)s)")
    arguments = arguments.parse_args()
    worst = compare(arguments.model, arguments.golden, engine)
    failed = not worst or max(worst.values()) > arguments.tolerance
    shown = ", ".join(f"{kind} {value:.1e}" for kind, value in worst.items())
    print(f"{'FAIL' if failed else 'ok'} {arguments.model}: {shown}")
    sys.exit(failed)
