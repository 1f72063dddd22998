import json

import numpy as np
import pandas as pd
import pytest

from facemask.errors import UserError
from facemask.runs.predictions import (
    add_mean_head,
    assemble,
    heads,
    logits,
    read_predictions,
    write_predictions,
)

CLASSES = ["with_mask", "without_mask"]
HEAD = np.array([[1.0, -1.0], [0.5, 0.25], [-3.0, 2.0]])


def table(**more: np.ndarray) -> pd.DataFrame:
    return assemble(
        ["a.jpg", "b.jpg", "c.jpg"],
        ["val", "val", "test"],
        ["g1", "g1", "g2"],
        ["with_mask", "without_mask", "without_mask"],
        {**more, "head": HEAD},
        CLASSES,
    )


def test_columns_and_head_order():
    frame = add_mean_head(table(no_pixels=HEAD, teacher=HEAD, head_dist=-HEAD, majority=HEAD), CLASSES)
    assert heads(frame) == ["head", "head_dist", "mean", "teacher", "no_pixels", "majority"]
    assert list(frame.columns[:6]) == ["id", "split", "group", "label", *frame.columns[4:6]]
    assert frame["logit/head/without_mask"].dtype == np.float32


def test_mean_head_is_the_average_of_both_heads_logits():
    frame = add_mean_head(table(head_dist=np.array([[3.0, 1.0], [0.5, 0.75], [1.0, 0.0]])), CLASSES)
    np.testing.assert_array_equal(logits(frame, "mean", CLASSES), [[2.0, 0.0], [0.5, 0.5], [-1.0, 1.0]])
    assert "mean" not in heads(add_mean_head(table(), CLASSES))


def test_mean_head_is_what_timm_returns_in_eval_mode():
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=2, depth=1).eval()
    with torch.no_grad():
        features = model.forward_features(torch.rand(3, 3, 32, 32, generator=torch.manual_seed(0)))
        expected = model.forward_head(features)
        both = [head(features[:, i]) for i, head in enumerate((model.head, model.head_dist))]
    arrays = {"head": both[0].numpy(), "head_dist": both[1].numpy()}
    frame = assemble(list("abc"), ["val"] * 3, list("abc"), ["with_mask"] * 3, arrays, CLASSES)
    frame = add_mean_head(frame, CLASSES)
    np.testing.assert_allclose(logits(frame, "mean", CLASSES), expected.numpy(), atol=1e-6)


def test_round_trip_keeps_every_bit_and_the_class_order(tmp_path):
    classes = ["zebra", "ape"]
    frame = assemble(["x", "ü/y"], ["val", "test"], ["1", "2"], ["ape", "zebra"], {"head": HEAD[:2] / 3}, classes)
    write_predictions(tmp_path / "p.parquet", frame, classes)
    read, read_classes = read_predictions(tmp_path / "p.parquet")
    assert read_classes == classes
    pd.testing.assert_frame_equal(read, frame)
    np.testing.assert_array_equal(logits(read, "head", classes), (HEAD[:2] / 3).astype(np.float32).astype(float))
    assert [p.name for p in tmp_path.iterdir()] == ["p.parquet"]


def test_a_failed_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "p.parquet"
    write_predictions(path, table(), CLASSES)
    before = path.read_bytes()

    def fail(table, file, **options):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", fail)
    with pytest.raises(OSError, match="no space"):
        write_predictions(path, table(), CLASSES)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["p.parquet"]


def test_unreadable_files_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_predictions(tmp_path / "none.parquet")
    good = tmp_path / "good.parquet"
    write_predictions(good, table(), CLASSES)
    (tmp_path / "cut.parquet").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "text.parquet").write_text("id,split\n")
    for name in ("cut.parquet", "text.parquet"):
        with pytest.raises(UserError, match="not a readable Parquet file"):
            read_predictions(tmp_path / name)
    table().to_parquet(tmp_path / "foreign.parquet")
    with pytest.raises(UserError, match="holds no predictions of facemask"):
        read_predictions(tmp_path / "foreign.parquet")
    write_predictions(tmp_path / "lacking.parquet", table().drop(columns="group"), CLASSES)
    with pytest.raises(UserError, match="lacks the column 'group'"):
        read_predictions(tmp_path / "lacking.parquet")


def test_assemble_refuses_what_cannot_be_evaluated():
    rest = (["val", "val"], ["1", "2"], ["a", "b"])
    with pytest.raises(UserError, match=r"^p\.jpg was predicted more than once"):
        assemble(["p.jpg", "p.jpg"], *rest, {"head": np.zeros((2, 2))}, ["a", "b"])
    with pytest.raises(UserError, match=r"not finite for 1 of 2 pictures \(first: q\.jpg\)"):
        assemble(["p.jpg", "q.jpg"], *rest, {"head": np.array([[0, 0], [np.nan, 0]])}, ["a", "b"])
    with pytest.raises(UserError, match="not finite for 1 of 2"):  # finite in float64, not in the stored float32
        assemble(["p.jpg", "q.jpg"], *rest, {"head": np.array([[0, 0], [1e39, 0]])}, ["a", "b"])
    with pytest.raises(UserError, match="'b' is not one of the classes a, c"):
        assemble(["p.jpg", "q.jpg"], *rest, {"head": np.zeros((2, 2))}, ["a", "c"])
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(2, 2\)"):
        assemble(["p.jpg", "q.jpg"], *rest, {"head": np.zeros((2, 3))}, ["a", "b"])


def test_an_unknown_head_is_named_with_the_choice():
    with pytest.raises(UserError, match=r"no head 'mean'.*choose one of head, teacher"):
        logits(table(teacher=HEAD), "mean", CLASSES)


def test_the_classes_are_in_the_schema(tmp_path):
    import pyarrow.parquet as pq

    write_predictions(tmp_path / "p.parquet", table(), CLASSES)
    assert json.loads(pq.read_schema(tmp_path / "p.parquet").metadata[b"facemask"]) == {"classes": CLASSES}
