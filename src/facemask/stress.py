"""How a run bears worse pictures, and whether its decision follows the mask: `facemask stress`."""

import copy
import hashlib
import random
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import albumentations as A
import cv2
import numpy as np
import pandas as pd
from omegaconf import OmegaConf

from facemask.data.audit import cover_box
from facemask.data.cache import Pixels
from facemask.data.datamodule import ImageData, SyntheticData
from facemask.data.images import centre_crop
from facemask.data.synthetic import mask_box
from facemask.data.transforms import hashed_rng
from facemask.errors import UserError
from facemask.evaluate import find_teacher, open_split, predict_splits
from facemask.files import write_text
from facemask.predict import load_model
from facemask.runs import metrics, predictions
from facemask.runs.calibration import class_indices
from facemask.runs.page import SERIES, Cell, Page, picture, plot, standalone
from facemask.runs.report import number, title

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# What is done to the view that the model sees: its unit, and the levels of strengths 1 to 5; 0 is the view itself.
CORRUPTIONS: dict[str, tuple[str, tuple[float, ...]]] = {
    "blur": ("Gaussian, standard deviation in % of the side", (1, 2, 3, 4.5, 6)),
    "noise": ("Gaussian, standard deviation in % of white", (3, 6, 10, 16, 25)),
    "JPEG": ("quality", (50, 30, 18, 10, 5)),
    "darkness": ("% of the brightness left", (70, 50, 35, 20, 10)),
    "low resolution": ("% of the side left", (60, 40, 28, 20, 14)),
    "grey": ("% of the colour left", (80, 60, 40, 20, 0)),
    "rotation": ("degrees, either way", (5, 10, 20, 30, 45)),
    "lower half covered": ("% of the half, from below", (20, 40, 60, 80, 100)),
    "upper half covered": ("% of the half, from above", (20, 40, 60, 80, 100)),
}
CLEAN = "clean"
HIDDEN, ALONE, PATCH = "mask region covered", "all else covered", "mask-coloured patch elsewhere"
LOWER, UPPER = "lower half covered", "upper half covered"
SHOWN = {"accuracy": "accuracy, %", "nll": "NLL", "ece": "ECE"}
GREY = 128
# A decision that a patch of colour beside the mask changes less often than this follows something else than colour.
SWAYED = 0.1

View = Callable[[int], np.ndarray]  # row of the data's table -> uint8 (img_size, img_size, 3)
Predict = Callable[[ImageData], pd.DataFrame]  # predictions of all pictures of a table
Reaction = Mapping[str, Mapping[str, Any]]


# -- what is done to a view -------------------------------------------------------------------------------------


def corrupt(view: np.ndarray, name: str, strength: int, path: str) -> np.ndarray:
    """A view, uint8 (S, S, 3), made worse; noise and the way of rotation depend on the picture's path alone."""
    if strength == 0:
        return view
    level, side = CORRUPTIONS[name][1][strength - 1], len(view)
    covered = round(level / 200 * side)
    if name == LOWER:
        return cover_box(view, (0, side - covered, side, side), side, side)
    if name == UPPER:
        return cover_box(view, (0, 0, side, covered), side, side)
    pipeline, rng = _pipeline(name, level, side), hashed_rng(name, path)
    pipeline.set_random_state(rng, random.Random(int(rng.integers(2**63))))
    return pipeline(image=view)["image"]


@lru_cache
def _pipeline(name: str, level: float, side: int) -> A.Compose:
    share, whole = level / 100, (1, 1)
    sampling = {"downscale": cv2.INTER_AREA, "upscale": cv2.INTER_LINEAR}

    def turned(degrees: float) -> A.Rotate:
        return A.Rotate(limit=(degrees, degrees), border_mode=cv2.BORDER_REFLECT_101, p=1)

    made: dict[str, Callable[[], Any]] = {
        "blur": lambda: A.GaussianBlur(blur_limit=0, sigma_limit=(share * side, share * side), p=1),
        "noise": lambda: A.GaussNoise(std_range=(share, share), p=1),
        "JPEG": lambda: A.ImageCompression(quality_range=(int(level), int(level)), p=1),
        "darkness": lambda: A.ColorJitter((share, share), whole, whole, (0, 0), p=1),
        "low resolution": lambda: A.Downscale(scale_range=(share, share), interpolation_pair=sampling, p=1),
        "grey": lambda: A.ColorJitter(whole, whole, (share, share), (0, 0), p=1),
        "rotation": lambda: A.OneOf([turned(level), turned(-level)], p=1),
    }
    return A.Compose([made[name]()])


class MaskRegion:
    """Views of drawn faces with the mask's region covered, with all else covered, and with its colour elsewhere.

    The region is the box that a mask with its straps may cover on this head, worn or not.
    """

    def __init__(self, data: SyntheticData, rows: np.ndarray) -> None:
        self.data = data
        colours = {int(row): self._colour(int(row)) for row in rows}
        self.colours = {row: colour for row, colour in colours.items() if colour is not None}

    def _cut(self, pixels: np.ndarray) -> np.ndarray:
        return centre_crop(pixels, self.data.img_size)

    def _pixels(self, row: int) -> np.ndarray:
        return self.data.pixels[self.data.cache_rows[row]]

    def _colour(self, row: int) -> np.ndarray | None:
        """The median colour (3,) of the mask material in a picture, or None where there is none."""
        path, pixels = self.data.table["path"].iloc[row], self._pixels(row)
        assert self.data.root is not None
        regions = self.data.root.with_name(f"{self.data.root.name}_mask_regions")
        region: Any = cv2.imread(str((regions / path).with_suffix(".png")), cv2.IMREAD_GRAYSCALE)
        region = cv2.resize(region, pixels.shape[1::-1], interpolation=cv2.INTER_AREA)
        return np.median(pixels[region > 200], axis=0).astype(np.uint8) if (region > 200).any() else None

    def region(self, row: int) -> np.ndarray:
        """Where a mask is, or would be, in the view: bool (S, S)."""
        facts, pixels = self.data.table.iloc[row], self._pixels(row)
        box = mask_box(self.data.draw_seed, int(Path(facts["path"]).stem), states=self.data.states)
        return self._cut(cover_box(np.zeros_like(pixels), box, facts["width"], facts["height"]))[:, :, 0] > 0

    def hidden(self, row: int) -> np.ndarray:
        return np.where(self.region(row)[:, :, None], np.uint8(GREY), self._cut(self._pixels(row)))

    def alone(self, row: int) -> np.ndarray:
        return np.where(self.region(row)[:, :, None], self._cut(self._pixels(row)), np.uint8(GREY))

    def patched(self, row: int) -> np.ndarray:
        """A square of a quarter of the side in the corner that overlaps the region least, outside of it; its colour is
        that of the picture's own mask, or of another picture's."""
        view, region, rng = self._cut(self._pixels(row)).copy(), self.region(row), hashed_rng(PATCH, row)
        side, quarter = len(view), len(view) // 4
        corners = [(y, x) for y in (0, side - quarter) for x in (0, side - quarter)]
        boxes = [np.s_[y : y + quarter, x : x + quarter] for y, x in rng.permutation(corners)]
        box = min(boxes, key=lambda box: int(region[box].sum()))
        others = list(self.colours)
        colour = self.colours[row if row in self.colours else others[rng.integers(len(others))]]
        view[box][~region[box]] = colour
        return view


def conditions(data: ImageData, rows: np.ndarray) -> dict[str, View]:
    """All that is done to the pictures of some rows, by name: `clean`, `<corruption> <strength>`, the shortcut test."""

    def worse(name: str, strength: int) -> View:
        return lambda row: corrupt(
            centre_crop(data.pixels[data.cache_rows[row]], data.img_size), name, strength, data.table["path"].iloc[row]
        )

    found = {CLEAN: worse("blur", 0)}
    found |= {f"{name} {s}": worse(name, s) for name in CORRUPTIONS for s in range(1, 6)}
    if isinstance(data, SyntheticData):
        mask = MaskRegion(data, rows)
        found |= {HIDDEN: mask.hidden, ALONE: mask.alone, PATCH: mask.patched}
    return found


class _Views(Pixels):
    def __init__(self, rows: np.ndarray, view: View) -> None:
        self.rows = rows
        self.view = view

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:  # type: ignore[override]
        return self.view(int(self.rows[index]))


def predict_under(data: ImageData, rows: np.ndarray, views: Mapping[str, View], predict: Predict) -> pd.DataFrame:
    """Predictions of some rows of the table under each condition, whose name goes into the column `split`."""
    from rich.progress import track

    frames = []
    for name, view in track(views.items(), "pictures made worse", total=len(views), transient=True):
        seen = copy.copy(data)
        seen.table = data.table.iloc[rows].reset_index(drop=True)
        seen.cache_rows, seen.pixels = np.arange(len(rows), dtype=np.int32), _Views(rows, view)
        frames.append(predict(seen).assign(split=name))
    return pd.concat(frames, ignore_index=True)


# -- does the decision follow the mask? -------------------------------------------------------------------------


def reactions(frame: pd.DataFrame, classes: Sequence[str], names: Mapping[str, str]) -> dict[str, dict[str, Reaction]]:
    """What conditions do to the decisions of each head, of a table that `predict_under` made.

    Args:
        names: what a condition is called -> the condition.

    Returns:
        {head: {name: {"accuracy", "auroc", "changed"}}}, each as `facemask.runs.metrics.scalar_metrics` gives it;
        changed: the share of the decisions that are others than on the clean pictures.
    """
    clean = frame[frame["split"] == CLEAN]
    labels, groups = class_indices(clean, classes), clean["group"].to_numpy()
    found: dict[str, dict[str, Reaction]] = {}
    for head in predictions.heads(frame):
        before = predictions.logits(clean, head, classes).argmax(axis=1)
        for name, condition in names.items():
            logits = predictions.logits(frame[frame["split"] == condition], head, classes)
            figures = metrics.scalar_metrics(logits, labels, groups)
            kept = metrics.scalar_metrics(logits, before, groups)["accuracy"]
            ends = {"value": kept["value"], "low": kept["high"], "high": kept["low"]}
            changed = {key: None if share is None else 1 - share for key, share in ends.items()}
            of = {"accuracy": figures["accuracy"], "auroc": figures["auroc"], "changed": changed}
            found.setdefault(head, {})[name] = of
    return found


def verdict(found: Mapping[str, Reaction], guess: float) -> tuple[str, list[str]]:
    """Whether a head's decision follows the mask, in a word or two and in sentences.

    Args:
        found: of each condition of the shortcut test.
        guess: accuracy of always naming the commonest class.
    """
    drawn = HIDDEN in found
    hidden, alone = (found[name] for name in ((HIDDEN, ALONE) if drawn else (LOWER, UPPER)))
    where = "the mask region" if drawn else "the lower half"
    other_evidence = _least(hidden["accuracy"]) > guess or _least(hidden["auroc"]) > 0.5
    enough = _least(alone["accuracy"]) > guess
    sentences = [
        f"With {where} covered {number(hidden['accuracy'], percent=True)} % are right, where naming the commonest "
        f"class gets {100 * guess:.1f} %, and the AUROC is {number(hidden['auroc'])}, where 0.5 is chance: "
        + ("something else tells the label too." if other_evidence else "no sign that anything else tells the label."),
        f"With all but {where} covered {number(alone['accuracy'], percent=True)} % are right: "
        + ("it is enough for more than guessing." if enough else "that is no more than guessing."),
    ]
    if drawn:
        patch = found[PATCH]["changed"]
        swayed = _least(patch) > SWAYED
        other_evidence |= swayed
        sentences.append(
            f"A patch in the mask's colour elsewhere changes {number(patch, percent=True)} % of the decisions: "
            + ("colour anywhere counts." if swayed else f"not shown to be more than {100 * SWAYED:.0f} %.")
        )
    if not enough:
        return "is not shown to follow the mask", sentences
    return ("follows the mask, and other things too" if other_evidence else "follows the mask"), sentences


def _least(entry: Mapping[str, Any]) -> float:
    found = entry["value"] if entry["low"] is None else entry["low"]
    return -np.inf if found is None else found


# -- the command ------------------------------------------------------------------------------------------------


def stress(run_dir: Path, split: str, pictures: int, out: Path, cache_dir: Path) -> Page:
    """Stress a run's heads and its teacher; writes stress.html, stress.svg, stress.csv and shortcuts.csv into `out`.

    Args:
        split: of the run's own pictures, val or test.
        pictures: at most so many, those whose paths have the lowest hashes.

    Raises:
        UserError: whatever the user can mend, before anything is written.
    """
    model = load_model(run_dir)
    cfg, classifier, classes = OmegaConf.create(model.config), model.classifier, model.classes
    data = open_split(run_dir, cfg, split, cache_dir)
    make_out(out, data.drawn)
    teacher = find_teacher(run_dir, cfg, cache_dir, classes)
    gone = teacher is None and "teacher" in predictions.heads(
        predictions.read_predictions(run_dir / "predictions.parquet")[0]
    )
    rows = choose(data, split, pictures)

    def predict(seen: ImageData) -> pd.DataFrame:
        return predict_splits(classifier, teacher, seen, [split], cfg.evaluate.batch_size, model.device)[0]

    views = conditions(data, rows)
    frame = predict_under(data, rows, views, predict)
    shown = (HIDDEN, ALONE, PATCH) if data.drawn else (LOWER, UPPER)
    asked = {name: name if data.drawn else f"{name} 5" for name in shown}
    stressed = frame[~frame["split"].isin([HIDDEN, ALONE, PATCH])]
    numbers = metrics.evaluate(stressed, classes, resamples=cfg.evaluate.resamples)
    reacted = reactions(frame, classes, {CLEAN: CLEAN, **asked})
    page = Page(f"Stress test of {run_dir.name}", f"{len(rows):,} {split} pictures · {', '.join(classes)}")
    if gone:
        page.note("The run's teacher is no longer in the cache, so it is missing here.")
    labels = data.table["label"].iloc[rows]
    _shortcuts(page, reacted, classifier.reported_head, labels.value_counts(normalize=True).max())
    examples = [int(rows[(labels == name).to_numpy()][0]) for name in classes if (labels == name).any()]
    page.pictures([(views[asked[name]](row), f"{name}\n{labels[row]}") for name in asked for row in examples])
    _stressed(page, numbers, classifier.reported_head)
    page.figure(_sheet([[views[f"{name} {s}" if s else CLEAN](examples[0]) for s in range(6)] for name in CORRUPTIONS]))
    write_text(out / "stress.svg", standalone(_picture(numbers)))
    _stress_table(numbers).to_csv(out / "stress.csv", index=False)
    lines = [{"head": h, "pictures": name, **_figures(of, of)} for h, by in reacted.items() for name, of in by.items()]
    pd.DataFrame(lines).to_csv(out / "shortcuts.csv", index=False)
    page.write(out / "stress.html")
    return page


def choose(data: ImageData, split: str, count: int) -> np.ndarray:
    """Row numbers of at most so many pictures of a split: those whose paths have the lowest hashes."""
    rows = data.rows(split)
    order = np.argsort([hashlib.sha256(path.encode()).hexdigest() for path in data.table["path"].iloc[rows]])
    return np.sort(rows[order[:count]])


def make_out(out: Path, drawn: bool) -> None:
    """Make a folder for pictures; not where git would track photographs of people."""
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.is_dir())
    command = ["git", "-C", str(place), "check-ignore", "-q", str(out.absolute() / "picture.png")]
    if not drawn and shutil.which("git") and subprocess.run(command, capture_output=True).returncode == 1:
        raise UserError(f"--out {out} is in a git repository that would track photographs in it: name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}): name another folder") from error


def _shortcuts(page: Page, reacted: dict[str, dict[str, Reaction]], chosen: str, guess: float) -> None:
    heads = list(reacted)
    page.heading("Does the decision follow the mask?")
    verdicts = {head: verdict(found, guess) for head, found in reacted.items()}
    words, sentences = verdicts.pop(chosen)
    page.note(f"The decision of the {title(chosen, heads)} {words}. {' '.join(sentences)}")
    if verdicts:
        page.text(" ".join(f"That of the {title(head, heads)} {words}." for head, (words, _) in verdicts.items()))
    rows: list[list[Cell]] = [
        [title(head, heads), name, *(number(of[figure], percent=figure != "auroc") for figure in of)]
        for head, found in reacted.items()
        for name, of in found.items()
    ]
    page.table(
        ["", "pictures", "accuracy, %", "AUROC", "decisions changed, %"],
        rows,
        "against the decisions on the clean pictures; 95 % intervals, resampled by group",
    )
    page.text(
        "The mask region is the box that a mask and its straps may cover on the drawn head, worn or not; what is "
        "covered is grey. The patch is a square of a quarter of the side."
        if HIDDEN in reacted[chosen]
        else "Where the mask is on a photograph is not known: in a framed face it is in the lower half. Where faces "
        "are framed otherwise, the halves say less."
    )
    page.text("Grey areas are unlike what was trained on: that a decision changes there says what it needs, no more.")


def _stressed(page: Page, numbers: Mapping[str, Any], chosen: str) -> None:
    heads, strongest = list(numbers[CLEAN]), {CLEAN: CLEAN} | {name: f"{name} 5" for name in CORRUPTIONS}
    page.heading("Under stress")
    value = {name: numbers[condition][chosen]["accuracy"]["value"] for name, condition in strongest.items()}
    worst = min(CORRUPTIONS, key=lambda name: value[name])
    page.note(
        f"At the strongest, {worst} costs the {title(chosen, heads)} most: {100 * value[CLEAN]:.1f} % of the clean "
        f"pictures are right, and {100 * value[worst]:.1f} % then."
    )
    caption = "Lines: each head; shaded: 95 % intervals. Strength 0 is the clean view."
    page.figure(_picture(numbers), caption)
    for metric, name in SHOWN.items():
        rows: list[list[Cell]] = [
            [what, *(number(numbers[condition][head][metric], percent=metric == "accuracy") for head in heads)]
            for what, condition in strongest.items()
        ]
        page.table([f"{name}, strength 5", *(title(head, heads) for head in heads)], rows, strong=[0])
    page.text("NLL and ECE are of the heads as they are, without a temperature. All strengths are in stress.csv.")
    page.table(
        ["", "unit", "strength 1", "2", "3", "4", "5"],
        [[name, unit, *(f"{level:g}" for level in levels)] for name, (unit, levels) in CORRUPTIONS.items()],
    )


def _picture(numbers: Mapping[str, Any]) -> str:
    heads = list(numbers[CLEAN])

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(len(CORRUPTIONS), len(SHOWN), sharex=True, sharey="col")
        for name, line in zip(CORRUPTIONS, panels, strict=True):
            for (metric, label), axes in zip(SHOWN.items(), line, strict=True):
                scale = 100 if metric == "accuracy" else 1
                for head, colour in zip(heads, SERIES, strict=False):
                    entries = [numbers[f"{name} {s}" if s else CLEAN][head][metric] for s in range(6)]
                    values, low, high = (
                        [np.nan if e[k] is None else scale * e[k] for e in entries] for k in ("value", "low", "high")
                    )
                    axes.plot(values, color=colour, marker="o", markersize=2.5, label=title(head, heads))
                    axes.fill_between(range(6), low, high, color=colour, alpha=0.12, linewidth=0)
                axes.set_title(f"{name}: {label}" if axes is line[0] else label)
        for axes in panels[-1]:
            axes.set_xlabel("strength")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(heads))

    return plot(draw, 9.0, 13.0)


def _sheet(lines: list[list[np.ndarray]], cell: int = 96) -> str:
    """An SVG of one picture under each corruption (lines) at each strength (columns)."""
    small = [[cv2.resize(view, (cell, cell), interpolation=cv2.INTER_AREA) for view in line] for line in lines]
    width, height, left = cell * len(lines[0]), cell * len(lines), 160
    names = "".join(
        f'<text x="0" y="{cell * y + cell / 2}" fill="var(--ink)" font-size="14">{name}</text>'
        for y, name in enumerate(CORRUPTIONS)
    )
    source = picture(np.vstack([np.hstack(line) for line in small]), max(width, height))
    image = f'<image x="{left}" width="{width}" height="{height}" href="{source}"/>'
    return f'<svg viewBox="0 0 {left + width} {height}" width="{left + width}">{names}{image}</svg>'


def _stress_table(numbers: Mapping[str, Any]) -> pd.DataFrame:
    lines: list[dict[str, Any]] = []
    for condition, by_head in numbers.items():
        name, _, strength = condition.rpartition(" ") if condition != CLEAN else (CLEAN, "", "0")
        level = CORRUPTIONS[name][1][int(strength) - 1] if name in CORRUPTIONS else ""
        for head, of in by_head.items():
            facts = {"corruption": name, "strength": strength, "level": level, "head": head}
            lines.append({**facts, "pictures": of["n"], "groups": of["groups"], **_figures(of, metrics.SCALARS)})
    return pd.DataFrame(lines)


def _figures(of: Reaction, names: Iterable[str]) -> dict[str, Any]:
    """Columns of a table: a figure and the ends of its interval."""
    ends = {"": "value", "_low": "low", "_high": "high"}
    return {f"{name}{end}": of[name][key] for name in names for end, key in ends.items()}
