"""What is known of pictures, kept in an SQLite file: facts, thumbnails, embeddings, and which show the same photograph.

Only new and changed pictures are read again, and an interrupted scan goes on where it stopped.
"""

import hashlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
from filelock import FileLock
from PIL import Image
from rich.console import Console
from rich.progress import Progress, track

from facemask.data.duplicates import SIDE, components, find_pairs, thumbnail
from facemask.data.geometry import candidates, group
from facemask.data.images import MAX_PIXELS, BadImage, decode, read_header
from facemask.errors import UserError

# Raised whenever what is kept of a picture, or how pictures are grouped, changes: older files are made anew.
STORE_VERSION = 3
_KEPT = ["sha256", "pixels_sha256", "width", "height", "format", "phash", "problem"]
MANIFEST_COLUMNS = ["path", "label", "bytes", "mtime_ns", *_KEPT[:-1], "dup_group", "problem"]
# uint8 pictures (H, W, 3) -> float32 (N, D)
Embed = Callable[[list[np.ndarray]], np.ndarray]
T = TypeVar("T")

# Long values come last: SQLite reads a row only as far as it must.
_SCHEMA = """CREATE TABLE pictures (
    path TEXT PRIMARY KEY, bytes INTEGER, mtime_ns INTEGER, sha256 TEXT, pixels_sha256 TEXT, width INTEGER,
    height INTEGER, format TEXT, phash TEXT, problem TEXT, dup_group TEXT, thorough TEXT, thumb BLOB, embedding BLOB)"""


def collect(
    listing: pd.DataFrame,
    read: Callable[[str], bytes],
    store: Path,
    *,
    max_pixels: int = MAX_PIXELS,
    embed: Embed | None = None,
    full: bool = False,
) -> pd.DataFrame:
    """Table with `MANIFEST_COLUMNS` of any source of pictures, in the listing's order.

    Args:
        listing: path, label, bytes, mtime_ns (int). A picture is read again only where the last two have changed.
        read: path -> the encoded picture.
        store: SQLite file with what is known already; made where there is none.
        max_pixels: pictures above this, by their header, are a problem.
        embed: search with stage 2 as well, by these embeddings.
        full: read every picture again.

    sha256 is of the file; pixels_sha256 of the decoded upright RGB pixels, so that metadata and lossless formats make
    no difference; phash is the 64-bit DCT hash of imagehash, in hex. dup_group is the least sha256 of the pictures
    that show the same photograph. A picture that cannot be decoded has a `problem` and is a group of its own. Raises
    UserError if the store cannot be written.
    """
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{store}.lock"), closing(_open_store(store)) as database:
            _read_pictures(database, listing, read, max_pixels, full)
            column = "thorough" if embed else "dup_group"
            known = _facts(database, column)
            if known[column].isna().any():
                _write_groups(database, column, _groups(database, known, read, max_pixels, embed))
                known = _facts(database, column)
    except (OSError, sqlite3.OperationalError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"what is known of the pictures cannot be kept in {store.parent} ({reason}); choose another folder with "
            "data.cache_dir=DIR or --cache-dir DIR"
        ) from error
    known = known.rename(columns={column: "dup_group"}).drop(columns=["bytes", "mtime_ns"])
    return listing.merge(known, on="path", how="left", validate="one_to_one")[MANIFEST_COLUMNS]


def thumbnails(store: Path, paths: Sequence[str]) -> np.ndarray:
    """uint8 (N, 64, 64) of pictures that `collect` has read; black for those it could not decode."""
    with closing(sqlite3.connect(store)) as database:
        kept = dict(database.execute("SELECT path, thumb FROM pictures WHERE thumb IS NOT NULL"))
    thumbs = np.zeros((len(paths), SIDE, SIDE), dtype=np.uint8)
    for row, path in enumerate(paths):
        if path in kept:
            thumbs[row] = np.frombuffer(kept[path], dtype=np.uint8).reshape(SIDE, SIDE)
    return thumbs


def _open_store(store: Path) -> sqlite3.Connection:
    database = sqlite3.connect(store)
    try:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version == STORE_VERSION:
            return database
    except sqlite3.OperationalError:
        raise
    except sqlite3.DatabaseError:  # damaged: it holds nothing that cannot be found out again
        pass
    database.close()
    store.unlink(missing_ok=True)
    database = sqlite3.connect(store)
    with database:
        database.execute(_SCHEMA)
        database.execute(f"PRAGMA user_version = {STORE_VERSION}")
    return database


def _facts(database: sqlite3.Connection, column: str) -> pd.DataFrame:
    names = ["path", "bytes", "mtime_ns", *_KEPT, column]
    rows = database.execute(f"SELECT {', '.join(names)} FROM pictures ORDER BY path").fetchall()
    return pd.DataFrame(rows, columns=names)


def _read_pictures(
    database: sqlite3.Connection,
    listing: pd.DataFrame,
    read: Callable[[str], bytes],
    max_pixels: int,
    full: bool,
) -> None:
    """Bring the store up to date with the listing, and forget all groups if anything had changed."""
    known = {row[0]: row[1:] for row in database.execute("SELECT path, bytes, mtime_ns, sha256 FROM pictures")}
    rows = list(zip(listing["path"], listing["bytes"].tolist(), listing["mtime_ns"].tolist(), strict=True))
    # What could not be read has no sha256 and is tried again: permissions leave no trace in size and time.
    stale = [row for row in rows if full or known.get(row[0], ())[:2] != row[1:] or not known[row[0]][2]]
    gone = set(known) - {row[0] for row in rows}
    database.executemany("DELETE FROM pictures WHERE path = ?", [(path,) for path in gone])
    changed = bool(gone)
    marks = ", ".join("?" * (len(_KEPT) + 4))
    command = f"INSERT OR REPLACE INTO pictures (path, bytes, mtime_ns, {', '.join(_KEPT)}, thumb) VALUES ({marks})"

    def describe(row: tuple[str, int, int]) -> tuple:
        return *row, *_describe(row[0], read, max_pixels)

    saved = time.monotonic()
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for part in _batches(stale, 128, "reading pictures"):
                found = list(pool.map(describe, part))
                changed = changed or any(known.get(row[0], ("", "", ""))[2] != row[3] or not row[3] for row in found)
                database.executemany(command, found)
                if time.monotonic() - saved > 2:
                    database.commit()
                    saved = time.monotonic()
    finally:
        if changed:
            database.execute("UPDATE pictures SET dup_group = NULL, thorough = NULL")
        database.commit()


def _batches(items: Sequence[T], size: int, what: str) -> Iterator[Sequence[T]]:
    """Parts of a sequence, which bound what waits in memory and what an interruption loses; a bar where it is long."""
    starts = range(0, len(items), size)
    bar = track(starts, what, console=Console(stderr=True), transient=True, disable=len(items) < 100)
    return (items[start : start + size] for start in bar)


def _describe(path: str, read: Callable[[str], bytes], max_pixels: int) -> tuple:
    """`_KEPT` and the thumbnail of a picture."""
    from imagehash import phash

    try:
        data = read(path)
    except OSError as error:
        return "", "", 0, 0, "", "", f"cannot be read ({error.strerror})", None
    sha256, width, height, format_ = hashlib.sha256(data).hexdigest(), 0, 0, ""
    try:
        width, height, format_ = read_header(data)
        rgb = decode(data, max_pixels)
    except BadImage as error:
        return sha256, "", width, height, format_, "", error.reason, None
    pixels = hashlib.sha256(f"{rgb.shape[0]}x{rgb.shape[1]}\n".encode() + rgb.tobytes()).hexdigest()
    return sha256, pixels, width, height, format_, str(phash(Image.fromarray(rgb))), "", thumbnail(rgb).tobytes()


def _groups(
    database: sqlite3.Connection,
    known: pd.DataFrame,
    read: Callable[[str], bytes],
    max_pixels: int,
    embed: Embed | None,
) -> pd.Series:
    """dup_group of every row."""
    alone = known["sha256"].where(known["sha256"] != "", "unread:" + known["path"])
    # Equal pixels are one picture to the search.
    pictures = known[known["problem"] == ""].drop_duplicates("pixels_sha256")
    number = pd.Series(np.arange(len(pictures)), index=pictures["pixels_sha256"].to_numpy())
    thumbs = np.zeros((len(pictures), SIDE, SIDE), dtype=np.uint8)
    row_of = {path: row for row, path in enumerate(pictures["path"])}
    for path, thumb in database.execute("SELECT path, thumb FROM pictures WHERE thumb IS NOT NULL"):
        if path in row_of:
            thumbs[row_of[path]] = np.frombuffer(thumb, dtype=np.uint8).reshape(SIDE, SIDE)
    with Progress(console=Console(stderr=True), transient=True, disable=len(pictures) < 100) as bar:
        task = bar.add_task("comparing pictures", total=1.0)
        pairs = find_pairs(thumbs, progress=lambda share: bar.update(task, completed=share))
        number_of = components(len(pictures), pairs)
        if embed:
            bar.update(task, description="comparing keypoints", completed=0.0)
            likely = candidates(_embeddings(database, pictures["path"].tolist(), read, max_pixels, embed))
            number_of = group(
                number_of,
                likely,
                lambda row: decode(read(pictures["path"].iloc[row]), max_pixels),
                lambda share: bar.update(task, completed=share),
            )
    good = known["problem"] == ""
    component = pd.Series(alone, dtype=object)
    component[good] = number_of[number[known.loc[good, "pixels_sha256"]].to_numpy()].astype(str)
    return alone.groupby(component).transform("min")


def _embeddings(
    database: sqlite3.Connection,
    paths: list[str],
    read: Callable[[str], bytes],
    max_pixels: int,
    embed: Embed,
) -> np.ndarray:
    """float32 (N, D) of pictures, each the sum of plain and mirrored; those made before are kept."""
    done = {path for (path,) in database.execute("SELECT path FROM pictures WHERE embedding IS NOT NULL")}
    missing = [path for path in paths if path not in done]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for part in _batches(missing, 64, "embedding pictures"):
            pictures = list(pool.map(lambda path: decode(read(path), max_pixels), part))
            both = embed(pictures) + embed([np.ascontiguousarray(rgb[:, ::-1]) for rgb in pictures])
            rows = [(vector.tobytes(), path) for vector, path in zip(both.astype(np.float32), part, strict=True)]
            database.executemany("UPDATE pictures SET embedding = ? WHERE path = ?", rows)
            database.commit()
    kept = dict(database.execute("SELECT path, embedding FROM pictures WHERE embedding IS NOT NULL"))
    return np.stack([np.frombuffer(kept[path], dtype=np.float32) for path in paths])


def _write_groups(database: sqlite3.Connection, column: str, groups: pd.Series) -> None:
    paths = [row[0] for row in database.execute("SELECT path FROM pictures ORDER BY path")]
    with database:
        database.executemany(f"UPDATE pictures SET {column} = ? WHERE path = ?", zip(groups, paths, strict=True))
