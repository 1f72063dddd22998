"""An image folder -> the table of its pictures, one row each: their facts, and which show the same photograph.

What was found out about a picture is kept in an SQLite file, so that only new and changed files are read again and an
interrupted scan goes on where it stopped.
"""

import hashlib
import io
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from facemask.data.duplicates import SIDE, components, find_pairs, thumbnail
from facemask.data.geometry import candidates, confirm
from facemask.data.images import MAX_PIXELS, SUFFIXES, BadImage, decode, read_header
from facemask.errors import UserError
from facemask.files import write_bytes

# Raised whenever what is kept of a picture, or how pictures are grouped, changes: older files are made anew.
STORE_VERSION = 1
_KEPT = ["sha256", "pixels_sha256", "width", "height", "format", "phash", "problem"]
MANIFEST_COLUMNS = ["path", "label", "bytes", "mtime_ns", *_KEPT[:-1], "dup_group", "problem"]
CACHE_DIR = Path(".cache/facemask")
# uint8 pictures (H, W, 3) -> float32 (N, D)
Embed = Callable[[list[np.ndarray]], np.ndarray]

# Long values come last: SQLite reads a row only as far as it must.
_SCHEMA = """CREATE TABLE pictures (
    path TEXT PRIMARY KEY, bytes INTEGER, mtime_ns INTEGER, sha256 TEXT, pixels_sha256 TEXT, width INTEGER,
    height INTEGER, format TEXT, phash TEXT, problem TEXT, dup_group TEXT, thorough TEXT, thumb BLOB, embedding BLOB)"""
COLUMNS = ["path", "label", "sha256", "width", "height", "bytes", "format", "problem", "group"]
_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing"}


def scan_folder(root: Path | str | None) -> pd.DataFrame:
    """Table of every picture below `root`, sorted by path; classes are the direct sub-folders with pictures.

    Columns: path (POSIX, relative to root), label, sha256 (hex, of the file), width and height (pixels,
    upright; 0 if unknown), bytes, format (by content, not by name), problem (why the header cannot be read,
    else empty), group (= sha256, so exact copies are one group). Hidden files and folders, files with other
    suffixes and files directly in root are no part of it. Only headers are read here: a file may still fail
    to decode. Raises UserError if root is missing, no folder, unreadable, holds links that lead out of it
    or to folders, is split already (its sub-folders are named train, test, ...), or has under two pictures
    or under two classes.
    """
    root, paths = _list(root)
    with ThreadPoolExecutor(max_workers=4) as pool:
        rows = list(pool.map(lambda path: _row(root, path), paths))
    return pd.DataFrame(rows, columns=COLUMNS)


def collect(
    listing: pd.DataFrame,
    read: Callable[[str], bytes],
    store: Path,
    *,
    max_pixels: int = MAX_PIXELS,
    thorough: bool = False,
    embed: Embed | None = None,
    full: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Table with `MANIFEST_COLUMNS` of any source of pictures, in the listing's order.

    Args:
        listing: path, label, bytes, mtime_ns (int). A picture is read again only where the last two have changed.
        read: path -> the encoded picture.
        store: SQLite file with what is known already; made where there is none.
        max_pixels: pictures above this, by their header, are a problem.
        thorough, embed: search with stage 2 as well, by the embeddings of `embed`.
        full: read every picture again.
        progress: show how far it is.

    sha256 is of the file; pixels_sha256 of the decoded upright RGB pixels, so that metadata and lossless formats make
    no difference; phash is the 64-bit DCT hash of imagehash, in hex. dup_group is the least sha256 of the pictures
    that show the same photograph. A picture that cannot be decoded has a `problem` and is a group of its own. Raises
    UserError if the store cannot be written.
    """
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{store}.lock"), closing(_open_store(store)) as database:
            _read_pictures(database, listing, read, max_pixels, full, progress)
            column = "thorough" if thorough else "dup_group"
            known = _facts(database, column)
            if known[column].isna().any():
                _write_groups(database, column, _groups(database, known, read, max_pixels, embed, thorough, progress))
                known = _facts(database, column)
    except (OSError, sqlite3.OperationalError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"what is known of the pictures cannot be kept in {store.parent} ({reason}); choose another folder with "
            "data.cache_dir=DIR or --cache-dir DIR"
        ) from error
    known = known.rename(columns={column: "dup_group"}).drop(columns=["bytes", "mtime_ns"])
    return listing.merge(known, on="path", how="left", validate="one_to_one")[MANIFEST_COLUMNS]


def scan(
    root: Path | str | None,
    out: Path | None = None,
    *,
    cache_dir: Path = CACHE_DIR,
    max_pixels: int = MAX_PIXELS,
    thorough: bool = False,
    embed: Embed | None = None,
    full: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Write the manifest of a folder, as CSV or Parquet by the ending of `out`, and return it; see `collect`.

    Without `out` it is `manifest.csv` in the folder. Further columns of a manifest that is written anew are kept.
    Raises UserError as `scan_folder` does, and if the file exists but is no manifest of ours or cannot be written.
    """
    root, paths = _list(root)
    file = out or root / "manifest.csv"
    if file.suffix.lower() not in (".csv", ".parquet"):
        raise UserError(f"--out {file} must end in .csv or .parquet")
    if file.exists() and not _is_ours(file):
        raise UserError(f"{file} was not written by this command and is left as it is; give another file with --out")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{file.parent} cannot be written; give a file elsewhere with --out")
    store = store_of(root, cache_dir, max_pixels)
    table = collect(
        _stat(root, paths),
        lambda path: (root / path).read_bytes(),
        store,
        max_pixels=max_pixels,
        thorough=thorough,
        embed=embed,
        full=full,
        progress=progress,
    )
    written = table
    if file.exists():
        old = _read_manifest(file)
        further = [column for column in old if column not in MANIFEST_COLUMNS]
        written = table.merge(old[["path", *further]], on="path", how="left").fillna(dict.fromkeys(further, ""))
    buffer = io.BytesIO()
    if file.suffix.lower() == ".csv":
        written.to_csv(buffer, index=False, lineterminator="\n")
    else:
        written.to_parquet(buffer, index=False)
    try:
        write_bytes(file, buffer.getvalue())
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error.strerror}); give a file elsewhere with --out") from error
    return table


def load_manifest(
    root: Path | str | None,
    manifest: Path | str | None = None,
    *,
    group_by: Sequence[str] = (),
    cache_dir: Path = CACHE_DIR,
    max_pixels: int = MAX_PIXELS,
) -> pd.DataFrame:
    """Table of a folder for training: `MANIFEST_COLUMNS`, further columns of its manifest, and `group`.

    The facts are those of a scan, incremental and automatic. `dup_group` and further columns come from `manifest` (CSV
    or Parquet with path and dup_group) or else from the manifest.csv that `scan` wrote into the folder; without one,
    stage 1 of the search supplies `dup_group`. `group` joins what is equal in dup_group or in a column of `group_by`.
    Raises UserError as `scan_folder` does; if a manifest cannot be read, or pictures changed, vanished or came since
    it was written; and for an unknown column in `group_by`.
    """
    root, paths = _list(root)
    store = store_of(root, cache_dir, max_pixels)
    table = collect(_stat(root, paths), lambda path: (root / path).read_bytes(), store, max_pixels=max_pixels)
    beside = root / "manifest.csv"
    file = Path(manifest) if manifest else beside if beside.exists() and _is_ours(beside) else None
    if file is not None:
        given = _read_manifest(file)
        _check_manifest(file, given, table)
        further = [column for column in given if column not in MANIFEST_COLUMNS and column not in ("group", "split")]
        table = table.drop(columns="dup_group").merge(given[["path", "dup_group", *further]], on="path")
        table = table[[*MANIFEST_COLUMNS, *further]]
    if absent := [column for column in group_by if column not in table]:
        raise UserError(
            f"data.group_by names {', '.join(absent)}, a column that {file or 'the table of these pictures'} lacks; "
            f"it has {', '.join(table.columns)}; give a manifest that has it as data.manifest=FILE"
        )
    return table.assign(group=join_groups(table, ["dup_group", *group_by]))


def join_groups(table: pd.DataFrame, columns: Sequence[str]) -> pd.Series:
    """Series `group` (index of `table`): rows with an equal cell in one of `columns`, at any remove, share a group.

    Empty cells join nothing. A group is named by the least cell of the first column in it.
    """
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for column in columns:
        cells = table[column].fillna("").astype(str).to_numpy(dtype=object)
        rows = np.flatnonzero(cells != "")
        _, first, member = np.unique(cells[rows], return_index=True, return_inverse=True)
        pairs.append(np.column_stack([rows, rows[first][member]]))
    number = components(len(table), np.concatenate(pairs))
    name = table[columns[0]].fillna("").astype(str)
    name = name.where(name != "", table["path"])
    return name.groupby(number).transform("min").rename("group")


def store_of(root: Path, cache_dir: Path, max_pixels: int = MAX_PIXELS) -> Path:
    """The file that keeps what is known of a folder's pictures."""
    key = f"{Path(root).resolve()}\0{max_pixels}"
    return Path(cache_dir) / "manifests" / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.sqlite"


def thumbnails(store: Path, paths: Sequence[str]) -> np.ndarray:
    """uint8 (N, 64, 64) of pictures that `collect` has read; black for those it could not decode."""
    with closing(sqlite3.connect(store)) as database:
        kept = dict(database.execute("SELECT path, thumb FROM pictures WHERE thumb IS NOT NULL"))
    thumbs = np.zeros((len(paths), SIDE, SIDE), dtype=np.uint8)
    for row, path in enumerate(paths):
        if path in kept:
            thumbs[row] = np.frombuffer(kept[path], dtype=np.uint8).reshape(SIDE, SIDE)
    return thumbs


def match(
    root_a: Path,
    paths_a: Sequence[str],
    root_b: Path,
    paths_b: Sequence[str],
    *,
    cache_dir: Path = CACHE_DIR,
    max_pixels: int = MAX_PIXELS,
) -> pd.DataFrame:
    """path_a, path_b of the pictures of two folders that show the same photograph, by stage 1; both are scanned."""
    thumbs = []
    for root, paths in ((root_a, paths_a), (root_b, paths_b)):
        load_manifest(root, cache_dir=cache_dir, max_pixels=max_pixels)
        thumbs.append(thumbnails(store_of(root, cache_dir, max_pixels), paths))
    pairs = find_pairs(thumbs[0], thumbs[1])
    return pd.DataFrame({"path_a": np.array(paths_a)[pairs[:, 0]], "path_b": np.array(paths_b)[pairs[:, 1]]})


def near_conflicts(table: pd.DataFrame) -> pd.DataFrame:
    """path, label, dup_group of the pictures whose near-duplicates have another label, sorted by group and path."""
    pictures = table[table["problem"] == ""]
    mixed = pictures.groupby("dup_group")["label"].transform("nunique") > 1
    return pictures.loc[mixed, ["path", "label", "dup_group"]].sort_values(["dup_group", "path"], ignore_index=True)


def label_conflicts(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Pairs of paths, each sorted, of equal pixels (or files, where only these are known) and unequal labels."""
    key = "pixels_sha256" if "pixels_sha256" in table else "sha256"
    pictures = table[table["problem"] == ""].sort_values("path")
    copies = pictures[pictures.duplicated(key, keep=False)]
    return sorted(
        (first[0], second[0])
        for _, same in copies.groupby(key)
        for first, second in combinations(zip(same["path"], same["label"], strict=True), 2)
        if first[1] != second[1]
    )


def _list(root: Path | str | None) -> tuple[Path, list[str]]:
    """The folder and the paths of its pictures, sorted; raises UserError as `scan_folder` says."""
    if root is None or str(root) == "":
        raise UserError("no picture folder is given: set data.root=DIR or the environment variable FACEMASK_DATA")
    root = Path(root)
    if not root.exists():
        raise UserError(f"data.root={root} does not exist; give the folder that holds one sub-folder per class")
    if not root.is_dir():
        raise UserError(f"data.root={root} is no folder; give the folder that holds one sub-folder per class")
    paths = sorted(_walk(root))
    if not paths:
        raise UserError(
            f"data.root={root} holds no pictures ({', '.join(s[1:] for s in SUFFIXES)}) in sub-folders; "
            "it must hold one sub-folder of pictures per class"
        )
    classes = sorted({path.split("/", 1)[0] for path in paths})
    if len(paths) == 1:
        raise UserError(f"data.root={root} holds one picture only ({paths[0]}); add pictures of every class")
    if len(classes) == 1:
        raise UserError(
            f"data.root={root} holds one class only ({classes[0]}); at least two sub-folders must hold pictures"
        )
    if {name.lower() for name in classes} <= _SPLIT_NAMES:
        raise UserError(
            f"data.root={root} is split already ({', '.join(classes)}); merge these into one sub-folder "
            "per class and name the split in a file given as data.split"
        )
    return root, paths


def _walk(root: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"data.root={root}: {error.filename} cannot be listed ({error.strerror}); mend its permissions")

    real_root = os.path.realpath(root)
    for folder, folders, files in os.walk(root, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            inner = Path(folder, name)
            if inner.is_symlink():
                raise UserError(
                    f"data.root={root}: {inner.relative_to(root)} is a link to the folder "
                    f"{os.path.realpath(inner)}, and links to folders are not followed; "
                    "put a copy in its place or remove it"
                )
        for name in sorted(files) if Path(folder) != root else []:
            if name.startswith(".") or not name.lower().endswith(SUFFIXES):
                continue
            file = Path(folder, name)
            path = file.relative_to(root).as_posix()
            if any("\ud800" <= c <= "\udfff" for c in path):
                raise UserError(f"data.root={root}: the file name {path!a} is not valid UTF-8; rename the file")
            if file.is_symlink() and not Path(os.path.realpath(file)).is_relative_to(real_root):
                raise UserError(
                    f"data.root={root}: {path} is a link to {os.path.realpath(file)}, outside the folder; "
                    "put a copy in its place or remove it"
                )
            # Pipes and devices are left out: reading one may never end. A dead link is kept, to be reported.
            if file.is_file() or not file.exists():
                yield path


def _row(root: Path, path: str) -> tuple[str, str, str, int, int, int, str, str, str]:
    label = path.split("/", 1)[0]
    try:
        data = (root / path).read_bytes()
    except OSError as error:
        return path, label, "", 0, 0, 0, "", f"cannot be read ({error.strerror})", f"unread:{path}"
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        width, height, format_ = read_header(data)
    except BadImage as error:
        return path, label, sha256, 0, 0, len(data), "", error.reason, sha256
    return path, label, sha256, width, height, len(data), format_, "", sha256


def _stat(root: Path, paths: list[str]) -> pd.DataFrame:
    def facts(path: str) -> tuple[str, str, int, int]:
        label = path.split("/", 1)[0]
        try:
            stat = os.stat(root / path)  # noqa: PTH116 - five times as fast as Path.stat over many files
        except OSError:  # a dead link: reading it will say so
            return path, label, 0, 0
        return path, label, stat.st_size, stat.st_mtime_ns

    return pd.DataFrame([facts(path) for path in paths], columns=["path", "label", "bytes", "mtime_ns"])


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
    progress: bool,
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
    bar = Progress(console=Console(stderr=True), transient=True, disable=not progress or len(stale) < 100)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
            task = bar.add_task("reading pictures", total=len(stale))
            step = 128  # bounds what waits in memory, and what an interruption loses
            for start in range(0, len(stale), step):
                found = list(pool.map(describe, stale[start : start + step]))
                changed = changed or any(known.get(row[0], ("", "", ""))[2] != row[3] or not row[3] for row in found)
                database.executemany(command, found)
                bar.update(task, advance=len(found))
                if time.monotonic() - saved > 2:
                    database.commit()
                    saved = time.monotonic()
    finally:
        if changed:
            database.execute("UPDATE pictures SET dup_group = NULL, thorough = NULL")
        database.commit()


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
    thorough: bool,
    progress: bool,
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
    with Progress(console=Console(stderr=True), transient=True, disable=not progress or len(pictures) < 100) as bar:
        task = bar.add_task("comparing pictures", total=1.0)
        pairs = find_pairs(thumbs, progress=lambda share: bar.update(task, completed=share))
        if thorough:
            assert embed is not None, "stage 2 needs embeddings"
            bar.update(task, description="comparing keypoints", completed=0.0)
            likely = candidates(_embeddings(database, pictures["path"].tolist(), read, max_pixels, embed, progress))
            found = confirm(
                likely,
                lambda row: decode(read(pictures["path"].iloc[row]), max_pixels),
                lambda share: bar.update(task, completed=share),
            )
            pairs = np.concatenate([pairs, found])
    number_of = components(len(pictures), pairs)
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
    progress: bool,
) -> np.ndarray:
    """float32 (N, D) of pictures, each the sum of plain and mirrored; those made before are kept."""
    done = {path for (path,) in database.execute("SELECT path FROM pictures WHERE embedding IS NOT NULL")}
    missing = [path for path in paths if path not in done]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        bar = Progress(console=Console(stderr=True), transient=True, disable=not progress or len(missing) < 100)
        with bar:
            task = bar.add_task("embedding pictures", total=len(missing))
            step = 64
            for start in range(0, len(missing), step):
                part = missing[start : start + step]
                pictures = list(pool.map(lambda path: decode(read(path), max_pixels), part))
                both = embed(pictures) + embed([np.ascontiguousarray(rgb[:, ::-1]) for rgb in pictures])
                rows = [(vector.tobytes(), path) for vector, path in zip(both.astype(np.float32), part, strict=True)]
                database.executemany("UPDATE pictures SET embedding = ? WHERE path = ?", rows)
                database.commit()
                bar.update(task, advance=len(part))
    kept = dict(database.execute("SELECT path, embedding FROM pictures WHERE embedding IS NOT NULL"))
    return np.stack([np.frombuffer(kept[path], dtype=np.float32) for path in paths])


def _write_groups(database: sqlite3.Connection, column: str, groups: pd.Series) -> None:
    paths = [row[0] for row in database.execute("SELECT path FROM pictures ORDER BY path")]
    with database:
        database.executemany(f"UPDATE pictures SET {column} = ? WHERE path = ?", zip(groups, paths, strict=True))


def _is_ours(file: Path) -> bool:
    """Whether a file is a manifest written by `scan`."""
    try:
        if file.suffix.lower() == ".parquet":
            import pyarrow.parquet

            columns = pyarrow.parquet.read_schema(file).names
        else:
            columns = pd.read_csv(file, nrows=0).columns.tolist()
    except (OSError, ValueError):  # pyarrow's and pandas' errors on other files are ValueErrors
        return False
    return set(MANIFEST_COLUMNS) <= set(columns)


def _read_manifest(file: Path) -> pd.DataFrame:
    try:
        if file.suffix.lower() == ".parquet":
            table = pd.read_parquet(file)
        else:
            table = pd.read_csv(file, dtype=str, keep_default_na=False, index_col=False)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).strip().splitlines()[0]
        raise UserError(f"data.manifest={file} cannot be read ({reason}); give a CSV or Parquet file") from error
    if missing := [name for name in ("path", "dup_group") if name not in table]:
        raise UserError(f"data.manifest={file} lacks the column(s) {', '.join(missing)}; it needs path and dup_group")
    if (twice := table["path"][table["path"].duplicated()]).size:
        raise UserError(f"data.manifest={file} names {twice.nunique()} picture(s) twice ({_some(twice)})")
    return table


def _check_manifest(file: Path, given: pd.DataFrame, table: pd.DataFrame) -> None:
    """Raise UserError unless a manifest is of exactly these pictures."""
    both = table.merge(given, on="path", suffixes=("", "_given"))
    changed = pd.Series(False, index=both.index)
    for column in ("sha256", "bytes"):
        if f"{column}_given" in both:
            changed |= both[column].astype(str) != both[f"{column}_given"].astype(str)
    for what, paths in (
        ("are gone", given["path"][~given["path"].isin(table["path"])]),
        ("have changed", both["path"][changed]),
        ("have come", table["path"][~table["path"].isin(given["path"])]),
    ):
        if paths.size:
            raise UserError(
                f"{paths.size} picture(s) {what} since {file} was written ({_some(paths)}): restore them, or write it "
                "anew (facemask data scan)"
            )


def _some(names: pd.Series) -> str:
    return ", ".join(list(names)[:3]) + (", ..." if len(names) > 3 else "")
