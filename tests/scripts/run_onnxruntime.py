#!/usr/bin/env python3
"""Reproduces a fixture's golden tensors from an exported model with the Python package of ONNX Runtime, which shares
nothing with this project's own runtime: `run_onnxruntime.py MODEL FIXTURE`.
"""

import golden
import onnxruntime


def engine(path):
    """Opens a graph in a CPU session."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs)))


if __name__ == "__main__":
    golden.main(__doc__, engine)
