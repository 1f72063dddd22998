"""Every metric this project reports, with 95 % intervals, from the predictions table; needs no torch.

Conventions, with p = softmax(logits) and the decision = argmax (ties go to the lower class index):

- ``accuracy``; ``balanced_accuracy``: mean recall of the classes present (scikit-learn's); ``macro_f1``: mean
  F1 of the classes that occur as label or decision.
- ``auroc``: two classes: class index 1 is the positive one. More: unweighted mean of one-vs-rest over the
  classes present. Pictures are ranked by log-odds, so saturated softmax values make no false ties.
- ``nll``: mean of -log p[label], in nats.
- ``brier``: sum over classes, mean over pictures, range [0, 2]: ``sklearn.metrics.brier_score_loss`` with
  ``scale_by_half=False`` (for two classes twice the figure some report).
- ``ece``: 15 equal-width bins of the top-label confidence, L1, as torchmetrics'
  ``MulticlassCalibrationError`` has it (bins closed on the left; a confidence of exactly 1 has its own bin).

Intervals: pictures of one group (near-duplicates, one person) are not independent, so whole groups are drawn.

- accuracy, where every group has one picture: Wilson's score interval.
- otherwise, and for every other metric: cluster bootstrap over groups, percentile, 1,000 resamples (Field &
  Welsh 2007, "Bootstrapping clustered data"). All heads of a split see the same resamples. Below some 30
  groups it is too narrow.
- accuracy of 0 or 1 with larger groups, where all resamples agree: Wilson's with each group as one trial.
- ``ece``: the basic (reflected) bootstrap, held to [0, 1] and widened to contain the value. Resampling adds
  to the upward bias of the ECE, so a percentile interval may lie wholly above the value it is for.
  Still, of a well calibrated model the interval holds the true ECE less often than 95 % (simulated: 59 % at
  an ECE near 0, 87 % at 0.05, 93 % at 0.1; percentile: 0, 67, 87 %; 400 pictures).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from facemask.errors import UserError
from facemask.runs import predictions

SCALARS = ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "nll", "brier", "ece")
BINS = 15
Z = 1.959963984540054  # the normal distribution's 97.5 % quantile
SPLIT_ORDER = ("train", "val", "test")


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Quotient, nan where the denominator is 0."""
    shape = np.broadcast_shapes(np.shape(numerator), np.shape(denominator))
    return np.divide(numerator, denominator, out=np.full(shape, np.nan), where=denominator != 0)


def _mean_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis without the nans; nan where there is nothing else."""
    defined = np.isfinite(values)
    return _ratio(np.where(defined, values, 0.0).sum(axis=-1), defined.sum(axis=-1))


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log p[label] of every picture, shape (N,), in nats."""
    return np.abs(_log_softmax(logits)[np.arange(len(labels)), labels])  # log p <= 0, and never -0.0


def _bins(confidence: np.ndarray) -> np.ndarray:
    return np.digitize(confidence, np.linspace(0, 1, BINS + 1)) - 1


def reliability(logits: np.ndarray, labels: np.ndarray) -> list[dict[str, float]]:
    """The bins of the ECE that hold a picture: lower edge, count, mean confidence, accuracy."""
    probabilities = np.exp(_log_softmax(logits))
    confidence, correct = probabilities.max(axis=1), logits.argmax(axis=1) == labels
    index = _bins(confidence)
    return [
        {
            "low": float(b / BINS),
            "count": int((index == b).sum()),
            "confidence": float(confidence[index == b].mean()),
            "accuracy": float(correct[index == b].mean()),
        }
        for b in np.unique(index)
    ]


def confusion_matrix(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Counts, shape (C, C): row = label, column = decision."""
    classes = logits.shape[1]
    return np.bincount(labels * classes + logits.argmax(axis=1), minlength=classes**2).reshape(classes, classes)


def per_class(confusion: np.ndarray) -> list[dict[str, float | int | None]]:
    """Precision, recall, F1 and support of each class; None where a quotient is 0/0."""
    hits, support, decided = np.diag(confusion), confusion.sum(axis=1), confusion.sum(axis=0)
    columns = {
        "precision": _ratio(hits, decided),
        "recall": _ratio(hits, support),
        "f1": _ratio(2 * hits, support + decided),
    }
    return [
        {name: _jsonable(values[c]) for name, values in columns.items()} | {"support": int(support[c])}
        for c in range(len(confusion))
    ]


def _weighted_auroc(score: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve for each row of picture weights (B, N): the weighted Mann-Whitney statistic.

    A pair of a positive and a negative picture counts 1 where the positive one scores higher and 1/2 where
    they tie, times both weights.
    """
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])
    weights = weights[:, order]
    positives = weights * positive[order]
    if len(starts) < len(order):
        weights = np.add.reduceat(weights, starts, axis=1)
        positives = np.add.reduceat(positives, starts, axis=1)
    negatives = weights - positives
    below = np.cumsum(negatives, axis=1)
    wins = np.einsum("bn,bn->b", positives, below) - np.einsum("bn,bn->b", positives, negatives) / 2
    return _ratio(wins, positives.sum(axis=1) * negatives.sum(axis=1))


class Scalars:
    """All scalar metrics as functions of how often each group was drawn."""

    def __init__(self, logits: np.ndarray, labels: np.ndarray, group: np.ndarray) -> None:
        n, classes = logits.shape
        log_p = _log_softmax(logits)
        p = np.exp(log_p)
        label, decision = np.eye(classes)[labels], np.eye(classes)[logits.argmax(axis=1)]
        confidence = p.max(axis=1)
        gap = np.zeros((n, BINS + 1))
        gap[np.arange(n), _bins(confidence)] = confidence - (label * decision).sum(axis=1)
        brier = ((p - label) ** 2).sum(axis=1)
        sums = np.column_stack([label, decision, label * decision, losses(logits, labels), brier, gap])
        self.group_sums = np.zeros((group.max() + 1, sums.shape[1]))
        np.add.at(self.group_sums, group, sums)
        self.group, self.label, self.classes = group, label > 0, classes
        others = np.stack([np.logaddexp.reduce(np.delete(logits, c, 1), axis=1) for c in range(classes)], axis=1)
        self.log_odds = logits - others

    def __call__(self, draws: np.ndarray) -> dict[str, np.ndarray]:
        """``draws``: how often each group was drawn, shape (B, G). Values: shape (B,), nan if undefined."""
        c = self.classes
        sums = draws @ self.group_sums
        support, decided, hits = sums[:, :c], sums[:, c : 2 * c], sums[:, 2 * c : 3 * c]
        n = support.sum(axis=1)
        weights = draws[:, self.group]
        ranked = [1] if c == 2 else range(c)
        auroc = [_weighted_auroc(self.log_odds[:, k], self.label[:, k], weights) for k in ranked]
        return {
            "accuracy": hits.sum(axis=1) / n,
            "balanced_accuracy": _mean_defined(_ratio(hits, support)),
            "macro_f1": _mean_defined(_ratio(2 * hits, support + decided)),
            "auroc": _mean_defined(np.stack(auroc, axis=1)),
            "nll": sums[:, 3 * c] / n,
            "brier": sums[:, 3 * c + 1] / n,
            "ece": np.abs(sums[:, 3 * c + 2 :]).sum(axis=1) / n,
        }


def _jsonable(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _wilson(correct: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % score interval. Not by scipy.stats, which takes a second to import and stumbles where torch is a
    stub: a record is checked without torch."""
    z2 = Z**2
    p = correct / trials
    centre = (p + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z / (1 + z2 / trials) * float(np.sqrt(p * (1 - p) / trials + z2 / (4 * trials**2)))
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == trials else centre + half)


def scalar_metrics(
    logits: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    seed: int = 0,
    resamples: int = 1000,
) -> dict[str, dict[str, Any]]:
    """The scalar metrics, each with its 95 % interval.

    Args:
        logits: shape (N, C), float64, finite.
        labels: class indices, shape (N,).
        groups: what each picture belongs together with, shape (N,); None: every picture stands alone.
        seed: of the bootstrap; the same seed and groups give the same resamples.
        resamples: of the bootstrap.

    Returns:
        ``{metric: {"value", "low", "high", "interval"}}``; ``interval`` names the method. What cannot be told
        is None, with a sentence under ``reason``.
    """
    n = len(labels)
    group = np.arange(n) if groups is None else pd.factorize(np.asarray(groups))[0]
    trials = int(group.max()) + 1
    scalars = Scalars(logits, labels, group)
    values = {name: float(v[0]) for name, v in scalars(np.ones((1, trials))).items()}

    rng = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // n)  # the AUROC needs some arrays of (chunk, N)
    parts = []
    for first in range(0, resamples, chunk):
        rows = min(chunk, resamples - first)
        drawn = rng.integers(0, trials, (rows, trials)) + trials * np.arange(rows)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=rows * trials).reshape(rows, trials)
        parts.append(scalars(counts.astype(np.float64)))
    samples = {name: np.concatenate([part[name] for part in parts]) for name in SCALARS}

    result: dict[str, dict[str, Any]] = {}
    for name in SCALARS:
        value, drawn_values = values[name], samples[name][np.isfinite(samples[name])]
        entry: dict[str, Any] = {"value": _jsonable(value), "low": None, "high": None, "interval": None}
        result[name] = entry
        if entry["value"] is None:
            entry["reason"] = "undefined: the labels are all of one class"
        elif name == "accuracy" and (trials == n or value in (0.0, 1.0)):
            entry["low"], entry["high"] = _wilson(round(value * trials), trials)
            entry["interval"] = "wilson" if trials == n else "wilson over groups"
        elif len(drawn_values) < resamples / 2:
            entry["reason"] = "no interval: undefined in most resamples, a class has too few groups"
        elif np.ptp(drawn_values) < 1e-12:
            entry["reason"] = "no interval: all resamples give the same value"
        else:
            low, high = (float(q) for q in np.percentile(drawn_values, [2.5, 97.5]))
            entry["interval"] = "cluster bootstrap"
            if name == "ece":
                low, high = max(0.0, min(2 * value - high, value)), min(1.0, max(2 * value - low, value))
                entry["interval"] = "cluster bootstrap, basic"
            entry["low"], entry["high"] = low, high
    return result


def difference(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """a - b of one metric on two independent sets of pictures, from the two entries of `scalar_metrics` alone.

    The interval is MOVER's (Zou & Donner 2008, "Construction of confidence limits about effect measures"); of two
    Wilson intervals it is Newcombe's (1998) method 10. None where either value or interval is.
    """
    result: dict[str, Any] = {"value": None, "low": None, "high": None, "interval": None}
    if a["value"] is None or b["value"] is None:
        return result
    result["value"] = a["value"] - b["value"]
    if a["low"] is not None and b["low"] is not None:
        result["low"] = result["value"] - float(np.hypot(a["value"] - a["low"], b["high"] - b["value"]))
        result["high"] = result["value"] + float(np.hypot(a["high"] - a["value"], b["value"] - b["low"]))
        result["interval"] = "MOVER, unpaired"
    return result


def evaluate(
    frame: pd.DataFrame, classes: Sequence[str], seed: int = 0, resamples: int = 1000
) -> dict[str, dict[str, dict[str, Any]]]:
    """All metrics of every split and head of a predictions table, ready for JSON.

    Returns:
        ``{split: {head: {metric: {"value", "low", "high", "interval"[, "reason"]}, "confusion": [[]],
        "per_class": {class: {"precision", "recall", "f1", "support"}}, "n": pictures, "groups": groups}}}``;
        splits in the order train, val, test, others; a row of the confusion matrix is a label.

    Raises:
        UserError: an empty table, or a label that is none of the classes.
    """
    if not len(frame):
        raise UserError("the predictions table is empty; list at least one split that has pictures.")
    foreign = frame["label"][~frame["label"].isin(list(classes))]
    if len(foreign):
        raise UserError(
            f"the label {foreign.iloc[0]!r} is not one of the classes {', '.join(classes)}; "
            "use predictions on data with the classes the model was trained on."
        )
    found = list(dict.fromkeys(frame["split"]))
    splits = [s for s in SPLIT_ORDER if s in found] + [s for s in found if s not in SPLIT_ORDER]
    index = {name: i for i, name in enumerate(classes)}
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for split in splits:
        part = frame[frame["split"] == split]
        labels = part["label"].map(index).to_numpy(dtype=np.int64)
        groups = part["group"].to_numpy()
        result[split] = {}
        for head in predictions.heads(frame):
            logits = predictions.logits(part, head, classes)
            confusion = confusion_matrix(logits, labels)
            result[split][head] = {
                **scalar_metrics(logits, labels, groups, seed=seed, resamples=resamples),
                "confusion": confusion.tolist(),
                "per_class": dict(zip(classes, per_class(confusion), strict=True)),
                "n": len(part),
                "groups": len(set(groups)),
            }
    return result
