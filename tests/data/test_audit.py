import math
import os
from collections.abc import Collection
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from facemask.data.audit import (
    blur,
    border,
    cover_box,
    cover_lower_half,
    file_facts,
    forest_baseline,
    majority_baseline,
    padding,
    small,
)
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


def no_pixels(table: pd.DataFrame, splits: Collection[str]) -> pd.DataFrame:
    return forest_baseline(table, file_facts(table), splits, "no_pixels")


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
    predictions = no_pixels(table, ["val", "test"])
    assert len(predictions) == 80
    assert set(predictions["split"]) == {"val", "test"}
    assert accuracy(predictions) == 1.0
    assert accuracy(no_pixels(table.assign(format="JPEG"), ["val"])) < 0.9
    assert accuracy(no_pixels(table.assign(width=100), ["val"])) < 0.9
    for fact in ("height", "bytes"):
        hidden = table.assign(width=100, **{fact: (table["label"] == "b") * 50 + 100})
        assert accuracy(no_pixels(hidden, ["val"])) == 1.0, fact


def test_no_pixels_logits_are_finite_log_probabilities() -> None:
    predictions = no_pixels(made_table(), ["val"])
    logits = predictions.filter(like="logit/no_pixels/").to_numpy()
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    assert logits.min() == np.float32(math.log(0.5 / 300))
    assert logits.max() <= 0
    assert np.abs(np.exp(logits).sum(axis=1) - 1).max() <= 2 * 0.5 / 300 + 1e-6


def test_unlisted_splits_are_not_read() -> None:
    table = made_table()
    poisoned = table.astype({"width": object, "height": object, "bytes": object})
    is_test = poisoned["split"] == "test"
    poisoned.loc[is_test, ["width", "height", "bytes", "format", "label", "path", "group"]] = None
    for baseline in (majority_baseline, no_pixels):
        pd.testing.assert_frame_equal(baseline(poisoned, ["val"]), baseline(table, ["val"]), check_dtype=False)
        assert len(baseline(table, [])) == 0


def test_row_order() -> None:
    table = made_table()
    table["label"] = np.random.default_rng(1).permutation(table["label"])  # a hard task, so that trees differ
    logits = no_pixels(table, ["val"]).set_index("id").filter(like="logit/")
    again = no_pixels(table.iloc[::-1], ["val"]).set_index("id").filter(like="logit/")
    assert again.loc[logits.index].equals(logits)


def test_format_that_train_lacks() -> None:
    table = made_table()
    table.loc[table["split"] == "val", "format"] = "WEBP"
    predictions = no_pixels(table, ["val"])
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
    assert 0.87 < accuracy(no_pixels(table, ["val"])) < 0.93


def test_leaves_as_a_share_of_train() -> None:
    table = made_table()
    pure = forest_baseline(table, file_facts(table), ["val"], "x", 10, 1)
    coarse = forest_baseline(table, file_facts(table), ["val"], "x", 10, 0.5)
    assert accuracy(pure) > accuracy(coarse) == 0.5  # no leaf under 60 of 120 pictures
    assert list(coarse.columns[4:]) == ["logit/x/a", "logit/x/b", "logit/x/c"]
    assert pure["logit/x/a"].min() == np.float32(math.log(0.05))


def test_small_view_and_its_border() -> None:
    view = np.zeros((64, 64, 3), dtype=np.uint8)
    view[:2, :, 0] = 200
    view[32:, 32:, 2] = 40
    shrunk = small(view)
    assert shrunk.shape == (32, 32, 3)
    assert (shrunk[0] == [200, 0, 0]).all()
    assert (shrunk[16:, 16:] == [0, 0, 40]).all()
    edge = border(shrunk)
    assert edge.shape == (124 * 3,)
    assert (edge == 200).sum() == 32
    assert (edge == 40).sum() == 16 + 15
    hidden = cover_lower_half(shrunk)
    assert (hidden[16:] == 128).all()
    assert (hidden[:16] == shrunk[:16]).all()
    assert (shrunk[16:, 16:] == [0, 0, 40]).all()


def test_blur_falls_with_blur() -> None:
    view = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sharp, soft, flat = blur(view), blur(cv2.GaussianBlur(view, (0, 0), 2)), blur(np.full_like(view, 7))
    assert sharp[0] > soft[0] > flat[0] == 0
    spot = np.zeros((9, 9, 3), dtype=np.uint8)
    spot[4, 4] = 100  # its Laplacian: -400 once and 100 four times
    assert blur(spot)[0] == pytest.approx(math.log1p(200_000 / 81))


def test_padding_counts_constant_rows_and_columns() -> None:
    view = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    assert padding(view).tolist() == [0, 0, 0, 0]
    view[-10:] = 250
    view[:, :5] = 0
    view[-10:, :5] = 240  # within the tolerance of 16 grey levels
    assert padding(view).tolist() == [0, 0.25, 0, 0]
    view[:, :5] = 3
    assert padding(view).tolist() == [0, 0, 0.1, 0]
    assert padding(np.full((4, 4, 3), 9, dtype=np.uint8)).tolist() == [1, 1, 1, 1]


def test_the_cover_hides_a_box_of_the_original_at_any_working_size() -> None:
    pixels = np.zeros((50, 100, 3), dtype=np.uint8)
    hidden = cover_box(pixels, (40, 10, 81, 61), width=200, height=100)
    assert not pixels.any()
    expected = np.zeros((50, 100), dtype=np.uint8)
    expected[5:31, 20:41] = 128  # an edge inside a pixel takes the whole pixel
    assert (hidden == expected[..., None]).all()
