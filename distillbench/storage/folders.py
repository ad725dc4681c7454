"""The content of folders, the sizes of files, and the file system of a path.

Symbolic links are listed and never followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

NETWORK_FILE_SYSTEMS = {
    *("nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs", "9p", "virtiofs"),
    *("panfs", "wekafs", "orangefs", "fuse.sshfs", "fuse.glusterfs", "fuse.s3fs", "fuse.gcsfuse", "fuse.ceph"),
}  # file systems that other machines may write to


def folders_in(folder: Path) -> list[Path]:
    """The folders in `folder` that are not links; none if `folder` is a link or cannot be read."""
    if folder.is_symlink():
        return []
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))
    except OSError:
        return []


def files_below(folder: Path) -> list[Path]:
    """All files and links below a folder."""
    found = []
    for at, folders, files in walk(folder):
        found += [at / name for name in files]
        found += [at / name for name in folders if (at / name).is_symlink()]
    return found


def folders_below(folder: Path) -> list[Path]:
    """`folder` and all folders below it, the innermost first."""
    return [at for at, _, _ in walk(folder)][::-1]


def walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    if not folder.is_symlink():
        for at, folders, files in os.walk(folder):
            yield Path(at), folders, sorted(files)


def size_of(files: Iterable[Path]) -> int:
    """Bytes of the files; a file with several hard links counts once."""
    stats = filter(None, map(lstat, files))
    return sum({(found.st_dev, found.st_ino): found.st_size for found in stats}.values())


def freed(files: Iterable[Path]) -> int:
    """Bytes that deleting `files` frees. A file with several hard links counts only if all of them are deleted."""
    names: dict[tuple[int, int], int] = {}
    sizes: dict[tuple[int, int], int] = {}
    for found in filter(None, map(lstat, files)):
        inode = found.st_dev, found.st_ino
        names[inode] = names.get(inode, 0) + 1
        sizes[inode] = found.st_size if names[inode] >= found.st_nlink else 0
    return sum(sizes.values())


def lstat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


def file_system(path: Path) -> tuple[str, str]:
    """Type and mount options of the file system of `path`; empty if they are unknown."""
    import psutil

    path = path.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if path.is_relative_to(part.mountpoint)]
    last = max(mounts, key=lambda part: len(part.mountpoint), default=None)
    return ("", "") if last is None else (last.fstype, last.opts)
