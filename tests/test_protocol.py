import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import optuna
import pytest
import yaml

from facemask import protocol
from facemask.config import as_plain
from facemask.errors import UserError
from facemask.files import read_yaml
from facemask.protocol import SPEC, Driver, config, matched_smoothing, planned, read_study
from facemask.runs.compare import compare
from facemask.runs.folder import flat
from facemask.runs.record import config_differences, read_record

# Where the arms of a contrast differ, if not in what they are taught alone.
OTHERWISE = {
    ("deit_token_labels", "deit_plain"): {"model"},
    ("vit_token_labels", "vit_plain"): {"model"},
    ("deit_token_soft", "deit_logit"): {"distill", "model"},
    ("vit_plain", "deit_plain"): {"model", "recipe", "optim", "augment", "trainer"},
    ("hard_scratch-seeds", "deit_token_hard-seeds"): {"teacher"},
    ("hard_crossfit-seeds", "deit_token_hard-seeds"): {"teacher"},
}


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return read_yaml(SPEC)


@pytest.fixture(scope="module")
def configs(spec) -> dict[str, dict[str, Any]]:
    """Every entry of the study, composed and checked."""
    os.environ.setdefault("FACEMASK_DATA", "/data")
    arms: dict[str, dict[str, Any]] = {}
    for entry in read_study(spec):
        if entry.arm not in arms:
            arms[entry.arm] = as_plain(config([*entry.options, "run_dir=runs/one", "name=one"]))
    return {entry.record.removeprefix("study-"): arms[entry.arm] for entry in read_study(spec)}


def test_arms_differ_only_where_the_protocol_says(spec, configs):
    for pair in spec["contrasts"]:
        arm, reference = pair["arm"], pair["reference"]
        keys = config_differences(configs[arm], configs[reference])
        groups = {key.split(".")[0] for key in keys} - {"model_name"}
        expected = OTHERWISE.get((arm, reference), {"distill", "teacher"} if "scratch" in arm else {"distill"})
        assert groups == expected, pair
    one, other = (configs[name] for name in spec["same_weights"])
    assert config_differences(one, other) == ["model.name", "model_name"]
    recipes = {flat(configs[name])["optim.weight_decay"] for name in ("vit_token_hard", "vit_plain")}
    assert recipes == {0.3}


def test_one_budget_for_the_ablation_and_one_for_best(spec, configs):
    budget = {
        (c["model"]["img_size"], c["trainer"]["max_epochs"], c["data"]["fraction"], c["data"]["batch_size"])
        for name, c in configs.items()
        if not name.startswith(("best", "hybrid", "positive"))
    }
    (short,) = (epochs for _, epochs, fraction, _ in budget if fraction == 1)
    assert {(e / short, f) for _, e, f, _ in budget} == {(1, 1.0), (2, 0.25), (4, 0.1)}
    assert (
        len({flat(configs[n])["trainer.max_epochs"] for n in ("best_distilled", "best_labels", "best_labels_timm")})
        == 1
    )
    sweeps = {name: arm["sweep"]["trials"] for name, arm in spec["arms"].items() if "sweep" in arm}
    assert sweeps["tuned_hard"] == sweeps["tuned_labels"]
    assert sweeps["best_distilled"] == sweeps["best_labels"]


def test_what_is_opened_and_on_how_many_folds_and_seeds(spec):
    entries = {entry.record.removeprefix("study-"): entry for entry in read_study(spec)}
    assert next(iter(entries)) == "deit_token_hard"
    assert list(entries["deit_token_hard"].runs.values()) == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0)]
    assert entries["deit_token_labels-seeds"].runs == {f"fold0_seed{s}": (0, s) for s in (0, 1, 2)}
    assert entries["best_distilled"].runs == {f"seed{s}": (None, s) for s in (0, 1, 2)}
    assert {entry.record[:11] for entry in read_study(spec, full=True)} == {"study_full-"}
    for number in ("10", "25"):
        assert sum(name.endswith(f"_{number}-seeds") for name in entries) == 7


def test_a_split_and_folds_are_refused(spec):
    wrong = {**spec, "runs": [{"tier": "ablation", "arms": ["naive_hard"], "folds": [0]}]}
    with pytest.raises(UserError, match="naive_hard has a split of its own: give it seeds, and no folds"):
        read_study(wrong)


def test_smoothing_of_an_entropy_by_hand():
    assert matched_smoothing(-(0.95 * math.log(0.95) + 0.05 * math.log(0.05)), 2) == pytest.approx(0.1)
    assert matched_smoothing(-(0.8 * math.log(0.8) + 0.2 * math.log(0.1)), 3) == pytest.approx(0.3)
    assert matched_smoothing(math.log(2), 2) < 1  # what optim.label_smoothing may be
    assert matched_smoothing(0.0, 2) == 0


def test_planned_hours_by_hand(spec):
    options = [*spec["bases"]["drawn"], "model.img_size=64", "trainer.max_epochs=10"]
    plan = {"student": {64: 4.0}, "teacher": {64: 3.0}, "pictures": 1, "start": 20}
    asked: set[str] = set()
    labels = 3 * (20 + 10 * 2100 * 0.004) / 3600
    runs = [(None, 0), (None, 1), (None, 2)]
    assert planned(config([*options, "distill=none"]), runs, plan, asked) == pytest.approx(labels)
    growing = [*options, "distill=none", "augment.small_epochs=4", "augment.small_size=32"]
    shorter = 3 * (20 + (6 * 0.004 + 4 * 0.001) * 2100) / 3600
    assert planned(config(growing), runs, {**plan, "student": {64: 4.0, 32: 1.0}}, asked) == pytest.approx(shorter)
    assert planned(config([*options, "distill=hard"]), runs, plan, asked) == pytest.approx(labels + 3 * 63 / 3600)
    assert planned(config([*options, "distill=soft"]), runs, plan, asked) == pytest.approx(
        labels
    )  # its answers are kept


MINI: dict[str, Any] = {
    "name": "mini",
    "bases": {
        "drawn": [
            "data=synthetic", "data.num_images=160", "data.folds=2", "data.batch_size=16", "model=deit_distilled",
            "model.img_size=32", "model.depth=1", "teacher=resnet_small", "teacher.epochs=1", "trainer.max_epochs=1",
            "trainer.accelerator=cpu", "trainer.devices=1", "evaluate.splits=[test]", "evaluate.resamples=100",
            "logger=none", "threads=1",
        ]
    },
    "full": {},
    "full_arms": {},
    "arms": {
        "hard": {"base": "drawn", "options": ["distill=hard"]},
        "labels": {"base": "drawn", "options": ["distill=none"]},
    },
    "runs": [{"tier": "ablation", "arms": ["hard", "labels"], "folds": [0, 1]}],
    "contrasts": [{"kind": "primary", "arm": "hard", "reference": "labels", "question": "does the teacher help",
                   "expected": [-2, None]}],
    "targets": [{"arm": "hard", "asked": [0.0, 1.0], "predicted": [0, 0.0001], "what": "drawn"}],
    "same_weights": ["hard", "labels"],
    "worth": 0.01,
    "curves": {"both": ["hard", "labels"]},
    "budget": 1,
    "plan": {"student": {32: 1.0}, "teacher": {32: 1.0}, "pictures": 1, "start": 5},
}  # fmt: skip


def test_no_worker_waits_for_the_last_run_of_an_entry(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec_file = tmp_path / "mini.yaml"
    runs = [{"tier": "ablation", "arms": [arm], "seeds": [0]} for arm in ("hard", "labels", "hard")]
    spec_file.write_text(yaml.safe_dump({**MINI, "runs": runs}))
    together, trained, recorded = threading.Barrier(2), list[str](), list[str]()

    def train(driver: Driver, folder: Path, *_: Any) -> None:
        together.wait(30)  # raises where the other arm is not trained at the same time
        trained.append(folder.parent.name)

    monkeypatch.setattr(Driver, "train", train)
    monkeypatch.setattr(Driver, "record", lambda driver, entry, folders: recorded.append(entry.arm))
    Driver(spec_file, False, tmp_path / "experiments", 2, True).study(None, None)
    assert sorted(trained) == ["hard", "labels"]  # two records share a run
    assert recorded == ["hard", "labels", "hard"]


def test_what_has_a_record_can_be_left_out_and_a_failure_keeps_nothing_else_from_being_made(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    spec_file, experiments = tmp_path / "mini.yaml", tmp_path / "experiments"
    runs = [{"tier": "ablation", "arms": ["labels", "hard", "kept"], "seeds": [0]}]
    spec_file.write_text(yaml.safe_dump({**MINI, "arms": {**MINI["arms"], "kept": {"like": "hard"}}, "runs": runs}))
    (experiments / "mini-kept").mkdir(parents=True)
    (experiments / "mini-kept" / "record.json").touch()
    trained, recorded = list[str](), list[str]()

    def train(driver: Driver, folder: Path, *_: Any) -> None:
        trained.append(folder.parent.name)
        if folder.parent.name == "labels":
            raise UserError("the loss is not finite")

    monkeypatch.setattr(Driver, "train", train)
    monkeypatch.setattr(Driver, "record", lambda driver, entry, folders: recorded.append(entry.arm))
    monkeypatch.setattr(protocol, "write_page", lambda *_: "page")
    with pytest.raises(UserError, match=r"^mini-labels: not recorded, see above; the same command tries them again$"):
        Driver(spec_file, False, experiments, 1, True, missing_alone=True).study(None, None)
    assert (trained, recorded) == (["labels", "hard"], ["hard"])
    said = capsys.readouterr().out
    assert "failed    mini-labels: the loss is not finite" in said
    assert re.search(r"took      0.0\d hours now; 0.0 CPU-hours of training", said)


def test_a_record_of_other_weights_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Driver, "small_pictures", lambda driver, folders: None)
    monkeypatch.setattr(protocol, "read_record", lambda path: Recorded)
    spec_file, folder = tmp_path / "mini.yaml", tmp_path / "run"
    spec_file.write_text(yaml.safe_dump(MINI))
    driver = Driver(spec_file, False, tmp_path, 1, True)
    for path in (folder, tmp_path / "mini-hard"):
        path.mkdir()
    (tmp_path / "mini-hard" / "record.json").touch()
    for weights, said in (("a", ""), ("b", f"kept      {tmp_path / 'mini-hard'}: its weights are others;")):
        (folder / "summary.json").write_text(json.dumps({"weights_sha256": weights}))
        driver.record(driver.entries[0], [folder])
        out = capsys.readouterr().out
        assert out.startswith(said) if said else out == ""


class Recorded:
    info: ClassVar = {"runs": {"fold0": {"weights_sha256": "a", "teacher": {"teacher_entropy": 0.1}},
                               "fold1": {"weights_sha256": "a", "teacher": {"teacher_entropy": 0.2}}}}  # fmt: skip


def test_labels_are_smoothed_to_the_mean_entropy_of_the_runs_of_another_arm(tmp_path, monkeypatch):
    spec_file = tmp_path / "mini.yaml"
    smoothed = {"base": "drawn", "smooth_as": "hard"}
    runs = [{"tier": "ablation", "arms": ["smoothed"], "folds": [0, 1]}]
    spec_file.write_text(yaml.safe_dump({**MINI, "arms": {**MINI["arms"], "smoothed": smoothed}, "runs": runs}))
    asked: list[str] = []
    monkeypatch.setattr(protocol, "read_record", lambda path: asked.append(path.name) or Recorded)
    driver = Driver(spec_file, False, tmp_path, 1, True)
    (option,) = driver.found(driver.entries[0], True)
    s = float(option.removeprefix("optim.label_smoothing="))
    p = np.array([1 - s / 2, s / 2])
    assert asked == ["mini-hard"]
    assert -(p * np.log(p)).sum() == pytest.approx(0.15, abs=1e-5)


def test_an_arm_is_trained_with_the_best_values_of_its_search_whose_cost_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec_file = tmp_path / "mini.yaml"
    hard = {**MINI["arms"]["hard"], "sweep": {"trials": 3, "space": ["distill.alpha=interval(0.1,0.9)"]}}
    spec_file.write_text(yaml.safe_dump({**MINI, "arms": {**MINI["arms"], "hard": hard}}))
    driver = Driver(spec_file, False, tmp_path / "experiments", 2, True)
    entry = next(entry for entry in driver.entries if entry.arm == "hard")
    commands = []

    def search(command: list[str], **_: Any) -> int:
        commands.append(command)
        folder = tmp_path / "runs" / "mini" / "sweeps" / "hard"
        folder.mkdir(parents=True)
        study = optuna.create_study(study_name="mini_hard", storage=f"sqlite:///{folder}/study.db")
        begin = datetime.datetime(2026, 1, 1)
        space = {"distill.alpha": optuna.distributions.FloatDistribution(0.1, 0.9)}
        for number, (alpha, nll, minutes) in enumerate([(0.5, 0.4, 30), (0.2, 0.3, 60), (0.9, 0.5, 45)]):
            study.add_trial(
                optuna.trial.FrozenTrial(
                    number, optuna.trial.TrialState.COMPLETE, nll, begin, begin + datetime.timedelta(minutes=minutes),
                    {"distill.alpha": alpha}, space, {}, {}, {}, number,
                )
            )  # fmt: skip
        return 0

    monkeypatch.setattr(protocol, "_run", search)
    assert driver.found(entry, True) == driver.found(entry, False) == ["distill.alpha=0.2"]
    (command,) = commands
    assert {"n_workers=2", "sweep.trials=3", "data.fold=0", "distill.alpha=interval(0.1,0.9)"} <= set(command)
    kept = json.loads((tmp_path / "experiments" / "mini" / "searches.json").read_text())
    tried = [{"params": {"distill.alpha": a}, "value": value} for a, value in ((0.5, 0.4), (0.2, 0.3), (0.9, 0.5))]
    assert kept == {"hard": {"trials": 3, "cpu_hours": 2.25, "tried": tried}}
    driver.study(None, None, tables=True)
    table = (tmp_path / "experiments" / "mini" / "README.md").read_text()
    assert "3 trials of searches on validation for 2.2 more; 1 were planned for all of them." in table
    assert "| hard | 0 | 0.5 | 0.4000 |\n| hard | 1 | 0.2 | **0.3000** |\n| hard | 2 | 0.9 | 0.5000 |" in table


@pytest.mark.slow
def test_a_killed_study_goes_on_and_its_tables_are_compares_own_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spec_file = tmp_path / "mini.yaml"
    spec_file.write_text(yaml.safe_dump(MINI))
    environment = {**os.environ, "FACEMASK_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "none"]):  # whatever state the code is in
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *arguments], cwd=tmp_path, check=True)
    environment |= {"GIT_DIR": str(tmp_path / ".git"), "GIT_WORK_TREE": str(tmp_path)}
    command = [sys.executable, "-c", "from facemask.cli import main; main()", "study", "--spec", str(spec_file)]
    command += ["--workers", "1"]
    runs = tmp_path / "runs" / "mini"

    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (runs / "hard" / "fold1_seed0" / "config.yaml").exists():  # the second run has begun
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.wait()
    finished = runs / "hard" / "fold0_seed0"
    assert json.loads((finished / "status.json").read_text())["state"] == "finished"
    before = {file: file.stat().st_mtime_ns for file in (finished / "status.json", runs / "hard" / "fold0_seed0.log")}

    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file: file.stat().st_mtime_ns for file in before} == before
    trained = [line.split("/")[-2:] for line in done.stdout.splitlines() if line.startswith("train ")]
    assert trained == [["hard", "fold1_seed0"], ["labels", "fold0_seed0"], ["labels", "fold1_seed0"]]
    assert "3 of 4 runs left" not in done.stdout  # each entry counts its own
    assert "1 of 2 runs left" in done.stdout

    table = (tmp_path / "experiments" / "mini" / "README.md").read_text()
    (row,) = json.loads((tmp_path / "experiments" / "mini" / "contrasts.json").read_text())
    records = [tmp_path / "experiments" / f"mini-{arm}" for arm in ("labels", "hard")]
    own = compare(records)["recipe"][-1]
    assert row["recipe"] == {key: value for key, value in json.loads(json.dumps(own)).items() if key != "p_holm"}
    assert own["over"] == "folds"
    cells = f"| 2 folds | -2 or more | {100 * own['difference']:+.2f} ["
    assert re.search(r"\| hard - labels \| does the teacher help \| [\w ]+ " + re.escape(cells), table)
    assert row["weights"]["n"] == 160  # every picture once
    per_fold = [read_record(path) for path in records]
    hard = per_fold[1]
    right = [
        sum(r.metrics(run)["test"]["mean"]["accuracy"]["value"] * r.metrics(run)["test"]["mean"]["n"] for run in r.runs)
        for r in per_fold
    ]
    assert row["weights"]["difference"] == pytest.approx((right[1] - right[0]) / 160)
    mean = np.mean([hard.metrics(run)["test"]["mean"]["accuracy"]["value"] for run in hard.runs])
    said = (
        rf"Target. hard \(drawn\) is right on {100 * mean:.2f} % of the test pictures, mean of 2 folds; 95 % interval "
    )
    low = next(claim.get("low", mean) for claim in hard.claims if claim["claim"] == "test/mean/accuracy")
    came = "that was wrong" if low > 0.0001 else "the mean is not, but the interval does not exclude it"
    said += rf"\[.*, .*\] \(.*\). Predicted: below 0.01 %; {came}. "
    assert re.search(
        said + re.escape(f"0.00 % asked, reached; 100.00 % asked, {100 * (1 - mean):.2f} points short."), table
    )
    assert re.search(r"By head: class head .*; distillation head .*; mean head [+-].*, p ", table)
    assert re.search(
        r"points over 2 folds at seed 0, expected -2 or more \((undecided|which .*)\): .* no pixels .*\); "
        r"1 epochs at 32 px, under-trained\.",
        table,
    )
    assert "Negative control. hard and labels have OTHER weights." in table
    assert "Left out so far: nothing." in table

    again = subprocess.run([*command, "--dry-run"], env=environment, capture_output=True, text=True, check=True)
    assert again.stdout.count("0 of 2 runs left") == 2
    changed = {**MINI, "arms": {**MINI["arms"], "hard": {"base": "drawn", "options": ["distill=soft"]}}}
    spec_file.write_text(yaml.safe_dump(changed))
    monkeypatch.setenv("FACEMASK_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"^mini-hard: not recorded"):
        Driver(spec_file, False, Path("experiments"), 1, True).study(None, None)
    assert re.search(r"failed    mini-hard: .* holds a run of another config", capsys.readouterr().out)


def test_the_pinned_best_run_is_that_of_the_record(monkeypatch):
    monkeypatch.setenv("FACEMASK_DATA", "/data")
    recorded = read_yaml(protocol.ROOT / "experiments" / "study-best_distilled" / "config.yaml")
    pinned = as_plain(config(["experiment=facemask_best", "run_dir=runs/one"]))
    places = ("cache_dir", "ledger", "dirpath", "data.root", "data.split", "data.manifest")
    other = [key for key in config_differences(pinned, recorded) if not key.endswith(places)]
    assert {key.split(".")[0] for key in other} <= {"name", "experiment_name", "run_dir", "resume", "logger"}, other
