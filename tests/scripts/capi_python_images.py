"""Images through the Python package: capi_python_images.py MODEL FILE < CASE, a JSON object with the width and the RGB rows of
the file, its pixel_values, the input_ids of TEXT with it, and the tokens of greedy search."""

import json
import sys
from pathlib import Path

import numpy as np
import t5gemma

TEXT = "<start_of_image> a"
case, file = json.load(sys.stdin), sys.argv[2]
model = t5gemma.Model.open(sys.argv[1])
rgb = np.array(case["rgb"], np.uint8).reshape(-1, case["width"], 3)
pixels = np.array(case["pixel_values"], np.float32).reshape(1, 3, *[int((len(case["pixel_values"]) // 3) ** 0.5)] * 2)
options = {"max_new_tokens": len(case["tokens"])}


class Picture:
    """What is used of a PIL image."""

    size = rgb.shape[1::-1]

    def convert(self, mode):
        assert mode == "RGB"
        return self

    def __array__(self, dtype=None, copy=None):
        return rgb


def tokens(*arguments, **images):
    (row,) = model.generate(*arguments, **images, **options)
    return row[0].tokens.tolist()


forms = [file, Path(file), Path(file).read_bytes(), bytearray(Path(file).read_bytes()), rgb, rgb[:, ::-1][:, ::-1], Picture()]
for image in forms:
    assert tokens(TEXT, images=image) == case["tokens"], image
    assert tokens([TEXT], images=[[image]]) == case["tokens"]
    assert tokens(case["input_ids"], images=[image]) == case["tokens"]
assert tokens(TEXT, images=file, pan_and_scan=False) == case["tokens"]
assert tokens(case["input_ids"], pixel_values=pixels) == case["tokens"]
assert tokens(TEXT, images=255 - rgb) != case["tokens"]
rows = model.generate(["no image", TEXT], images=[[], [file]], **options)
assert rows[1][0].tokens.tolist() == case["tokens"]
with t5gemma.Engine(model) as engine:
    assert engine.submit(TEXT, images=file, **options).result()[0][0].tokens.tolist() == case["tokens"]
with t5gemma.Encoder.open(sys.argv[1]) as encoder:
    states = [opened.encode(TEXT, images=file)[0] for opened in (model, encoder)]
    assert np.abs(states[0] - states[1]).max() < 1e-5
    assert encoder.embed(TEXT, images=file).shape[0] == 1
assert model.score(TEXT, [case["tokens"]], images=file)[0].logprob != model.score(TEXT, [case["tokens"]], images=255 - rgb)[0].logprob


def fails(kind, message, call):
    try:
        call()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)


fails(t5gemma.Error, "images: expected 1 images, as many as the text has <start_of_image>, found 2", lambda: tokens(TEXT, images=[file] * 2))
fails(t5gemma.Error, "images: expected 1 images, as many as the text has <start_of_image>, found 0", lambda: tokens(TEXT, images=[]))
fails(t5gemma.Error, "sources.images[0]: expected a JPEG, PNG or WebP image, found something else", lambda: tokens(TEXT, images=b"noise"))
fails(FileNotFoundError, "no/such.png", lambda: tokens(TEXT, images="no/such.png"))
fails(TypeError, "images[0]: expected a path, bytes, an array or a PIL image, found 5", lambda: tokens(TEXT, images=5))
fails(ValueError, "images[0]: expected an array [height, width, 3] of uint8", lambda: tokens(TEXT, images=rgb[:, :, 0]))
fails(ValueError, "images: expected 2, a list of images for each source, found 1", lambda: model.generate([TEXT, TEXT], images=[file]))
fails(ValueError, "pixel_values requires token ids", lambda: tokens(TEXT, pixel_values=pixels))
fails(ValueError, "pixel_values: expected [images, 3, image_size, image_size]", lambda: tokens([5], pixel_values=pixels[0]))
fails(t5gemma.Error, "4 tokens 7 (4 for each of 1 images), found 0", lambda: tokens([5, 6], pixel_values=pixels))
print("well")
