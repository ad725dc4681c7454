"""Images for the tests of datasets, in the layouts that sources have."""

import io
import json
import pickle
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


class OldPickler(pickle._Pickler):
    """Writes strings and bytes as Python 2 wrote its `str`: the files of CIFAR are such pickles."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_old(self, value):
        data = value if isinstance(value, bytes) else value.encode("latin1")
        self.write(b"T" + struct.pack("<i", len(data)) + data)
        self.memoize(value)

    dispatch[bytes] = dispatch[str] = save_old


def old_pickle(value):
    """A pickle as Python 2 with an old numpy wrote it."""
    file = io.BytesIO()
    OldPickler(file, 2).dump(value)
    return file.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")


def cifar_batch(images, labels, dumps=old_pickle):
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return dumps({"data": rows, "labels": labels, "filenames": ["a.png"] * len(labels), "batch_label": "batch 1 of 5"})


def cifar(dumps=old_pickle):
    """Six images, (6,32,32,3), and the files of a CIFAR-10 of five for training and one for testing."""
    images = pixels(6, side=32)
    files = {f"cifar-10-batches-py/data_batch_{k}": cifar_batch(images[k - 1 : k], [k], dumps) for k in range(1, 6)}
    return images, files | {"cifar-10-batches-py/test_batch": cifar_batch(images[5:], [9], dumps)}


def opened(reader):
    """All images of a reader, (N,H,W,C) uint8."""
    return np.stack([np.asarray(reader.open(index)) for index in range(len(reader))])


def make(cls, path="", **settings):
    """The dataset of a class, with its defaults but for `settings`."""
    return cls(cls.Config(kind=cls.name, path=str(path), **settings))
