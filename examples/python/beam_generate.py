"""Documents through a model with Apache Beam's RunInference: JSON lines with `id` and `text` in, with `id` and `output` out.

    python beam_generate.py --model model --input 'in/*.jsonl' --output out/part [--max_new_tokens 64] [options of Beam]

Needs the packages apache-beam and t5gemma. Each worker process opens the model once and computes a bundle's rows in batches.
"""

import argparse
import json

import apache_beam as beam
import t5gemma
from apache_beam.ml.inference.base import ModelHandler, PredictionResult, RunInference
from apache_beam.options.pipeline_options import PipelineOptions


class T5Gemma(ModelHandler):
    """Generates for rows with a `text`; `options` are those of Model.generate."""

    def __init__(self, model, threads=None, **options):
        super().__init__(min_batch_size=16, max_batch_size=64)
        self.model, self.threads, self.options = model, threads, options

    def load_model(self):
        return t5gemma.Model.open(self.model, threads=self.threads)

    def run_inference(self, batch, model, inference_args=None):
        generated = model.generate([row["text"] for row in batch], **self.options, **(inference_args or {}))
        return [PredictionResult(row, found[0].text) for row, found in zip(batch, generated)]

    def get_metrics_namespace(self):
        return "t5gemma"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--input", required=True, help="pattern of files with JSON lines")
    parser.add_argument("--output", required=True, help="prefix of the files to write")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of a worker process")
    given, rest = parser.parse_known_args()
    with beam.Pipeline(options=PipelineOptions(rest, save_main_session=True)) as pipeline:
        (
            pipeline
            | beam.io.ReadFromText(given.input)
            | beam.Map(json.loads)
            | RunInference(T5Gemma(given.model, given.threads, max_new_tokens=given.max_new_tokens))
            | beam.Map(lambda result: json.dumps({"id": result.example["id"], "output": result.inference}, ensure_ascii=False))
            | beam.io.WriteToText(given.output, file_name_suffix=".jsonl")
        )


if __name__ == "__main__":
    main()
