"""`facemask dashboard`, from conf/dashboard.yaml: all arms on one page, from records, run folders and sweeps; and the
workspace and report of a Weights & Biases project."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from facemask.config import ROOT, read_config
from facemask.errors import UserError
from facemask.files import read_yaml
from facemask.runs.folder import RunFolder, flat
from facemask.runs.page import INK, MUTED, SERIES, Cell, Page, plot, shares
from facemask.runs.predictions import read_predictions
from facemask.runs.record import all_records, mean_interval
from facemask.runs.report import number
from facemask.runs.sweep_page import bars, importance_of, parallel, ranked

if TYPE_CHECKING:
    import optuna
    from matplotlib.figure import Figure

SPEC, STUDY = ROOT / "conf" / "dashboard.yaml", ROOT / "conf" / "study.yaml"
BESIDE = {"teacher": "teacher, %", "no_pixels": "no pixels, %"}
NOTE = (
    "95 % intervals: over an arm's runs (t) where it has several, else over pictures. Arms on different pictures are "
    "not comparable."
)


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in seed or fold, `over`; metrics and curves hold one entry for each."""

    name: str
    head: str
    classes: list[str]
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    curves: list[pd.DataFrame]
    over: str | None = None

    def estimate(self, split: str, metric: str, head: str | None = None) -> dict[str, Any] | None:
        """Value with its 95 % interval: over runs (t) where there are several, else over pictures."""
        entries = [run.get(split, {}).get(head or self.head, {}).get(metric) for run in self.metrics]
        if any(entry is None or entry["value"] is None for entry in entries):
            return None
        if len(entries) == 1:
            return entries[0]
        over = mean_interval([entry["value"] for entry in entries])
        return {"value": over["mean"], "low": over["low"], "high": over["high"]}

    def confusion(self, split: str) -> np.ndarray:
        """Counts (C, C) over all runs: rows are labels, columns decisions; zeros where the split was not opened."""
        runs = [run[split][self.head]["confusion"] for run in self.metrics if split in run]
        return np.sum(runs, axis=0) if runs else np.zeros((len(self.classes),) * 2, dtype=int)


def arms_of(experiments: Path, runs: Sequence[Path] = ()) -> list[Arm]:
    """One arm per record, in the order of names, then one per run folder.

    Raises:
        UserError: a folder holds no finished run.
    """
    arms = []
    for record in all_records(experiments):
        metrics, curves = [record.metrics(run) for run in record.runs], [record.curves(run) for run in record.runs]
        classes = record.predictions(record.runs[0])[1]
        head, over = record.info["reported_head"], record.info["over"]
        arms.append(Arm(record.name, head, classes, record.config, metrics, curves, over))
    for run in runs:
        if RunFolder(run).status().get("state") != "finished":
            raise UserError(f"{run} holds no finished run: finish it with resume=true, or name another folder")
        metrics, summary = (json.loads((run / f"{name}.json").read_text()) for name in ("metrics", "summary"))
        classes = read_predictions(run / "predictions.parquet")[1]
        curves = [pd.read_csv(run / "curves.csv")]
        arms.append(
            Arm(run.name, summary["reported_head"], classes, read_config(run / "config.yaml"), [metrics], curves)
        )
    return arms


# -- plots, in a page's colours or in any others; the figure comes last, for `facemask.runs.page.plot` ----------------


def forest(arms: Sequence[Arm], split: str, metric: str, colour: str, ink: str, figure: "Figure") -> None:
    """Every arm's estimate with its interval, and the teacher's as a tick."""
    axes = figure.subplots()
    for place, arm in enumerate(arms):
        if estimate := arm.estimate(split, metric):
            axes.plot(estimate["value"], place, "s", color=colour, markersize=5)
            if estimate["low"] is not None:
                axes.plot([estimate["low"], estimate["high"]], [place, place], color=colour, linewidth=2)
        if teacher := arm.estimate(split, metric, "teacher"):
            axes.plot(teacher["value"], place, "|", color=ink, markersize=12)
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.set(ylim=(len(arms) - 0.4, -0.6), xlabel=f"{split} {metric.replace('_', ' ')} (tick: teacher)")


def curves(arms: Sequence[Arm], quantity: str, colours: Sequence[str], figure: "Figure") -> None:
    """Mean over the runs of each arm, by epoch, and their range."""
    axes = figure.subplots()
    for place, arm in enumerate(arms):
        colour, line = _look(place, colours)
        runs = [run.dropna(subset=quantity).set_index("epoch")[quantity] for run in arm.curves if quantity in run]
        if runs:
            table = pd.concat(runs, axis=1)
            axes.plot(table.index, table.mean(axis=1), line, color=colour, label=arm.name)
            axes.fill_between(table.index, table.min(axis=1), table.max(axis=1), color=colour, alpha=0.2, linewidth=0)
    axes.set(xlabel="epoch", ylabel=quantity)
    axes.locator_params("x", integer=True)
    if axes.lines:
        figure.legend(loc="outside right center")


def _look(place: int, colours: Sequence[str]) -> tuple[str, str]:
    """Colour and style of a line; no two of 18 are alike in six colours."""
    return colours[place % len(colours)], ("-", "--", ":")[place // len(colours) % 3]


def families(arms: Sequence[Arm], study: Mapping[str, Any]) -> dict[str, list[Arm]]:
    """Arms that one figure can show: those of no study, then the `curves` of conf/study.yaml."""
    own = f"{study['name']}-"
    found = {"arms of no study": [arm for arm in arms if not arm.name.startswith(own)]}
    for title, names in study["curves"].items():
        found[title] = [arm for arm in arms if arm.name.startswith(own) and arm.name.removeprefix(own) in names]
    return {title: part for title, part in found.items() if part}


def by_fraction(arms: Sequence[Arm]) -> list[list[tuple[float, Arm]]]:
    """Arms that differ in data.fraction alone, seeds and epochs aside, where there are two or more: [(fraction, arm)],
    rising. Records over folds and over seeds are not put together; an option that came after one was made is passed
    over."""
    groups: list[tuple[dict[str, Any], list[tuple[float, Arm]]]] = []
    for arm in arms:
        options, run_dir = flat(arm.config), arm.config.get("run_dir", "$RUN_DIR")
        fraction = options.get("data.fraction", 1.0)
        names = ("fraction", "seed", "name", "experiment_name", "group", "max_epochs", "epochs")
        same = {k: v for k, v in options.items() if k.split(".")[-1] not in names or k == "model.name"}
        same = {"over": arm.over} | {k: v for k, v in same.items() if run_dir not in str(v)}
        group = next((members for facts, members in groups if _alike(facts, same)), None)
        if group is None:
            groups.append((same, [(fraction, arm)]))
        else:
            group.append((fraction, arm))
    return [sorted(members, key=lambda pair: pair[0]) for _, members in groups if len(members) > 1]


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configs are made of the same parts, and equal in all options that both have."""
    parts = [{key for key in config if key.endswith("_target_")} for config in (one, other)]
    return parts[0] == parts[1] and all(one[key] == other[key] for key in one.keys() & other.keys())


def data_efficiency(
    groups: Sequence[Sequence[tuple[float, Arm]]], split: str, metric: str, colours: Sequence[str], figure: "Figure"
) -> None:
    """A metric over the fraction of the training pictures."""
    axes = figure.subplots()
    for place, group in enumerate(groups):
        colour, line = _look(place, colours)
        known = [(fraction, estimate) for fraction, arm in group if (estimate := arm.estimate(split, metric))]
        axes.plot(
            [f for f, _ in known], [e["value"] for _, e in known], f"o{line}", color=colour, label=group[-1][1].name
        )
        for fraction, e in known:
            if e["low"] is not None:
                axes.plot([fraction, fraction], [e["low"], e["high"]], color=colour)
    axes.set(xscale="log", xlabel="fraction of the training pictures", ylabel=f"{split} {metric}")
    axes.set_xticks(sorted({fraction for group in groups for fraction, _ in group}), minor=False)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    figure.legend(loc="outside right center")


# -- the page ---------------------------------------------------------------------------------------------------


def read_spec(file: Path = SPEC) -> dict[str, Any]:
    """conf/dashboard.yaml, or another file with the same keys."""
    spec, known = read_yaml(file), read_yaml(SPEC)
    if not isinstance(spec, dict) or spec.keys() != known.keys():
        raise UserError(f"{file} must hold the keys {', '.join(known)}, as conf/dashboard.yaml does")
    return spec


def ablation(arms: Sequence[Arm], spec: dict[str, Any]) -> tuple[list[str], list[list[Cell]]]:
    """The ablation table: columns, and a row per arm."""
    split, metrics = spec["split"], spec["metrics"]
    columns = [metric.replace("_", " ") + (", %" if metric.endswith("accuracy") else "") for metric in metrics]
    rows: list[list[Cell]] = []
    for arm in arms:
        cells = [number(arm.estimate(split, metric), percent=metric.endswith("accuracy")) for metric in metrics]
        beside = [number(arm.estimate(split, "accuracy", head), percent=True, interval=False) for head in BESIDE]
        rows.append([arm.name, arm.head, *cells, *beside, len(arm.metrics)])
    return ["arm", "head", *columns, *BESIDE.values(), "runs"], rows


def matrices(arms: Sequence[Arm], split: str) -> tuple[list[str], list[list[Cell]], str, list[list[float | None]]]:
    """Confusion matrices of arms with the same classes in one table: columns, a row per label, caption, shade."""
    rows: list[list[Cell]] = []
    shade: list[list[float | None]] = []
    for arm in arms:
        first: list[Cell] = [arm.name, arm.head]
        for label, counts in zip(arm.classes, arm.confusion(split).tolist(), strict=True):
            rows.append([*first, label, *counts])
            shade.append([None, None, None, *shares(counts)])
            first = ["", ""]
    return ["arm", "head", "label ↓  decided →", *arms[0].classes], rows, "Counts over all runs of an arm.", shade


def build_page(arms: Sequence[Arm], studies: Sequence["optuna.Study"], spec: dict[str, Any]) -> Page:
    """Ablation table, forest plots, data efficiency, curves by arm, confusion matrices and sweeps."""
    split, count = spec["split"], sum(len(arm.metrics) for arm in arms)
    page = Page(spec["title"], f"{split} split; arms: {len(arms)}, runs: {count}, sweeps: {len(studies)}")
    page.heading("Ablation")
    page.table(*ablation(arms, spec), NOTE)
    for metric in spec["forest"]:
        draw = partial(forest, arms, split, metric, SERIES[0], INK)
        page.figure(plot(draw, height=0.9 + 0.3 * len(arms)), f"{metric}, 95 % intervals")
    if groups := by_fraction(arms):
        page.heading("Data efficiency")
        page.figure(plot(partial(data_efficiency, groups, split, spec["forest"][0], SERIES)), "Arms by data.fraction.")
    page.heading("Curves by arm")
    for title, family in families(arms, read_yaml(STUDY)).items():
        for quantity in spec["curves"]:
            draw = partial(curves, family, quantity, SERIES)
            page.figure(plot(draw), f"{quantity}, {title}: mean and range of an arm's runs")
    page.heading("Confusion matrices")
    for classes in dict.fromkeys(tuple(arm.classes) for arm in arms):
        columns, rows, caption, shade = matrices([arm for arm in arms if tuple(arm.classes) == classes], split)
        page.table(columns, rows, caption, shade=shade)
    for study in studies:
        best, names = ranked(study), study.metric_names or ["value"]
        params = list(dict.fromkeys(key for trial in best for key in trial.params))
        page.heading(f"Sweep {study.study_name}")
        rows = [[t.number, *t.values, *map(t.params.get, params)] for t in best[:10]]
        page.table(["trial", *names, *params], rows, f"The best of {len(study.trials)} trials, on validation")
        if importance := importance_of(study, 0):
            draw = partial(bars, importance, colour=SERIES[0], muted=MUTED)
            page.figure(plot(draw, height=0.8 + 0.3 * len(importance)), f"Importance for {names[0]}")
        if len(best) > 1:
            good = -(-len(best) // 5)
            draw = partial(parallel, best, params, names, good, colour=SERIES[0], muted=MUTED)
            page.figure(plot(draw), "Every completed trial is a line; coloured: the best fifth.")
    return page


# -- Weights & Biases -------------------------------------------------------------------------------------------


def build_wandb(spec: dict[str, Any], entity: str, project: str) -> tuple[Any, Any]:
    """Workspace and report of a project, as objects of wandb-workspaces; nothing is sent before their `save()`."""
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise UserError("--wandb needs wandb-workspaces: pip install 'facemask[wandb]'") from error

    split, sweep = spec["split"], spec["sweep"]
    columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(key)) for key in sweep["parameters"]]
    columns.append(wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(sweep["objective"])))
    panels: dict[str, list[Any]] = {
        "Ablation": [
            wr.BarPlot(title=f"{head}: {split} {metric}", metrics=[f"{split}/{head}/{metric}"], groupby="group")
            for metric in spec["metrics"]
            for head in spec["heads"]
        ],
        "Curves by arm": [
            wr.LinePlot(
                title=quantity,
                x="epoch",
                y=[quantity],
                groupby="group",
                groupby_aggfunc="mean",
                groupby_rangefunc="minmax",
                aggregate=True,
            )
            for quantity in spec["curves"]
        ],
        "Confusion matrices": [
            wr.CustomChart(
                query={"summaryTable": {"tableKey": f"{split}/confusion_matrix_table"}},
                chart_name="wandb/confusion_matrix/v1",
                chart_fields={"Actual": "Actual", "Predicted": "Predicted", "nPredictions": "nPredictions"},
                chart_strings={"title": f"{split}: label and decision"},
            )
        ],
        "Sweeps": [
            wr.ParallelCoordinatesPlot(columns=columns),
            wr.ParameterImportancePlot(with_respect_to=sweep["objective"]),
            *(wr.ScatterPlot(x=wr.Config(key), y=sweep["objective"]) for key in sweep["parameters"]),
        ],
    }
    sections = [ws.Section(name=name, panels=content, is_open=True) for name, content in panels.items()]
    workspace = ws.Workspace(entity=entity, project=project, name=spec["title"], sections=sections)
    blocks: list[Any] = [wr.TableOfContents(), wr.P(NOTE)]
    for name, content in panels.items():
        runs = wr.Runset(entity=entity, project=project, name="arms", groupby=["group"] if name != "Sweeps" else [])
        blocks += [wr.H1(name), wr.PanelGrid(runsets=[runs], panels=content)]
    return workspace, wr.Report(entity=entity, project=project, title=spec["title"], blocks=blocks)


def publish(spec: dict[str, Any], entity: str, project: str) -> list[str]:
    """Save workspace and report in an account; returns their addresses. Raises UserError where it refuses."""
    parts = build_wandb(spec, entity, project)
    try:
        for part in parts:
            part.save()
    except Exception as error:  # not logged in, no such entity, no network: W&B raises many kinds
        raise UserError(f"W&B took no dashboard for {entity}/{project} ({str(error).splitlines()[0]})") from error
    return [part.url for part in parts]
