"""Documents through a model with Spark's mapInPandas: rows with `id` and `text` in, with `id` and `output` out.

    spark-submit spark_generate.py --model model --input 'in/*.jsonl' --output out

Needs a Java runtime, the packages pyspark, pandas and pyarrow, and t5gemma on every worker. A task opens the model once, and its
rows share the steps of an engine; the next batch is under way before the results of one are written.
"""

import argparse

import pandas as pd
from pyspark.sql import SparkSession


def generate(folder, threads, **options):
    """The function for mapInPandas: batches of rows in, batches of results out, in the same order."""

    def work(batches):
        import t5gemma

        model = t5gemma.Model.open(folder, threads=threads)
        # Two batches wait at most, of spark.sql.execution.arrow.maxRecordsPerBatch rows each.
        with t5gemma.Engine(model, max_waiting=1_000_000) as engine:
            before = None
            for batch in batches:
                begun = batch["id"], [engine.future(text, **options) for text in batch["text"]]
                if before:
                    yield ended(*before)
                before = begun
            if before:
                yield ended(*before)

    def ended(ids, futures):
        return pd.DataFrame({"id": ids, "output": [future.result()[0][0].text for future in futures]})

    return work


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--input", required=True, help="pattern of files with JSON lines")
    parser.add_argument("--output", required=True, help="folder to write JSON lines into")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="of a task")
    given = parser.parse_args()
    spark = SparkSession.builder.appName("t5gemma").getOrCreate()
    rows = spark.read.schema("id long, text string").json(given.input)
    work = generate(given.model, given.threads, max_new_tokens=given.max_new_tokens)
    rows.mapInPandas(work, schema="id long, output string").write.json(given.output)
    spark.stop()


if __name__ == "__main__":
    main()
