"""An image folder -> the table of its pictures, one row each: their facts, and which show the same photograph."""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from facemask.data.duplicates import components
from facemask.data.images import MAX_PIXELS, SUFFIXES, BadImage, read_header
from facemask.data.store import MANIFEST_COLUMNS, Embed, collect
from facemask.errors import UserError
from facemask.files import write_bytes

CACHE_DIR = Path(".cache/facemask")
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


def scan(
    root: Path | str | None,
    out: Path | None = None,
    *,
    cache_dir: Path = CACHE_DIR,
    max_pixels: int = MAX_PIXELS,
    embed: Embed | None = None,
    full: bool = False,
) -> pd.DataFrame:
    """Write the manifest of a folder, as CSV or Parquet by the ending of `out`, and return it; see `collect`.

    Without `out` it is `manifest.csv` in the folder. Its column `search` says "quick" or "thorough". Further columns of
    a manifest that is written anew are kept. Raises UserError as `scan_folder` does, and if the file exists but is no
    manifest of ours, is a thorough one and this scan is not, or cannot be written.
    """
    root, paths = _list(root)
    file = out or root / "manifest.csv"
    if file.suffix.lower() not in (".csv", ".parquet"):
        raise UserError(f"--out {file} must end in .csv or .parquet")
    if file.exists() and not _is_ours(file):
        raise UserError(f"{file} was not written by this command and is left as it is; give another file with --out")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"{file.parent} cannot be written; give a file elsewhere with --out")
    old = _read_manifest(file) if file.exists() else None
    if old is not None and "search" in old and (old["search"] == "thorough").any() and not embed:
        raise UserError(f"{file} was written with --thorough; repeat --thorough, or give another file with --out")
    store = store_of(root, cache_dir, max_pixels)
    table = collect(
        _stat(root, paths),
        lambda path: (root / path).read_bytes(),
        store,
        max_pixels=max_pixels,
        embed=embed,
        full=full,
    )
    written = table.assign(search="thorough" if embed else "quick")
    if old is not None:
        further = [column for column in old if column not in written]
        written = written.merge(old[["path", *further]], on="path", how="left").fillna(dict.fromkeys(further, ""))
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
        further = [name for name in given if name not in (*MANIFEST_COLUMNS, "group", "split", "search")]
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
            stat = os.stat(root / path)  # noqa: PTH116 - faster than Path.stat over many files
        except OSError:  # a dead link: reading it will say so
            return path, label, 0, 0
        return path, label, stat.st_size, stat.st_mtime_ns

    return pd.DataFrame([facts(path) for path in paths], columns=["path", "label", "bytes", "mtime_ns"])


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
