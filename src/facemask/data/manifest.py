"""An image folder -> the table of its pictures, one row each."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import pandas as pd

from facemask.data.images import SUFFIXES, BadImage, read_header
from facemask.errors import UserError

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
    with ThreadPoolExecutor(max_workers=4) as pool:
        rows = list(pool.map(lambda path: _row(root, path), paths))
    return pd.DataFrame(rows, columns=COLUMNS)


def label_conflicts(table: pd.DataFrame) -> list[tuple[str, str]]:
    """Pairs of paths, each sorted, whose files are equal byte for byte but whose labels differ."""
    pictures = table[table["problem"] == ""].sort_values("path")
    copies = pictures[pictures.duplicated("sha256", keep=False)]
    return sorted(
        (first[0], second[0])
        for _, same in copies.groupby("sha256")
        for first, second in combinations(zip(same["path"], same["label"], strict=True), 2)
        if first[1] != second[1]
    )


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
