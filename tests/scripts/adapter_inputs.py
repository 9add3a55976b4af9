"""Runs the graphs that take LoRA adapters in plain ONNX Runtime, as a loop of one's own would, and compares them with golden tensors:
adapter_inputs.py MODEL GOLDEN ADAPTERS. MODEL is exported with --lora-inputs and --all-logits, and ADAPTERS is the folder of the adapters
plain and rslora. The rows of the golden mixed batch use plain, no adapter and rslora. Prints the largest differences of logits: of the
first step, and of the cached step that continues it."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from safetensors.numpy import load_file

NAMES = ["plain", None, "rslora"]


def modules(folder, rank):
    """A and B of each module, [in, rank] and [rank, out], with the scale in B."""
    config = json.loads((folder / "adapter_config.json").read_text())
    r = config["r"]
    scale = config["lora_alpha"] / (r**0.5 if config["use_rslora"] else r)
    found = {}
    for name, values in load_file(folder / "adapter_model.safetensors").items():
        module, part = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".", 1)
        pair = np.zeros((values.shape[1], rank), np.float32) if part == "lora_A" else np.zeros((rank, values.shape[0]), np.float32)
        if part == "lora_A":
            pair[:, :r] = values.T
        else:
            pair[:r] = values.T * np.float32(scale)
        found[f"{module}.{part}"] = pair
    return found


def main(model, golden, adapters):
    tensors = load_file(golden)
    ids, mask, target = tensors["in.input_ids"], tensors["in.attention_mask"], tensors["in.decoder_input_ids"]
    rank = 8
    of = {name: modules(Path(adapters) / name, rank) for name in NAMES if name}

    def run(graph, feeds, names):
        """Feeds the adapters of `names` side by side."""
        session = onnxruntime.InferenceSession(Path(model) / graph, providers=["CPUExecutionProvider"])
        feeds = dict(feeds)
        for port in session.get_inputs():
            if port.name.endswith((".lora_A", ".lora_B")):
                axis = 1 if port.name.endswith(".lora_A") else 0
                size = port.shape[1 - axis]
                zeros = np.zeros((size, rank) if axis else (rank, size), np.float32)
                feeds[port.name] = np.concatenate([of.get(name, {}).get(port.name, zeros) for name in names], axis)
        return dict(zip([output.name for output in session.get_outputs()], session.run(None, feeds), strict=True))

    hidden = [
        run("encoder_lora_model.onnx", {"input_ids": ids[[row]], "attention_mask": mask[[row]]}, [name])["last_hidden_state"]
        for row, name in enumerate(NAMES)
    ]
    members = ["plain", "rslora"]
    used = np.array([[name == member for member in members] for name in NAMES]).repeat(rank, axis=1).astype(np.float32)
    first = {"encoder_attention_mask": mask, "encoder_hidden_states": np.concatenate(hidden)}
    first |= {"adapter_mask": used, "encoder_adapter_mask": used}
    whole = run("decoder_lora_model.onnx", first | {"input_ids": target}, members)["logits"]

    # The same in two parts, the second token by token.
    part = run("decoder_lora_model.onnx", first | {"input_ids": target[:, :4]}, members)
    cached = {name.replace("present", "past_key_values"): value for name, value in part.items() if name.startswith("present")}
    steps = []
    for at in range(4, target.shape[1]):
        feeds = {"encoder_attention_mask": mask, "input_ids": target[:, [at]], "adapter_mask": used} | cached
        step = run("decoder_with_past_lora_model.onnx", feeds, members)
        cached |= {name.replace("present", "past_key_values"): value for name, value in step.items() if name.startswith("present")}
        steps.append(step["logits"])
    expected = tensors["mixed.logits"]
    print(np.abs(whole - expected).max(), np.abs(np.concatenate(steps, 1) - expected[:, 4:]).max())


main(*sys.argv[1:])
