"""Where a run's files lie when several processes have part in it, or a bucket is to keep them.

Code that runs sees a local folder, reads and writes it, and decides by what is in it. With several
processes each has such a folder of its own, so nothing waits for another's file system: process 0's
is the run's, the others' begin as copies of its numbers and are thrown away. Of a bucket
(`gs://...`) process 0 has a copy, and puts what changed back before every checkpoint and at the
end. Checkpoints alone are everybody's: `shared` says where those of a folder lie.
"""

from __future__ import annotations

import atexit
import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from jaxalign.core import distributed
from jaxalign.core.metrics import replacing

CHECKPOINTS = "ckpt"  # folders of this name belong to all processes
NUMBERS = (".json", ".jsonl", ".npz")  # files by which a run decides what is left to do

_homes: dict[Path, epath.Path] = {}  # local folder: where its checkpoints, or all of it, belong
_kept: dict[Path, tuple[int, int]] = {}  # local file: its time and size when it was put back


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether the path names a place that is no file system."""
    return "://" in os.fspath(path)


def open_folder(path: str | os.PathLike) -> Path:
    """The local folder to work in, for a run whose files belong in `path`. Made by the caller.

    All processes of the run must call it.
    """
    if distributed.count() == 1 and not in_bucket(path):
        return Path(path)
    if distributed.is_main() and not in_bucket(path):
        folder = Path(path)
        distributed.broadcast(_packed(folder))
        return folder
    folder = Path(tempfile.mkdtemp(prefix="jaxalign-")) / Path(path).name
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    home = epath.Path(path)
    _homes[folder] = home if in_bucket(path) else home.resolve()
    if distributed.is_main():
        _bring(home, folder)
        distributed.broadcast(_packed(folder))
    else:
        _unpack(distributed.broadcast(b""), folder)
    return folder


def shared(path: str | os.PathLike) -> epath.Path:
    """Where the checkpoints of a local folder lie, whole, for all processes."""
    if in_bucket(path):
        return epath.Path(path)
    place = Path(path).absolute()
    for folder, home in _homes.items():
        if place.is_relative_to(folder):
            return home / str(place.relative_to(folder))
    return epath.Path(path).resolve()


def keep() -> None:
    """Puts back what changed in the local copy of a bucket."""
    for folder, home in _homes.items():
        if distributed.is_main() and in_bucket(home):
            for file in _files(folder):
                _put_back(file, home / str(file.relative_to(folder)))


def write_text(place: epath.Path, text: str) -> None:
    """Writes a file in one piece, as a bucket does by itself and a file system by a rename."""
    if in_bucket(place):
        place.write_text(text)
        return
    with replacing(Path(place)) as temporary:
        temporary.write_text(text)


def _put_back(file: Path, place: epath.Path) -> None:
    found = file.stat()
    stamp = found.st_mtime_ns, found.st_size
    if _kept.get(file) != stamp:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(file.read_bytes())
        _kept[file] = stamp


def _bring(home: epath.Path, folder: Path) -> None:
    """Copies the run's files out of a bucket."""
    for file in _files(home):
        copy = folder / str(file.relative_to(home))
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
        _kept[copy] = copy.stat().st_mtime_ns, copy.stat().st_size


def _files(folder: Any) -> Iterator[Any]:
    """The run's own files, without checkpoints and what a kill may have left half written."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_dir():
            yield from _files(path) if path.name != CHECKPOINTS else ()
        elif path.suffix != ".tmp":
            yield path


def _packed(folder: Path) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for path in _files(folder):
            if path.suffix in NUMBERS:
                file.write(path, path.relative_to(folder))
    return packed.getvalue()


def _unpack(packed: bytes, folder: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(packed)) as file:
        file.extractall(folder)
