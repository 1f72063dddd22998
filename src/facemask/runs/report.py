"""The report of one run: ``report.html`` in its folder, and the short table at the end of training."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from facemask.errors import UserError
from facemask.runs import metrics as metrics_module
from facemask.runs import predictions
from facemask.runs.calibration import class_indices
from facemask.runs.folder import flat
from facemask.runs.page import MUTED, SERIES, Cell, Page, plot, text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

ROWS = {
    "teacher": "teacher",
    "head": "student class head",
    "head_dist": "student distillation head",
    "mean": "student mean of heads",
    "majority": "majority class",
    "no_pixels": "no pixels",
}
TITLES = {
    "teacher_label_disagreement": "teacher's decision differs from the label",
    "teacher_entropy": "entropy of the teacher (nats)",
    "student_teacher_agreement": "student decides as the teacher does",
}
SHOWN = {"accuracy": "accuracy, %", "balanced_accuracy": "balanced, %", "auroc": "AUROC", "nll": "NLL", "ece": "ECE"}
DEGENERATE = 0.005
WORST = 12
Pictures = Callable[[str], np.ndarray]  # id -> pixels
# {split: {head: {metric: {value, low, high}}}}, as facemask.runs.metrics.evaluate returns it.
Metrics = Mapping[str, Mapping[str, Any]]


def _heads(metrics: Metrics) -> list[str]:
    """Heads in the order of the report's tables."""
    found = list(dict.fromkeys(head for heads in metrics.values() for head in heads))
    return [h for h in ROWS if h in found] + [h for h in found if h not in ROWS]


def title(head: str, heads: Sequence[str]) -> str:
    """What a head is called beside the other heads of its run."""
    return "student" if head == "head" and "head_dist" not in heads else ROWS.get(head, head)


def number(entry: Mapping[str, Any] | None, *, percent: bool = False, interval: bool = True) -> str:
    """A value, with its interval where there is one: ``98.7 [97.9, 99.3]``."""
    if entry is None or entry["value"] is None:
        return "–"
    scale, digits = (100, 1) if percent else (1, 3)
    text = f"{scale * entry['value']:.{digits}f}"
    if interval and entry["low"] is not None:
        text += f" [{scale * entry['low']:.{digits}f}, {scale * entry['high']:.{digits}f}]"
    return text


def terminal_table(metrics: Metrics, summary: Mapping[str, Any]) -> "Table":
    """The short table that a training prints when it ends; at most 100 columns wide.

    Args:
        metrics: what :func:`facemask.runs.metrics.evaluate` returned.
        summary: of the run; ``reported_head`` marks a row, ``test_opened`` goes into the caption.
    """
    splits = [s for s in ("val", "test") if s in metrics] or list(metrics)[:2]
    last, heads, chosen = splits[-1], _heads(metrics), summary["reported_head"]
    sizes = ", ".join(f"{split} {next(iter(metrics[split].values()))['n']:,}" for split in splits)
    caption = f"accuracy and balanced accuracy in %, 95 % intervals; pictures: {sizes}"
    if "test" in metrics and summary["test_opened"]:
        caption += f"\ntest opened {_times(summary['test_opened'])}"
    rows, strong = [], [i for i, head in enumerate(heads) if head == chosen and len(heads) > 1]
    for i, head in enumerate(heads):
        entries = [metrics[split].get(head, {}) for split in splits]
        cells = [number(entry.get("accuracy"), percent=True) for entry in entries]
        cells.append(number(entries[-1].get("balanced_accuracy"), percent=True, interval=False))
        cells.append(number(entries[-1].get("nll"), interval=False))
        rows.append([title(head, heads) + (" *" if i in strong else ""), *cells])
    columns = ["", *(f"{split} accuracy" for split in splits), f"{last} balanced", f"{last} NLL"]
    return text_table(columns, rows, caption, strong)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def run_report(run_dir: Path, *, pictures: Pictures | None) -> Path:
    """Write ``report.html`` from a run folder that is otherwise complete; returns its path.

    Args:
        pictures: gives the pixels of a picture, uint8 (H, W, 3), for its id; the page then has thumbnails.
            None: the worst errors are listed by name only (for reports that leave the machine).
    """
    frame, classes = predictions.read_predictions(run_dir / "predictions.parquet")
    metrics, summary, provenance = (
        json.loads((run_dir / f"{name}.json").read_text()) for name in ("metrics", "summary", "provenance")
    )
    chosen = summary["reported_head"]
    page = Page(summary["name"], lead(metrics, chosen))
    results(page, metrics, summary, chosen)
    _curves(page, run_dir / "curves.csv")
    confusion(page, metrics, chosen, classes)
    _reliability(page, frame, chosen, classes)
    per_class(page, metrics, chosen)
    worst(page, frame, chosen, classes, pictures)
    _data(page, summary["data"])
    if summary["distillation"]:
        _distillation(page, summary["distillation"])
    _training(page, summary["training"])
    page.heading("Provenance")
    page.code(provenance["command"])
    page.table([], [[name, _cell(value)] for name, value in flat(provenance).items() if name != "command"])
    page.code((run_dir / "config.yaml").read_text(encoding="utf-8"), folded="config.yaml")
    return page.write(run_dir / "report.html")


def lead(metrics: Metrics, chosen: str) -> str:
    split = "test" if "test" in metrics else list(metrics)[-1]
    entry = metrics[split][chosen]
    floor = number(metrics[split].get("no_pixels", {}).get("accuracy"), percent=True)
    pictures = f"{entry['n']:,} pictures in {entry['groups']:,} groups"
    accuracy = f"{split} accuracy {number(entry['accuracy'], percent=True)} %, without any pixel {floor} %"
    return f"{accuracy} · {title(chosen, _heads(metrics))} · {pictures}"


def results(page: Page, metrics: Metrics, summary: Mapping[str, Any], chosen: str) -> None:
    page.heading("Results")
    for note in summary["notes"]:
        page.note(note)
    heads = _heads(metrics)
    for split, entries in metrics.items():
        shown = [head for head in heads if head in entries]
        rows: list[list[Cell]] = []
        for head in shown:
            cells = [number(entries[head][name], percent=name.endswith("accuracy")) for name in SHOWN]
            rows.append([title(head, heads) + (" *" if head == chosen else ""), *cells])
        first = entries[shown[0]]
        caption = f"{split}: {first['n']:,} pictures in {first['groups']:,} groups"
        page.table(["", *SHOWN.values()], rows, caption, strong=[shown.index(chosen)])
    page.text(
        "* the reported head. In brackets: 95 % intervals, from a bootstrap over groups of pictures that "
        "belong together (near-duplicates; one person, where the data say so); for accuracy Wilson's where every "
        "group is one picture. They tell how far another sample of such pictures would move a figure, not how "
        "far another training seed would. A figure without one: all resamples agree."
    )
    if "test" in metrics and summary["test_opened"]:
        page.text(f"Test opened {_times(summary['test_opened'])} for this data, this run included.")


def _curves(page: Page, path: Path) -> None:
    curves = pd.read_csv(path)
    panels: dict[str, dict[str, str]] = {}  # quantity -> train, val or "" -> column
    names = [str(name) for name in curves if name not in ("epoch", "step") and curves[name].notna().any()]
    for column in sorted(names, key=lambda name: name.endswith("_epoch")):  # of steps and epochs, the epochs stay
        prefix, _, rest = column.rpartition("/") if column.startswith(("train/", "val/")) else ("", "", column)
        panels.setdefault(re.sub(r"_(epoch|step)$", "", rest), {})[prefix] = column
    order = sorted(panels, key=lambda name: {"loss": 0, "accuracy": 1}.get(name, 2))
    width = min(3, len(panels))
    lines = -(-len(panels) // width)

    def draw(figure: "Figure") -> None:
        for i, quantity in enumerate(order):
            axes = figure.add_subplot(lines, width, i + 1)
            logged = {column: curves[curves[column].notna()] for column in panels[quantity].values()}
            by_epoch = "epoch" in curves and all(rows["epoch"].is_unique for rows in logged.values())
            axis = "epoch" if by_epoch or "step" not in curves else "step"
            for prefix, column in sorted(panels[quantity].items()):
                rows = logged[column]
                colour, marker = SERIES[1 if prefix == "val" else 0], "o" if len(rows) < 20 else None
                axes.plot(rows[axis], rows[column], color=colour, marker=marker, markersize=2.5, label=prefix)
            axes.set(xlabel=axis, title=quantity)
            axes.locator_params(axis="x", integer=True)
            if set(panels[quantity]) != {""}:
                axes.legend()

    page.heading("Training curves")
    page.figure(plot(draw, 2.9 * width, 2.3 * lines), "Curves as logged while training.")


def confusion(page: Page, metrics: Metrics, chosen: str, classes: Sequence[str]) -> None:
    page.heading("Confusion matrix")
    for split, entries in metrics.items():
        page.confusion(entries[chosen]["confusion"], classes, split)


def _reliability(page: Page, frame: pd.DataFrame, chosen: str, classes: Sequence[str]) -> None:
    page.heading("Reliability")
    parts = {str(split): part for split, part in frame.groupby("split", sort=False)}
    page.figure(
        reliability({s: (predictions.logits(p, chosen, classes), class_indices(p, classes)) for s, p in parts.items()}),
        "Accuracy against mean confidence in each bin of the ECE; below, how many pictures a bin holds. "
        "Bins with few pictures scatter.",
    )


def reliability(lines: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str:
    """The reliability diagram, as SVG, of named (logits (N, C), labels (N,))."""

    def draw(figure: "Figure") -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        top.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        for (name, (logits, labels)), colour in zip(lines.items(), SERIES, strict=False):
            bins = metrics_module.reliability(logits, labels)
            confidence = [b["confidence"] for b in bins]
            top.plot(confidence, [b["accuracy"] for b in bins], color=colour, marker="o", markersize=4, label=name)
            bottom.plot(confidence, [b["count"] / len(labels) for b in bins], color=colour, marker="o", markersize=3)
            top.set(ylabel="accuracy", ylim=(-0.03, 1.03), xlim=(1 / logits.shape[1] - 0.02, 1.02))
        bottom.set(xlabel="confidence", ylabel="share of pictures", ylim=(-0.05, 1.05))
        top.legend(loc="lower right")

    return plot(draw, 5.2, 4.2)


def per_class(page: Page, metrics: Metrics, chosen: str) -> None:
    page.heading("Per class")
    rows: list[list[Cell]] = []
    for split, entries in metrics.items():
        for name, row in entries[chosen]["per_class"].items():
            values = [None if row[key] is None else f"{row[key]:.3f}" for key in ("precision", "recall", "f1")]
            rows.append([split, name, *values, row["support"]])
    page.table(["split", "class", "precision", "recall", "F1", "support"], rows)


def wrong(frame: pd.DataFrame, head: str, classes: Sequence[str]) -> pd.DataFrame:
    """The pictures that a head decides wrongly, with what it `decided`, `confidence` and `loss`; the worst first."""
    logits = predictions.logits(frame, head, classes)
    labels, decided = class_indices(frame, classes), logits.argmax(axis=1)
    table = frame[["id", "split", "label"]].assign(
        loss=metrics_module.losses(logits, labels),
        decided=np.array(classes)[decided],
        confidence=np.exp(-metrics_module.losses(logits, decided)),
    )
    return table[decided != labels].sort_values(["loss", "id"], ascending=[False, True])


def worst(page: Page, frame: pd.DataFrame, chosen: str, classes: Sequence[str], pictures: Pictures | None) -> None:
    errors = wrong(frame, chosen, classes)
    page.heading("Worst errors")
    for split in frame["split"].unique():
        part = errors[errors["split"] == split]
        page.heading(f"{split}: {len(part):,} of {(frame['split'] == split).sum():,} pictures decided wrongly", 3)
        shown = list(part.head(WORST).itertuples(index=False))
        if thumbnails := [] if pictures is None else _thumbnails(shown, pictures):
            page.pictures(thumbnails)
        elif shown:
            rows: list[list[Cell]] = [[r.id, r.label, r.decided, f"{r.confidence:.3f}", f"{r.loss:.2f}"] for r in shown]
            page.table(["picture", "label", "decided", "confidence", "loss"], rows)


def _thumbnails(rows: Sequence[Any], pictures: Pictures) -> list[tuple[np.ndarray, str]]:
    """Pixels and captions; none where a picture is gone, so that a report can be written without the data."""
    said = [f"{r.decided} {r.confidence:.0%}\nlabel {r.label}\n{r.id.rpartition('/')[2]}" for r in rows]
    try:
        return [(pictures(r.id), text) for r, text in zip(rows, said, strict=True)]
    except (OSError, KeyError, UserError):
        return []


def _cell(value: Any) -> Cell:
    """A value of a JSON file as a table's cell. Whole numbers keep their digits: a seed is no quantity."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _data(page: Page, data: Mapping[str, Any]) -> None:
    page.heading("Data")
    page.table([], [[name, _cell(data[name])] for name in ("fingerprint", "classes", "not_in_split_file")])
    rows: list[list[Cell]] = [[split, *row.values(), sum(row.values())] for split, row in data["counts"].items()]
    page.table(["split", *data["classes"], "pictures"], rows)
    left_out = data["left_out"]
    page.text(f"Files left out: {len(left_out)}.")
    if left_out:
        page.code("\n".join(f"{name}: {why}" for name, why in left_out.items()), folded="their names")


def _distillation(page: Page, distillation: Mapping[str, Any]) -> None:
    page.heading("Distillation")
    if distillation["degenerate"]:
        page.note("Degenerate: the teacher's decisions equal the labels.")
    rows: list[list[Cell]] = []
    for name, value in distillation.items():
        share = name.endswith(("agreement", "disagreement"))
        rows.append([TITLES.get(name, name), f"{100 * value:.2f} %" if share else _cell(value)])
    page.table([], rows)


def hugging_face_metrics(split: str, figures: Mapping[str, Any]) -> str:
    """The block that Hugging Face's ``Trainer.log_metrics`` prints and model cards quote.

    Same rules as ``transformers.trainer_pt_utils.metrics_format``: run times as h:mm:ss.cc, total_flos in
    units of 2**30 (GF), other floats to four decimals, names sorted.
    """
    shown = {}
    for name, value in sorted(figures.items()):
        if name.endswith("_runtime"):
            text = f"{timedelta(seconds=int(value))}.{int(abs(value - int(value)) * 100):02d}"
        elif name == "total_flos":
            text = f"{int(value) >> 30}GF"
        else:
            text = str(round(value, 4)) if isinstance(value, float) else str(value)
        shown[name] = text
    left, right = max(map(len, shown)), max(map(len, shown.values()))
    return "\n".join([f"***** {split} metrics *****", *(f"  {k:<{left}} = {v:>{right}}" for k, v in shown.items())])


def _training(page: Page, training: Mapping[str, Any]) -> None:
    page.heading("Training figures")
    figures = {k: v for k, v in training.items() if isinstance(v, int | float) and np.isfinite(v)}
    for split in ("train", "eval"):
        part = {k: v for k, v in figures.items() if k.startswith("eval_") == (split == "eval")}
        if part:
            page.code(hugging_face_metrics(split, part))
    page.table([], [[name, _cell(value)] for name, value in training.items() if not isinstance(value, int | float)])
