"""What a sweep found: a table in the terminal, and one page with its figures, which lie beside it as PNG."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from facemask.runs.page import MUTED, SERIES, Cell, Page, plot, text_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[["Figure", str, str], None]  # figure, colour, muted colour


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """Completed trials, the best first; with several objectives those of the Pareto front come first."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    front = {trial.number for trial in study.best_trials} if complete else set()
    if len(study.directions) > 1:
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
    front = len(study.best_trials) if best else 0
    console.print(text_table(columns, rows, strong=range(front)))

    counts = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    said = ", ".join(f"{count} {state.name.lower()}" for state, count in counts.items() if count)
    page = Page(f"Sweep {study.study_name}", f"{len(trials)} trials looked at on the validation split: {said}.")

    def figure(heading: str, name: str, draw: Draw, height: float, caption: str) -> None:
        from matplotlib.figure import Figure

        page.heading(heading)
        page.figure(plot(lambda empty: draw(empty, SERIES[0], MUTED), height=height), caption)
        png = Figure(figsize=(7.6, height), layout="constrained")
        draw(png, "C0", "0.6")
        png.savefig(folder / f"{name}.png", dpi=150)

    page.heading("Trials")
    page.table(columns, rows, "The best first; a pruned trial has the value it was pruned at.", strong=range(front))
    for index, name in enumerate(names):
        if importance := importance_of(study, index):
            figure(f"Importance for {name}", f"importance{index or ''}", partial(bars, importance),
                   0.6 + 0.3 * len(importance), "Share of the variance (fANOVA) that is due to a parameter, if every "
                   "completed trial has it.")  # fmt: skip
        if best:
            figure(f"Slices of {name}", f"slices{index or ''}", partial(_slices, best, params, index, name),
                   2.4 * math.ceil(len(params) / 3), "Every completed trial, by one parameter at a time.")  # fmt: skip
    if len(best) > 1:
        good = front if len(names) > 1 else math.ceil(len(best) / 5)
        figure("Parallel coordinates", "parallel", partial(parallel, best, params, names, good), 3.2,
               "Each line a completed trial, each axis the range of a parameter or of a value; coloured: "
               + ("the Pareto front." if len(names) > 1 else "the best fifth."))  # fmt: skip
    if len(names) > 1 and best:
        figure("Pareto front", "pareto", partial(_pareto, best, front, names), 3.6,
               "Coloured: trials that no other one beats in all objectives.")  # fmt: skip
    return page.write(folder / "sweep.html")


def _row(trial: FrozenTrial, objectives: int, params: Sequence[str]) -> list[Cell]:
    pruned = trial.state == TrialState.PRUNED and trial.intermediate_values
    values = trial.values or ([trial.intermediate_values[max(trial.intermediate_values)]] if pruned else [])
    seconds = trial.duration.total_seconds() if trial.duration else None
    facts = trial.user_attrs.get("kills"), trial.user_attrs.get("reason", "")[:200]
    shown = [*(values or [None] * objectives), *map(trial.params.get, params)]
    return [trial.number, trial.state.name.lower(), *shown, seconds, *facts]


def importance_of(study: optuna.Study, index: int) -> dict[str, float]:
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    try:
        return optuna.importance.get_param_importances(
            study, evaluator=evaluator, target=lambda trial: trial.values[index]
        )
    except (ValueError, RuntimeError):  # fewer than two completed trials, or all alike
        return {}


def bars(importance: dict[str, float], figure: "Figure", colour: str, muted: str) -> None:
    axes = figure.subplots()
    axes.barh(list(importance)[::-1], list(importance.values())[::-1], color=colour)
    axes.set_xlim(0, 1)


def _slices(
    best: list[FrozenTrial], params: Sequence[str], index: int, name: str, figure: "Figure", colour: str, muted: str
) -> None:
    from matplotlib.ticker import NullFormatter

    grid = figure.subplots(math.ceil(len(params) / 3), 3, squeeze=False, sharey=True)
    for axes in grid.flat[len(params) :]:
        axes.set_visible(False)
    for key, axes in zip(params, grid.flat, strict=False):
        with_it = [trial for trial in best if key in trial.params]
        axes.scatter([t.params[key] for t in with_it], [t.values[index] for t in with_it], s=14, color=colour)
        axes.set_title(key)
        dist: Any = with_it[0].distributions[key] if with_it else None
        if hasattr(dist, "low"):
            axes.set_xscale("log" if dist.log else "linear")
            axes.set_xlim(dist.low, dist.high)
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.collections[0].set_clip_on(False)  # trials at an end of the range are seen whole
    for axes in grid[:, 0]:
        axes.set_ylabel(name)


def _position(trial: FrozenTrial, key: str) -> float:
    """Of a trial's parameter on its axis, from 0 to 1; nan where the trial has none."""
    if key not in trial.params:
        return math.nan
    dist: Any = trial.distributions[key]
    if hasattr(dist, "choices"):
        return dist.choices.index(trial.params[key]) / max(1, len(dist.choices) - 1)
    low, high, value = (math.log(x) if dist.log else x for x in (dist.low, dist.high, trial.params[key]))
    return (value - low) / ((high - low) or 1)


def parallel(
    best: list[FrozenTrial],
    params: Sequence[str],
    names: Sequence[str],
    good: int,
    figure: "Figure",
    colour: str,
    muted: str,
) -> None:
    axes = figure.subplots()
    ends = [(min(column), max(column)) for column in zip(*(trial.values for trial in best), strict=True)]
    for place, trial in reversed(list(enumerate(best))):
        values = [(v - low) / ((high - low) or 1) for v, (low, high) in zip(trial.values, ends, strict=True)]
        heights, strong = [*(_position(trial, key) for key in params), *values], place < good
        axes.plot(heights, color=colour if strong else muted, alpha=0.9 if strong else 0.4, marker=".", lw=1.2)
    axes.set_xticks(range(len(params) + len(names)), [*params, *names], rotation=20, ha="right")
    axes.set_yticks([])


def _pareto(
    best: list[FrozenTrial], front: int, names: Sequence[str], figure: "Figure", colour: str, muted: str
) -> None:
    axes = figure.subplots()
    for part, shade in ((best[front:], muted), (best[:front], colour)):
        axes.scatter([trial.values[0] for trial in part], [trial.values[1] for trial in part], s=22, color=shade)
    axes.set(xlabel=names[0], ylabel=names[1])
