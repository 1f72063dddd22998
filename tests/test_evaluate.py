"""A finished run, made here without training, evaluated on its own pictures and on others."""

import json
import shutil

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from drawn_run import drawn_run
from typer.testing import CliRunner

from facemask.audit import baselines
from facemask.cli import app
from facemask.config import ROOT, check_targets, read_config
from facemask.data import synthetic
from facemask.errors import UserError
from facemask.evaluate import (
    build_data,
    compare_predictions,
    evaluate,
    find_teacher,
    load_run,
    picture_attributes,
    read_attributes,
)
from facemask.files import write_json, write_text
from facemask.runs import calibration, metrics, predictions
from facemask.runs.checkpoints import write_checkpoint
from facemask.runs.ledger import openings

CONF = ROOT / "conf"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Folders: `faces` (60 pictures, the run's own) and `run`; nothing in them is changed by a test."""
    place = tmp_path_factory.mktemp("evaluate")
    synthetic.write_folder(place / "faces", 60, 0)
    (place / "faces" / "attributes.csv").unlink(missing_ok=True)
    splits = ["val", "test"]
    run = drawn_run(place, "model=deit_distilled", data=["data=folder", f"data.root={place / 'faces'}"], splits=splits)
    data = build_data(read_config(run / "config.yaml")["data"])
    data.prepare(splits)
    frame, classes = predictions.read_predictions(run / "predictions.parquet")
    frame = frame.merge(baselines(data.table, splits, place / "cache"), on=predictions.COLUMNS)
    predictions.write_predictions(run / "predictions.parquet", frame, classes)
    write_json(run / "metrics.json", metrics.evaluate(frame, classes, resamples=100))
    return place


@pytest.fixture
def run(place, tmp_path):
    """A copy of the run that a test may change."""
    return shutil.copytree(place / "run", tmp_path / "run")


@pytest.fixture(scope="module")
def other(place):
    """24 faces of another seed, and copies of 5 of the run's training pictures: smaller, mirrored, re-encoded."""
    other = place / "other"
    synthetic.write_folder(other, 24, 7)
    (other / "attributes.csv").unlink(missing_ok=True)
    split = pd.read_csv(place / "run" / "split.csv")
    copies = split[split["split"] == "train"].sort_values("path").iloc[:5]
    for number, row in enumerate(copies.itertuples()):
        pixels = cv2.imread(str(place / "faces" / row.path))
        if number % 2:
            pixels = pixels[:, ::-1]
        pixels = cv2.resize(pixels, None, fx=0.8, fy=0.8, interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(other / row.label / f"copy{number}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 85])
    return other


def options(place, *more):
    return [f"cache_dir={place / 'cache'}", f"ledger={place / 'ledger.jsonl'}", *more]


def of_other(place, root, *more):
    return options(place, "data=folder", f"data.root={root}", *more)


def facts_of(folder):
    return json.loads((folder / "evaluation.json").read_text())


def test_own_splits_come_out_as_stored_and_the_test_opening_is_written_down(place, run, capsys):
    ledger = run.parent / "ledger.jsonl"
    here = [f"cache_dir={place / 'cache'}", f"ledger={ledger}"]
    evaluate(run, [*here, "evaluate.splits=[val]"], name="val")
    assert not ledger.exists()
    capsys.readouterr()
    folder = evaluate(run, here, name="again")
    assert folder == run / "evaluations" / "again"
    facts = facts_of(folder)
    for split, pictures in (("val", 6), ("test", 12)):
        assert facts["against_stored"][split]["pictures"] == pictures
        assert facts["against_stored"][split]["largest_difference"] == 0
    assert (facts["test_opened"], facts["notes"]) == (1, [])
    assert json.loads((folder / "metrics.json").read_text()) == json.loads((run / "metrics.json").read_text())
    told = capsys.readouterr().out
    assert "equal to the stored ones, bit for bit" in told
    assert "test opened once" in told
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        evaluate(run, here, name="again")
    split = pd.read_csv(run / "split.csv")
    split.iloc[1:].to_csv(run / "split.csv", index=False)
    with pytest.raises(UserError, match="changed since"):
        evaluate(run, here)
    assert sorted(path.name for path in (run / "evaluations").iterdir()) == ["again", "val"]


def test_other_pictures_near_duplicates_and_the_drop(place, run, other, capsys):
    ledger = run.parent / "ledger.jsonl"
    given = [f"cache_dir={place / 'cache'}", f"ledger={ledger}", "data=folder", f"data.root={other}"]
    whole = evaluate(run, given, name="whole")
    facts = facts_of(whole)
    found = {pair["path"].split("/")[1] for pair in facts["near_duplicates"]["pairs"]}
    assert found == {f"copy{number}.jpg" for number in range(5)}
    assert (facts["near_duplicates"]["pictures"], facts["near_duplicates"]["of"]) == (5, 29)
    frame, classes = predictions.read_predictions(whole / "predictions.parquet")
    assert len(frame) == 29
    assert set(frame["split"]) == {"other"}
    assert predictions.heads(frame) == ["head", "head_dist", "mean", "majority", "no_pixels"]

    before = json.loads((run / "metrics.json").read_text())["test"]["mean"]["accuracy"]["value"]
    after = (predictions.logits(frame, "mean", classes).argmax(axis=1) == frame["label"].map(classes.index)).mean()
    assert facts["against"] == "test"
    assert facts["drop"]["mean"]["accuracy"]["value"] == pytest.approx(before - after)
    told = capsys.readouterr().out
    seen = "5 (17.2%) are near-duplicates of the run's training pictures: kept"
    assert told.index(seen) < told.index("Drop")  # said first
    page = (whole / "evaluation.html").read_text()
    low, high = (100 * facts["drop"]["mean"]["accuracy"][key] for key in ("low", "high"))
    for text in (seen.replace("'", "&#39;"), f"{100 * (before - after):.1f} [{low:.1f}, {high:.1f}]"):
        assert text in page

    clean = evaluate(run, given, name="clean", exclude_duplicates=True)
    kept, _ = predictions.read_predictions(clean / "predictions.parquet")
    assert len(kept) == 24
    pd.testing.assert_frame_equal(kept, frame[~frame["id"].str.contains("copy")].reset_index(drop=True))
    assert openings(ledger, facts["fingerprint"], "other") == 2


def test_calibration_threshold_and_worst_groups_of_other_pictures(place, run, other, tmp_path, capsys):
    paths = sorted(file.relative_to(other).as_posix() for file in other.glob("*/*.*"))
    kind = ["copy" if "copy" in path else "drawn" for path in paths]
    pd.DataFrame({"path": paths, "kind": kind}).to_csv(tmp_path / "kinds.csv", index=False)
    folder = evaluate(
        run, of_other(place, other), name="all", cost="10:1", positive="with_mask", attributes=tmp_path / "kinds.csv"
    )
    facts = facts_of(folder)
    frame, classes = predictions.read_predictions(folder / "predictions.parquet")
    stored, _ = predictions.read_predictions(run / "predictions.parquet")
    val = stored[stored["split"] == "val"]
    logits, labels = predictions.logits(val, "mean", classes), val["label"].map(classes.index).to_numpy()
    temperature = calibration.fit_temperature(logits, labels)
    found = facts["calibration"]["other"]["mean"]
    assert found["temperature"] == pytest.approx(temperature)
    now, index = predictions.logits(frame, "mean", classes), frame["label"].map(classes.index).to_numpy()
    groups = frame["group"].to_numpy()
    for name, scaled in (("before", now), ("after", now / temperature)):
        expected = metrics.scalar_metrics(scaled, index, groups, resamples=100)
        assert found[name]["ece"] == pytest.approx(expected["ece"])
    p = calibration.softmax(now, temperature)
    curve = pd.read_csv(folder / "risk_coverage.csv").query("head == 'mean'")
    assert len(curve) == len(set(p.max(axis=1)))
    assert curve["risk"].iloc[-1] == pytest.approx((now.argmax(axis=1) != index).mean())

    # chosen on validation, told of the others; class 0 is positive
    threshold = calibration.cost_threshold(calibration.softmax(logits, temperature)[:, 0], labels == 0, 10, 1)
    assert facts["cost"]["chosen"]["evaluated"] == calibration.at_threshold(p[:, 0], index == 0, threshold, 10, 1)
    assert facts["cost"]["chosen"]["validation"]["of_positives"] == (labels == 0).sum()

    table = pd.read_csv(folder / "groups.csv").set_index(["attribute", "value"])
    drawn = table.loc["kind", "drawn"]
    hits = (now.argmax(axis=1) == index)[~frame["id"].str.contains("copy")]
    assert (drawn["n"], drawn["accuracy"]) == (24, pytest.approx(hits.mean()))
    assert table.loc["kind", "1 value(s) of fewer than 20 pictures each"]["n"] == 5
    page = (folder / "evaluation.html").read_text()
    for text in ("Calibration", "Risk and coverage", "Missing a with_mask costs 10", "Worst groups", "kind"):
        assert text in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", "")
    told = capsys.readouterr().out
    assert ["chosen", f"{threshold:.3f}", "other"] in [line.split()[:3] for line in told.splitlines()]
    assert "below the rest" in told


def test_attributes_of_pictures(place, tmp_path):
    data = build_data(load_run(place / "run")[0].data)
    data.prepare(["test"])
    ids = data.table["path"].tolist()[:7]
    pd.DataFrame({"path": ids[:3], "light": [1, 2, 3]}).to_csv(tmp_path / "a.csv", index=False)
    found = picture_attributes(data, ids, read_attributes(tmp_path / "a.csv"))
    sizes = [min(cv2.imread(str(place / "faces" / path)).shape[:2]) for path in ids]
    assert found["short side, px"].tolist() == sizes
    assert found["light"].tolist()[:3] == [1, 2, 3]
    assert found["light"].isna().tolist() == [False] * 3 + [True] * 4
    assert set(found["format"]) <= {"JPEG", "PNG"}
    assert not {"path", "label", "sha256", "group", "split"} & found.keys()
    pixels = data.pixels[data.cache_rows[0]]
    assert found["brightness"][0] == pytest.approx(pixels.mean())
    (tmp_path / "b.csv").write_text("path,x\na,1\na,2\n")
    with pytest.raises(UserError, match="names every picture once"):
        read_attributes(tmp_path / "b.csv")
    with pytest.raises(UserError, match="is not a readable CSV file"):
        read_attributes(tmp_path / "nowhere.csv")


def test_without_validation_predictions_nothing_is_calibrated(place, run):
    frame, classes = predictions.read_predictions(run / "predictions.parquet")
    predictions.write_predictions(run / "predictions.parquet", frame[frame["split"] == "test"], classes)
    facts = facts_of(evaluate(run, options(place, "evaluate.splits=[test]")))
    assert "the run keeps no validation predictions: no temperature, no threshold" in facts["notes"]
    assert "cost" not in facts
    assert "after" not in facts["calibration"]["test"]["mean"]


def test_without_the_training_pictures(place, run, other):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["root"] = str(run / "gone")
    write_text(run / "config.yaml", yaml.safe_dump(config))
    given = of_other(place, other)
    with pytest.raises(UserError, match="--exclude-duplicates needs the run's training pictures"):
        evaluate(run, given, exclude_duplicates=True)
    folder = evaluate(run, given)
    facts = facts_of(folder)
    assert "near-duplicates of training pictures are unknown" in facts["notes"][0]
    assert "near_duplicates" not in facts
    frame, _ = predictions.read_predictions(folder / "predictions.parquet")
    assert predictions.heads(frame) == ["head", "head_dist", "mean"]


def test_labels_of_other_pictures(place, run, other, tmp_path):
    renamed = tmp_path / "renamed"
    for label, folder in (("with_mask", "masked"), ("without_mask", "bare")):
        shutil.copytree(other / label, renamed / folder)
    given = of_other(place, renamed)
    with pytest.raises(UserError, match="the data's label 'bare' is none of the model's classes"):
        evaluate(run, given)
    with pytest.raises(UserError, match="--classes names 'nude'"):
        evaluate(run, given, names={"nude": "without_mask"})
    folder = evaluate(run, given, names={"masked": "with_mask", "bare": "without_mask"})
    given = [str(run), *of_other(place, other), "--name", "cli"]
    result = CliRunner().invoke(app, ["evaluate", *given])
    assert result.exit_code == 0, result.output
    assert isinstance(CliRunner().invoke(app, ["evaluate", *given, "--classes", "a"]).exception, UserError)
    same = run / "evaluations" / "cli"
    numbers = [json.loads((place / "metrics.json").read_text())["other"]["mean"] for place in (folder, same)]
    assert numbers[0]["confusion"] == numbers[1]["confusion"]


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["optim.lr=1"], "optim.lr says nothing about an evaluation"),
        (["data.root=/nowhere"], "data.root is of other pictures: name their kind as well"),
        (["data=folder", "data.root=/nowhere"], "/nowhere does not exist"),
        (["data=folders"], "data=folders does not exist: choose one of"),
        (["data=folder", "data.rot=x"], "unknown key data.rot"),
        (["data=folder", "data.img_size=64"], "the run's model sees pictures of 32 px"),
        (["evaluate.resamples=3"], "evaluate.resamples=3 must be"),
        ({"cost": "10"}, "--cost 10: give what a false negative and a false positive cost, such as 10:1"),
        ({"cost": "0:1"}, "--cost 0:1"),
        ({"cost": "1:nan"}, "--cost 1:nan"),
        ({"positive": "mask"}, "--positive mask is no class of the run: choose one of with_mask, without_mask"),
        ({"name": "a/b"}, "--name a/b is no plain name of a folder"),
        ({"exclude_duplicates": True}, "--exclude-duplicates and --classes are for other pictures"),
    ],
)
def test_wrong_options(place, given, sentence):
    overrides, more = ([], given) if isinstance(given, dict) else (given, {})
    with pytest.raises(UserError, match=sentence):
        evaluate(place / "run", options(place, *overrides), **more)
    assert not (place / "run" / "evaluations").exists()


def test_load_run_gives_the_weights_that_were_written(place):
    cfg, classifier, classes = load_run(place / "run")
    stored = torch.load(place / "run" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, stored[name]) for name, value in classifier.state_dict().items())
    assert not classifier.training
    assert classes == ["with_mask", "without_mask"]
    assert cfg.data.root == str(place / "faces")
    assert find_teacher(place / "run", cfg, place / "cache", classes) is None


def test_runs_that_cannot_be_trusted(run, tmp_path):
    with pytest.raises(UserError, match="holds no finished run"):
        evaluate(tmp_path)
    best = run / "checkpoints" / "best.ckpt"
    content = torch.load(best, weights_only=True)
    content["hyper_parameters"]["model"]["_target_"] = "os.system"
    write_checkpoint(best, content)
    with pytest.raises(UserError, match=r"checkpoints\.json has another sha256"):
        load_run(run)
    (run / "checkpoints.json").unlink()
    with pytest.raises(UserError, match=r"asks for 'os\.system', which is never built from a file"):
        load_run(run)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "facemask.config.os.system",
        "facemask.files.write_text",
        "facemask.modeling.weights.torch.load",
        "facemask.modeling.__builtins__.eval",
        "albumentations.core.serialization.load",
        "torch.optim.lr_scheduler.types.FunctionType",
        "pytorch_lightning.callbacks.Callback\nos.system",
        ["facemask.data.datamodule.FolderData"],
    ],
)
def test_refused_targets(target):
    with pytest.raises(UserError, match="never built from a file"):
        check_targets({"model": [{"deep": {"_target_": target}}]}, "config.yaml")


def test_every_target_of_the_projects_own_configs_is_allowed():
    for file in set(CONF.rglob("*.yaml")) - {
        file for part in ("sweep*/**/*", "sweep*", "hydra/**/*") for file in CONF.glob(part)
    }:
        config = yaml.safe_load(file.read_text()) or {}
        config.pop("hydra", None)
        check_targets(json.loads(json.dumps(config).replace("${", "$(")), file)  # a run keeps them resolved


def test_compare_predictions():
    def frame(logits):
        ids = ["a", "b"]
        return predictions.assemble(ids, ["test"] * 2, ids, ["x", "y"], {"head": np.array(logits)}, ["x", "y"])

    before = frame([[1.0, 0.0], [0.0, 0.5]])
    after = frame([[1.0, 0.25], [0.0, -0.25]])
    found = compare_predictions(after.iloc[::-1], before, ["x", "y"])["test"]
    assert found["largest_difference"] == 0.75
    assert found["changed_decisions"] == 1
    assert compare_predictions(before.iloc[:1], before, ["x", "y"])["test"]["sentence"].startswith("the run stored no")


def test_difference_of_two_proportions_is_newcombes():
    # Newcombe (1998), table II: 56/70 and 48/80, method 10: 0.2, interval 0.0524 to 0.3339
    entries = []
    for correct, trials in ((56, 70), (48, 80)):
        labels = np.zeros(trials, dtype=int)
        labels[trials // 2 :] = 1
        logits = np.eye(2)[labels] * 2.0
        logits[correct:] = -logits[correct:]
        entries.append(metrics.scalar_metrics(logits, labels, resamples=100)["accuracy"])
    found = metrics.difference(*entries)
    assert found["value"] == pytest.approx(0.2)
    assert (found["low"], found["high"]) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    unknown = {"value": None, "low": None, "high": None, "interval": None}
    assert metrics.difference(entries[0], unknown)["value"] is None
