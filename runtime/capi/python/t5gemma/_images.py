"""The accepted forms of images: files by path or as bytes, PIL images, and arrays [height, width, 3] of uint8."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple, Sequence, Union

import numpy as np

from ._forms import is_list, shown

Image = Union[str, "os.PathLike[str]", bytes, bytearray, memoryview, np.ndarray, Any]
"""A path, the bytes of a JPEG, PNG or WebP file, an array [height, width, 3] of uint8, or a PIL image."""

Images = Union[Image, Sequence[Image], Sequence[Sequence[Image]]]
"""One image or several of one source, or a list of images for each source."""


class Pixels(NamedTuple):
    """An image as t5g_sources takes it."""

    data: np.ndarray
    """uint8, of one dimension."""
    width: int
    """0 for a file."""


def rows(images: Images, count: int) -> list[list[Pixels]]:
    """The images of each source."""
    if not is_list(images):
        images = [images]
    several = any(is_list(row) for row in images)
    given = images if several or count > 1 else [images]
    if len(given) != count:
        raise ValueError(f"images: expected {count}, a list of images for each source, found {len(given)}")
    found = []
    for at, row in enumerate(given):
        name = "images" if given is not images else f"images[{at}]"
        if not is_list(row):
            raise ValueError(f"{name}: expected a list of images, found {shown(row)}")
        found.append([_one(f"{name}[{place}]", image) for place, image in enumerate(row)])
    return found


def _one(name: str, image: Image) -> Pixels:
    if isinstance(image, (bytes, bytearray, memoryview)):
        return Pixels(np.frombuffer(bytes(image), np.uint8), 0)
    if isinstance(image, (str, os.PathLike)):
        return Pixels(np.frombuffer(Path(image).read_bytes(), np.uint8), 0)
    if hasattr(image, "convert") and hasattr(image, "size"):
        # A PIL image. As in transformers, its pixels are taken as they are, whatever its Exif data says.
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise ValueError(f"{name}: expected an array [height, width, 3] of uint8, found {shown(image)}")
        return Pixels(np.ascontiguousarray(image).reshape(-1), image.shape[1])
    raise TypeError(f"{name}: expected a path, bytes, an array or a PIL image, found {shown(image)}")
