"""The common interface of all sources of images, :class:`Reader`, and what they share.

| module        | sources                                                                     |
|---------------|-----------------------------------------------------------------------------|
| image_folders | a folder, a zip or tars of encoded images (PNG, JPEG, WebP, BMP, TIFF, ...) |
| tables        | parquet files, or a dataset of a hub, whose rows hold encoded images        |
| array_files   | arrays of pixels                                                            |

A reader holds names and labels in memory and reads images on demand. Its fingerprint depends on the data and not on the
place: a zip has the same fingerprint as the folder that it was packed from.

Every error is a UserError that names ``dataset.path`` and the faulty file.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import math
import struct
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from distillbench.errors import LONGEST_REASON, UserError, quoted
from distillbench.storage.files import git_lfs_pointer

SUFFIXES = {
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # that are decoded, whatever the suffix
OPAQUE = (".jpg", ".jpeg", ".jpe", ".jfif", ".ppm", ".pgm", ".pbm", ".pnm")  # formats without transparency
LARGEST_FILE = 2**28  # bytes of one encoded image, and of a file of labels or captions
LARGEST_IMAGE = Image.MAX_IMAGE_PIXELS or 2**26  # pixels; above that Pillow warns, which is an error here
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_DEPTH, PNG_COLOURS = 24, 25  # byte offsets of the bits per channel and of the colour type
PNG_ALPHA = (4, 6)  # grey and alpha, colour and alpha
BITS_PER_SAMPLE = 258  # TIFF tag
SPLITS = {"train": ("train", "training", "data"), "test": ("test", "t10k", "val", "valid", "validation")}  # by our name
LISTED = 3  # names that a note lists

# What decoders raise for damaged files.
DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, LookupError, TypeError, RuntimeError, NotImplementedError),
    *(ArithmeticError, MemoryError, AssertionError, AttributeError),
    *(struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
warnings.filterwarnings("ignore", module=r"PIL\.")  # about metadata: Pillow raises errors for damaged pixels
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)

T = TypeVar("T")


class Reader(ABC):
    """Stored images by index, with labels or captions if there are any.

    `notes` are sentences for the user: which files were found and ignored, and which choices were made.
    """

    kind: str  # a description of the source
    encoded: bool = True  # decoding takes time and releases the GIL, so that threads help
    labels: np.ndarray | None = None  # (N,) int64
    class_names: Sequence[str] = ()  # by label; empty: the source names none
    class_count: int = 0  # number of classes declared by the source; 0: unknown
    captions: Sequence[str] | None = None  # N texts
    several_captions: bool = False  # some image has several captions, of which the first is used
    transparent: bool = False  # some image is not opaque; set by checksum() and fingerprint()
    notes: Sequence[str] = ()

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def open(self, index: int) -> Image.Image | np.ndarray:
        """Image `index`, decoded: a Pillow image, or uint8 (H,W,C). Raises UserError if it is damaged."""

    @abstractmethod
    def name(self, index: int) -> str:
        """The name of image `index` in its source."""

    @abstractmethod
    def checksum(self, index: int) -> tuple[int, int]:
        """CRC-32 and size in bytes of image `index` as stored."""

    def checksums(self, workers: int = 1) -> list[tuple[int, int]]:
        """The checksum of every image. Sets `transparent`."""
        return map_in_order(self.checksum, range(len(self)), workers)

    def fingerprint(self, workers: int = 1) -> str:
        """SHA-256 over the stored images in order. Sets `transparent`."""
        checksums = np.array(self.checksums(workers), dtype="<u8")
        return hashlib.sha256(checksums.tobytes()).hexdigest()


def map_in_order(call: Callable[[Any], T], items: Sequence[Any], workers: int) -> list[T]:
    """``[call(item) for item in items]`` on `workers` threads. Raises the error of the first failing item."""
    if workers < 2 or len(items) < 2:
        return [call(item) for item in items]
    size = math.ceil(len(items) / workers)
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor(len(parts)) as pool:
        return [result for part in pool.map(lambda part: [call(item) for item in part], parts) for result in part]


def dataset_error(message: str) -> UserError:
    """The error of a source of images."""
    return UserError(f"dataset.path: {message}")


def unreadable(name: str, error: Exception) -> UserError:
    """The error for an image that cannot be decoded. Its text holds no object address, so that it is reproducible."""
    why = "no image format is recognised" if isinstance(error, UnidentifiedImageError) else str(error)
    return dataset_error(f"cannot read {quoted(name)} as an image: {why[:LONGEST_REASON] or type(error).__name__}")


def some(names: Sequence[Any]) -> str:
    """The first few of `names`, with ``...`` if there are more."""
    shown = ", ".join(map(str, names[:LISTED]))
    return f"{shown}, ..." if len(names) > LISTED else shown


# --- decoding --------------------------------------------------------------------------------------------------------


def decode(data: bytes, name: str) -> Image.Image:
    """The image in `data`. Raises UserError."""
    if why := git_lfs_pointer(data):
        raise unreadable(name, ValueError(why))
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > LARGEST_IMAGE:
            raise ValueError(f"it has {image.width:,} x {image.height:,} pixels, at most {LARGEST_IMAGE:,} are allowed")
        if image.format in ("PNG", "WEBP", "GIF", "TIFF") and image.is_animated:  # type: ignore[attr-defined]
            kind = "a file" if image.format == "TIFF" else "an animation"
            raise ValueError(f"it is {kind} of {image.n_frames:,} frames")  # type: ignore[attr-defined]
        if _deep(image, data):  # Pillow would drop half the bits of colour images
            raise ValueError("it has more than 8 bits per channel: convert it to 8 bits")
        if image.format == "PNG":
            Image.open(io.BytesIO(data), formats=("PNG",)).verify()  # unlike load(), it verifies checksums
        image.load()
    except DAMAGE as error:
        raise unreadable(name, error) from error
    return image


def _deep(image: Image.Image, data: bytes) -> bool:
    """Whether a file has more than 8 bits per channel although Pillow's mode does not show it."""
    if image.mode.startswith(("I", "F")):
        return False  # the mode shows it
    if image.format == "PNG":
        return data[PNG_DEPTH] > 8
    if image.format == "TIFF":
        return max(image.tag_v2.get(BITS_PER_SAMPLE, (1,))) > 8  # type: ignore[attr-defined]
    if image.format == "PPM":
        return any(isinstance(tile[3], tuple) and int(tile[3][-1]) > 255 for tile in image.tile)  # type: ignore[attr-defined]
    return False


def is_opaque(image: Image.Image) -> bool:
    """Whether no pixel of an image is transparent."""
    return not image.has_transparency_data or image.convert("RGBA").getchannel("A").getextrema()[0] == 255


def over_white(image: Image.Image) -> Image.Image:
    """`image` composited over white, as web pages show it. An opaque image keeps its colours."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return image if is_opaque(image) else Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def may_be_transparent(data: bytes) -> bool:
    """Whether the format of the file that starts with `data` allows transparent pixels."""
    if data[:2] == b"\xff\xd8" or data[:1] == b"P" or data[12:16] == b"VP8 ":  # JPEG, the PPM family, lossy WebP
        return False
    if data[:8] != PNG_START or data[PNG_COLOURS] in PNG_ALPHA:
        return True
    at = len(PNG_START)
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind in (b"tRNS", b"IDAT"):
            return kind == b"tRNS"
        at += 12 + length
    return True


def is_transparent(data: bytes) -> bool:
    """Whether the image in `data` has a transparent pixel. False if it cannot be decoded."""
    if len(data) <= PNG_COLOURS or not may_be_transparent(data):
        return False
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if not image.has_transparency_data or image.width * image.height > LARGEST_IMAGE:
            return False
        return not is_opaque(image)
    except DAMAGE:
        return False


class EncodedReader(Reader):
    """Images stored in an image format such as PNG."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self.notes: list[str] = []
        self._checksums: np.ndarray | None = None  # (N,2), once computed

    def __len__(self) -> int:
        return len(self.names)

    def name(self, index: int) -> str:
        return self.names[index]

    @abstractmethod
    def data(self, index: int) -> bytes:
        """The bytes of image `index` as stored. Raises UserError."""

    def open(self, index: int) -> Image.Image | np.ndarray:
        return decode(self.data(index), self.name(index))

    def checksum(self, index: int) -> tuple[int, int]:
        data = self.data(index)
        if not self.transparent and is_transparent(data):
            self.transparent = True
        return zlib.crc32(data), len(data)

    def checksums(self, workers: int = 1) -> list[tuple[int, int]]:
        if self._checksums is None:
            self._checksums = np.array(super().checksums(workers), dtype="<u8").reshape(-1, 2)
        return list(map(tuple, self._checksums.tolist()))


# --- splits ----------------------------------------------------------------------------------------------------------


def split_named(word: str) -> str:
    """The split in the name of a folder, file or array ("t10k-images" and "validation" are test), or ""."""
    first = word.lower().replace("_", "-").split(".")[0].split("-")[0]
    return next((split for split, names in SPLITS.items() if first in names), "")


def of_split(names: Sequence[str], split: str, words: Callable[[str], Sequence[str]], what: str) -> list[str]:
    """The `names` that belong to `split`; ``words(name)`` are the parts of a name that may name a split.

    Returns all names if no word names a split, or if `split` is "all". If a split has several names, the first in
    :data:`SPLITS` is used: images in val are not the test set if there is also a folder test.
    """
    named = {name: next((word for word in words(name) if split_named(word)), "") for name in names}
    if split == "all" or not any(named.values()):
        return list(names)
    ours = {word for word in named.values() if split_named(word) == split}
    if not ours:
        others = ", ".join(sorted({word for word in named.values() if word}))
        raise dataset_error(f"{what} has no split={split}, only {others}")
    spelled = {word: word.lower().replace("_", "-").split(".")[0].split("-")[0] for word in ours}
    best = min(spelled.values(), key=SPLITS[split].index)
    return [name for name in names if spelled.get(named[name]) == best]


def split_folder(name: str, deepest: int = 2) -> list[str]:
    """The folders among the upper `deepest` whose whole name is a split's: train in "afhq/train/cat/1.png"."""
    every = {alias for names in SPLITS.values() for alias in names} - {"data"}
    return [part for part in name.split("/")[:-1][:deepest] if part.lower() in every]
