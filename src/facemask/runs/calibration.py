"""How far to trust a probability, and where to draw the line: temperature, risk and coverage, costs, worst groups.

Pure functions of logits, labels and groups; no torch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from facemask.runs import predictions

LEAST = 20  # pictures of a group that is ranked among the worst


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """softmax(logits / temperature) over the classes, float64 (N, C)."""
    from scipy import special

    return special.softmax(np.asarray(logits, dtype=np.float64) / temperature, axis=-1)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that calibrates logits best (Guo et al. 2017, "On calibration of modern neural networks").

    Minimises the cross entropy of softmax(logits / T) for T in [0.05, 20]. The targets are not 1 and 0 but Platt's
    (1999): 1 - 1/(n + 2) for a label that n pictures have. A model without an error on few pictures would else be
    called certain without bounds (T -> 0).

    Args:
        logits: shape (N, C), float64.
        labels: class indices, shape (N,).
    """
    from scipy import optimize, special

    pictures, classes = logits.shape
    rest = 1 / (np.bincount(labels, minlength=classes)[labels] + 2)
    targets = np.repeat(rest[:, None] / (classes - 1), classes, axis=1)
    targets[np.arange(pictures), labels] = 1 - rest

    def cross_entropy(log_temperature: float) -> float:
        return -float((targets * special.log_softmax(logits / np.exp(log_temperature), axis=1)).sum())

    found = optimize.minimize_scalar(cross_entropy, bounds=(np.log(0.05), np.log(20)), method="bounded")
    return float(np.exp(found.x))


def temperatures(frame: pd.DataFrame, classes: Sequence[str]) -> dict[str, float]:
    """Temperature of every head of a predictions table, fitted on its validation rows; {} where it has none."""
    val = frame[frame["split"] == "val"]
    if val.empty:
        return {}
    labels = class_indices(val, classes)
    return {head: fit_temperature(predictions.logits(val, head, classes), labels) for head in predictions.heads(val)}


def class_indices(frame: pd.DataFrame, classes: Sequence[str]) -> np.ndarray:
    """Labels of a predictions table as class indices, int64 (N,)."""
    return frame["label"].map({name: i for i, name in enumerate(classes)}).to_numpy(dtype=np.int64)


def risk_coverage(confidence: np.ndarray, wrong: np.ndarray, weights: np.ndarray | None = None) -> pd.DataFrame:
    """Share of errors among the pictures that a model answers when it is silent below a threshold.

    Geifman & El-Yaniv 2017, "Selective classification for deep neural networks". Pictures of equal confidence are
    answered together.

    Args:
        confidence: probability of the decision (N,); wrong: whether it is an error (N,).
        weights: how often each picture counts (N,); None: once.

    Returns: `threshold`, `coverage`, `risk`, from the least to full coverage.
    """
    order = np.argsort(-confidence, kind="stable")
    counts = np.ones(len(wrong)) if weights is None else weights[order]
    answered, errors = counts.cumsum(), (counts * wrong[order]).cumsum()
    last = np.flatnonzero(np.append(np.diff(confidence[order]) != 0, True) & (answered > 0))
    columns = {"threshold": confidence[order], "coverage": answered / answered[-1]}
    columns["risk"] = np.divide(errors, answered, out=np.zeros(len(errors)), where=answered > 0)
    return pd.DataFrame(columns).iloc[last].reset_index(drop=True)


def aurc(curve: pd.DataFrame) -> float:
    """Area under a risk-coverage curve: the mean risk over all coverages, 0 at best."""
    return float((curve["risk"] * np.diff(curve["coverage"], prepend=0)).sum())


def aurc_interval(
    confidence: np.ndarray, wrong: np.ndarray, groups: np.ndarray, resamples: int, seed: int = 0
) -> dict[str, Any]:
    """AURC with the percentile interval of a cluster bootstrap over groups, as in `facemask.runs.metrics`."""
    group, names = pd.factorize(groups)
    rng = np.random.default_rng(seed)
    drawn = (np.bincount(rng.integers(0, len(names), len(names)), minlength=len(names)) for _ in range(resamples))
    values = [aurc(risk_coverage(confidence, wrong, counts[group])) for counts in drawn]
    low, high = np.percentile(values, [2.5, 97.5])
    value = aurc(risk_coverage(confidence, wrong))
    return {"value": value, "low": float(low), "high": float(high), "interval": "cluster bootstrap"}


def cost_threshold(probability: np.ndarray, positive: np.ndarray, miss: float, alarm: float) -> float:
    """The threshold of the probability of the positive class at which errors cost least on these pictures.

    Midway between two pictures' probabilities; of several that cost the same, the one next to alarm / (miss + alarm),
    which is best where probabilities are right (Elkan 2001, "The foundations of cost-sensitive learning").

    Args:
        probability: of the positive class (N,); a picture is called positive from the threshold on.
        positive: whether it is (N,).
        miss, alarm: cost of a false negative and of a false positive.
    """
    values = np.unique(probability)
    candidates = np.concatenate([[0.0], (values[1:] + values[:-1]) / 2, [1.0 if values[-1] < 1 else np.inf]])
    misses = np.searchsorted(np.sort(probability[positive]), candidates, side="left")
    alarms = (~positive).sum() - np.searchsorted(np.sort(probability[~positive]), candidates, side="left")
    costs = miss * misses + alarm * alarms
    best = candidates[costs <= costs.min() + 1e-12 * max(miss, alarm)]
    return float(best[np.abs(best - alarm / (miss + alarm)).argmin()])


def at_threshold(
    probability: np.ndarray, positive: np.ndarray, threshold: float, miss: float, alarm: float
) -> dict[str, Any]:
    """Misses, false alarms and their cost per picture where a picture is called positive from a threshold on."""
    called = probability >= threshold
    misses, alarms = int((positive & ~called).sum()), int((~positive & called).sum())
    return {
        "threshold": threshold,
        "misses": misses,
        "of_positives": int(positive.sum()),
        "false_alarms": alarms,
        "of_negatives": int((~positive).sum()),
        "cost_per_picture": (miss * misses + alarm * alarms) / len(positive),
    }


def worst_groups(
    correct: np.ndarray, groups: np.ndarray, attributes: Mapping[str, pd.Series], least: int = LEAST
) -> pd.DataFrame:
    """Accuracy of the pictures with each value of each attribute, the lowest first.

    Numbers of more than eight values are cut at their quartiles. Values of fewer than `least` pictures are not ranked:
    they are one row, "fewer than ... each". Intervals: see `accuracy_interval`. The worst of many looks worse than it
    is, so `below` says whether its interval, at 5 % divided by the number of rows (Bonferroni), lies below the accuracy
    of all pictures.

    Args:
        correct: (N,); groups: what belongs together (N,); attributes: name -> value of each picture (N,), "" unknown.

    Returns: attribute, value, n, groups, accuracy, low, high, below.
    """
    rows: list[dict[str, Any]] = []
    for name, column in attributes.items():
        values = _binned(column)
        counts = values[values != ""].value_counts()
        ranked, small = counts.index[counts >= least], counts.index[counts < least]
        if len(ranked) == 0 or len(counts) < 2:
            continue
        rows += [{"attribute": name, "value": value, "rows": (values == value).to_numpy()} for value in ranked]
        if len(small):
            title = f"{len(small)} value(s) of fewer than {least} pictures each"
            rows.append({"attribute": name, "value": title, "rows": values.isin(small).to_numpy()})
    for row in rows:
        mask = row.pop("rows")
        row |= accuracy_interval(correct[mask], groups[mask])
        row["below"] = accuracy_interval(correct[mask], groups[mask], level=0.05 / len(rows))["high"] < correct.mean()
    table = pd.DataFrame(rows, columns=["attribute", "value", "n", "groups", "accuracy", "low", "high", "below"])
    return table.sort_values(["accuracy", "high", "attribute"], ignore_index=True)


def accuracy_interval(correct: np.ndarray, groups: np.ndarray, level: float = 0.05) -> dict[str, Any]:
    """Accuracy with Wilson's interval at the number of independent pictures: all, divided by the design effect of the
    groups (Korn & Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data"); without an error, or without a success, the number of groups."""
    from statsmodels.stats.proportion import proportion_confint

    n, value = len(correct), float(correct.mean())
    sums = pd.Series(correct - value).groupby(groups).sum()
    trials = float(len(sums))
    if 0 < value < 1:
        trials = n / max(1.0, (sums**2).sum() / (n * value * (1 - value)))
    low, high = proportion_confint(value * trials, trials, alpha=level, method="wilson")
    return {"n": n, "groups": len(sums), "accuracy": value, "low": float(low), "high": float(high)}


def _binned(column: pd.Series) -> pd.Series:
    """Values as text, "" where unknown; numbers of more than eight values become their quarters."""
    if pd.api.types.is_numeric_dtype(column) and column.nunique() > 8:
        quarters = pd.qcut(column, 4, duplicates="drop", precision=3)
        return quarters.map(lambda part: f"{part.left:g} to {part.right:g}").astype(object).fillna("")
    return column.astype(object).fillna("").astype(str)
