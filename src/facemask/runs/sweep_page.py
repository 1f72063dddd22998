"""What a sweep found: a table in the terminal, and one page with its figures, which lie beside it as PNG."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from facemask.runs.page import MUTED, SERIES, Cell, Page, format_cell, plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[["Figure", Sequence[str], str], None]  # figure, colours of series, muted colour


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """Completed trials, the best first; with several objectives those of the Pareto front come first."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if len(study.directions) > 1:
        front = {trial.number for trial in study.best_trials}
        return sorted(complete, key=lambda trial: (trial.number not in front, trial.number))
    sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
    return sorted(complete, key=lambda trial: (sign * trial.values[0], trial.number))


def show(study: optuna.Study, folder: Path, console: Console) -> Path:
    """Print the trials and write `folder`/sweep.html and its figures as PNG; returns the page."""
    names = study.metric_names or [f"objective {number}" for number in range(len(study.directions))]
    best = ranked(study)
    trials = [*best, *(trial for trial in study.get_trials(deepcopy=False) if trial.state != TrialState.COMPLETE)]
    params = list(dict.fromkeys(key for trial in trials for key in trial.params))
    columns = ["trial", "state", *names, *params, "seconds", "kills", "reason"]
    rows = [_row(trial, len(names), params) for trial in trials]
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(format_cell(cell) for cell in row), style="bold" if row is rows[0] and best else None)
    console.print(table)

    counts = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    said = ", ".join(f"{count} {state.name.lower()}" for state, count in counts.items() if count)
    page = Page(f"Sweep {study.study_name}", f"{len(trials)} trials looked at on the validation split: {said}.")
    page.heading("Trials")
    strong = [number for number, trial in enumerate(trials) if best and trial in study.best_trials]
    page.table(columns, rows, "The best first; a pruned trial has the value it was pruned at.", strong=strong)
    for index, name in enumerate(names):
        importance = _importance(study, index)
        if importance:
            page.heading(f"Importance for {name}")
            draw = _bars(importance)
            _figure(page, folder, f"importance{index or ''}", draw, 0.6 + 0.3 * len(importance), "Share of the "
                    "variance (fANOVA) that is due to a parameter, if every completed trial has it.")  # fmt: skip
        if best:
            page.heading(f"Slices of {name}")
            height = 2.4 * math.ceil(len(params) / 3)
            _figure(page, folder, f"slices{index or ''}", _slices(best, params, index, name), height,
                    "Every completed trial, by one parameter at a time.")  # fmt: skip
    if len(best) > 1:
        page.heading("Parallel coordinates")
        _figure(page, folder, "parallel", _parallel(best, params, names), 3.2,
                "Each line a completed trial, each axis the range of a parameter or of a "
                "value; coloured: the best fifth.")  # fmt: skip
    if len(names) > 1 and best:
        page.heading("Pareto front")
        front = {trial.number for trial in study.best_trials}
        _figure(page, folder, "pareto", _pareto(best, front, names), 3.6, "Coloured: trials that no other one beats "
                "in all objectives.")  # fmt: skip
    return page.write(folder / "sweep.html")


def _row(trial: FrozenTrial, objectives: int, params: Sequence[str]) -> list[Cell]:
    pruned = trial.state == TrialState.PRUNED and trial.intermediate_values
    values = trial.values or ([trial.intermediate_values[max(trial.intermediate_values)]] if pruned else [])
    return [
        trial.number,
        trial.state.name.lower(),
        *(values or [None] * objectives),
        *(trial.params.get(key) for key in params),
        trial.duration.total_seconds() if trial.duration else None,
        trial.user_attrs.get("kills"),
        trial.user_attrs.get("reason", "")[:200],
    ]


def _importance(study: optuna.Study, index: int) -> dict[str, float]:
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        return optuna.importance.get_param_importances(
            study, evaluator=evaluator, target=lambda trial: trial.values[index]
        )
    except (ValueError, RuntimeError):  # fewer than two completed trials, or all alike
        return {}


def _figure(page: Page, folder: Path, name: str, draw: Draw, height: float, caption: str) -> None:
    from matplotlib.figure import Figure

    page.figure(plot(lambda figure: draw(figure, SERIES, MUTED), height=height), caption)
    figure = Figure(figsize=(7.6, height), layout="constrained")
    draw(figure, [f"C{number}" for number in range(6)], "0.6")
    figure.savefig(folder / f"{name}.png", dpi=150)


def _bars(importance: dict[str, float]) -> Draw:
    def draw(figure: "Figure", series: Sequence[str], muted: str) -> None:
        axes = figure.subplots()
        axes.barh(list(importance)[::-1], list(importance.values())[::-1], color=series[0])
        axes.set_xlim(0, 1)

    return draw


def _slices(best: list[FrozenTrial], params: Sequence[str], index: int, name: str) -> Draw:
    def draw(figure: "Figure", series: Sequence[str], muted: str) -> None:
        grid = figure.subplots(math.ceil(len(params) / 3), 3, squeeze=False, sharey=True)
        for number, axes in enumerate(grid.flat):
            if number >= len(params):
                axes.set_visible(False)
                continue
            key = params[number]
            with_it = [trial for trial in best if key in trial.params]
            axes.scatter([t.params[key] for t in with_it], [t.values[index] for t in with_it], s=14, color=series[0])
            axes.set_title(key)
            dist: Any = with_it[0].distributions[key] if with_it else None
            if hasattr(dist, "low"):
                axes.set_xscale("log" if dist.log else "linear")
                axes.set_xlim(dist.low, dist.high)
            if number % 3 == 0:
                axes.set_ylabel(name)

    return draw


def _parallel(best: list[FrozenTrial], params: Sequence[str], names: Sequence[str]) -> Draw:
    def position(trial: FrozenTrial, key: str) -> float:
        if key not in trial.params:
            return math.nan
        dist: Any = trial.distributions[key]
        if hasattr(dist, "choices"):
            return dist.choices.index(trial.params[key]) / max(1, len(dist.choices) - 1)
        low, high, value = (math.log(x) if dist.log else x for x in (dist.low, dist.high, trial.params[key]))
        return (value - low) / ((high - low) or 1)

    def draw(figure: "Figure", series: Sequence[str], muted: str) -> None:
        axes = figure.subplots()
        ends = [(min(column), max(column)) for column in zip(*(trial.values for trial in best), strict=True)]
        for place, trial in reversed(list(enumerate(best))):
            values = [(v - low) / ((high - low) or 1) for v, (low, high) in zip(trial.values, ends, strict=True)]
            good = place < math.ceil(len(best) / 5)
            heights = [*(position(trial, key) for key in params), *values]
            axes.plot(heights, color=series[0] if good else muted, alpha=0.9 if good else 0.4, marker=".", lw=1.2)
        axes.set_xticks(range(len(params) + len(names)), [*params, *names], rotation=20, ha="right")
        axes.set_yticks([])

    return draw


def _pareto(best: list[FrozenTrial], front: set[int], names: Sequence[str]) -> Draw:
    def draw(figure: "Figure", series: Sequence[str], muted: str) -> None:
        axes = figure.subplots()
        for trial in best:
            on_front = trial.number in front
            axes.scatter(
                trial.values[0], trial.values[1], s=22, color=series[0] if on_front else muted, zorder=2 + on_front
            )
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])

    return draw
