import json
import time
import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest
from sklearn.metrics import brier_score_loss, precision_recall_fscore_support

from facemask.errors import UserError
from facemask.runs.metrics import (
    SCALARS,
    Scalars,
    confusion_matrix,
    evaluate,
    losses,
    per_class,
    reliability,
    scalar_metrics,
)
from facemask.runs.predictions import assemble


def values(logits: np.ndarray, labels: np.ndarray, groups=None, **options) -> dict[str, float]:
    return {k: v["value"] for k, v in scalar_metrics(logits, labels, groups, **options).items()}


def log(probabilities) -> np.ndarray:
    return np.log(np.asarray(probabilities, dtype=float))


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_values_are_torchmetrics_and_scikit_learns(classes, scale):
    torch = pytest.importorskip("torch")
    from torchmetrics.functional import classification as tm

    rng = np.random.default_rng(classes)
    labels = rng.integers(0, classes, 600)
    # eighths are exact, so their ties are ties for everybody; the AUROC counts them half
    logits = np.round(8 * (scale * rng.normal(size=(600, classes)) + 1.5 * np.eye(classes)[labels])) / 8
    p, y = torch.tensor(logits).softmax(1), torch.tensor(labels)
    k = {"num_classes": classes}
    expected = {
        "accuracy": tm.multiclass_accuracy(p, y, average="micro", **k),
        "balanced_accuracy": tm.multiclass_accuracy(p, y, average="macro", **k),
        "macro_f1": tm.multiclass_f1_score(p, y, average="macro", **k),
        "auroc": tm.binary_auroc(p[:, 1], y) if classes == 2 else tm.multiclass_auroc(p, y, **k),
        "nll": torch.nn.functional.cross_entropy(torch.tensor(logits), y),
        "ece": tm.multiclass_calibration_error(p, y, n_bins=15, norm="l1", **k),
        "brier": brier_score_loss(labels, p.numpy(), labels=range(classes), scale_by_half=False),
    }
    found = values(logits, labels, resamples=2)
    for name in SCALARS:
        assert found[name] == pytest.approx(float(expected[name]), abs=1e-6), name
    np.testing.assert_array_equal(confusion_matrix(logits, labels), tm.multiclass_confusion_matrix(p, y, **k).numpy())
    rows = per_class(confusion_matrix(logits, labels))
    for name, column in zip(
        ("precision", "recall", "f1", "support"),
        precision_recall_fscore_support(labels, logits.argmax(1)),
        strict=True,
    ):
        assert [row[name] for row in rows] == pytest.approx(column.tolist(), abs=1e-12)


def test_values_worked_out_by_hand():
    # right, right, wrong, wrong by a tie (the lower index is decided)
    logits = log([[0.8, 0.2], [0.25, 0.75], [0.6, 0.4], [0.5, 0.5]])
    labels = np.array([0, 1, 1, 1])
    found = values(logits, labels)
    assert found["accuracy"] == 0.5
    assert found["balanced_accuracy"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["macro_f1"] == pytest.approx((2 * 1 / (1 + 3) + 2 * 1 / (3 + 1)) / 2)
    assert found["auroc"] == 1.0  # 0.2 lies under 0.75, 0.4 and 0.5
    assert found["nll"] == pytest.approx(-np.log(0.8 * 0.75 * 0.4 * 0.5) / 4)
    assert found["brier"] == pytest.approx(2 * (0.2**2 + 0.25**2 + 0.6**2 + 0.5**2) / 4)
    # bins of width 1/15: 0.8 is the edge of bin 12, 0.75 in bin 11, 0.6 at the edge of 9, 0.5 in 7
    assert found["ece"] == pytest.approx((0.2 + 0.25 + 0.6 + 0.5) / 4)
    assert confusion_matrix(logits, labels).tolist() == [[1, 0], [2, 1]]
    assert losses(logits, labels)[2] == pytest.approx(-np.log(0.4))


def test_auroc_counts_ties_half_and_does_not_saturate():
    labels = np.array([0, 0, 1, 1])
    assert values(np.array([[0.0, s] for s in (1, 2, 2, 3)]), labels)["auroc"] == 3.5 / 4
    assert values(np.zeros((4, 2)), labels)["auroc"] == 0.5
    # softmax of both is exactly 1.0 in float64; the order still counts
    assert values(np.array([[0.0, s] for s in (100, 200, 300, 400)]), labels)["auroc"] == 1.0
    three = np.array([[1000.0, 0, 0], [2000, 0, 0], [0, 1000, 0], [0, 0, 1000]])
    assert values(three, np.array([0, 0, 1, 2]))["auroc"] == 1.0


def test_reliability_bins_make_up_the_ece():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300, 3)) * 2, rng.integers(0, 3, 300)
    bins = reliability(logits, labels)
    assert sum(b["count"] for b in bins) == 300
    ece = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / 300
    assert ece == pytest.approx(values(logits, labels, resamples=2)["ece"], abs=1e-12)
    assert all(b["low"] <= b["confidence"] < b["low"] + 1 / 15 for b in bins)


def test_a_drawn_group_counts_as_if_its_pictures_were_repeated():
    """The weighted formulas of the bootstrap against plain ones on really repeated pictures, all metrics."""
    rng = np.random.default_rng(3)
    n, trials, classes = 60, 25, 4
    logits, labels = np.round(rng.normal(size=(n, classes)), 1), rng.integers(0, classes, n)
    group = np.concatenate([np.arange(trials), rng.integers(0, trials, n - trials)])
    draws = rng.multinomial(trials, np.full(trials, 1 / trials), size=5)
    found = Scalars(logits, labels, group)(draws.astype(float))
    for b, row in enumerate(draws):
        repeated = np.repeat(np.arange(n), row[group])
        expected = values(logits[repeated], labels[repeated], resamples=2)
        for name in SCALARS:
            assert found[name][b] == pytest.approx(expected[name], abs=1e-12), name


def test_accuracy_alone_in_its_group_has_wilsons_interval():
    logits, labels = np.tile([[1.0, 0.0]], (20, 1)), np.array([0] * 18 + [1] * 2)
    found = scalar_metrics(logits, labels)["accuracy"]
    # Wilson (1927): (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), p = 0.9, n = 20, z = 1.959964
    assert found["interval"] == "wilson"
    assert (found["low"], found["high"]) == pytest.approx((0.698966, 0.972134), abs=1e-6)


def test_the_bootstrap_agrees_with_the_exact_binomial_quantiles():
    """80 groups of two like pictures, 60 right: resampled accuracy is Binomial(80, 0.75) / 80."""
    labels = np.repeat([0] * 60 + [1] * 20, 2)
    found = scalar_metrics(np.tile([[1.0, 0.0]], (160, 1)), labels, np.repeat(np.arange(80), 2))["accuracy"]
    from scipy.stats import binom

    assert found["interval"] == "cluster bootstrap"
    expected = binom.ppf([0.025, 0.975], 80, 0.75) / 80
    assert (found["low"], found["high"]) == pytest.approx(expected, abs=1.5 / 80)


def test_duplicates_widen_the_interval_only_where_groups_are_known():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(100, 2)), rng.integers(0, 2, 100)
    logits, labels, group = np.repeat(logits, 4, 0), np.repeat(labels, 4), np.repeat(np.arange(100), 4)
    clustered, alone = scalar_metrics(logits, labels, group), scalar_metrics(logits, labels)
    for name in ("accuracy", "balanced_accuracy", "macro_f1", "auroc", "nll", "brier"):
        ratio = (clustered[name]["high"] - clustered[name]["low"]) / (alone[name]["high"] - alone[name]["low"])
        assert 1.7 < ratio < 2.3, name  # four copies: sqrt(4)
        assert clustered[name]["value"] == pytest.approx(alone[name]["value"])


@pytest.mark.parametrize("known", [True, False])
def test_coverage_of_the_accuracy_interval(known):
    """Groups of 1 to 7 pictures that are right or wrong together: 95 % only if the groups are known."""
    rng, covered, trials = np.random.default_rng(7), 0, 300
    for _ in range(trials):
        sizes = rng.integers(1, 8, 60)
        group = np.repeat(np.arange(60), sizes)
        right = np.repeat(rng.random(60) < 0.8, sizes)
        logits = np.tile([[1.0, 0.0]], (len(group), 1))
        found = scalar_metrics(logits, (~right).astype(int), group if known else None, resamples=300)
        covered += found["accuracy"]["low"] <= 0.8 <= found["accuracy"]["high"]
    rate = covered / trials
    assert (0.90 <= rate <= 0.98) if known else rate < 0.75


def test_the_ece_interval_allows_for_its_upward_bias():
    """Confidences that are right: the true ECE is near 0 (0.001), every estimate of it is far above."""
    rng, covered, estimates = np.random.default_rng(1), 0, []
    for _ in range(80):
        z = rng.normal(0, 2.5, 400)
        labels = (rng.random(400) < 1 / (1 + np.exp(-z))).astype(int)
        found = scalar_metrics(np.stack([np.zeros(400), z], 1), labels, resamples=200)["ece"]
        covered += found["low"] <= 0.0015
        estimates.append(found["value"])
    assert np.mean(estimates) > 0.03
    assert covered >= 35  # a percentile interval: 0


def test_intervals_hold_their_value_and_depend_on_the_seed_alone():
    rng = np.random.default_rng(5)
    logits, labels, group = rng.normal(size=(90, 3)), rng.integers(0, 3, 90), rng.integers(0, 40, 90)
    first, again = (scalar_metrics(logits, labels, group, seed=1) for _ in range(2))
    other = scalar_metrics(logits, labels, group, seed=2)
    assert first == again
    for name in SCALARS:
        assert first[name]["low"] <= first[name]["value"] <= first[name]["high"], name
        assert first[name]["low"] != other[name]["low"] or first[name]["high"] != other[name]["high"], name
    renamed = scalar_metrics(logits, labels, [f"g{g}" for g in group], seed=1)
    assert renamed == first


def frame_of(logits, labels, classes, split="test", groups=None) -> pd.DataFrame:
    n = len(labels)
    ids = [f"{split}/{i}.jpg" for i in range(n)]
    return assemble(
        ids, [split] * n, groups or ids, [classes[i] for i in labels], {"head": np.asarray(logits)}, classes
    )


@pytest.mark.parametrize(
    ("logits", "labels"),
    [
        ([[0.0, 1.0]], [1]),
        ([[0.0, 1.0]] * 5, [1] * 5),
        ([[80.0, -80.0], [-80.0, 80.0]] * 10, [0, 1] * 10),
        ([[2.0, -1.0]] * 8, [0, 1] * 4),
        ([[3e38, -3e38], [3e38, -3e38]], [0, 1]),
        ([[0.0, 1.0, 2.0], [0.0, 0.0, 9.0]], [0, 2]),
    ],
    ids=["one picture", "one class", "perfect", "constant", "huge", "class absent"],
)
def test_degenerate_tables_give_json_without_a_warning(logits, labels):
    classes = ["a", "b", "c"][: len(logits[0])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate(frame_of(logits, labels, classes), classes)
    entry = json.loads(json.dumps(found, allow_nan=False))["test"]["head"]
    for name in SCALARS:
        assert (entry[name]["low"] is None) == (entry[name]["interval"] is None)
        assert (entry[name]["low"] is None) == ("reason" in entry[name])


def test_what_is_undefined_is_none_with_its_reason():
    entry = evaluate(frame_of([[0.0, 1.0]] * 5, [1] * 5, ["a", "b"]), ["a", "b"])["test"]["head"]
    assert entry["auroc"]["value"] is None
    assert entry["auroc"]["reason"] == "undefined: the labels are all of one class"
    assert entry["balanced_accuracy"]["value"] == 1.0
    assert entry["balanced_accuracy"]["low"] is None
    assert entry["balanced_accuracy"]["reason"] == "no interval: all resamples give the same value"
    assert entry["per_class"]["a"] == {"precision": None, "recall": None, "f1": None, "support": 0}
    assert entry["per_class"]["b"] == {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 5}


def test_perfect_predictions_are_not_given_a_certain_accuracy():
    logits, labels = np.array([[9.0, 0.0], [0.0, 9.0]] * 30), np.array([0, 1] * 30)
    alone = scalar_metrics(logits, labels)["accuracy"]
    paired = scalar_metrics(logits, labels, np.repeat(np.arange(20), 3))["accuracy"]
    for found, trials in ((alone, 60), (paired, 20)):
        expected = binomtest(trials, trials).proportion_ci(method="wilson")
        assert (found["low"], found["high"]) == pytest.approx((expected.low, 1.0))
    assert paired["interval"] == "wilson over groups"


def test_evaluate_nests_by_split_and_head():
    rng = np.random.default_rng(0)
    parts = []
    for split, n in (("holdout", 7), ("test", 30), ("val", 20)):
        part = frame_of(rng.normal(size=(n, 2)), rng.integers(0, 2, n), ["a", "b"], split)
        parts.append(part.assign(**{"logit/teacher/a": part["logit/head/b"], "logit/teacher/b": 0.0}))
    frame = pd.concat(parts, ignore_index=True)
    frame.loc[frame["split"] == "test", "group"] = [f"g{i // 2}" for i in range(30)]
    found = evaluate(frame, ["a", "b"])
    assert list(found) == ["val", "test", "holdout"]
    assert list(found["val"]) == ["head", "teacher"]
    assert (found["test"]["head"]["n"], found["test"]["head"]["groups"]) == (30, 15)
    assert found["test"]["head"]["accuracy"]["interval"] == "cluster bootstrap"
    assert found["val"]["head"]["accuracy"]["interval"] == "wilson"
    assert np.sum(found["test"]["teacher"]["confusion"]) == 30
    with pytest.raises(UserError, match="'a' is not one of the classes b, c"):
        evaluate(frame, ["b", "c"])
    with pytest.raises(UserError, match="table is empty"):
        evaluate(frame.iloc[:0], ["a", "b"])


def test_ten_thousand_pictures_take_seconds():
    rng = np.random.default_rng(0)
    start = time.process_time()
    scalar_metrics(rng.normal(size=(10_000, 2)), rng.integers(0, 2, 10_000), rng.integers(0, 8_000, 10_000))
    assert time.process_time() - start < 10
