"""Greedy generation over the three graphs of a model folder, as a model of Triton's `python` backend that calls those of its
`onnxruntime` or `tensorrt` backend. It needs the packages numpy and tokenizers. The backend t5gemma is faster: here every step passes the cache
through Triton, requests share no steps, and there is no other search."""

import json
from pathlib import Path

import numpy as np
import tokenizers
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self.name = config["name"]
        folder = Path(args["model_repository"]) / config["parameters"]["model"]["string_value"]
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        options = json.loads((folder / "config.json").read_text())
        if (folder / "generation_config.json").exists():
            options |= json.loads((folder / "generation_config.json").read_text())
        ends = options.get("eos_token_id", 1)
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.start = options.get("decoder_start_token_id", options.get("bos_token_id", 2))
        self.most = options.get("max_new_tokens") or options.get("max_length", 21) - 1
        self.outputs = {
            graph: config["parameters"][graph]["string_value"].split(",") for graph in ("encoder", "decoder", "decoder_with_past")
        }

    def run(self, graph, inputs):
        """The outputs of a graph by name."""
        tensors = [triton.Tensor(name, value) for name, value in inputs.items()]
        # A model on a GPU leaves its outputs there unless it is asked for others.
        request = triton.InferenceRequest(
            model_name=f"{self.name}_{graph}",
            requested_output_names=self.outputs[graph],
            inputs=tensors,
            preferred_memory=triton.PreferredMemory(triton.TRITONSERVER_MEMORY_CPU),
        )
        response = request.exec()
        if response.has_error():
            raise triton.TritonModelException(response.error().message())
        return {name: triton.get_output_tensor_by_name(response, name).as_numpy() for name in self.outputs[graph]}

    def generate(self, source, most):
        """The tokens of a target."""
        ids = np.array([source], dtype=np.int64)
        mask = np.ones_like(ids)
        (states,) = self.run("encoder", {"input_ids": ids, "attention_mask": mask}).values()
        # The first step makes the cache, whose encoder half stays as it is.
        token = np.array([[self.start]], dtype=np.int64)
        inputs = {"encoder_attention_mask": mask, "input_ids": token, "encoder_hidden_states": states}
        graph, past, tokens = "decoder", {}, []
        while len(tokens) < most:
            outputs = self.run(graph, inputs)
            tokens.append(int(outputs.pop("logits")[0, -1].argmax()))
            if tokens[-1] in self.ends:
                break
            past |= {name.replace("present", "past_key_values", 1): value for name, value in outputs.items()}
            inputs = {"encoder_attention_mask": mask, "input_ids": np.array([tokens[-1:]], dtype=np.int64)} | past
            graph = "decoder_with_past"
        return tokens

    def execute(self, requests):
        responses = []
        for request in requests:
            try:
                texts = triton.get_input_tensor_by_name(request, "text_input").as_numpy().reshape(-1)
                most = int(json.loads(request.parameters() or "{}").get("max_new_tokens", self.most))
                targets = [self.generate(self.tokenizer.encode(text.decode()).ids, most) for text in texts]
                answers = [self.tokenizer.decode(target, skip_special_tokens=True).encode() for target in targets]
                output = triton.Tensor("text_output", np.array(answers, dtype=np.object_))
                responses.append(triton.InferenceResponse([output]))
            except Exception as error:  # One request must not fail the others.
                responses.append(triton.InferenceResponse(error=triton.TritonError(str(error))))
        return responses
