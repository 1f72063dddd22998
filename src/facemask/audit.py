"""What a data set gives away: leaks between its splits, and how far its labels can be told without the mask.

`baselines` are the figures without pixels that training reports beside its own; `audit` is the whole page.
"""

import hashlib
import inspect
import itertools
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from facemask.data import audit as shortcuts
from facemask.data import splits as data_splits
from facemask.data.manifest import label_conflicts, near_conflicts
from facemask.errors import UserError
from facemask.runs import metrics
from facemask.runs.calibration import class_indices
from facemask.runs.page import Cell, Page
from facemask.runs.predictions import COLUMNS, logits, read_predictions, write_predictions
from facemask.runs.report import number
from facemask.runs.statistics import mean_difference

if TYPE_CHECKING:
    from facemask.data.datamodule import ImageData

HEADS = {
    "majority": "majority class",
    "no_pixels": "no pixels: width, height, bytes, format",
    "aspect_ratio": "aspect ratio",
    "border": "1-pixel border",
    "top_third": "top third",
    "covered": "lower half covered",
    "pixels": f"whole picture at {shortcuts.SMALL}×{shortcuts.SMALL}",
}
PIXEL_SHORTCUTS = {
    "blur": "blur: variance of the Laplacian",
    "padding": "padding: constant rows and columns at the sides",
    "border": "1-pixel border",
}
# Forests of more pictures take long and gain little; these are the train pictures with the lowest hashes.
MOST_TRAIN = 10_000
TREES, LEAF = 100, 0.005
LISTED = 20


# -- the predictions that every number comes from ---------------------------------------------------------------


def baselines(table: pd.DataFrame, splits: Collection[str], cache_dir: Path) -> pd.DataFrame:
    """Predictions of the heads `majority` and `no_pixels` for some splits, fit on train; kept in `cache_dir`.

    Args:
        table: path, label, split, sha256, group, width, height, bytes, format. Other splits are not read.
    """

    def fit() -> pd.DataFrame:
        majority = shortcuts.majority_baseline(table, splits)
        facts = shortcuts.forest_baseline(table, shortcuts.file_facts(table), splits, "no_pixels")
        return _joined([majority, facts])

    return _kept(table, {"splits": sorted(splits)}, cache_dir, fit)


def shortcut_predictions(data: "ImageData", degrade: float) -> pd.DataFrame:
    """Predictions of every shortcut for the test split; kept in the data's `cache_dir`.

    Heads: those of `HEADS`, the first two from `baselines`; and those of `PIXEL_SHORTCUTS` with the suffix
    `_degraded`, fit and tested on views that the augmentation `degrade` has made, beside `blur` and `padding`.

    Args:
        data: prepared, with its test split.
        degrade: probability of each degradation of a view, as `augment.degrade` in training.
    """

    def fit() -> pd.DataFrame:
        table = data.table[data.table["split"].isin(["train", "test"])]
        train = table["path"][table["split"] == "train"]
        chosen = sorted(train, key=lambda path: hashlib.sha256(path.encode()).digest())[:MOST_TRAIN]
        table = table[(table["split"] == "test") | table["path"].isin(chosen)]
        features = _features(data, table, degrade)
        features["aspect_ratio"] = (table["width"] / table["height"]).to_numpy()[:, None]
        return _joined(
            [shortcuts.forest_baseline(table, x, ["test"], head, TREES, LEAF) for head, x in features.items()]
        )

    what = {"degrade": degrade, "img_size": data.img_size, "working_size": data.working_size}
    base = baselines(data.table, ("test", "val"), data.cache_dir)
    return _joined([base[base["split"] == "test"].reset_index(drop=True), _kept(data.table, what, data.cache_dir, fit)])


def _features(data: "ImageData", table: pd.DataFrame, degrade: float) -> dict[str, np.ndarray]:
    """Head -> features (N, D) of the table's rows, each picture read once."""
    from rich.progress import track

    from facemask.data.datamodule import SyntheticData
    from facemask.data.images import centre_crop
    from facemask.data.synthetic import mask_box
    from facemask.data.transforms import Augmentation

    worse = Augmentation(seed=0, img_size=data.img_size, degrade=degrade)
    found: dict[str, list[np.ndarray]] = {}
    known = zip(table["path"], data.cache_rows[table.index], table["width"], table["height"], strict=True)
    rows = track(known, "reading pixels", total=len(table), transient=True, disable=len(table) < 100)
    for path, row, width, height in rows:
        pixels = data.pixels[row]
        view = centre_crop(pixels, data.img_size)
        small = shortcuts.small(view)
        if isinstance(data, SyntheticData):
            box = mask_box(data.draw_seed, int(Path(path).stem), states=data.states)
            covered = shortcuts.small(centre_crop(shortcuts.cover_box(pixels, box, width, height), data.img_size))
        else:
            covered = shortcuts.cover_lower_half(small)
        degraded = worse.view(pixels, path, epoch=0)
        values = {
            "border": shortcuts.border(small),
            "top_third": small[: shortcuts.SMALL // 3],
            "covered": covered,
            "pixels": small,
            "blur": shortcuts.blur(view),
            "padding": shortcuts.padding(view),
            "border_degraded": shortcuts.border(shortcuts.small(degraded)),
            "blur_degraded": shortcuts.blur(degraded),
            "padding_degraded": shortcuts.padding(degraded),
        }
        for head, value in values.items():
            found.setdefault(head, []).append(value.ravel())
    return {head: np.stack(values) for head, values in found.items()}


def kept_shortcuts(table: pd.DataFrame, img_size: int, crop_pct: float, cache_dir: Path) -> pd.DataFrame | None:
    """What `shortcut_predictions` kept for pictures of a split.csv, at a run's size or at the page's own; or None."""
    for size, degrade in itertools.product({img_size: None, 224: None, 64: None}, (0.5, 0.0)):
        what = {"degrade": degrade, "img_size": size, "working_size": int(size / crop_pct)}
        if (file := _file(table, what, cache_dir)).exists():
            return read_predictions(file)[0]
    return None


def _file(table: pd.DataFrame, what: dict[str, Any], cache_dir: Path) -> Path:
    import sklearn

    code = [inspect.getsource(part) for part in (shortcuts, baselines, shortcut_predictions, _features)]
    groups = table[["path", "group"]].sort_values("path").to_numpy().tolist()
    key = [data_splits.fingerprint(table), groups, what, code, MOST_TRAIN, TREES, LEAF, sklearn.__version__]
    return cache_dir / "audits" / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.parquet"


def _kept(table: pd.DataFrame, what: dict[str, Any], cache_dir: Path, fit: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """What `fit` returns, from `cache_dir/audits` where the same was asked of the same data and code before."""
    file = _file(table, what, cache_dir)
    try:
        return read_predictions(file)[0]
    except UserError:  # absent or damaged
        frame = fit()
    file.parent.mkdir(parents=True, exist_ok=True)
    write_predictions(file, frame, sorted(table["label"][table["split"] == "train"].unique()))
    return frame


def _joined(frames: list[pd.DataFrame]) -> pd.DataFrame:
    joined = frames[0]
    for frame in frames[1:]:
        joined = joined.merge(frame, on=COLUMNS, how="left", validate="one_to_one")
    return joined


# -- the page ---------------------------------------------------------------------------------------------------


def audit(data: "ImageData", degrade: float, source: str) -> Page:
    """The page of a data set.

    Args:
        data: prepared, with its test split.
        degrade: see `shortcut_predictions`.
        source: what the pictures and their split are, for the page's first line.
    """
    table = data.table
    frame = shortcut_predictions(data, degrade)
    heads = metrics.evaluate(frame, data.classes)["test"]
    page = Page("Data audit", f"{source} · {len(table):,} pictures · fingerprint {data.fingerprint[:16]}")
    page.heading("Findings")
    for finding in _findings(data, heads):
        page.note(finding)
    _balance(page, data)
    _files(page, data)
    _leaks(page, data)
    _conflicts(page, data)
    _shortcut_table(page, data, heads)
    _pixel_table(page, data, frame, heads, degrade)
    return page


def _also_in(table: pd.DataFrame, names: pd.Series, one: str, other: str) -> pd.Series:
    """Rows of split `one` (bool, over the table) whose name split `other` has too; an empty name is none."""
    elsewhere = set(names[(table["split"] == other) & (names != "")])
    return (table["split"] == one) & names.isin(elsewhere)


def _percent(heads: dict[str, Any], head: str, metric: str = "accuracy") -> str:
    return number(heads[head][metric], percent=True)


def _known(data: "ImageData") -> dict[str, pd.Series]:
    """What pictures may share -> its name for each of them: same pixels, near-duplicate, same person where known."""
    table = data.table
    exact = table["sha256" if "pixels_sha256" not in table else "pixels_sha256"]
    copies = table["group" if "dup_group" not in table else "dup_group"]  # whatever else a split keeps together
    kinds = {"same pixels": exact, "near-duplicate": copies}
    return kinds | ({"same person": table["person"].fillna("").astype(str)} if "person" in table else {})


def _findings(data: "ImageData", heads: dict[str, Any]) -> list[str]:
    tested, shares = (data.table["split"] == "test").sum(), {}
    for kind, names in _known(data).items():
        hits = int(_also_in(data.table, names, "test", "train").sum())
        shares[kind] = f"{hits:,} of {tested:,} test pictures ({hits / tested:.1%})"
    found = [
        f"{shares['near-duplicate']} have a near-duplicate in train.",
        f"Without any pixel, from width, height, bytes and format, {_percent(heads, 'no_pixels')} % of the test "
        f"labels are told (majority class {_value(heads, 'majority'):.1%}): read a model's accuracy as its distance "
        "from there.",
    ]
    strongest = max((head for head in HEADS if head not in ("majority", "pixels")), key=lambda h: _value(heads, h))
    if strongest != "no_pixels":
        found.append(f"The strongest shortcut is “{_title(data, strongest)}”: {_value(heads, strongest):.1%}.")
    if "same person" in shares:
        found.append(f"{shares['same person']} show a person of train.")
    if data.left_out:
        found.append(f"{len(data.left_out):,} files cannot be used and are left out of everything here.")
    if data.unnamed:
        found.append(f"{data.unnamed:,} pictures of the folder are not in the split file and are left out here.")
    return found


def _value(heads: dict[str, Any], head: str) -> float:
    return float(heads[head]["accuracy"]["value"])


def _title(data: "ImageData", head: str) -> str:
    return "mask region covered" if head == "covered" and data.drawn else HEADS[head]


def _balance(page: Page, data: "ImageData") -> None:
    page.heading("Classes and splits")
    counts = data_splits.count(data.table)
    rows: list[list[Cell]] = [
        [label, *map(int, numbers), int(numbers.sum()), f"{numbers.sum() / len(data.table):.1%}"]
        for label, numbers in zip(counts.index, counts.to_numpy(), strict=True)
    ]
    rows.append(["all classes", *map(int, counts.to_numpy().sum(axis=0)), len(data.table), ""])
    page.table(["class", *counts.columns, "all", "share"], rows, strong=[len(data.classes)])
    page.text(f"{data.table['group'].nunique():,} groups of pictures that a split keeps together.")


def _files(page: Page, data: "ImageData") -> None:
    page.heading("Sizes and formats")
    table = data.table
    formats = sorted(table["format"].unique())
    rows: list[list[Cell]] = []
    for label in data.classes:
        own = table[table["label"] == label]
        width, height, size = own["width"], own["height"], own["bytes"]
        spans = [f"{int(x.median())} ({x.min()}–{x.max()})" for x in (width, height)]
        aspect = (width / height).median()
        shares = [f"{(own['format'] == name).mean():.1%}" for name in formats]
        rows.append([label, *spans, f"{aspect:.2f}", f"{size.median() / 1000:.1f}", *shares])
    page.table(
        ["class", "width, px", "height, px", "aspect ratio", "kB", *formats],
        rows,
        "medians, in brackets the smallest and largest; share of each format by content",
    )
    if data.left_out:
        page.heading("Files that cannot be used", 3)
        bad = sorted(data.left_out.items())
        page.table(["file", "reason"], [[path, reason] for path, reason in bad[:LISTED]], _first(len(bad)))


def _first(count: int) -> str:
    return f"the first {LISTED} of {count:,}" if count > LISTED else ""


def _leaks(page: Page, data: "ImageData") -> None:
    page.heading("The same picture or person in two splits")
    table = data.table
    kinds = _known(data)
    rows: list[list[Cell]] = []
    for one, other in (("test", "train"), ("val", "train"), ("test", "val")):
        for label in data.classes:
            mine = (table["split"] == one) & (table["label"] == label)
            hits = [int((_also_in(table, names, one, other) & mine).sum()) for names in kinds.values()]
            shares = [f"{n:,} ({n / max(1, mine.sum()):.1%})" for n in hits]
            rows.append([f"{one} in {other}", label, int(mine.sum()), *shares])
    page.table(["splits", "class", "pictures", *kinds], rows, "pictures of the first split found in the second")
    if (manifest := getattr(data, "manifest", None)) is not None:
        page.text(f"Near-duplicates are those of {manifest}.")
    elif not data.drawn:
        page.text(
            "Near-duplicates are those of the folder's manifest.csv, where facemask data scan wrote one, and else of "
            "its search by hashes, which misses rotated, cropped and edited copies (facemask data scan --thorough)."
        )
    if "same person" in kinds:
        persons = kinds["same person"][kinds["same person"] != ""]
        page.text(f"Persons are known for {len(persons):,} pictures ({persons.nunique():,} persons).")


def _conflicts(page: Page, data: "ImageData") -> None:
    page.heading("Copies with different labels")
    table = data.table
    same = label_conflicts(table)
    near = near_conflicts(table) if "dup_group" in table else table.iloc[:0]
    if not len(near) and not same:
        page.text("None: no two copies of one picture have different labels.")
        return
    page.text(
        f"{len(same):,} pairs have the same pixels and different labels; {near['dup_group'].nunique():,} groups of "
        f"near-duplicates hold more than one label ({len(near):,} pictures). Look at them: one label of each is wrong, "
        "or the groups join different pictures."
    )
    split_of = dict(zip(table["path"], table["split"], strict=True))
    numbers = {group: i + 1 for i, group in enumerate(near["dup_group"].unique())}
    rows: list[list[Cell]] = [
        [f"group {numbers[group]}", path, label, split_of[path]]
        for path, label, group in zip(near["path"], near["label"], near["dup_group"], strict=True)
    ]
    page.table(["", "file", "label", "split"], rows[:LISTED], _first(len(rows)))
    shown = near["path"][near["path"].map(split_of).isin(["train", "val", "test"])][:12]
    page.pictures([(data.picture(path), path) for path in shown])


def _shortcut_table(page: Page, data: "ImageData", heads: dict[str, Any]) -> None:
    page.heading("Shortcuts")
    majority = _value(heads, "majority")
    tested, groups = heads["majority"]["n"], heads["majority"]["groups"]
    rows: list[list[Cell]] = []
    for head in HEADS:
        above = f"{100 * (_value(heads, head) - majority):+.1f}"
        both = _percent(heads, head), _percent(heads, head, "balanced_accuracy")
        rows.append([_title(data, head), both[0], above, both[1]])
    page.table(
        ["what is seen", "test accuracy, %", "above majority", "balanced, %"],
        rows,
        f"{tested:,} test pictures in {groups:,} groups; in brackets 95 % intervals, resampled by group",
    )
    covered = (
        "In “mask region covered” a grey box lies over all that a mask and its straps could cover, worn or not. "
        if data.drawn
        else "In “lower half covered” the lower half of the view is grey. "
    )
    page.text(
        f"Each row is a random forest, fit on train and tested on test. Pixels are those of the "
        f"evaluation view ({data.img_size} px, aspect ratio kept, centre crop), shrunk to "
        f"{shortcuts.SMALL}×{shortcuts.SMALL}. {covered}A forest is a weak reader of pixels: its figure is what is at "
        "least given away, not at most."
    )


def _pixel_table(page: Page, data: "ImageData", frame: pd.DataFrame, heads: dict[str, Any], degrade: float) -> None:
    page.heading("Pixel shortcuts, and what degrading the views leaves of them")
    labels, groups = class_indices(frame, data.classes), pd.factorize(frame["group"])[0]
    rows: list[list[Cell]] = []
    for head, title in PIXEL_SHORTCUTS.items():
        pair = (head, f"{head}_degraded")
        before, after = (logits(frame, name, data.classes).argmax(axis=1) == labels for name in pair)
        change = mean_difference(after.astype(float) - before, groups, np.random.default_rng(0), resamples=1000)
        low, high = max(-1.0, change.low), min(1.0, change.high)
        interval = f"{100 * change.difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
        rows.append([title, *(_percent(heads, name) for name in pair), interval])
    page.table(
        ["what is seen", "evaluation view, %", f"degrade={degrade:g}, %", "change, points"],
        rows,
        f"test accuracy; majority class {_value(heads, 'majority'):.1%}",
    )
    page.text(
        f"Degraded views are made as training makes them with augment.degrade={degrade:g} (resolution, blur and JPEG "
        "quality, each at random), here without crop, mirror and colour; forests are fit and tested on them. The "
        "change is measured, not claimed closed: a difference that the views still show can still be learned."
    )
