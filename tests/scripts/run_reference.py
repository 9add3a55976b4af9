#!/usr/bin/env python3
"""Reproduces a fixture's golden tensors from an exported model with ONNX's reference evaluator, which follows the
standard operator by operator in numpy and optimises nothing: `run_reference.py MODEL FIXTURE`, for tiny models.
"""

import golden
import onnx
from onnx.reference import ReferenceEvaluator


def engine(path):
    """Reads a graph with its weights."""
    evaluator = ReferenceEvaluator(onnx.load(path))
    return lambda inputs: dict(zip(evaluator.output_names, evaluator.run(None, inputs)))


if __name__ == "__main__":
    golden.main(__doc__, engine)
