"""Safe reading of untrusted .npz and .npy files: no Python objects, checksums verified, memory checked first."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np
import psutil

from distillbench.errors import LONGEST_REASON

MAPPED = 2**20  # bytes above which an uncompressed array is memory-mapped
BLOCK = 2**24  # bytes read at a time
# The errors that reading a damaged file, or a file of another format, can raise.
DAMAGED = (
    *(OSError, ValueError, EOFError, LookupError, TypeError, RuntimeError, ArithmeticError, MemoryError),
    *(SyntaxError, TokenError, zipfile.BadZipFile, zlib.error),
)


def check_memory(size: int) -> None:
    """Raise ValueError unless an array of `size` bytes fits into free memory."""
    free = psutil.virtual_memory().available
    if size > free:
        raise ValueError(f"its header declares {size:,} bytes, and {free:,} are free in memory")


class NotNpz(ValueError):
    """The file is whole, but of another format."""


def _is_npy(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(len(np.lib.format.MAGIC_PREFIX)) == np.lib.format.MAGIC_PREFIX
    except OSError:
        return False


class Npz:
    """The arrays of an npz file by name. With `mapped`, large uncompressed arrays are memory-mapped.

    Raises ValueError if the file is damaged, or an array contains Python objects or does not fit into memory.
    """

    def __init__(self, path: Path, mapped: bool = False) -> None:
        self.path, self.mapped = path, mapped
        try:
            with zipfile.ZipFile(path) as archive:
                infos = archive.infolist()
        except FileNotFoundError:
            raise
        except DAMAGED as error:
            if _is_npy(path):
                raise NotNpz("it is an .npy file, which holds one array without a name") from error
            raise ValueError(str(error)[:LONGEST_REASON] or type(error).__name__) from error
        self.infos = {info.filename.removesuffix(".npy"): info for info in infos}
        if len(self.infos) != len(infos):
            raise ValueError("it has two arrays with the same name")
        self.names = list(self.infos)

    def __getitem__(self, name: str) -> np.ndarray:
        info = self.infos[name]
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(info) as file:
                shape, fortran, dtype = _header(file)
                if file.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
                    raise ValueError(f"its header says {dtype} {shape}, which is not what follows")
                if self.mapped and info.compress_type == zipfile.ZIP_STORED and info.file_size > MAPPED:
                    start = info.file_size - file.tell()
                    while file.read(BLOCK):  # zipfile compares the checksum at the end
                        pass
                    return self._map(info, info.file_size - start, shape, fortran, dtype)
                check_memory(info.file_size)
                return _read(file, shape, fortran, dtype)
        except DAMAGED as error:
            raise ValueError(str(error)[:LONGEST_REASON] or type(error).__name__) from error

    def _map(
        self, info: zipfile.ZipInfo, skipped: int, shape: tuple[int, ...], fortran: bool, dtype: np.dtype
    ) -> np.ndarray:
        with open(self.path, "rb") as file:
            file.seek(info.header_offset + 26)  # the lengths of name and extra field in the local header
            name, extra = np.frombuffer(file.read(4), dtype="<u2").tolist()
        start = info.header_offset + 30 + name + extra + skipped
        return np.memmap(self.path, dtype, "r", start, shape, "F" if fortran else "C")


def read_npy(path: Path) -> np.ndarray:
    """The array in an .npy file, memory-mapped if it is large. Raises ValueError like :class:`Npz`."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            shape, fortran, dtype = _header(file)
            start = file.tell()
            if start + math.prod(shape) * dtype.itemsize != size:
                raise ValueError(f"its header says {dtype} {shape}, which is not what follows")
            if size > MAPPED:
                return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")
            return _read(file, shape, fortran, dtype)
    except DAMAGED as error:
        raise ValueError(str(error)[:LONGEST_REASON] or type(error).__name__) from error


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the order is Fortran's, and dtype."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    if dtype.subdtype is not None or dtype.names is not None or any(side < 0 for side in shape):
        raise ValueError(f"it is an array of {dtype} {shape}")
    return shape, fortran, dtype


def _read(file: IO[bytes], shape: tuple[int, ...], fortran: bool, dtype: np.dtype) -> np.ndarray:
    flat = np.empty(math.prod(shape), dtype=dtype)
    into, filled = flat.view(np.uint8).reshape(-1) if dtype.itemsize else np.empty(0, np.uint8), 0
    while filled < len(into) and (block := file.read(min(BLOCK, len(into) - filled))):
        into[filled : filled + len(block)] = np.frombuffer(block, np.uint8)
        filled += len(block)
    if filled < len(into):
        raise ValueError("it is truncated")
    return flat.reshape(shape, order="F" if fortran else "C")
