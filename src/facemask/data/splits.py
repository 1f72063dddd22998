"""Who is trained on, who is validated on, who is tested on: grouped, stratified, seeded, and fingerprinted.

Every random choice orders groups or paths by sha256(key, seed, name), so it depends neither on the order of
the rows nor on a library's random numbers.
"""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from facemask.errors import UserError
from facemask.files import write_text

SPLITS = ("train", "val", "test")


def make_split(table: pd.DataFrame, seed: int, ratios: tuple[float, float, float] = (0.7, 0.1, 0.2)) -> pd.Series:
    """Series `split` (index of `table`): train, val, test by `ratios`, whole groups, stratified by label.

    Greedy, largest groups first (they go to train more often than not): see `_assign`. A ratio of 0 leaves
    that split out. Raises UserError for impossible ratios and for a class with fewer groups than there are
    splits.
    """
    if len(ratios) != 3 or min(ratios) < 0 or ratios[0] == 0 or abs(sum(ratios) - 1) > 1e-6:
        raise UserError(
            f"data.split_ratios={list(ratios)} must be three shares (train, val, test) that sum to 1, train above 0"
        )
    shares = {name: ratio for name, ratio in zip(SPLITS, ratios, strict=True) if ratio > 0}
    return _assign(table, shares, f"split:{seed}").rename("split")


def assign_folds(table: pd.DataFrame, k: int, seed: int) -> pd.Series:
    """Series `fold` (int, 0 to k-1): k equal parts of whole groups, stratified by label.

    Raises UserError if k < 2 or a class has fewer than k groups.
    """
    if k < 2:
        raise UserError(f"data.folds={k} must be 2 or more")
    folds = _assign(table, {str(i): 1 / k for i in range(k)}, f"fold:{seed}")
    return folds.astype("int64").rename("fold")


def fold_split(table: pd.DataFrame, i: int, k: int, seed: int, val_ratio: float = 0.1) -> pd.Series:
    """Series `split` of cross-validation: fold i is test; `val_ratio` of the rest is val, what remains train.

    The folds are those of `assign_folds(table, k, seed)`: over i = 0 to k-1 every picture is tested once.
    Val is grouped, stratified and drawn anew for each i.
    """
    if not 0 <= i < k:
        raise UserError(f"data.fold={i} must be from 0 to {k - 1} with data.folds={k}")
    if not 0 < val_ratio < 1:
        raise UserError(f"data.val_ratio={val_ratio} must be between 0 and 1")
    is_test = assign_folds(table, k, seed) == i
    rest = _assign(table[~is_test], {"train": 1 - val_ratio, "val": val_ratio}, f"fold-val:{seed}:{i}")
    return rest.reindex(table.index, fill_value="test").rename("split")


def parse_fold(text: str) -> tuple[int, int]:
    """`2/5` -> (2, 5): the fold that is tested, counted from 0, and the number of folds."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise UserError(f"fold {text!r} must be I/K, such as 0/5 for the first of five folds")
    return int(match[1]), int(match[2])


def split_table(
    table: pd.DataFrame,
    seed: int,
    ratios: tuple[float, float, float] = (0.7, 0.1, 0.2),
    fold: int | None = None,
    folds: int = 5,
    fraction: float = 1.0,
) -> pd.DataFrame:
    """The table with its column `split`, less the train rows that are not in the fraction.

    A split that the table has is kept, unless a fold is asked for. Raises what `make_split`, `fold_split` and
    `take_fraction` raise.
    """
    if fold is not None:
        table = table.assign(split=fold_split(table, fold, folds, seed))
    elif "split" not in table:
        table = table.assign(split=make_split(table, seed, ratios))
    return take_fraction(table, fraction, seed) if fraction != 1 else table


def take_fraction(table: pd.DataFrame, fraction: float, seed: int) -> pd.DataFrame:
    """The table with about `fraction` of its train rows, per class and in whole groups; other splits stay.

    Nested: with one seed, 10 % is a part of 25 %. Each class takes its groups in seeded order while their
    middle lies within the fraction, so it misses its number by at most half a group, and has at least one
    group. A group with several labels counts under its most frequent one.
    """
    if not 0 < fraction <= 1:
        raise UserError(f"data.fraction={fraction} must be above 0 and at most 1")
    train = table[table["split"] == "train"]
    label_of = train.groupby("group")["label"].agg(lambda labels: labels.mode().iloc[0])
    size_of = train["group"].value_counts()
    kept: set[str] = set()
    for label in sorted(label_of.unique()):
        groups = sorted(label_of.index[label_of == label], key=lambda group: _hash(f"fraction:{seed}", group))
        sizes = size_of[groups].to_numpy()
        middle = np.cumsum(sizes) - sizes / 2
        count = max(1, int(np.sum(middle <= fraction * sizes.sum())))
        kept.update(groups[:count])
    return table[(table["split"] != "train") | table["group"].isin(kept)]


def flip_labels(table: pd.DataFrame, rate: float, seed: int, classes: Sequence[str]) -> pd.Series:
    """Series `label` with exactly round(rate * n) of the n train labels changed to another class, uniformly.

    The rows with the lowest sha256 of (seed, path) are changed, so a higher rate changes a superset.
    """
    if not 0 <= rate <= 1:
        raise UserError(f"data.label_noise={rate} must be from 0 to 1")
    labels = table["label"].copy()
    train = table[table["split"] == "train"]
    digests = train["path"].map(lambda path: _hash(f"flip:{seed}", path))
    for row in digests.sort_values().index[: round(rate * len(train))]:
        others = [name for name in sorted(classes) if name != labels[row]]
        labels[row] = others[int(digests[row][-16:], 16) % len(others)]
    return labels


def count(table: pd.DataFrame) -> pd.DataFrame:
    """Pictures of each class (row) in each split (column)."""
    return pd.crosstab(table["label"], table["split"]).reindex(columns=list(SPLITS), fill_value=0)


def fingerprint(table: pd.DataFrame) -> str:
    """sha256 (hex) of the pictures, their labels and their split; the order of the rows does not matter.

    Hashed bytes: for each row, sorted by path (by code point), the four strings path, label, split, sha256 in
    UTF-8, each followed by one NUL byte. No row separator, nothing before, nothing after.
    """
    digest = hashlib.sha256()
    columns = ["path", "label", "split", "sha256"]
    rows = table[columns].sort_values(columns)
    for row in zip(*(rows[column] for column in columns), strict=True):
        for value in row:
            digest.update(value.encode() + b"\0")
    return digest.hexdigest()


def read_split(
    path: Path | str, table: pd.DataFrame, need: Collection[str] = ("train", "val")
) -> tuple[pd.Series, int]:
    """Split of a CSV file with the columns path, label, split -> (Series `split`, pictures left out).

    The series holds the rows of `table` that the file names (`table.join(series, how="inner")` applies it);
    the number counts the pictures of the table that it does not name. Raises UserError if the file cannot
    be read, lacks a column, names a picture twice, an absent picture, another label than the folder's or an
    unknown split, leaves a class out of train, or has no picture in one of the splits in `need`.
    """
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False)
    except FileNotFoundError as error:
        raise UserError(f"data.split={path} does not exist; give a CSV file, or leave data.split out") from error
    except (OSError, ValueError) as error:  # pandas' parser errors and UnicodeDecodeError are ValueErrors
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"data.split={path} cannot be read as CSV ({reason}); give another file") from error
    if missing := [name for name in ("path", "label", "split") if name not in rows]:
        raise UserError(f"data.split={path} lacks the column(s) {', '.join(missing)}; it needs path,label,split")
    if (twice := rows["path"][rows["path"].duplicated()]).size:
        raise UserError(
            f"data.split={path} names {twice.nunique()} pictures twice ({_some(twice)}); keep one line each"
        )
    if unknown := sorted(set(rows["split"]) - set(SPLITS)):
        raise UserError(
            f"data.split={path} has the unknown split(s) {', '.join(map(repr, unknown[:3]))}; use train, val or test"
        )
    label_of = pd.Series(table["label"].to_numpy(), index=table["path"].to_numpy())
    absent = rows["path"][~rows["path"].isin(label_of.index)]
    if absent.size:
        raise UserError(
            f"data.split={path} names {absent.size} pictures not in the data folder ({_some(absent)}); "
            "mend the paths (relative to data.root) or give the split that belongs to these pictures"
        )
    wrong = rows[rows["label"].to_numpy() != label_of[rows["path"]].to_numpy()]
    if len(wrong):
        first = wrong.iloc[0]
        raise UserError(
            f"data.split={path} gives {len(wrong)} pictures another label than their folder "
            f"(first: {first['path']} as {first['label']!r}); mend the labels or move the pictures"
        )
    in_train = set(rows["label"][rows["split"] == "train"])
    if left := sorted(set(table["label"]) - in_train):
        raise UserError(
            f"data.split={path} has no train picture of the class(es) {', '.join(left)}; "
            "add some, or remove the class's folder"
        )
    if empty := [name for name in SPLITS if name in need and name not in set(rows["split"])]:
        raise UserError(f"data.split={path} has no {' and no '.join(empty)} picture; add some")
    split_of = pd.Series(rows["split"].to_numpy(), index=rows["path"].to_numpy())
    named = table[table["path"].isin(split_of.index)]
    series = pd.Series(split_of[named["path"]].to_numpy(), index=named.index, name="split")
    return series, len(table) - len(named)


def write_split(path: Path | str, table: pd.DataFrame, *, force: bool = False) -> None:
    """Write path,label,split of `table`, sorted by path, as CSV, whole or not at all; makes the folders above.

    Raises UserError where the place cannot be written, and, without `force`, where it holds anything else already.
    """
    path = Path(path)
    text = table[["path", "label", "split"]].sort_values("path").to_csv(index=False, lineterminator="\n")
    try:
        if path.is_file() and not force and path.read_bytes() != text.encode():
            raise UserError(
                f"{path} holds another split or other data; choose another file, or replace it with --force"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"the split file {path} cannot be written ({error.strerror}); choose another place") from error


def _assign(table: pd.DataFrame, shares: Mapping[str, float], key: str) -> pd.Series:
    """Part of each row: whole groups, each class divided by `shares`.

    First every part gets one group of every class, the smallest groups going to the smallest parts. Then
    groups are placed by falling size, within a size in seeded order, each where it adds least to sum over
    parts and classes of (count - target)^2 / target. For groups of one picture that is Sainte-Laguë's
    apportionment of each class, so it misses no target by more than about one picture.
    """
    names = list(shares)
    share = np.array([shares[name] for name in names])
    label, classes = pd.factorize(table["label"], sort=True)
    member, groups = pd.factorize(table["group"])
    counts = np.zeros((len(groups), len(classes)))
    np.add.at(counts, (member, label), 1)
    target = share[:, None] * counts.sum(axis=0)
    filled = np.zeros_like(target)
    part_of = np.full(len(groups), -1)
    digests = np.fromiter((int(_hash(key, group)[:16], 16) for group in groups), dtype=np.uint64)
    order = np.lexsort([digests, -counts.sum(axis=1)])

    def place(group: int, part: int) -> None:
        part_of[group] = part
        filled[part] += counts[group]

    number = (counts > 0).sum(axis=0)
    for c in np.argsort(number, kind="stable"):
        for part in np.argsort(share, kind="stable"):
            if filled[part, c] == 0:
                free = next((g for g in order[::-1] if part_of[g] < 0 and counts[g, c] > 0), None)
                if free is None:
                    raise UserError(
                        f"class {classes[c]!r} is too small: its {int(counts[:, c].sum())} pictures form "
                        f"{number[c]} independent groups (copies count once), too few to give each of "
                        f"{len(names)} parts ({', '.join(names)}) one; add pictures or remove its folder"
                    )
                place(free, int(part))
    for g in order:
        if part_of[g] < 0:
            cost = (counts[g] * (2 * filled + counts[g]) / target).sum(axis=1)
            place(g, int(np.argmin(cost)))
    return pd.Series(np.array(names, dtype=object)[part_of[member]], index=table.index, dtype="str")


def _hash(key: str, name: str) -> str:
    return hashlib.sha256(f"{key}\0{name}".encode()).hexdigest()


def _some(names: pd.Series) -> str:
    return ", ".join(list(dict.fromkeys(names))[:3]) + (", ..." if names.nunique() > 3 else "")
