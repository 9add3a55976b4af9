"""Compares the logits of an exported model with those of an adapter's golden tensors: adapter_logits.py MODEL GOLDEN ADAPTER. The model is
one with --all-logits, which any ONNX runtime runs. Prints the largest differences of hidden states and logits."""

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from safetensors.numpy import load_file


def main(model, golden, adapter):
    tensors = load_file(golden)
    ids, mask = tensors["in.input_ids"], tensors["in.attention_mask"]

    def run(graph, feeds):
        session = onnxruntime.InferenceSession(Path(model) / graph, providers=["CPUExecutionProvider"])
        return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))

    hidden = run("encoder_model.onnx", {"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
    feeds = {"encoder_attention_mask": mask, "input_ids": tensors["in.decoder_input_ids"], "encoder_hidden_states": hidden}
    logits = run("decoder_model.onnx", feeds)["logits"]
    expected = tensors[f"{adapter}.encoder_last_hidden_state"]
    states = np.abs(np.where(mask[:, :, None] == 1, hidden - expected, 0)).max()
    print(states, np.abs(logits - tensors[f"{adapter}.logits"]).max())


main(*sys.argv[1:])
