"""Writes the seed corpus of the fuzz targets, corpus/TARGET/NAME, from the fixtures beside this folder and from inputs that once
failed. Needs Python alone: python3 tests/fuzz/make_corpus.py"""

import json
import shutil
import struct
from pathlib import Path

HERE = Path(__file__).parent
TESTS = HERE.parent
PUBLIC = TESTS / "fixtures/public"
DEMO = TESTS / "demo/checkpoint"


def seed(target, name, data):
    folder = HERE / "corpus" / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name.replace(" ", "_")).write_bytes(data.encode() if isinstance(data, str) else data)


def compact(value):
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def safetensors(tensors):
    """A file of zeros: {name: (dtype, shape, bytes)}."""
    header, at = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = compact(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


def configs():
    for file in sorted(PUBLIC.glob("*/checkpoint/config.json")):
        seed("config", file.parent.parent.name, compact(json.loads(file.read_text())))
    seed("config", "defaults", '{"model_type":"t5gemma","encoder":{"num_hidden_layers":2},"decoder":{"num_hidden_layers":3}}')
    seed("config", "nan", '{"model_type":"t5gemma","encoder":{"initializer_range":NaN},"decoder":{}}')
    seed("config", "mark", "\ufeff{}")
    seed("config", "plan", "batch=1..4,source=1..128,target=64,beams=1..4")
    seed("config", "bytes", "24GB")
    seed("config", "version", "tensorrt=10.16")


def checkpoints():
    # The first byte is the file, in the order of the target.
    balanced = PUBLIC / "tiny-balanced/checkpoint"
    seed("checkpoint", "config", b"\0" + (balanced / "config.json").read_bytes())
    seed("checkpoint", "weights", b"\1" + safetensors({"model.decoder.norm.weight": ("F32", [32], 128), "extra": ("U8", [3], 3)}))
    seed("checkpoint", "pointer", b"\1version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n")
    seed("checkpoint", "page", b"\1<!DOCTYPE html><html><title>Access to this model is restricted</title></html>")
    index = {"metadata": {"total_size": 128}, "weight_map": {"model.decoder.norm.weight": "model.safetensors"}}
    seed("checkpoint", "index", b"\2" + compact(index).encode())
    seed("checkpoint", "generation_config", b"\3" + (balanced / "generation_config.json").read_bytes())
    seed("checkpoint", "tokenizer_config", b"\5" + (DEMO / "tokenizer_config.json").read_bytes())


def tokenizers():
    small = json.loads((TESTS / "fixtures/tokenizer_settings.json").read_text())["tokenizer"]
    seed("tokenizer", "small", compact(small))
    changes = {
        "no_special_tokens": lambda t: t.update(post_processor={"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [], "special_tokens": {}}),
        "strip": lambda t: t["decoder"].setdefault("decoders", []).append({"type": "Strip", "content": " ", "start": 1, "stop": 1}),
        "prefix": lambda t: t["model"].update(continuing_subword_prefix="######"),
        "large_id": lambda t: t["model"]["vocab"].update(zzz=4294967295),
        "empty_pattern": lambda t: t.update(normalizer={"type": "Replace", "pattern": {"String": ""}, "content": "\u2581"}),
    }
    for name, change in changes.items():
        changed = json.loads(json.dumps(small))
        change(changed)
        seed("tokenizer", name, compact(changed))
        seed("model_folder", f"tokenizer_{name}", b"\2" + compact(changed).encode())
    seed("model_folder", "generation_config", b"\1" + (DEMO / "generation_config.json").read_bytes())
    seed("model_folder", "tokenizer_config", b"\3" + (DEMO / "tokenizer_config.json").read_bytes())
    manifest = {"format": "t5gemma-onnx", "format_version": 1, "target": "cpu", "files": {}, "graphs": {}}
    seed("model_folder", "manifest", b"\0" + compact(manifest).encode())


def chat_templates():
    templates = json.loads((TESTS / "fixtures/chat.json").read_text())["templates"]
    for name, files in templates.items():
        template = files.get("chat_template")
        if isinstance(template, str) and len(template) < 4000:
            seed("chat_template", name.replace("/", "_"), template)
    odd = ["{%}", "{{ messages|tojson(indent=100000000000) }}", "{{ 'a' * 100000000 }}", "{{ range(1000000000)|list }}",
           "{{ '%0100000000d' % 1 }}", "{{ [1,'a',True,None] }}", "{% for m in messages %}{{ m.content.rsplit('.', 1) }}{% endfor %}",
           "{{ namespace(x=1).x }}{% set c = cycler('a', 'b') %}{{ c.next() }}", "\ufeff{{ bos_token }}\r\n"]
    for at, template in enumerate(odd):
        seed("chat_template", f"odd_{at}", template)


def requests():
    files = ['{"max_new_tokens":20,"eos_token_id":[1,106],"pad_token_id":0}', '{"eos_token_id":null,"top_k":50,"cache_implementation":"hybrid"}']
    asked = ['{"num_beams":4,"length_penalty":0.5,"early_stopping":"never"}', '{"do_sample":true,"temperature":0.7,"top_p":0.9,"seed":3}',
             '{"bad_words_ids":[[5,6]],"sequence_bias":[[[7],-2.5]],"suppress_tokens":[5],"no_repeat_ngram_size":2}']
    for at, file in enumerate(files):
        for also, request in enumerate(asked):
            seed("options", f"{at}_{also}", f"{file}\n{request}")
    constraints = {
        "schema": {"json_schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
        "multiple": {"json_schema": {"type": "integer", "multipleOf": 16777216}},
        "multiples": {"json_schema": {"allOf": [{"properties": {}}, {"properties": {"a": {"type": "integer", "multipleOf": 1000003}}}, {"required": ["a.*"]}], "patternProperties": {}}},
        "regex": {"regex": "[a-z]+ (a{2,5}|b)?"},
        "repeats": {"regex": "(a{1000}){1000}"},
        "grammar": {"grammar": 'start: start "a" | "a"'},
        "sequences": {"allowed_sequences": ["a b", [5, 6]], "required_phrases": [[6]]},
    }
    for name, request in constraints.items():
        seed("constraints", name, compact(request))
    lines = ['{"text":"Dr. Smith","options":{"num_beams":2}}', '{"id":"x","input_ids":[[2,5],[6,7]],"attention_mask":[[1,1],[1,0]]}',
             '{"text":["a","b"],"target":["c","d"]}', '{"input_ids":[2,5],"decoder_input_ids":[2,9],"target_ids":[[5]]}',
             '{"text":"\\ud800"}', '{"id":1e999,"text":"a","text":"b"}', "[" * 200]
    for at, line in enumerate(lines):
        seed("json_lines", str(at), line)
    # The first byte is the kind of file, in the order of the target.
    seed("files", "texts", b"\0\xef\xbb\xbfa text\r\nanother\n")
    outputs = {"0.last_hidden_state": ("F32", [1, 2, 3], 24), "0.input_ids": ("I64", [1, 2], 16), "0.attention_mask": ("I64", [1, 2], 16)}
    seed("files", "encoder_outputs", b"\1" + safetensors(outputs))
    seed("files", "golden", b"\2" + safetensors({"in.right.input_ids": ("I64", [1, 2], 16), "enc.right.last_hidden_state": ("BF16", [1, 2, 3], 12)}))
    seed("files", "bench", b"\3" + b'{"protocol":1,"cases":[{"id":1,"src":[[5,6]],"beams":1,"gen":2,"ops":["encode"]}]}')
    seed("files", "json_schema", b'\4{"type":"object"}')
    seed("files", "grammar", b'\5start: "a"')
    seed("files", "allowed_sequences", b'\6["a b",[5,6]]')
    seed("files", "required_phrases", b"\7a\nb\n")


def onnx():
    """A model with one Identity, in the wire format: fields are (number << 3 | kind)."""
    def field(number, data):
        data = data if isinstance(data, bytes) else data.encode()
        return bytes([number << 3 | 2, len(data)]) + data

    shape = field(2, field(1, b"\x08\x02") + field(1, field(2, "n")))
    port = lambda name: field(1, name) + field(2, field(1, b"\x08\x01" + shape))  # noqa: E731
    node = field(1, field(1, "x") + field(2, "y") + field(4, "Identity"))
    graph = node + field(2, "g") + field(11, port("x")) + field(12, port("y"))
    seed("onnx", "identity", b"\x08\x0a" + field(7, graph) + field(8, b"\x10\x15"))
    seed("onnx", "empty", b"")


if __name__ == "__main__":
    shutil.rmtree(HERE / "corpus", ignore_errors=True)
    configs(), checkpoints(), tokenizers(), chat_templates(), requests(), onnx()
    print(sum(1 for path in (HERE / "corpus").rglob("*") if path.is_file()), "seeds")
