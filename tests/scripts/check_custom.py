#!/usr/bin/env python3
"""Runs exports with custom interfaces in the Python package of ONNX Runtime, as a program with a loop of its own would:
`check_custom.py FIXTURE KIND=MODEL ...`. FIXTURE is a folder of make_voice_fixture.py; a KIND says what the model was exported with:

    logits    no flags: the first step on all tokens, and again one token a step through the cache
    embeds    --inputs-embeds encoder,decoder
    states    --head none
    linear    --head linear:predict_layer.0.2.weight,predict_layer.0.2.bias
    silu      --head mlp with silu in the place of gelu

All with the logits of all positions. Prints the largest difference of each from the reference; exit status 1 if one is above 5e-4."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from safetensors.numpy import load_file

LIMIT = 5e-4


class Model:
    def __init__(self, folder):
        self.folder = folder
        self.sessions = {}

    def run(self, graph, inputs):
        """The outputs of a graph by name; of the inputs, those that it takes."""
        if graph not in self.sessions:
            self.sessions[graph] = onnxruntime.InferenceSession(self.folder / f"{graph}.onnx", providers=["CPUExecutionProvider"])
        session = self.sessions[graph]
        taken = {port.name: inputs[port.name] for port in session.get_inputs()}
        names = [port.name for port in session.get_outputs()]
        return dict(zip(names, session.run(names, taken)))


def inputs_of(golden, weights):
    """Everything that any of the graphs takes, before the decoder's."""
    ids = golden["in.input_ids"]
    return {
        "input_ids": ids,
        "inputs_embeds": weights["backbone.model.encoder.embed_tokens.weight"][ids],
        "attention_mask": golden["in.attention_mask"],
        "position_ids": golden.get("position_ids"),
    }


def first_step(model, golden, weights, count):
    given = inputs_of(golden, weights)
    states = model.run("encoder_model", given)["last_hidden_state"]
    targets = golden["in.target_ids"][:, :count]
    positions = golden.get("decoder_position_ids")
    decoder = given | {
        "encoder_attention_mask": golden["in.attention_mask"],
        "encoder_hidden_states": states,
        "input_ids": targets,
        "decoder_inputs_embeds": weights["audio_embedding.0.weight"][targets],
        "decoder_position_ids": None if positions is None else positions[:, :count],
    }
    return states, model.run("decoder_model", decoder)


def through_the_cache(model, golden, weights):
    _, outputs = first_step(model, golden, weights, 1)
    logits = [outputs["logits"]]
    past = {name.replace("present", "past_key_values"): value for name, value in outputs.items() if name.startswith("present")}
    targets, positions = golden["in.target_ids"], golden.get("decoder_position_ids")
    for at in range(1, targets.shape[1]):
        one = slice(at, at + 1)
        given = past | {
            "encoder_attention_mask": golden["in.attention_mask"],
            "input_ids": targets[:, one],
            "decoder_inputs_embeds": weights["audio_embedding.0.weight"][targets[:, one]],
            "decoder_position_ids": None if positions is None else positions[:, one],
        }
        outputs = model.run("decoder_with_past_model", given)
        logits.append(outputs["logits"])
        past |= {name.replace("present", "past_key_values"): value for name, value in outputs.items() if name.startswith("present")}
    return np.concatenate(logits, 1)


def expected(kind, golden, weights):
    hidden = golden["decoder_last_hidden_state"]
    first, first_bias, second, second_bias = (weights[f"predict_layer.0.{layer}.{part}"] for layer in (0, 2) for part in ("weight", "bias"))
    inner = hidden @ first.T + first_bias
    return {
        "logits": golden["logits"],
        "embeds": golden["logits"],
        "states": hidden,
        "linear": hidden @ second.T + second_bias,
        "silu": inner / (1 + np.exp(-inner)) @ second.T + second_bias,
    }[kind]


def main():
    fixture, models = Path(sys.argv[1]), [argument.split("=", 1) for argument in sys.argv[2:]]
    golden, weights = load_file(fixture / "golden.safetensors"), load_file(fixture / "checkpoint/model.safetensors")
    count = golden["in.target_ids"].shape[1]
    differences = {}
    for kind, folder in models:
        model, wanted = Model(Path(folder)), expected(kind, golden, weights)
        states, outputs = first_step(model, golden, weights, count)
        visible = golden["in.attention_mask"][..., None] != 0
        differences[f"{kind}: encoder"] = np.abs(np.where(visible, states - golden["encoder_last_hidden_state"], 0)).max()
        found = outputs["decoder_last_hidden_state" if kind == "states" else "logits"]
        differences[f"{kind}: decoder"] = np.abs(found - wanted).max()
        if kind in ("logits", "embeds"):
            differences[f"{kind}: cached steps"] = np.abs(through_the_cache(model, golden, weights) - wanted).max()
    print(json.dumps({name: float(difference) for name, difference in differences.items()}, indent=1))
    if not all(difference <= LIMIT for difference in differences.values()):
        sys.exit(f"above {LIMIT}")


if __name__ == "__main__":
    main()
