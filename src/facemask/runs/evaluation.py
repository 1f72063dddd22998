"""What an evaluation adds to the metrics: calibration, risk and coverage, a threshold for given costs, worst groups;
and their page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from facemask.errors import UserError
from facemask.runs import calibration as of
from facemask.runs import predictions, report
from facemask.runs.metrics import scalar_metrics
from facemask.runs.page import SERIES, Cell, Page, plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS = ("head", "head_dist", "mean", "teacher")  # those that are calibrated; baselines are not
COVERAGES = (0.5, 0.8, 0.9, 0.95, 1.0)
SHOWN = 15


@dataclass(frozen=True)
class Cost:
    """What errors cost: a `positive` picture that is missed, and a false alarm."""

    positive: str
    miss: float
    alarm: float


def parse_cost(text: str, positive: str | None, classes: Sequence[str]) -> Cost:
    """`10:1`, false negative to false positive, and which class is positive (None: the last, as in the AUROC).

    Raises:
        UserError: no two positive numbers, or no such class.
    """
    positive = classes[-1] if positive is None else positive
    if positive not in classes:
        raise UserError(f"--positive {positive} is no class of the run: choose one of {', '.join(classes)}")
    try:
        miss, alarm = map(float, text.split(":"))
    except ValueError:
        miss = alarm = 0.0
    if not (0 < miss < np.inf and 0 < alarm < np.inf):
        raise UserError(f"--cost {text}: give what a false negative and a false positive cost, such as 10:1")
    return Cost(positive, miss, alarm)


def calibration_facts(
    frame: pd.DataFrame, classes: Sequence[str], temperatures: Mapping[str, float], resamples: int
) -> tuple[dict[str, dict[str, dict[str, Any]]], pd.DataFrame]:
    """{split: {head: temperature, ece, nll and brier before and after, aurc, risk at some coverages}}, and all
    risk-coverage curves one below the other: split, head, threshold, coverage, risk.

    Without a temperature there is no "after". The order of confidences, and with it risk and coverage, is that of
    calibrated probabilities (of raw ones without a temperature).
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    curves = []
    for split, part in frame.groupby("split", sort=False):
        labels, groups = of.class_indices(part, classes), part["group"].to_numpy()
        for head in (head for head in HEADS if head in predictions.heads(part)):
            logits = predictions.logits(part, head, classes)
            facts: dict[str, Any] = {"temperature": temperatures.get(head)}
            for name, temperature in (("before", 1.0), ("after", facts["temperature"])):
                if temperature is not None:
                    values = scalar_metrics(logits / temperature, labels, groups, resamples=resamples)
                    facts[name] = {metric: values[metric] for metric in ("ece", "nll", "brier")}
            confidence, wrong = (
                of.softmax(logits, facts["temperature"] or 1).max(axis=1),
                logits.argmax(axis=1) != labels,
            )
            facts["aurc"] = of.aurc_interval(confidence, wrong, groups, resamples)
            curve = of.risk_coverage(confidence, wrong)
            at = [curve[curve["coverage"] >= least - 1e-12].head(1) for least in COVERAGES]
            facts["risk_at_coverage"] = pd.concat(at).to_dict("records")
            found.setdefault(str(split), {})[head] = facts
            curves.append(curve.assign(split=split, head=head))
    return found, pd.concat(curves, ignore_index=True)[["split", "head", "threshold", "coverage", "risk"]]


def cost_facts(
    val: pd.DataFrame, part: pd.DataFrame, classes: Sequence[str], head: str, temperature: float, cost: Cost
) -> dict[str, Any]:
    """The threshold that costs least on the validation pictures, and what it costs on these and on others."""
    index = list(classes).index(cost.positive)

    def scores(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        p = of.softmax(predictions.logits(frame, head, classes), temperature)[:, index]
        return p, (frame["label"] == cost.positive).to_numpy()

    facts: dict[str, Any] = {"head": head, "positive": cost.positive, "miss": cost.miss, "false_alarm": cost.alarm}
    if len(set(scores(val)[1])) < 2:
        raise UserError(f"the validation pictures are not both {cost.positive} and something else: no threshold")
    best = of.cost_threshold(*scores(val), cost.miss, cost.alarm)
    for name, threshold in (("chosen", best), ("one half", 0.5)):
        facts[name] = {
            "validation": of.at_threshold(*scores(val), threshold, cost.miss, cost.alarm),
            "evaluated": of.at_threshold(*scores(part), threshold, cost.miss, cost.alarm),
        }
    return facts


# -- the page ---------------------------------------------------------------------------------------------------


def build_page(
    title: str,
    frame: pd.DataFrame,
    classes: Sequence[str],
    numbers: Mapping[str, Any],
    summary: Mapping[str, Any],
    facts: Mapping[str, Any],
    curves: pd.DataFrame,
    worst: pd.DataFrame,
    pictures: Callable[[str], np.ndarray] | None,
) -> tuple[Page, Page]:
    """The page of an evaluation, and the part of it that a terminal shows beside `report.terminal_table`.

    Args:
        frame: predictions; numbers: what `facemask.runs.metrics.evaluate` made of them.
        summary: the run's, with `test_opened` and `notes` of this evaluation.
        facts: evaluation.json; curves: see `calibration_facts`; worst: what `worst_groups` returned.
        pictures: gives the pixels of a picture for its id.
    """
    chosen, split = summary["reported_head"], facts["split"]
    part = frame[frame["split"] == split]
    page = Page(title, report.lead(numbers, chosen))
    report.results(page, numbers, summary, chosen)
    report.confusion(page, numbers, chosen, classes)
    report.per_class(page, numbers, chosen)
    first = len(page.blocks)
    if "drop" in facts:
        _drop(page, facts["drop"], facts["against"])
    _calibration(page, part, split, classes, facts["calibration"][split], chosen)
    _coverage(page, curves[curves["split"] == split], facts["calibration"][split])
    if "cost" in facts:
        _threshold(page, facts["cost"], split)
    _groups(page, worst, numbers[split][chosen]["accuracy"])
    shown = Page(title, page.lead, page.blocks[first:])
    report.worst(page, frame, chosen, classes, pictures)
    page.heading("Provenance")
    page.code(facts["command"])
    return page, shown


def _drop(page: Page, drop: Mapping[str, Any], split: str) -> None:
    page.heading("Drop")
    rows: list[list[Cell]] = [
        [
            report.title(head, list(drop)),
            *(report.number(entry[m], percent=True) for m in ("accuracy", "balanced_accuracy")),
        ]
        for head, entry in drop.items()
    ]
    caption = f"points lost from the run's own {split} pictures to these; 95 % intervals of a difference, unpaired"
    page.table(["", "of accuracy", "of balanced accuracy"], rows, caption)


def _calibration(
    page: Page, part: pd.DataFrame, split: str, classes: Sequence[str], facts: Mapping[str, Any], chosen: str
) -> None:
    page.heading("Calibration")
    rows: list[list[Cell]] = []
    for head, entry in facts.items():
        temperature = "–" if entry["temperature"] is None else f"{entry['temperature']:.3f}"
        raw, after = entry["before"], entry.get("after", {})
        ece = [report.number(part.get("ece")) for part in (raw, after)]
        nll = [report.number(part.get("nll"), interval=False) for part in (raw, after)]
        rows.append([report.title(head, list(facts)), temperature, *ece, *nll])
    page.table(["", "temperature", "ECE before", "ECE after", "NLL before", "NLL after"], rows, split)
    temperature = facts[chosen]["temperature"]
    if temperature is None:
        page.note("The run keeps no validation predictions, so no temperature could be fitted.")
    else:
        page.text(
            "The temperature was fitted on the run's stored validation predictions and on nothing else (Guo et al. "
            "2017). It changes no decision. On the validation split itself the figures after are of the pictures that "
            "the temperature was fitted on."
        )
    labels, logits = of.class_indices(part, classes), predictions.logits(part, chosen, classes)
    lines = {"before": (logits, labels)} | ({"after": (logits / temperature, labels)} if temperature else {})
    caption = f"Reliability on {split}, {report.title(chosen, list(facts))}, in the ECE's bins."
    page.figure(report.reliability(lines), caption)


def _coverage(page: Page, curves: pd.DataFrame, facts: Mapping[str, Any]) -> None:
    page.heading("Risk and coverage")

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        for (head, curve), colour in zip(curves.groupby("head", sort=False), SERIES, strict=False):
            name = report.title(str(head), list(facts))
            axes.step(100 * curve["coverage"], 100 * curve["risk"], color=colour, where="post", label=name)
        axes.set(xlabel="pictures answered, %", ylabel="errors among them, %", xlim=(0, 100.5))
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper left")

    page.figure(plot(draw, 5.8, 3.0), "Errors among the most confident pictures, silent on the others.")
    rows: list[list[Cell]] = []
    for head, entry in facts.items():
        cells = [f"{100 * at['risk']:.1f} ({at['threshold']:.3f})" for at in entry["risk_at_coverage"]]
        rows.append([report.title(head, list(facts)), *cells, report.number(entry["aurc"])])
    columns = ["", *(f"{100 * coverage:.0f} %" for coverage in COVERAGES), "AURC"]
    page.table(
        columns, rows, "errors in % where so many pictures are answered, and the probability from which on they are"
    )


def _threshold(page: Page, facts: Mapping[str, Any], split: str) -> None:
    page.heading("Threshold for given costs")
    positive = facts["positive"]
    page.text(
        f"Missing a {positive} costs {facts['miss']:g}, a false {positive} {facts['false_alarm']:g}. A picture is "
        f"called {positive} where its calibrated probability reaches the threshold. The threshold was chosen on the "
        f"run's validation predictions; {split} says what it costs elsewhere."
    )
    rows: list[list[Cell]] = []
    for name in ("chosen", "one half"):
        for where, title in (("validation", "validation"), ("evaluated", split)):
            at = facts[name][where]
            missed, false = f"{at['misses']} of {at['of_positives']}", f"{at['false_alarms']} of {at['of_negatives']}"
            rows.append([name, f"{at['threshold']:.3f}", title, missed, false, f"{at['cost_per_picture']:.4f}"])
    columns = ["threshold", "p", "pictures", f"{positive} missed", f"false {positive}", "cost per picture"]
    page.table(columns, rows, strong=[1])


def _groups(page: Page, worst: pd.DataFrame, accuracy: Mapping[str, Any]) -> None:
    page.heading("Worst groups")
    if worst.empty:
        return page.text(f"No attribute has a value of {of.LEAST} pictures, and another value.")
    rows: list[list[Cell]] = []
    for row in worst.head(SHOWN).to_dict("records"):
        entry = {"value": row["accuracy"], "low": row["low"], "high": row["high"]}
        shown = report.number(entry, percent=True)
        rows.append([row["attribute"], row["value"], row["n"], shown, "yes" if row["below"] else ""])
    caption = (
        f"the {min(SHOWN, len(worst))} lowest of {len(worst)}; all pictures: {report.number(accuracy, percent=True)}"
    )
    page.table(["attribute", "value", "pictures", "accuracy, %", "below the rest"], rows, caption)
    page.text(
        "The lowest of many groups is low by chance, too: “below the rest” says that the interval lies below the "
        "accuracy of all pictures even at 5 % shared among all rows (Bonferroni). Values of fewer than "
        f"{of.LEAST} pictures are not ranked, but put together. Numbers are cut at their quartiles. All rows are in "
        "groups.csv."
    )
