"""Figures computed by hand, or by another library."""

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from statsmodels.stats.proportion import proportion_confint

from facemask.runs import predictions
from facemask.runs.calibration import (
    accuracy_interval,
    at_threshold,
    aurc,
    aurc_interval,
    cost_threshold,
    fit_temperature,
    risk_coverage,
    softmax,
    temperatures,
    worst_groups,
)


def test_softmax_at_a_temperature():
    np.testing.assert_allclose(softmax(np.array([[2.0, 0.0]]), 2.0), [[np.e / (1 + np.e), 1 / (1 + np.e)]])


def test_temperature_of_equal_margins_follows_from_the_accuracy():
    # All margins are 4, and 9 of 10 of each class are right. Platt's targets make that 9 * 11/12 + 1/12 of 10, and the
    # best temperature gives every decision this probability.
    labels = np.repeat([0, 1], 10)
    logits = np.where(np.eye(2)[labels] > 0, 2.0, -2.0)
    logits[[0, 10]] *= -1
    p = (9 * 11 / 12 + 1 / 12) / 10
    assert fit_temperature(logits, labels) == pytest.approx(4 / np.log(p / (1 - p)), rel=1e-4)


def test_temperature_scales_with_the_logits_and_finds_the_true_one():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20000, 3)) * 2
    labels = np.array([rng.choice(3, p=p) for p in softmax(logits)])
    assert fit_temperature(logits, labels) == pytest.approx(1, abs=0.03)
    assert fit_temperature(5 * logits, labels) == pytest.approx(5 * fit_temperature(logits, labels), rel=1e-3)


def test_a_model_without_errors_is_not_certain():
    labels = np.repeat([0, 1], 20)
    logits = np.where(np.eye(2)[labels] > 0, 1.0, -1.0)
    p = softmax(logits, fit_temperature(logits, labels)).max()
    assert p == pytest.approx(1 - 1 / 22, abs=1e-4)


def test_temperatures_are_of_validation_rows_alone():
    rng = np.random.default_rng(1)
    splits = ["val"] * 40 + ["test"] * 40
    labels = ["a", "b"] * 40
    logits = rng.normal(size=(80, 2)) + np.eye(2)[[0, 1] * 40]
    heads = {"head": logits, "teacher": 2 * logits}
    ids = [str(i) for i in range(80)]
    frame = predictions.assemble(ids, splits, ids, labels, heads, ["a", "b"])
    found = temperatures(frame, ["a", "b"])
    assert found["head"] == pytest.approx(fit_temperature(logits[:40].astype(np.float32), np.array([0, 1] * 20)))
    assert found["teacher"] == pytest.approx(2 * found["head"], rel=1e-3)
    assert temperatures(frame[40:], ["a", "b"]) == {}


def test_risk_and_coverage():
    confidence, wrong = np.array([0.6, 0.9, 0.8, 0.8]), np.array([True, False, True, False])
    curve = risk_coverage(confidence, wrong)
    assert curve["threshold"].tolist() == [0.9, 0.8, 0.6]  # equal confidences are answered together
    assert curve["coverage"].tolist() == [0.25, 0.75, 1.0]
    assert curve["risk"].tolist() == pytest.approx([0, 1 / 3, 0.5])
    assert aurc(curve) == pytest.approx(0.25 * 0 + 0.5 / 3 + 0.25 * 0.5)
    repeated = risk_coverage(np.repeat(confidence, [2, 0, 1, 3]), np.repeat(wrong, [2, 0, 1, 3]))
    pd.testing.assert_frame_equal(risk_coverage(confidence, wrong, np.array([2, 0, 1, 3])), repeated)


def test_the_interval_of_aurc_widens_with_groups():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.5, 1, 300)
    wrong = rng.uniform(size=300) > confidence
    alone = aurc_interval(confidence, wrong, np.arange(300), 200)
    copies = aurc_interval(np.tile(confidence, 4), np.tile(wrong, 4), np.tile(np.arange(300), 4), 200)
    assert alone["low"] < alone["value"] < alone["high"]
    assert (copies["low"], copies["high"]) == pytest.approx((alone["low"], alone["high"]), abs=1e-9)


def test_threshold_of_costs():
    p = np.array([0.1, 0.2, 0.4, 0.6, 0.7, 0.9])
    positive = np.array([False, True, False, False, True, True])
    assert cost_threshold(p, positive, 10, 1) == pytest.approx(0.15)  # no miss, two false alarms
    assert at_threshold(p, positive, 0.15, 10, 1) == {
        "threshold": 0.15,
        "misses": 0,
        "of_positives": 3,
        "false_alarms": 2,
        "of_negatives": 3,
        "cost_per_picture": 2 / 6,
    }
    assert cost_threshold(p, positive, 1, 10) == pytest.approx(0.65)  # one miss, no false alarm
    assert at_threshold(p, positive, 0.65, 1, 10)["cost_per_picture"] == 1 / 6
    # nothing between 0.3 and 0.8 costs anything: next to 1 / (1 + 3)
    easy = np.array([0.1, 0.3, 0.8, 0.9])
    assert cost_threshold(easy, easy > 0.5, 3, 1) == pytest.approx(0.55)
    # no positive picture is worth a false alarm, not even at a probability of 1
    assert cost_threshold(np.array([1.0, 1.0, 1.0]), np.array([True, False, False]), 1, 1) == np.inf


def test_no_other_threshold_costs_less():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=300)
    positive = rng.uniform(size=300) < 1 / (1 + np.exp(-logits))
    p = LogisticRegression().fit(logits[:, None], positive).predict_proba(logits[:, None])[:, 1]
    for miss, alarm in ((1, 1), (10, 1), (1, 7)):
        best = at_threshold(p, positive, cost_threshold(p, positive, miss, alarm), miss, alarm)["cost_per_picture"]
        others = [at_threshold(p, positive, t, miss, alarm)["cost_per_picture"] for t in [*p, *(p + 1e-9), 0, 1.1]]
        assert best == pytest.approx(min(others))


def test_interval_of_an_accuracy():
    correct = np.repeat([True, False], [90, 10])
    found = accuracy_interval(correct, np.arange(100))
    assert (found["low"], found["high"]) == pytest.approx(proportion_confint(90, 100, method="wilson"))
    assert (found["n"], found["groups"], found["accuracy"]) == (100, 100, 0.9)
    # four copies of every picture tell no more than one
    copies = accuracy_interval(np.repeat(correct, 4), np.repeat(np.arange(100), 4))
    assert (copies["low"], copies["high"]) == pytest.approx(proportion_confint(90, 100, method="wilson"))
    assert copies["n"] == 400
    # without an error the groups are counted
    perfect = accuracy_interval(np.ones(40, dtype=bool), np.repeat(np.arange(10), 4))
    assert (perfect["low"], perfect["high"]) == pytest.approx(proportion_confint(10, 10, method="wilson"))


def test_worst_groups():
    n = 120
    correct = np.ones(n, dtype=bool)
    correct[:12] = False
    values = pd.Series(["dark"] * 20 + ["light"] * 95 + ["odd"] * 5)
    size = pd.Series(np.arange(n))
    attributes = {"light": values, "size": size, "id": pd.Series(map(str, range(n))), "same": pd.Series(["x"] * n)}
    table = worst_groups(correct, np.arange(n), attributes)
    assert set(table["attribute"]) == {"light", "size"}  # every id is its own, and one value has no other
    rows = table.set_index(["attribute", "value"])
    dark = rows.loc["light", "dark"]
    assert (dark["n"], dark["accuracy"], dark["below"]) == (20, 8 / 20, True)
    assert rows.loc["light", "1 value(s) of fewer than 20 pictures each"]["n"] == 5
    assert rows.loc["size"]["n"].tolist() == [30] * 4
    assert table.iloc[0][["attribute", "value"]].tolist() == ["light", "dark"]
    assert not rows.loc["light", "light"]["below"]


def test_unknown_values_are_no_group():
    values = pd.Series([None] * 30 + ["a"] * 30 + ["b"] * 30)
    table = worst_groups(np.ones(90, dtype=bool), np.arange(90), {"x": values})
    assert sorted(table["value"]) == ["a", "b"]
