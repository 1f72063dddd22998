import math
import os
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from facemask.data.audit import FLOOR, majority_baseline, no_pixels_baseline
from facemask.data.manifest import scan_folder
from facemask.data.splits import read_split


def made_table(n: int = 200) -> pd.DataFrame:
    """Class b is wider than class a; class c tells itself by its format alone."""
    rng = np.random.default_rng(0)
    label = np.array(["a", "a", "b", "c"])[np.arange(n) % 4]
    table = pd.DataFrame(
        {
            "path": [f"{name}/{i:03d}.png" for i, name in enumerate(label)],
            "label": label,
            "split": np.array(["train", "train", "train", "val", "test"])[np.arange(n) // 4 % 5],
            "group": [f"g{i}" for i in range(n)],
            "width": rng.integers(100, 150, n) + 100 * (label == "b"),
            "height": rng.integers(100, 150, n),
            "bytes": rng.integers(1000, 2000, n),
            "format": np.where(label == "c", "PNG", "JPEG"),
        }
    )
    return table.sample(frac=1, random_state=0)


def accuracy(predictions: pd.DataFrame) -> float:
    logits = predictions.filter(like="logit/")
    classes = np.array([str(column).rsplit("/", 1)[1] for column in logits])
    return float((classes[logits.to_numpy().argmax(axis=1)] == predictions["label"]).mean())


def test_majority_by_hand() -> None:
    table = made_table()
    predictions = majority_baseline(table, ["val"])
    assert list(predictions.columns) == [
        *("id", "split", "group", "label"),
        *("logit/majority/a", "logit/majority/b", "logit/majority/c"),
    ]
    val = table[table["split"] == "val"]
    assert len(predictions) == 40
    for column, source in {"id": "path", "group": "group", "label": "label", "split": "split"}.items():
        assert predictions[column].tolist() == val[source].tolist()
    logits = predictions.filter(like="logit/")
    assert (logits.dtypes == np.float32).all()
    expected = [math.log(0.5), math.log(0.25), math.log(0.25)]
    assert np.allclose(logits, expected, atol=1e-6)
    assert accuracy(predictions) == 0.5
    swapped = majority_baseline(table.assign(label=table["label"].map({"a": "c", "b": "b", "c": "a"})), ["val"])
    assert np.allclose(swapped.filter(like="logit/"), expected[::-1], atol=1e-6)
    assert list(swapped.columns) == list(predictions.columns)


def test_no_pixels_reads_all_four_facts() -> None:
    table = made_table()
    predictions = no_pixels_baseline(table, ["val", "test"], seed=0)
    assert len(predictions) == 80
    assert set(predictions["split"]) == {"val", "test"}
    assert accuracy(predictions) == 1.0
    assert accuracy(no_pixels_baseline(table.assign(format="JPEG"), ["val"], 0)) < 0.9
    assert accuracy(no_pixels_baseline(table.assign(width=100), ["val"], 0)) < 0.9
    for fact in ("height", "bytes"):
        hidden = table.assign(width=100, **{fact: (table["label"] == "b") * 50 + 100})
        assert accuracy(no_pixels_baseline(hidden, ["val"], 0)) == 1.0, fact


def test_no_pixels_logits_are_finite_log_probabilities() -> None:
    predictions = no_pixels_baseline(made_table(), ["val"], seed=0)
    logits = predictions.filter(like="logit/no_pixels/").to_numpy()
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    assert logits.min() == np.float32(math.log(FLOOR))
    assert logits.max() <= 0
    assert np.abs(np.exp(logits).sum(axis=1) - 1).max() <= 2 * FLOOR + 1e-6


def test_unlisted_splits_are_not_read() -> None:
    table = made_table()
    poisoned = table.astype({"width": object, "height": object, "bytes": object})
    is_test = poisoned["split"] == "test"
    poisoned.loc[is_test, ["width", "height", "bytes", "format", "label", "path", "group"]] = None
    for baseline in (majority_baseline, partial(no_pixels_baseline, seed=0)):
        pd.testing.assert_frame_equal(baseline(poisoned, ["val"]), baseline(table, ["val"]), check_dtype=False)
        assert len(baseline(table, [])) == 0


def test_row_order_and_seed() -> None:
    table = made_table()
    table["label"] = np.random.default_rng(1).permutation(table["label"])  # a hard task, so that trees differ
    logits = no_pixels_baseline(table, ["val"], 0).set_index("id").filter(like="logit/")
    again = no_pixels_baseline(table.iloc[::-1], ["val"], 0).set_index("id").filter(like="logit/")
    assert again.loc[logits.index].equals(logits)
    assert not no_pixels_baseline(table, ["val"], 1).set_index("id").filter(like="logit/").equals(logits)


def test_format_that_train_lacks() -> None:
    table = made_table()
    table.loc[table["split"] == "val", "format"] = "WEBP"
    predictions = no_pixels_baseline(table, ["val"], 0)
    assert len(predictions) == 40
    assert np.isfinite(predictions.filter(like="logit/").to_numpy()).all()


def test_real_validation_split() -> None:
    if not os.environ.get("FACEMASK_DATA"):
        pytest.skip("FACEMASK_DATA is not set: no real pictures")
    root = Path(os.environ["FACEMASK_DATA"])
    table = scan_folder(root)
    table = table.join(read_split(root / "splits" / "leakfree_seed0.csv", table)[0], how="inner")
    majority = majority_baseline(table, ["val"])
    assert len(majority) == 411
    assert accuracy(majority) == 217 / 411
    assert 0.87 < accuracy(no_pixels_baseline(table, ["val"], 0)) < 0.93
