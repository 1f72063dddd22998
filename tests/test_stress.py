"""Stressed views, and models that are known to follow the mask, the border or the colour, put to the shortcut test."""

import itertools
import subprocess

import numpy as np
import pandas as pd
import pytest
import torch
from drawn_run import drawn_run
from typer.testing import CliRunner

from facemask.cli import app
from facemask.errors import UserError
from facemask.evaluate import load_run, own_pictures, predict_splits
from facemask.runs import predictions
from facemask.runs.ledger import openings
from facemask.stress import (
    ALONE,
    CLEAN,
    CORRUPTIONS,
    HIDDEN,
    LOWER,
    PATCH,
    UPPER,
    MaskRegion,
    choose,
    conditions,
    corrupt,
    make_out,
    predict_under,
    reactions,
    verdict,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return drawn_run(tmp_path_factory.mktemp("stress"), "model=deit_distilled", "evaluate.splits=[val]")


@pytest.fixture(scope="module")
def data(run):
    cfg = load_run(run)[0]
    return own_pictures(run, cfg, cfg, ["val"])


@pytest.fixture(scope="module")
def view(data):
    return data.picture(data.table["path"].iloc[data.rows("train")[0]])


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_strength_0_is_the_view_itself_and_each_strength_is_stronger_and_the_same_again(name, view):
    assert corrupt(view, name, 0, "a.jpg") is view
    before = view.copy()
    worse = [corrupt(view, name, strength, "a.jpg") for strength in range(6)]
    assert np.array_equal(view, before)
    far = [np.abs(w.astype(int) - view).mean() for w in worse]
    assert all(low < high for low, high in itertools.pairwise(far)), far
    corrupt(view, name, 3, "b.jpg")  # another picture in between changes nothing
    assert np.array_equal(corrupt(view, name, 3, "a.jpg"), worse[3])


def test_what_strengths_mean(view):
    white = np.full((100, 100, 3), 200, np.uint8)
    assert corrupt(white, "darkness", 3, "a").mean() == pytest.approx(70, abs=1)
    assert corrupt(white, "noise", 2, "a").std() == pytest.approx(0.06 * 255, rel=0.1)
    assert not np.array_equal(corrupt(white, "noise", 2, "a"), corrupt(white, "noise", 2, "b"))
    assert np.ptp(corrupt(view, "grey", 5, "a"), axis=2).max() <= 1
    rows = (corrupt(white, LOWER, 2, "a") == 128).all(axis=(1, 2))
    assert np.flatnonzero(rows).tolist() == list(range(80, 100))  # 40 % of the half
    assert np.flatnonzero((corrupt(white, UPPER, 5, "a") == 128).all(axis=(1, 2))).tolist() == list(range(50))
    ways = {corrupt(view, "rotation", 5, f"{n}.jpg").tobytes() for n in range(20)}
    assert len(ways) == 2


def test_clean_pictures_are_predicted_as_evaluation_does(run, data):
    classifier = load_run(run)[1]

    def predict(seen):
        return predict_splits(classifier, None, seen, ["val"], 64, torch.device("cpu"))[0]

    rows = data.rows("val")
    stored, _ = predictions.read_predictions(run / "predictions.parquet")
    frame = predict_under(data, rows, {CLEAN: conditions(data, rows)[CLEAN]}, predict)
    pd.testing.assert_frame_equal(frame.drop(columns="split"), stored.drop(columns="split"))
    noise = {"noise 3": conditions(data, rows)["noise 3"]}
    assert predict_under(data, rows, noise, predict).equals(predict_under(data, rows, noise, predict))
    few = choose(data, "val", 5)
    part = predict_under(data, few, {CLEAN: conditions(data, few)[CLEAN]}, predict)
    assert part["id"].tolist() == data.table["path"].iloc[few].tolist()
    assert set(few) <= set(rows)
    assert len(few) == 5


def oracle(data, rows, where):
    """Predicts the label where the pixels in `where(row)` (bool) are those of the clean view, and else class 1."""
    clean = conditions(data, rows)[CLEAN]

    def predict(seen):
        same = [np.array_equal(seen.pixels[i][where(row)], clean(row)[where(row)]) for i, row in enumerate(rows)]
        said = np.where(same, data.labels(rows), 1)
        facts = [seen.table[column].tolist() for column in ("path", "split", "group", "label")]
        return predictions.assemble(*facts, {"head": 4.0 * np.eye(2)[said]}, data.classes)

    return predict


def shortcut_test(data, where):
    rows = data.rows("train")
    views = conditions(data, rows)
    names = [CLEAN, HIDDEN, ALONE, PATCH]
    frame = predict_under(data, rows, {name: views[name] for name in names}, oracle(data, rows, where))
    guess = pd.Series(data.labels(rows)).value_counts(normalize=True).max()
    found = reactions(frame, data.classes, dict(zip(names, names, strict=True)))["head"]
    values = {name: (of["accuracy"]["value"], of["changed"]["value"]) for name, of in found.items()}
    return values, verdict(found, guess), rows, guess


def test_a_model_that_sees_the_mask_alone_follows_it_and_one_that_sees_all_else_does_not(data):
    region = MaskRegion(data, data.rows("train")).region
    values, (words, sentences), rows, guess = shortcut_test(data, region)
    other = float((data.labels(rows) == 1).mean())
    assert values == {CLEAN: (1, 0), HIDDEN: (other, 1 - other), ALONE: (1, 0), PATCH: (1, 0)}
    assert words == "follows the mask"
    assert f"gets {100 * guess:.1f} %, and the AUROC is 0.500, where 0.5 is chance: no sign" in sentences[0]
    assert sentences[2].endswith("% of the decisions: not shown to be more than 10 %.")

    values, (words, sentences), _, _ = shortcut_test(data, lambda row: ~region(row))
    assert values == {CLEAN: (1, 0), HIDDEN: (1, 0), ALONE: (other, 1 - other), PATCH: (other, 1 - other)}
    assert words == "is not shown to follow the mask"
    assert "something else tells the label too" in sentences[0]
    assert "colour anywhere counts" in sentences[2]


def test_what_is_changed_outside_the_mask_region_and_in_it(data):
    rows = data.rows("train")
    mask = MaskRegion(data, rows)
    worn = int(rows[data.labels(rows) == 0][0])
    clean, region = conditions(data, rows)[CLEAN](worn), mask.region(worn)
    assert 0.05 < region.mean() < 0.9
    hidden, alone, patched = mask.hidden(worn), mask.alone(worn), mask.patched(worn)
    assert (hidden[region] == 128).all()
    assert np.array_equal(hidden[~region], clean[~region])
    assert (alone[~region] == 128).all()
    assert np.array_equal(alone[region], clean[region])
    changed = (patched != clean).any(axis=2)
    assert changed.any()
    assert not (changed & region).any()
    assert changed.sum() <= 8 * 8
    assert (patched[changed] == mask.colours[worn]).all()
    bare = [row for row in rows if row not in mask.colours]
    assert bare
    assert (mask.patched(int(bare[0])) != conditions(data, rows)[CLEAN](int(bare[0]))).any()


def test_flips_are_counted_against_the_decisions_and_photographs_have_two_sentences():
    ids = [f"{n}.jpg" for n in range(20)]
    labels = ["a"] * 10 + ["b"] * 10
    clean, worse = np.eye(2)[[0] * 12 + [1] * 8], np.eye(2)[[0] * 9 + [1] * 11]
    frame = pd.concat(
        [
            predictions.assemble(ids, ["val"] * 20, ids, labels, {"head": logits}, ["a", "b"]).assign(split=name)
            for name, logits in ((CLEAN, clean), (LOWER, worse), (UPPER, np.eye(2)[[0] * 20]))
        ]
    )
    found = reactions(frame, ["a", "b"], {name: name for name in (CLEAN, LOWER, UPPER)})["head"]
    assert (found[CLEAN]["accuracy"]["value"], found[LOWER]["accuracy"]["value"]) == (0.9, 0.95)
    changed = found[LOWER]["changed"]  # Wilson's interval of 3 of 20
    assert [changed[key] for key in ("value", "low", "high")] == pytest.approx([0.15, 0.0524, 0.3604], abs=5e-4)
    words, sentences = verdict(found, 0.5)
    assert words == "is not shown to follow the mask"  # with the upper half covered all are "a"
    assert len(sentences) == 2
    assert sentences[1].endswith("that is no more than guessing.")


def test_photographs_are_not_put_where_git_would_track_them(tmp_path):
    subprocess.run(["git", "init", "-q", str(tmp_path / "code")], check=True)
    (tmp_path / "code" / ".gitignore").write_text("/runs/\n")
    make_out(tmp_path / "elsewhere", drawn=False)
    make_out(tmp_path / "code" / "runs" / "a" / "stress", drawn=False)
    make_out(tmp_path / "code" / "figures", drawn=True)
    with pytest.raises(UserError, match="in a git repository that would track photographs in it"):
        make_out(tmp_path / "code" / "figures" / "new", drawn=False)
    with pytest.raises(UserError, match=r"cannot be made \(Not a directory\): name another folder"):
        make_out(tmp_path / "code" / ".gitignore" / "new", drawn=True)


@pytest.mark.slow
def test_the_command_writes_one_picture_two_tables_and_a_page(run, tmp_path):
    cache = str(run.parent / "cache")
    result = CliRunner().invoke(app, ["stress", str(run), "--cache-dir", cache, "--out", str(tmp_path / "new" / "out")])
    assert result.exit_code == 0, result.output
    out = tmp_path / "new" / "out"
    table = pd.read_csv(out / "stress.csv")
    assert len(table) == (1 + 9 * 5) * 3
    assert set(table["head"]) == {"head", "head_dist", "mean"}
    assert set(table["pictures"]) == {16}
    assert table.loc[table["corruption"] == "JPEG", "level"].unique().tolist() == [50, 30, 18, 10, 5]
    assert table[["accuracy", "nll", "ece"]].notna().all(axis=None)
    shortcuts = pd.read_csv(out / "shortcuts.csv")
    assert shortcuts["pictures"].tolist() == [CLEAN, HIDDEN, ALONE, PATCH] * 3
    assert (shortcuts.loc[shortcuts["pictures"] == CLEAN, "changed"] == 0).all()
    picture = (out / "stress.svg").read_text()
    assert "var(--" not in picture
    assert all(f"{name}: accuracy, %" in picture for name in CORRUPTIONS)
    assert "The decision of the student mean of heads" in (out / "stress.html").read_text()


def test_a_closed_test_split_stays_closed(run, data, tmp_path):
    from facemask.stress import stress

    with pytest.raises(UserError, match="trained without opening its test split: leave it closed with --split val"):
        stress(run, "test", 20, tmp_path / "out", run.parent / "cache")
    assert openings(run.parent / "ledger.jsonl", data.test_fingerprint) == 0
    assert not (tmp_path / "out").exists()
