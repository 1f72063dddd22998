"""What a run's decisions rest on: maps over pictures, its worst errors beside their nearest training pictures, and
whether the maps are right: `facemask explain`."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from omegaconf import OmegaConf
from rich.progress import track

from facemask.data.datamodule import ImageData
from facemask.data.images import BadImage
from facemask.data.transforms import hashed_rng
from facemask.errors import UserError
from facemask.evaluate import open_split, predict_splits
from facemask.files import write_bytes
from facemask.modeling.attention import TOKENS, attention_maps
from facemask.predict import Model, load_model
from facemask.runs.page import Cell, Page
from facemask.runs.report import title, wrong
from facemask.runs.statistics import Estimate, mean_difference
from facemask.stress import GREY, choose, make_out

METHODS = {"rollout": "attention rollout", "gradient": "gradient-weighted attention", "occlusion": "occlusion"}
OF_TOKEN = {"head": "class token", "head_dist": "distillation token"}
STEPS = 10
# How much more area a map's curves must have than random ones, of 1, for it to be said to show what decides.
MARGIN = 0.05
NEAREST = 3
BATCH = 64

Kind = tuple[str, str]  # method, head


# -- maps -------------------------------------------------------------------------------------------------------


def log_odds(logits: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Log-odds (N,) of one class per row of logits (N, C)."""
    rows = np.arange(len(logits))
    others = logits.astype(np.float64)
    others[rows, classes] = -np.inf
    return logits[rows, classes] - np.logaddexp.reduce(others, axis=1)


def occlusion(view: np.ndarray, score: Callable[[np.ndarray], np.ndarray], grid: tuple[int, int]) -> np.ndarray:
    """Occlusion map (Zeiler & Fergus 2014, "Visualizing and understanding convolutional networks").

    Args:
        view: uint8 (S, S, 3).
        score: views (N, S, S, 3) -> (N,).
        grid: rows and columns of cells. A grey window of about a seventh of the side, in whole cells, takes all places.

    Returns:
        (rows, columns): how much the score falls, on average over the windows that cover a cell.
    """
    (rows, columns), places = grid, [_cells(len(view), count) for count in grid]
    high, wide = (max(1, round(count / 7)) for count in grid)
    covered, windows = [view], []
    for top in range(rows - high + 1):
        for left in range(columns - wide + 1):
            window = np.zeros(grid, dtype=bool)
            window[top : top + high, left : left + wide] = True
            windows.append(window)
            covered.append(np.where(window[np.ix_(*places)][:, :, None], np.uint8(GREY), view))
    scores = score(np.stack(covered))
    weights = np.stack(windows).astype(float)
    return np.einsum("n,nyx->yx", scores[0] - scores[1:], weights) / weights.sum(axis=0)


def _cells(side: int, count: int) -> np.ndarray:
    """The cell of each pixel (side,) along one way."""
    return np.arange(side) * count // side


def predict_logits(model: Model, views: np.ndarray) -> dict[str, np.ndarray]:
    """Logits (N, C) by head of views (N, S, S, 3), in batches."""
    parts = [model.logits(views[start : start + BATCH]) for start in range(0, len(views), BATCH)]
    return {head: np.concatenate([part[head].numpy() for part in parts]) for head in parts[0]}


def maps(model: Model, view: np.ndarray) -> dict[Kind, np.ndarray]:
    """All maps of one view (S, S, 3), (rows, columns) each, of what speaks for the head's own decision: rollout and
    gradient-weighted attention of each trained head's token, where the network has such, and occlusion."""
    pixels = torch.from_numpy(view).permute(2, 0, 1)[None].to(model.device)
    heads = [head for head in model.heads if head in TOKENS]
    attention = attention_maps(model.classifier.backbone, pixels, heads)
    found = {kind: found[0].cpu().double().numpy() for kind, found in attention.items()}
    decided = predict_logits(model, view[None])[model.head].argmax(axis=1)

    def score(views: np.ndarray) -> np.ndarray:
        return log_odds(predict_logits(model, views)[model.head], np.repeat(decided, len(views)))

    grid = next((found.shape for found in found.values()), (7, 7))
    found["occlusion", model.head] = occlusion(view, score, (grid[0], grid[1]))
    return found


def describe(kind: Kind, model: Model) -> str:
    """What a map is called."""
    method, head = kind
    return METHODS[method] if method == "occlusion" else f"{METHODS[method]}, {OF_TOKEN[head]}"


def overlay(view: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """A map (rows, columns) laid over its view, uint8 (S, S, 3): bright where it is high, dark at 0 and below."""
    heat = np.clip(heat, 0, None) if heat.min() < 0 else heat - heat.min()
    scaled = np.rint(255 * heat / max(float(heat.max()), 1e-12)).astype(np.uint8)
    wide = cv2.resize(scaled, view.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    colours = cv2.cvtColor(cv2.applyColorMap(wide, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    return cv2.addWeighted(view, 0.45, colours, 0.55, 0)


# -- are the maps right? ----------------------------------------------------------------------------------------


def curves(view: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Views (2, STEPS + 1, S, S, 3) of the deletion and of the insertion curve (Petsiuk et al. 2018, "RISE").

    The cells of the map (rows, columns) with the highest values come first: in deletion they turn grey, in insertion
    they turn sharp in a blurred picture.
    """
    side = len(view)
    rank = np.empty(heat.size, dtype=np.int64)
    rank[np.argsort(-heat.ravel(), kind="stable")] = np.arange(heat.size)
    places = np.ix_(*(_cells(side, count) for count in heat.shape))
    order = rank.reshape(heat.shape)[places][:, :, None]
    blurred = cv2.GaussianBlur(view, (0, 0), side / 10)
    counts = np.linspace(0, heat.size, STEPS + 1).round()
    deletion = [np.where(order < count, np.uint8(GREY), view) for count in counts]
    insertion = [np.where(order < count, view, blurred) for count in counts]
    return np.stack([np.stack(deletion), np.stack(insertion)])


def areas(model: Model, view: np.ndarray, path: str) -> list[dict[str, object]]:
    """Areas under the deletion and insertion curves of every map of a view, and of a random map that its path seeds:
    of the calibrated probability of the head's own decision, 0 to 1."""
    found = maps(model, view)
    heats = [*found.values(), hashed_rng("random map", path).random(next(iter(found.values())).shape)]
    views = np.stack([curves(view, heat) for heat in heats])
    probabilities = model.probabilities(predict_logits(model, views.reshape(-1, *view.shape)))
    by_head = {head: p.reshape(*views.shape[:3], -1) for head, p in probabilities.items()}
    lines: list[dict[str, object]] = []
    for number, (method, head) in enumerate(found):
        decided = by_head[head][number, 0, 0].argmax()  # nothing is deleted yet
        area = np.trapezoid(by_head[head][:, :, :, decided], dx=1 / STEPS, axis=2)
        line = {"deletion": area[number, 0], "insertion": area[number, 1]}
        line |= {"random_deletion": area[-1, 0], "random_insertion": area[-1, 1]}
        lines.append({"id": path, "method": method, "head": head, **line})
    return lines


def gain(table: pd.DataFrame, groups: np.ndarray) -> Estimate:
    """By how much a method's curves beat random ones: the mean of what its deletion has less and its insertion more, a
    row per picture, resampled by group."""
    less, more = table["random_deletion"] - table["deletion"], table["insertion"] - table["random_insertion"]
    difference = ((less + more) / 2).to_numpy(dtype=float)
    return mean_difference(difference, pd.factorize(groups)[0], np.random.default_rng(0), resamples=1000)


# -- the command ------------------------------------------------------------------------------------------------


def explain(
    run_dir: Path,
    images: Sequence[str],
    out: Path,
    split: str,
    errors: int,
    check: int,
    cache_dir: Path,
    checkpoint: Path | None = None,
) -> tuple[Page, dict[str, str]]:
    """Explain pictures and a run's worst errors; writes explain.html and one PNG per picture into `out`.

    Args:
        run_dir: or a record, whose weights `checkpoint` names; without the run's data there are pictures only.
        images: files.
        split: of the run's own pictures, val or test: of its errors, and of the check.
        errors: so many of the worst.
        check: so many pictures for the check of the maps; areas.csv holds its figures.

    Returns:
        The page, and path -> problem of the images that cannot be read.

    Raises:
        UserError: whatever the user can mend, before anything is written.
    """
    model = load_model(run_dir, checkpoint)
    views: dict[str, np.ndarray] = {}
    problems: dict[str, str] = {}
    for path in images:
        try:
            views[path] = model.view(path)
        except BadImage as error:
            problems[path] = str(error)
    files = _files(list(views), out)
    page = Page(f"What {run_dir.name} looks at", f"decisions by the {title(model.head, model.heads)}")
    data = None
    try:
        data = open_split(run_dir, OmegaConf.create(model.config), split, cache_dir) if errors or check else None
    except UserError as error:
        if not images:
            raise
        page.note(f"No errors, training pictures or check are shown: {error}.")
    make_out(out, drawn=data is not None and data.drawn and not images)
    neighbours = None if data is None else Neighbours(model, data)
    if check and data is not None:
        _check(page, model, data, choose(data, split, check), out)
    if views:
        page.heading("Pictures")
    for path, view in views.items():
        shown = _shown(model, view)
        write_bytes(files[path], _strip(shown))
        page.heading(path, 3)
        page.pictures(shown + ([] if neighbours is None else neighbours(view)))
    if errors and data is not None and neighbours is not None:
        _errors(page, model, data, split, errors, neighbours)
    page.write(out / "explain.html")
    return page, problems


class Neighbours:
    """The training pictures nearest to a view, by the cosine of what the student's class head reads."""

    def __init__(self, model: Model, data: ImageData) -> None:
        self.model = model
        self.data = data
        self.rows = data.rows("train")
        loader = data.eval_loader("train", BATCH)
        batches = track(loader, "training pictures", total=len(loader), transient=True)
        self.embeddings = np.concatenate([self._embed(batch["pixels"]) for batch in batches])

    @torch.inference_mode()
    def _embed(self, pixels: torch.Tensor) -> np.ndarray:
        pooled = self.model.classifier.backbone(pixels.to(self.model.device)).pooled.flatten(1)
        return torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()

    def __call__(self, view: np.ndarray) -> list[tuple[np.ndarray, str]]:
        cosine = self.embeddings @ self._embed(torch.from_numpy(view).permute(2, 0, 1)[None])[0]
        nearest = np.argsort(-cosine, kind="stable")[:NEAREST]
        paths, labels = (self.data.table[column].iloc[self.rows[nearest]] for column in ("path", "label"))
        return [
            (self.data.picture(path), f"training picture {label}\n{path}\ncosine {cosine[number]:.3f}")
            for path, label, number in zip(paths, labels, nearest, strict=True)
        ]


def _files(paths: Sequence[str], out: Path) -> dict[str, Path]:
    """Where each picture's PNG goes; pictures of one name are numbered."""
    names = [Path(path).stem for path in paths]
    files = {
        path: out / (f"{name}.png" if names.index(name) == i else f"{name}_{i}.png")
        for i, (path, name) in enumerate(zip(paths, names, strict=True))
    }
    if over := {file.resolve() for file in files.values()} & {Path(path).resolve() for path in paths}:
        raise UserError(f"--out {out}: the explanation would be written over {min(over)}: name another folder")
    return files


def _shown(model: Model, view: np.ndarray, label: str = "") -> list[tuple[np.ndarray, str]]:
    """A view and its maps, with captions."""
    (prediction,) = model.predict([view])
    decided = f"{prediction.label} {prediction.probability:.3f}"
    own = (view, f"decided {decided}" + (f"\nlabel {label}" if label else ""))
    return [own, *((overlay(view, heat), describe(kind, model)) for kind, heat in maps(model, view).items())]


def _strip(shown: Sequence[tuple[np.ndarray, str]]) -> bytes:
    """A PNG of pictures side by side under their captions."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):
        figure = Figure(figsize=(2.3 * len(shown), 2.8), layout="constrained")
        for axes, (pixels, caption) in zip(figure.subplots(1, len(shown)), shown, strict=True):
            axes.imshow(pixels)
            axes.set_title(caption.replace(", ", ",\n"), fontsize=9)
            axes.axis("off")
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120, bbox_inches="tight")
    return buffer.getvalue()


def _check(page: Page, model: Model, data: ImageData, rows: np.ndarray, out: Path) -> None:
    paths = data.table["path"].iloc[rows].tolist()
    progress = track(paths, "check of the maps", transient=True)
    table = pd.DataFrame([line for path in progress for line in areas(model, data.picture(path), path)])
    groups = data.table["group"].iloc[rows].to_numpy()
    page.heading("Do the maps show what decides?")
    lines: list[list[Cell]] = []
    for (method, head), of in table.groupby(["method", "head"], sort=False):
        found = gain(of, groups)
        means = [f"{of[name].mean():.3f}" for name in ("deletion", "random_deletion", "insertion", "random_insertion")]
        words = "yes" if found.low > MARGIN else "no" if found.high < MARGIN else "not shown"
        interval = f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
        lines.append([describe((str(method), str(head)), model), *means, interval, words])
    better = [str(line[0]) for line in lines if line[-1] == "yes"]
    page.note(
        f"Beats random maps by more than {MARGIN:g}: {'; '.join(better) or 'none'} "
        f"({len(better)} of {len(lines)} methods, on {len(paths):,} pictures)."
    )
    page.table(
        ["", "deletion", "random", "insertion", "random", "gain", f"above {MARGIN:g}?"],
        lines,
        "areas under the curves of the decision's probability; gain: mean of both, with its 95 % interval",
    )
    page.text(
        "The view is changed cell by cell, from the map's highest value to its lowest: deletion turns cells grey (of a "
        "right map the probability falls fast: little area), insertion sharpens cells of a blurred picture (it rises "
        "fast: much area)."
    )
    table.to_csv(out / "areas.csv", index=False)


def _errors(page: Page, model: Model, data: ImageData, split: str, count: int, neighbours: Neighbours) -> None:
    frame, _ = predict_splits(model.classifier, None, data, [split], BATCH, model.device)
    errors = wrong(frame, model.head, model.classes)
    page.heading("Worst errors")
    page.text(
        f"{len(errors):,} of {len(frame):,} {split} pictures are decided wrongly; the worst {min(count, len(errors))} "
        "by their loss, and the training pictures that the student finds most like them."
    )
    rows: Any = errors.head(count).itertuples()
    for row in rows:
        view = data.picture(row.id)
        page.heading(row.id, 3)
        page.pictures(_shown(model, view, row.label) + neighbours(view))
