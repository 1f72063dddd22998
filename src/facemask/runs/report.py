"""The report of one run: ``report.html`` in its folder, and the short table at the end of training."""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from facemask.errors import UserError
from facemask.runs import metrics as metrics_module
from facemask.runs import predictions
from facemask.runs.page import MUTED, SERIES, Cell, Page, plot

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
    "degenerate": "degenerate",
}
DEGENERATE = 0.005
WORST = 12


def _heads(metrics: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Heads in the order of the report's tables."""
    found = list(dict.fromkeys(head for heads in metrics.values() for head in heads))
    return [h for h in ROWS if h in found] + [h for h in found if h not in ROWS]


def _title(head: str, heads: Sequence[str]) -> str:
    return "student" if head == "head" and "head_dist" not in heads else ROWS.get(head, head)


def reported_head(metrics: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """The head that stands for the run: ``summary["reported_head"]``, mean, head, or the first there is."""
    found = _heads(metrics)
    wanted = [summary.get("reported_head"), "mean", "head", *found]
    return next(head for head in wanted if head in found)


def _number(entry: Mapping[str, Any] | None, *, percent: bool = False, digits: int = 3, interval: bool = True) -> str:
    """A value, with its interval where there is one: ``98.7 [97.9, 99.3]``."""
    if entry is None or entry["value"] is None:
        return "–"
    scale, digits = (100, 1) if percent else (1, digits)
    text = f"{scale * entry['value']:.{digits}f}"
    if interval and entry["low"] is not None:
        text += f" [{scale * entry['low']:.{digits}f}, {scale * entry['high']:.{digits}f}]"
    return text


def terminal_table(metrics: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> "Table":
    """The short table that a training prints when it ends; at most 100 columns wide.

    Args:
        metrics: what :func:`facemask.runs.metrics.evaluate` returned.
        summary: of the run; ``reported_head`` marks a row, ``test_opened`` goes into the caption.
    """
    from rich import box
    from rich.table import Table

    columns, rows, caption = _short_table(metrics, summary)
    if summary.get("test_opened") is not None:
        caption += f"\ntest opened {_times(summary['test_opened'])}"
    table = Table(box=box.SIMPLE_HEAD, caption=caption, caption_justify="left", pad_edge=False)
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(*cells, style="bold" if cells[0].endswith("*") else None)
    return table


def markdown_table(metrics: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    """The table of :func:`terminal_table` in Markdown, for records."""
    columns, rows, caption = _short_table(metrics, summary)
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += ["| " + " | ".join(cells).replace(" *", r" \*") + " |" for cells in rows]
    return "\n".join([*lines, "", caption[0].upper() + caption[1:] + "."])


def _short_table(
    metrics: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any]
) -> tuple[list[str], list[list[str]], str]:
    """Titles of the number columns, rows with their title first (the reported head's ends with " *"), caption."""
    splits = [s for s in ("val", "test") if s in metrics] or list(metrics)[:2]
    last, heads, chosen = splits[-1], _heads(metrics), reported_head(metrics, summary)
    sizes = ", ".join(f"{split} {next(iter(metrics[split].values()))['n']:,}" for split in splits)
    columns = [*(f"{split} accuracy" for split in splits), f"{last} balanced", f"{last} NLL"]
    rows = []
    for head in heads:
        entries = [metrics[split].get(head, {}) for split in splits]
        cells = [_number(entry.get("accuracy"), percent=True) for entry in entries]
        cells.append(_number(entries[-1].get("balanced_accuracy"), percent=True, interval=False))
        cells.append(_number(entries[-1].get("nll"), interval=False))
        rows.append([_title(head, heads) + (" *" if head == chosen and len(heads) > 1 else ""), *cells])
    return columns, rows, f"accuracy and balanced accuracy in %, 95 % intervals; pictures: {sizes}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def run_report(run_dir: Path, *, pictures: Callable[[str], np.ndarray] | None) -> Path:
    """Write ``report.html`` from what the run folder holds; returns its path.

    ``predictions.parquet`` and ``metrics.json`` are needed; what else is missing leaves its section out.

    Args:
        run_dir: the run folder.
        pictures: gives the pixels of a picture, uint8 (H, W, 3), for its id; the page then has thumbnails.
            None: the worst errors are listed by name only (for reports that leave the machine).

    Raises:
        UserError: predictions or metrics are missing or broken.
    """
    frame, classes = predictions.read_predictions(run_dir / "predictions.parquet")
    metrics = _read_json(run_dir / "metrics.json")
    if not metrics:
        raise UserError(f"{run_dir / 'metrics.json'} does not exist; evaluate the run first.")
    summary = _read_json(run_dir / "summary.json")
    provenance = _read_json(run_dir / "provenance.json")
    chosen = reported_head(metrics, summary)
    if chosen not in predictions.heads(frame):
        raise UserError(f"{run_dir / 'predictions.parquet'} has no head {chosen!r}; evaluate the run again.")

    page = Page(str(summary.get("name") or run_dir.name), _lead(metrics, summary, chosen))
    _results(page, metrics, summary, chosen)
    _curves(page, run_dir / "curves.csv")
    _confusion(page, metrics, chosen, classes)
    _reliability(page, frame, chosen, classes)
    _per_class(page, metrics, chosen)
    _worst(page, frame, chosen, classes, pictures)
    _data(page, summary.get("data") or {}, classes)
    _distillation(page, summary.get("distillation") or {})
    _training(page, summary.get("training") or {})
    _provenance(page, provenance, run_dir / "config.yaml")
    return page.write(run_dir / "report.html")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON (cut off?); evaluate the run again.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no dictionary; evaluate the run again.")
    return content


def _lead(metrics: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any], chosen: str) -> str:
    split = "test" if "test" in metrics else list(metrics)[-1]
    entry = metrics[split].get(chosen)
    if entry is None:
        return ""
    title = _title(chosen, _heads(metrics))
    accuracy = _number(entry["accuracy"], percent=True)
    return f"{split} accuracy {accuracy} % · {title} · {entry['n']:,} pictures in {entry['groups']:,} groups"


def _results(page: Page, metrics: Mapping[str, Mapping[str, Any]], summary: Mapping[str, Any], chosen: str) -> None:
    page.heading("Results")
    for note in summary.get("notes") or []:
        page.note(str(note))
    heads = _heads(metrics)
    for split, entries in metrics.items():
        shown = [head for head in heads if head in entries]
        rows: list[list[Cell]] = [
            [
                _title(head, heads) + (" *" if head == chosen else ""),
                _number(entries[head]["accuracy"], percent=True),
                _number(entries[head]["balanced_accuracy"], percent=True),
                _number(entries[head]["auroc"]),
                _number(entries[head]["nll"]),
                _number(entries[head]["ece"]),
            ]
            for head in shown
        ]
        first = entries[shown[0]]
        page.table(
            ["", "accuracy, %", "balanced, %", "AUROC", "NLL", "ECE"],
            rows,
            f"{split}: {first['n']:,} pictures in {first['groups']:,} groups",
            strong=[shown.index(chosen)] if chosen in shown else [],
        )
    page.text(
        "* the reported head. In brackets: 95 % intervals, from a bootstrap over groups of pictures that "
        "belong together (byte-identical files); for accuracy Wilson's where every group is one picture. They "
        "tell how far another sample of such pictures would move a figure, not how far another training seed "
        "would. A figure without one: all resamples agree."
    )
    if summary.get("test_opened") is not None:
        page.text(f"Test opened {_times(summary['test_opened'])} for this data, this run included.")


def _panels(curves: pd.DataFrame) -> dict[str, dict[str, pd.Series]]:
    """{quantity: {train or val or "": its values over epoch or step}} of a CSVLogger's table."""
    panels: dict[str, dict[str, str]] = {}
    for column in curves.columns:
        if column in ("epoch", "step") or curves[column].notna().sum() == 0:
            continue
        prefix, _, rest = column.rpartition("/") if column.startswith(("train/", "val/")) else ("", "", column)
        quantity = re.sub(r"_(epoch|step)$", "", rest)
        # where a quantity is logged per step and per epoch, the epoch's curve is shown
        if prefix not in panels.setdefault(quantity, {}) or column.endswith("_epoch"):
            panels[quantity][prefix] = column
    result = {}
    for quantity, columns in panels.items():
        logged = {prefix: curves[curves[column].notna()] for prefix, column in columns.items()}
        by_epoch = "epoch" in curves and all(rows["epoch"].is_unique for rows in logged.values())
        axis = "epoch" if by_epoch or "step" not in curves else "step"
        result[quantity] = {
            prefix: pd.Series(rows[columns[prefix]].to_numpy(), rows[axis].to_numpy(), name=axis)
            for prefix, rows in logged.items()
        }
    order = ("loss", "accuracy", "acc")
    return dict(sorted(result.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _curves(page: Page, path: Path) -> None:
    if not path.is_file():
        return
    try:
        table = pd.read_csv(path, on_bad_lines="skip").apply(pd.to_numeric, errors="coerce")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError):
        table = pd.DataFrame()
    if "epoch" not in table and "step" not in table:
        page.note(f"{path.name} cannot be read; there are no training curves.")
        return
    panels = _panels(table)
    if not panels:
        return
    page.heading("Training curves")
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)

    def draw(figure: "Figure") -> None:
        for i, (quantity, curves) in enumerate(panels.items()):
            axes = figure.add_subplot(lines, columns, i + 1)
            for prefix, series in curves.items():
                axes.plot(
                    series.index,
                    series,
                    color=SERIES[1 if prefix == "val" else 0],
                    marker="o" if len(series) < 20 else None,
                    markersize=2.5,
                    label=prefix,
                )
                axes.set_xlabel(str(series.name))
            axes.locator_params(axis="x", integer=True)
            axes.set_title(quantity)
            if set(curves) != {""}:
                axes.legend()

    page.figure(plot(draw, 2.9 * columns, 2.3 * lines), "Curves as logged while training.")


def _confusion(page: Page, metrics: Mapping[str, Mapping[str, Any]], chosen: str, classes: Sequence[str]) -> None:
    page.heading("Confusion matrix")
    for split, entries in metrics.items():
        if chosen not in entries:
            continue
        counts = entries[chosen]["confusion"]
        rows: list[list[Cell]] = [[name, *map(int, row)] for name, row in zip(classes, counts, strict=True)]
        shade = [[None, *(0.45 * n / max(1, sum(row)) for n in row)] for row in counts]
        page.table(["label ↓  decided →", *classes], rows, split, shade=shade)


def _split_order(frame: pd.DataFrame) -> list[str]:
    found = list(dict.fromkeys(frame["split"]))
    order = metrics_module.SPLIT_ORDER
    return [s for s in order if s in found] + [s for s in found if s not in order]


def _labels(frame: pd.DataFrame, classes: Sequence[str]) -> np.ndarray:
    return frame["label"].map({name: i for i, name in enumerate(classes)}).to_numpy(dtype=np.int64)


def _reliability(page: Page, frame: pd.DataFrame, chosen: str, classes: Sequence[str]) -> None:
    page.heading("Reliability")

    def draw(figure: "Figure") -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        top.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
        for i, split in enumerate(_split_order(frame)):
            part = frame[frame["split"] == split]
            bins = metrics_module.reliability(predictions.logits(part, chosen, classes), _labels(part, classes))
            confidence = [b["confidence"] for b in bins]
            colour = SERIES[i % len(SERIES)]
            top.plot(confidence, [b["accuracy"] for b in bins], color=colour, marker="o", markersize=4, label=split)
            share = [b["count"] / len(part) for b in bins]
            bottom.plot(confidence, share, color=colour, marker="o", markersize=3)
        top.set(ylabel="accuracy", ylim=(-0.03, 1.03), xlim=(1 / len(classes) - 0.02, 1.02))
        bottom.set(xlabel="confidence", ylabel="share of pictures", ylim=(-0.05, 1.05))
        top.legend(loc="lower right")

    page.figure(
        plot(draw, 5.2, 4.2),
        "Accuracy against mean confidence in each bin of the ECE; below, how many pictures a bin holds. "
        "Bins with few pictures scatter.",
    )


def _per_class(page: Page, metrics: Mapping[str, Mapping[str, Any]], chosen: str) -> None:
    page.heading("Per class")
    rows: list[list[Cell]] = [
        [
            split,
            name,
            *(f"{v:.3f}" if (v := row[k]) is not None else None for k in ("precision", "recall", "f1")),
            row["support"],
        ]
        for split, entries in metrics.items()
        if chosen in entries
        for name, row in entries[chosen]["per_class"].items()
    ]
    page.table(["split", "class", "precision", "recall", "F1", "support"], rows)


def _worst(
    page: Page,
    frame: pd.DataFrame,
    chosen: str,
    classes: Sequence[str],
    pictures: Callable[[str], np.ndarray] | None,
) -> None:
    logits = predictions.logits(frame, chosen, classes)
    decided = logits.argmax(axis=1)
    labels = _labels(frame, classes)
    table = frame[["id", "split", "label"]].assign(
        loss=metrics_module.losses(logits, labels),
        decided=[classes[i] for i in decided],
        confidence=np.exp(-metrics_module.losses(logits, decided)),
    )
    wrong = table[decided != labels].sort_values(["loss", "id"], ascending=[False, True])
    page.heading("Worst errors")
    for split in _split_order(frame):
        part = wrong[wrong["split"] == split]
        page.heading(f"{split}: {len(part):,} of {(frame['split'] == split).sum():,} pictures decided wrongly", 3)
        shown = list(part.head(WORST).itertuples(index=False))
        thumbnails = [] if pictures is None else _thumbnails(shown, pictures)
        if thumbnails:
            page.pictures(thumbnails)
        elif shown:
            rows: list[list[Cell]] = [[r.id, r.label, r.decided, f"{r.confidence:.3f}", f"{r.loss:.2f}"] for r in shown]
            page.table(["picture", "label", "decided", "confidence", "loss"], rows)


def _thumbnails(rows: Sequence[Any], pictures: Callable[[str], np.ndarray]) -> list[tuple[np.ndarray, str]]:
    """Pixels and captions; none where a picture is gone, so that a report can be written without the data."""
    try:
        return [
            (pictures(r.id), f"{r.decided} {r.confidence:.0%}\nlabel {r.label}\n{r.id.rpartition('/')[2]}")
            for r in rows
        ]
    except (OSError, KeyError, UserError):
        return []


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _cell(value: Any) -> Cell:
    """A value of a JSON file as a table's cell. Whole numbers keep their digits: a seed is no quantity."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _data(page: Page, data: Mapping[str, Any], classes: Sequence[str]) -> None:
    if not data:
        return
    page.heading("Data")
    known = {"fingerprint", "classes", "counts", "left_out"}
    pairs = [("fingerprint", data.get("fingerprint")), ("classes", data.get("classes") or list(classes))]
    pairs += list(_flat({k: v for k, v in data.items() if k not in known}))
    page.table([], [[name, _cell(value)] for name, value in pairs])
    counts = data.get("counts") or {}
    if counts and all(isinstance(row, Mapping) for row in counts.values()):
        names = list(dict.fromkeys(name for row in counts.values() for name in row))
        rows: list[list[Cell]] = [
            [split, *(row.get(name, 0) for name in names), sum(row.values())] for split, row in counts.items()
        ]
        page.table(["split", *names, "pictures"], rows)
    left_out = data.get("left_out")
    if isinstance(left_out, int):
        page.text(f"Files left out: {left_out}.")
    elif left_out:
        names = [f"{n}: {why}" for n, why in left_out.items()] if isinstance(left_out, Mapping) else left_out
        page.text(f"Files left out: {len(left_out)}.")
        page.code("\n".join(map(str, names)), folded="their names")
    elif left_out is not None:
        page.text("No file was left out.")


def _distillation(page: Page, distillation: Mapping[str, Any]) -> None:
    if not distillation:
        return
    page.heading("Distillation")
    disagreement = distillation.get("teacher_label_disagreement")
    small = isinstance(disagreement, float | int) and disagreement < DEGENERATE
    if distillation.get("degenerate", small):
        page.note("Degenerate: the teacher's decisions equal the labels.")
    rows: list[list[Cell]] = []
    for name, value in _flat(distillation):
        share = isinstance(value, float) and name.endswith(("agreement", "disagreement"))
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


def training_blocks(training: Mapping[str, Any]) -> list[str]:
    """The blocks of :func:`hugging_face_metrics` for training and for evaluation."""
    numbers = {k: v for k, v in _flat(training) if isinstance(v, int | float) and not isinstance(v, bool)}
    figures = {k: v for k, v in numbers.items() if np.isfinite(v)}
    parts = {
        "train": {k: v for k, v in figures.items() if not k.startswith("eval_")},
        "eval": {k: v for k, v in figures.items() if k.startswith("eval_")},
    }
    return [hugging_face_metrics(split, part) for split, part in parts.items() if part]


def _training(page: Page, training: Mapping[str, Any]) -> None:
    if not training:
        return
    page.heading("Training figures")
    for block in training_blocks(training):
        page.code(block)
    others = [[name, _cell(value)] for name, value in _flat(training) if not isinstance(value, int | float)]
    if others:
        page.table([], others)


def _provenance(page: Page, provenance: Mapping[str, Any], config: Path) -> None:
    if not provenance and not config.is_file():
        return
    page.heading("Provenance")
    command = provenance.get("command")
    if command:
        page.code(command if isinstance(command, str) else " ".join(map(str, command)))
    pairs = [(name, value) for name, value in _flat(provenance) if name != "command"]
    rows: list[list[Cell]] = [[n, _cell(v)] for n, v in pairs if "\n" not in str(v)]
    if rows:
        page.table([], rows)
    for name, value in pairs:
        if "\n" in str(value):
            page.code(str(value), folded=name)
    if config.is_file():
        page.code(config.read_text(encoding="utf-8"), folded="config.yaml")
