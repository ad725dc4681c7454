"""Images for the tests of datasets, in the layouts that sources have."""

import io
import json
import struct
import zipfile

import numpy as np
from PIL import Image


def pixels(count, side=8, channels=3, seed=0):
    """(N,H,W,C) uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="png")
    return file.getvalue()


def write_folder(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def write_zip(path, files, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def edm(count, labels=None):
    """Files as EDM's dataset tool names them."""
    names = [f"00000/img{number:08d}.png" for number in range(count)]
    files = {name: png(image) for name, image in zip(names, pixels(count), strict=True)}
    pairs = None if labels is None else [list(pair) for pair in zip(names, labels, strict=True)]
    return files | {"dataset.json": json.dumps({"labels": pairs})}


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def make(cls, path="", **settings):
    """The dataset of a class, with its defaults but for `settings`."""
    return cls(cls.Config(kind=cls.name, path=str(path), **settings))
