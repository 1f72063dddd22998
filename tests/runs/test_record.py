import json
import math
import subprocess

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from facemask.cli import app
from facemask.data.splits import fingerprint
from facemask.errors import UserError
from facemask.runs import provenance
from facemask.runs.folder import RunFolder
from facemask.runs.metrics import evaluate
from facemask.runs.predictions import read_predictions
from facemask.runs.record import changed_files, mean_interval, neutral, read_record, record, summarise

HEADS = ("head", "teacher", "no_pixels", "majority")


def test_a_record_holds_everything_but_paths_pictures_and_weights(make_run, tmp_path):
    runs = [make_run(2), make_run(0), make_run(1)]
    target = record(runs, "mine", tmp_path / "experiments", fingerprint)
    names = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    of_run = ("predictions.parquet", "metrics.json", "curves.csv")
    assert names == {
        "record.json", "config.yaml", "claims.yaml", "versions.txt", "pictures.parquet", "README.md", "SHA256SUMS",
        *(f"runs/seed{seed}/{name}" for seed in range(3) for name in of_run),
    }  # fmt: skip
    text = b"".join(path.read_bytes() for path in target.rglob("*") if path.is_file())
    for secret in (str(tmp_path), "/somewhere", "/home", "has pictures"):
        assert secret.encode() not in text
    read = read_record(target)
    assert read.runs == ["seed0", "seed1", "seed2"]
    assert read.info["over"] == "seed"
    assert read.info["runs"]["seed1"]["audit"]["test_with_a_copy_in_train"] == 0
    assert sum(read.info["runs"]["seed1"]["audit"]["counts"]["test"].values()) == 16
    assert "Pictures: train 16, val 8, test 16; 0 test pictures" in (target / "README.md").read_text()
    assert read.info["test_opened"] == 5
    assert read.config["data"]["split"] == "$FACEMASK_DATA/splits/a.csv"
    assert read.config["callbacks"]["best"]["dirpath"] == "$RUN_DIR/checkpoints"
    assert read.config["model"]["checkpoint"] == "$FILE/weights.pth"
    seed2 = read.info["runs"]["seed2"]
    assert seed2["command"] == (
        'python train.py seed=2 "data.root=$FACEMASK_DATA" "run_dir=$RUN_DIR" "model.checkpoint=$FILE/w.pth"'
    )
    assert seed2["overrides"][1] == "data.root=$FACEMASK_DATA"
    assert seed2["notes"] == ["weights of $RUN_DIR/checkpoints/best.ckpt"]
    assert seed2["environment"]["TORCH_HOME"] == "$FILE/torch"
    assert (target / "versions.txt").read_text() == f"numpy=={np.__version__}\ntorch==2.9\n"
    pictures = read.pictures()
    assert pictures.columns.tolist()[:5] == ["path", "label", "group", "sha256", "bytes"]
    assert pictures["split/seed1"].value_counts().to_dict() == {"train": 16, "test": 16, "val": 8}
    assert subprocess.run(["sha256sum", "--quiet", "-c", "SHA256SUMS"], cwd=target, check=False).returncode == 0


def test_numbers_come_from_the_predictions(make_run, tmp_path):
    runs = [make_run(seed) for seed in range(3)]
    target = record(runs, "mine", tmp_path / "experiments", fingerprint)
    accuracies, losses = [], []
    for seed, folder in enumerate(runs):
        frame, classes = read_predictions(folder / "predictions.parquet")
        stored = read_record(target).predictions(f"seed{seed}")[0]
        logits = [column for column in frame if column.startswith("logit/")]
        pd.testing.assert_frame_equal(
            stored[["id", "split", "label", *logits]], frame[["id", "split", "label", *logits]]
        )
        assert stored.groupby("group").ngroups == frame.groupby("group").ngroups
        numbers = evaluate(frame, classes, resamples=100)
        assert read_record(target).metrics(f"seed{seed}") == json.loads(json.dumps(numbers))
        accuracies.append(numbers["test"]["head"]["accuracy"]["value"])
        losses.append(numbers["test"]["head"]["nll"]["value"])
    claims = {claim["claim"]: claim for claim in yaml.safe_load((target / "claims.yaml").read_text())}
    claim = claims["test/head/accuracy"]
    assert claim["value"] == pytest.approx(np.mean(accuracies), abs=1e-15)
    assert claim["std"] == pytest.approx(np.std(accuracies, ddof=1), abs=1e-15)
    half = 4.302652729749464 * claim["std"] / math.sqrt(3)  # t of 2 degrees of freedom
    assert (claim["low"], claim["high"]) == pytest.approx((claim["value"] - half, claim["value"] + half), abs=1e-11)
    assert claim["tier"] == "metrics"
    assert claim["tolerance"] == {"metrics": 1e-9, "predict": 0.005, "train": 0.02}
    assert claims["train/teacher_label_disagreement"]["value"] == pytest.approx((0.1 + 0.15 + 0.2) / 3)
    assert claims["weights/seed1"]["value"] == f"{1:064}"
    expected = {
        f"{s}/{h}/{m}" for s in ("val", "test") for h in HEADS for m in ("accuracy", "balanced_accuracy", "nll")
    }
    assert {name for name in claims if name.startswith(("val", "test"))} == expected
    readme = (target / "README.md").read_text()
    assert f"{100 * claim['value']:.1f} [{100 * claim['low']:.1f}, 100.0]" in readme
    assert f"{np.mean(losses):.3f} [" in readme
    assert "| student \\* |" in readme
    assert "opened 5 time(s)" in readme
    assert "Mean over 3 seeds" in readme


def test_one_run_keeps_its_own_interval(make_record):
    read = read_record(make_record(seeds=(4,)))
    own = read.metrics("seed4")["test"]["head"]["accuracy"]
    entry = read.info["summary"]["test"]["head"]["accuracy"]
    assert entry == {"mean": own["value"], "std": None, "low": own["low"], "high": own["high"], "n": 1}
    assert read.info["over"] is None


def test_intervals_by_hand():
    assert mean_interval([0.9, 0.92]) == pytest.approx(
        {"mean": 0.91, "std": 0.0141421356, "low": 0.91 - 12.7062047 * 0.01, "high": 0.91 + 12.7062047 * 0.01, "n": 2}
    )
    assert mean_interval([0.7] * 3) == {"mean": 0.7, "std": 0.0, "low": None, "high": None, "n": 3}
    undefined = {"value": None, "low": None, "high": None}
    defined = {"value": 0.5, "low": 0.4, "high": 0.6}
    entry = dict.fromkeys(("balanced_accuracy", "macro_f1", "auroc", "nll", "brier", "ece"), undefined)
    assert summarise({"a": {"test": {"head": {**entry, "accuracy": defined}}}}) == {
        "test": {"head": {"accuracy": {"mean": 0.5, "std": None, "low": 0.4, "high": 0.6, "n": 1}}}
    }


def test_folds_have_splits_of_their_own(make_run, tmp_path):
    read = read_record(record([make_run(0, fold=f) for f in range(2)], "cv", tmp_path / "e", fingerprint))
    assert read.runs == ["fold0", "fold1"]
    pictures = read.pictures()
    assert (pictures["split/fold0"] != pictures["split/fold1"]).any()
    for run in read.runs:
        tested = set(pictures["path"][pictures[f"split/{run}"] == "test"])
        frame = read.predictions(run)[0]
        assert set(frame["id"][frame["split"] == "test"]) == tested


def test_runs_that_do_not_belong_together_are_refused(make_run, tmp_path):
    def refused(message, *runs, **options):
        with pytest.raises(UserError, match=message):
            record(runs, "mine", tmp_path / "experiments", fingerprint, **options)
        assert not (tmp_path / "experiments" / "mine").exists()

    first = make_run(0)
    refused(r"differ in evaluate\.batch_size, optim\.lr: runs of one record", first, make_run(
        1, name="lr", optim={"lr": 0.1}, evaluate={"splits": ["val", "test"], "batch_size": 32, "resamples": 100}
    ))  # fmt: skip
    refused("the same seed and fold", first, make_run(0, name="again"))
    refused("over seeds or over folds, not both", make_run(0, fold=0), make_run(1, fold=1))
    other = make_run(1)
    provenance = json.loads((other / "provenance.json").read_text())
    provenance["versions"]["torch"] = "2.10"
    (other / "provenance.json").write_text(json.dumps(provenance))
    refused(r"differ in versions\.torch", first, other)


def test_code_that_nobody_has_is_recorded_only_on_request(make_run, tmp_path):
    dirty = make_run(0, dirty=True)
    with pytest.raises(UserError, match=r"trained by code that is in no commit.*--allow-dirty"):
        record([dirty], "mine", tmp_path / "e", fingerprint)
    target = record([dirty], "mine", tmp_path / "e", fingerprint, allow_dirty=True)
    assert (target / "diff.patch").read_text() == "--- a/x\n+++ b/x\n"
    assert "with the changes in diff.patch" in (target / "README.md").read_text()


def test_runs_of_the_same_code_at_two_commits_are_one_record_and_of_other_code_are_not(make_run, tmp_path):
    runs = [make_run(seed) for seed in (0, 1)]

    def put(**git):
        file = runs[1] / "provenance.json"
        facts = json.loads(file.read_text())
        facts["git"] |= git
        file.write_text(json.dumps(facts))

    put(commit="d" * 40)
    info = json.loads((record(runs, "mine", tmp_path / "e", fingerprint) / "record.json").read_text())
    assert info["git"]["commit"] == "c" * 40
    put(trees=["other"])
    with pytest.raises(UserError, match=r"differ in git\.commit, git\.trees"):
        record(runs, "other", tmp_path / "e", fingerprint)


def test_code_that_git_does_not_know_is_dirty_and_in_the_diff(tmp_path, monkeypatch):
    package = tmp_path / "src" / "facemask" / "runs"
    package.mkdir(parents=True)
    (package / "a.py").write_text("old\n")
    (tmp_path / "README.md").write_text("old results")

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    git("init", "-q")
    git("add", "-A")
    git("commit", "-q", "-m", "x")
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "record.json").write_text("{}")
    (tmp_path / "README.md").write_text("new results")
    software, diff = provenance.code_and_versions()
    assert (software["git"]["dirty"], diff) == (False, "")
    (tmp_path / "src" / "new.py").write_text("brand new\n")
    (package / "a.py").write_text("changed\n")
    software, diff = provenance.code_and_versions()
    assert software["git"]["dirty"]
    assert software["git"]["untracked"] == ["src/new.py"]
    assert "+brand new" in diff
    assert "+changed" in diff


def test_a_record_larger_than_a_megabyte_is_refused(make_run, tmp_path, monkeypatch):
    run = make_run(0)
    rows = "".join(f"{i},{i * 0.123456789}\n" for i in range(50_000))
    with (run / "curves.csv").open("a") as file:
        file.write(rows)
    with pytest.raises(UserError, match=r"would take 1,\d{3},\d{3} bytes \(most of them runs/seed0/curves\.csv\)"):
        record([run], "mine", tmp_path / "e", fingerprint)
    assert list((tmp_path / "e").iterdir()) == []


def test_the_name_of_an_experiment_is_kept_for_its_runs(make_run, tmp_path):
    with pytest.raises(UserError, match=r"--name smoke is for runs of experiment=smoke, and .* is none"):
        record([make_run(0)], "smoke", tmp_path / "e", fingerprint)


def test_runs_that_were_changed_or_not_finished_are_refused(make_run, tmp_path):
    def refused(message, run, name="mine"):
        with pytest.raises(UserError, match=message):
            record([run], name, tmp_path / "e", fingerprint)

    refused("must be one word", make_run(0, name="a"), name="../mine")
    run = make_run(0, name="b")
    RunFolder(run).set_status("failed")
    refused("holds no finished run", run)
    run = make_run(0, name="c")
    (run / "split.csv").write_text((run / "split.csv").read_text().replace(",val,", ",test,", 1))
    refused("is not the split that the run was trained on", run)
    run = make_run(0, name="d")
    (run / "checkpoints" / "best.ckpt").write_bytes(b"weighty")
    refused(r"best\.ckpt was changed since the run ended", run)
    run = make_run(0, name="e")
    (run / "split.csv").write_text("path,label,split\n")
    refused("made by an older facemask", run)
    assert not list((tmp_path / "e").glob("*")) if (tmp_path / "e").exists() else True


def test_a_record_is_not_overwritten(make_run, make_record, tmp_path):
    path = make_record()
    before = changed_files(path), (path / "SHA256SUMS").read_bytes()
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        record([make_run(5)], "mine", path.parent, fingerprint)
    assert before == ([], (path / "SHA256SUMS").read_bytes())
    assert [p.name for p in path.parent.iterdir()] == ["mine"]


def test_paths_are_replaced_only_where_they_are_paths():
    places = [("/data/pics", "$FACEMASK_DATA"), ("runs/a", "$RUN_DIR")]
    assert neutral("data.root=/data/pics", places) == "data.root=$FACEMASK_DATA"
    assert neutral("/data/pics2/x.csv", places) == "$FILE/x.csv"
    assert neutral("[/data/pics/a.csv,/etc/hosts]", places) == "[$FACEMASK_DATA/a.csv,$FILE/hosts]"
    assert neutral("hydra.searchpath=[file:///mnt/me/conf]", places) == "hydra.searchpath=[$FILE/conf]"
    assert neutral("data.split='/mnt/my own/a b.csv'", places) == "data.split='$FILE/a b.csv'"
    kept = ["vit_tiny_patch16_224", "1/2", "a/b/c", "https://example.org/a/b", 0.5, None, "runs/abc"]
    assert neutral(kept, places) == kept


def test_the_command(make_run, tmp_path):
    runs = [str(make_run(seed)) for seed in range(2)]
    (tmp_path / "e" / ".a.x1.part" / "a").mkdir(parents=True)  # of a command that was killed
    result = CliRunner().invoke(app, ["record", *runs, "--name", "a", "--experiments", str(tmp_path / "e")])
    assert result.exit_code == 0, result.output
    assert read_record(tmp_path / "e" / "a").runs == ["seed0", "seed1"]
    assert [path.name for path in (tmp_path / "e").iterdir()] == ["a"]
