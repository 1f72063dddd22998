"""Decoded pictures at working size, memory-mapped: decoded once, shared read-only by workers and ranks."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock
from rich.progress import track

from facemask.data.images import BadImage, decode, resize_short

# Part of every cache's name: raised whenever decoding or resizing changes what comes out.
CODE_VERSION = 1


class PixelCache:
    """uint8 pixels (H, W, 3) of every picture of a table, short side at the working size, in the table's order.

    Pictures that cannot be decoded have no pixels; `problems` maps their paths to the reason.
    """

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.problems: dict[str, str] = meta["problems"]
        self.shapes = np.load(folder / "shapes.npy")
        sizes = self.shapes.astype(np.int64).prod(axis=1) * 3
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.file = folder / "pixels.bin"
        if self.file.stat().st_size != self.offsets[-1]:
            raise ValueError(f"{self.file} has {self.file.stat().st_size} bytes instead of {self.offsets[-1]}")
        self._pixels: np.memmap | None = None

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> np.ndarray:
        if self._pixels is None:
            self._pixels = np.memmap(self.file, dtype=np.uint8, mode="r")
        height, width = self.shapes[index]
        return np.asarray(self._pixels[self.offsets[index] : self.offsets[index + 1]]).reshape(height, width, 3)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pixels": None}  # workers map the file themselves


def cache_key(table: pd.DataFrame, size: int, max_pixels: int) -> str:
    """Name of the cache of these files at this size: depends on paths and contents, not on labels or splits."""
    digest = hashlib.sha256(f"{CODE_VERSION}/{size}/{max_pixels}\n".encode())
    for path, sha256 in zip(table["path"], table["sha256"], strict=True):
        digest.update(json.dumps([path, sha256]).encode())
    return digest.hexdigest()[:32]


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
    """
    folder = cache_dir / "pixels" / cache_key(table, size, max_pixels)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        try:
            return PixelCache(folder)
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            shutil.rmtree(folder, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            _build(table, read, size, max_pixels, scratch)
            scratch.replace(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return PixelCache(folder)


def _build(table: pd.DataFrame, read: Callable[[str], bytes], size: int, max_pixels: int, folder: Path) -> None:
    def load(path: str) -> np.ndarray | BadImage:
        try:
            return resize_short(decode(read(path), max_pixels), size)
        except BadImage as problem:
            return problem

    paths = table["path"].tolist()
    shapes = np.zeros((len(paths), 2), dtype=np.int32)
    problems: dict[str, str] = {}
    # Decoding and resizing release the interpreter lock, so threads are enough.
    with ThreadPoolExecutor(os.cpu_count()) as pool, (folder / "pixels.bin").open("wb") as file:
        step = 256  # bounds how many decoded pictures wait in memory
        starts = range(0, len(paths), step)
        for start in track(starts, description="decoding pictures", transient=True, disable=len(paths) < 100):
            for index, pixels in enumerate(pool.map(load, paths[start : start + step]), start):
                if isinstance(pixels, BadImage):
                    problems[paths[index]] = pixels.reason
                else:
                    shapes[index] = pixels.shape[:2]
                    file.write(pixels.tobytes())
        file.flush()
        os.fsync(file.fileno())
    np.save(folder / "shapes.npy", shapes)
    (folder / "meta.json").write_text(json.dumps({"problems": problems}))
