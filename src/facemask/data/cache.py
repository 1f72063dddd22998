"""Decoded pictures at working size, memory-mapped: decoded once, shared read-only by workers and ranks."""

import hashlib
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import PIL
from rich.progress import track

from facemask.data import images
from facemask.data.images import BadImage, decode, resize_short
from facemask.errors import UserError
from facemask.files import build_folder

log = logging.getLogger(__name__)

_CHUNK = 2**25  # bytes under one checksum
# Other code or another Pillow may decode to other pixels.
_CODE = hashlib.sha256(b"".join(Path(file).read_bytes() for file in (__file__, images.__file__))).hexdigest()


class Pixels(Sequence[np.ndarray]):
    """uint8 pixels (H, W, 3) of every picture of a table, short side at the working size, in the table's order.

    `problems` maps the paths of pictures that cannot be decoded to the reason.
    """

    problems: dict[str, str]


class Files(Pixels):
    """Pixels straight from the files. Reading one raises UserError where it is not what was scanned."""

    def __init__(self, table: pd.DataFrame, read: Callable[[str], bytes], size: int, max_pixels: int) -> None:
        self.paths = table["path"].array
        self.sha256 = np.frombuffer(bytes.fromhex("".join(table["sha256"])), dtype="V32")
        self.read = read
        self.size = size
        self.max_pixels = max_pixels

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        """uint8 (H, W, 3), short side at the working size. Raises BadImage for what cannot be decoded."""
        path = self.paths[index]
        try:
            data = self.read(path)
        except OSError as error:
            raise UserError(
                f"{path} was there when the folder was scanned and cannot be read now ({error.strerror or error}): "
                "put it back or start again without it"
            ) from error
        if hashlib.sha256(data).digest() != self.sha256[index].tobytes():
            raise UserError(f"{path} has changed since the folder was scanned: start again, so that it is scanned anew")
        return resize_short(decode(data, self.max_pixels), self.size)

    def decode_all(self) -> Iterator[np.ndarray | BadImage]:
        """Every row's pixels, or why there are none, in order, by all cores; then all `problems` are known."""
        self.problems = {}

        def load(index: int) -> np.ndarray | BadImage:
            try:
                return self[index]
            except BadImage as problem:
                self.problems[self.paths[index]] = problem.reason
                return problem

        step = 256  # bounds how many decoded pictures wait in memory
        starts = range(0, len(self), step)
        # Decoding and resizing release the interpreter lock, so threads are enough.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in track(starts, description="decoding pictures", transient=True, disable=len(self) < 100):
                yield from pool.map(load, range(start, min(start + step, len(self))))


class PixelCache(Pixels):
    """A folder of pixels.bin (all pixels, one after the other) and index.npz (where they lie, and checksums).

    Pictures that cannot be decoded have no pixels. Opening reads the whole file against its checksums (CRC-32 of
    every 32 MiB) and raises ValueError, or what numpy raises, for a damaged cache.
    """

    def __init__(self, folder: Path) -> None:
        with np.load(folder / "index.npz") as index:  # a zip file, with checksums of its own
            self.shapes = index["shapes"]
            checksums = index["checksums"]
            self.problems = json.loads(index["problems"].tobytes())
        sizes = self.shapes.astype(np.int64).prod(axis=1) * 3
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.file = folder / "pixels.bin"
        self._pixels: np.ndarray | None = None
        size = int(self.offsets[-1])
        if self.file.stat().st_size != size:
            raise ValueError(f"{self.file} has {self.file.stat().st_size} bytes instead of {size}")
        pixels = self._map()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(lambda start: zlib.crc32(pixels[start : start + _CHUNK].data), range(0, size, _CHUNK))
            if list(found) != checksums.tolist():
                raise ValueError(f"{self.file} does not have the checksums it was written with")

    def _map(self) -> np.ndarray:
        if self._pixels is None:
            empty = self.offsets[-1] == 0  # nothing can be mapped of an empty file
            self._pixels = np.zeros(0, np.uint8) if empty else np.memmap(self.file, dtype=np.uint8, mode="r")
        return self._pixels

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        height, width = self.shapes[index]
        pixels = self._map()[self.offsets[index] : self.offsets[index + 1]]
        return np.asarray(pixels).reshape(height, width, 3)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pixels": None}  # workers map the file themselves


def cache_key(table: pd.DataFrame, size: int, max_pixels: int) -> str:
    """Name of the cache of these files at this size, made by this code: paths and contents enter, labels and splits
    do not."""
    digest = hashlib.sha256(f"{_CODE}/{PIL.__version__}/{size}/{max_pixels}\n".encode())
    for path, sha256 in zip(table["path"], table["sha256"], strict=True):
        digest.update(json.dumps([path, sha256]).encode())
    return digest.hexdigest()[:32]


@contextmanager
def writing(cache_dir: Path) -> Iterator[None]:
    """What fails to be written below cache_dir inside is told in one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cache_dir={cache_dir} cannot be written ({error.strerror or error}): "
            "choose another with cache_dir=DIR or the environment variable FACEMASK_CACHE"
        ) from error


def open_cache(
    table: pd.DataFrame, read: Callable[[str], bytes], size: int, max_pixels: int, cache_dir: Path
) -> PixelCache:
    """The cache of a table's pictures, built first where there is none or where it is damaged.

    Args:
        table: rows with `path` and `sha256`.
        read: path -> the file's bytes.
        size: short side in pixels.
        max_pixels: pictures above this, by their header, are refused undecoded.
        cache_dir: parent of all caches; safe to share between processes.

    Raises UserError for a file that is not what was scanned, and where cache_dir cannot be written.
    """
    folder = cache_dir / "pixels" / cache_key(table, size, max_pixels)
    if (cache := _sound(folder)) is not None:
        return cache
    with writing(cache_dir):
        build_folder(folder, lambda scratch: _build(Files(table, read, size, max_pixels), scratch), _sound)
    return PixelCache(folder)


def _sound(folder: Path) -> PixelCache | None:
    if not folder.exists():
        return None
    try:
        return PixelCache(folder)
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        log.warning(f"the pixel cache {folder} is damaged ({error}) and is built again")
        return None


def _build(files: Files, folder: Path) -> None:
    shapes = np.zeros((len(files), 2), dtype=np.int32)
    checksums: list[int] = []
    buffer = bytearray()
    with (folder / "pixels.bin").open("wb") as file:
        for index, pixels in enumerate(files.decode_all()):
            if not isinstance(pixels, BadImage):
                shapes[index] = pixels.shape[:2]
                buffer += pixels.data
            while len(buffer) >= _CHUNK or (buffer and index == len(files) - 1):
                checksums.append(zlib.crc32(buffer[:_CHUNK]))
                file.write(buffer[:_CHUNK])
                del buffer[:_CHUNK]
        file.flush()
        os.fsync(file.fileno())
    told = np.frombuffer(json.dumps(files.problems).encode(), dtype=np.uint8)
    np.savez(folder / "index.npz", shapes=shapes, checksums=np.array(checksums, dtype=np.int64), problems=told)
