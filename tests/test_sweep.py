"""Sweeps: what is searched, that every trial is counted once whatever is killed, and what a trial tells."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import yaml
from optuna.trial import TrialState
from postgresql import BINARIES, Server
from rich.console import Console
from sweeping import processes, soak, start

from facemask import study as studies
from facemask.errors import UserError
from facemask.runs import storage as storages
from facemask.runs.checkpoints import read_checkpoint
from facemask.runs.sweep_page import ranked, show
from facemask.space import distribution, read
from facemask.study import Study, open_study
from facemask.sweep import main, results
from facemask.trial import Report

ROOT = Path(__file__).resolve().parents[1]
TINY = [
    "data.num_images=60",
    "data.batch_size=16",
    "model.img_size=32",
    "model.depth=1",
    "trainer.max_epochs=3",
    "evaluate.resamples=100",
    "logger=none",
    "threads=1",
]


def study(folder: Path, *options: str) -> Study:
    return Study(read(["sweep=deit", f"sweep.folder={folder}", *options]))


# -- what is asked for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("interval(0.1, 0.5)", optuna.distributions.FloatDistribution(0.1, 0.5)),
        ("interval(1, 5)", optuna.distributions.FloatDistribution(1.0, 5.0)),
        ("tag(log, interval(1e-4, 1e-2))", optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)),
        ("tag(int, interval(1, 8))", optuna.distributions.IntDistribution(1, 8)),
        ("tag(int, log, interval(1, 64))", optuna.distributions.IntDistribution(1, 64, log=True)),
        ("range(2, 10, 2)", optuna.distributions.IntDistribution(2, 10, step=2)),
        ("range(0.0, 1.0, 0.25)", optuna.distributions.FloatDistribution(0.0, 1.0, step=0.25)),
        ("choice(hard, soft)", optuna.distributions.CategoricalDistribution(["hard", "soft"])),
        ("8,16,32", optuna.distributions.CategoricalDistribution(["8", "16", "32"])),
        ("choice(true, 3, [1, 2])", optuna.distributions.CategoricalDistribution(["True", "3", "[1,2]"])),
    ],
)
def test_the_grammar_is_that_of_hydra_optuna_sweeper(text: str, expected: Any) -> None:
    assert distribution("optim.lr", text) == expected


@pytest.mark.parametrize(
    "text", ["interval(5, 1)", "range(5, 1)", "choice()", "0.1", "tag(log, interval(0, 1))", "interval(", "glob(*)"]
)
def test_what_is_no_range_or_an_empty_one_is_named(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"sweep.space: optim.lr: {text}")):
        distribution("optim.lr", text)


def test_the_three_arms_have_equal_budgets_and_bounds_and_start_from_their_recipes(tmp_path: Path) -> None:
    arms = {name: Study(read([f"sweep={name}", f"sweep.folder={tmp_path / name}"])) for name in
            ("vit", "deit", "deit_distilled")}  # fmt: skip
    common = ["optim.lr", "optim.weight_decay", "optim.layer_decay", "model.drop_path_rate"]
    for arm in arms.values():
        assert arm.total == 30
        for key in common:
            assert arm.space.distributions[key] == arms["vit"].space.distributions[key]
    assert [arms["vit"].first[key] for key in common] == [7.5e-4, 0.3, 1.0, 0.0]
    assert [arms["deit"].first[key] for key in common] == [1e-3, 0.05, 1.0, 0.1]
    distilled = arms["deit_distilled"]
    assert distilled.first == arms["deit"].first | {"distill": "hard", "distill.alpha": 0.5}  # hard has no tau
    assert not distilled.space.applies("distill.tau", {"distill": "hard"})
    assert distilled.space.applies("distill.tau", {"distill": "soft"})
    options = [distilled._propose([]).user_attrs["options"], arms["vit"]._propose([]).user_attrs["options"]]
    for given in options:
        assert [option for option in given if option.startswith(("evaluate.", "augment."))] == [
            "evaluate.splits=[val]",
            "augment.seed=0",
        ]


def test_values_on_the_command_line_belong_to_the_space_and_others_to_every_trial(tmp_path: Path) -> None:
    cfg = read(["sweep=deit", "optim.lr=interval(1e-4,2e-3)", "trainer.max_epochs=3", "data.batch_size=16,32"])
    assert cfg.sweep.space["optim.lr"] == "interval(1e-4,2e-3)"
    assert cfg.sweep.space["data.batch_size"] == "16,32"
    assert cfg.sweep.overrides == ["model=deit", "trainer.max_epochs=3"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["optim.learning_rate=interval(1e-4,1e-2)"], "unknown key optim.learning_rate"),
        (["optim.lr=interval(1e-2,1e-4)"], "optim.lr: interval(1e-2,1e-4) holds no values"),
        (["model.drop_path_rate=interval(0,1.5)"], "model.drop_path_rate=1.5 must be a number from 0 to below 1"),
        (["optim.lr=interval(1e-6,1e-5)"], "the recipe's own values, and 0.001 is not in the range"),
        (["seed=3"], "sweep.seeds"),
        (["evaluate.splits=[val,test]"], "validation only"),
        (["run_dir=x"], "run_dir is set by the sweep"),
        (["--multirun"], "--multirun: sweep.py takes overrides only"),
        (["sweep.objectives=[test/nll]"], "does not report test/nll"),
        (["sweep.objectives=[val/f1]"], "choose of val/accuracy"),
        (["sweep.directions=[down]"], "sweep.directions=['down'] must say minimize or maximize"),
        (["sweep.trials=null"], "a sweep needs an end"),
        (["n_workers=0"], "n_workers=0 must be"),
        (["+sweep.when={optim.lr: 'distill=soft'}"], "an earlier one of sweep.space"),
        (["sweep.storage=nonsense"], "no URL of a database"),
        (["sweep.storage=mysql://u:secret@h/d"], "mysql://u:***@h/d: choose sqlite"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(tmp_path: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        study(tmp_path / "s", *arguments)
    assert not (tmp_path / "s" / "study.db").exists()


def test_another_sweep_of_the_same_name_is_refused_with_the_difference(tmp_path: Path) -> None:
    study(tmp_path)
    study(tmp_path, "sweep.trials=50", "n_workers=3")  # the budget may grow
    with pytest.raises(UserError, match=r"space: .*1e-4, 5e-3.* -> .*1e-4,2e-3.*or a new sweep.name"):
        study(tmp_path, "optim.lr=interval(1e-4,2e-3)")
    with pytest.raises(UserError, match=r"overrides: \['model=deit'\] -> \['model=deit', 'augment=none'\]"):
        study(tmp_path, "augment=none")
    study(tmp_path, "augment=none", "sweep.name=other")


# -- every trial once -------------------------------------------------------------------------------------------


def test_a_claim_that_is_cut_off_anywhere_leaves_one_trial_that_the_next_one_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = study(tmp_path, "sweep.trials=2")
    for step in ("set_trial_user_attr", "record_heartbeat", "set_trial_state_values"):
        with monkeypatch.context() as patch:
            patch.setattr(type(first.storage), step, lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                first.claim(True)
        assert len(first.trials()) == 1
    assert first.claim(True).number == 0  # type: ignore[union-attr]
    assert first.claim(True).number == 1  # type: ignore[union-attr]
    assert first.claim(True) is None
    other = study(tmp_path, "sweep.trials=2")
    monkeypatch.setattr(studies, "_here", lambda: "another machine")
    assert other.claim(True) is None  # both are trained, as their heartbeats say
    other.storage.grace_period = -1
    assert other.claim(True).number == 0  # type: ignore[union-attr]
    assert len(other.trials()) == 2


def test_workers_in_a_hurry_never_make_more_than_the_total(tmp_path: Path) -> None:
    one = study(tmp_path, "sweep.trials=12")
    claimed: list[int] = []

    def work() -> None:
        while (trial := one.claim(True)) is not None:
            claimed.append(trial.number)
            one.tell(trial, TrialState.COMPLETE, [float(trial.number)])
            one.mine.discard(trial.number)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(claimed) == list(range(12))
    assert [trial.state for trial in one.trials()] == [TrialState.COMPLETE] * 12
    one.tell(one.trials()[3], TrialState.FAIL, reason="late")  # by a worker that had lost it
    assert one.trials()[3].value == 3.0


def test_the_next_trial_depends_on_study_seed_number_and_history_alone(tmp_path: Path) -> None:
    def proposals(folder: Path, reopen: bool, *options: str) -> list[dict[str, Any]]:
        opened = study(folder, "sweep.trials=12", *options)
        for number in range(12):
            opened = study(folder, "sweep.trials=12", *options) if reopen and number % 4 == 3 else opened
            trial = opened.claim(True)
            assert trial is not None
            opened.tell(trial, TrialState.COMPLETE, [abs(np.log(trial.params["optim.lr"]) + 6)])
        return [trial.params for trial in opened.trials()]

    whole = proposals(tmp_path / "a", False)
    assert proposals(tmp_path / "b", True) == whole
    assert len({trial["optim.lr"] for trial in whole}) == 12
    assert proposals(tmp_path / "c", False, "sweep.seed=1")[1:] != whole[1:]


def _checked(folder: Path, url: str, trials: int) -> list[Any]:
    """The trials of a soaked study, after every count is checked."""
    found = optuna.load_study(study_name="deit", storage=url).trials
    assert [trial.number for trial in found] == list(range(trials))
    _check_histories(folder, found)
    return found


def _check_histories(folder: Path, found: list[Any]) -> None:
    for trial in found:
        history = (folder / f"trial{trial.number:04d}_seed0" / "history").read_text().split()
        done = 4 if trial.state == TrialState.COMPLETE else 2
        assert history == [str(epoch) for epoch in range(done)], trial  # no epoch twice, none left out
        lr, decay = trial.params["optim.lr"], trial.params["optim.layer_decay"]
        state = TrialState.PRUNED if lr > 2e-3 else TrialState.FAIL if decay < 0.65 else TrialState.COMPLETE
        assert trial.state == state


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_storage_that_is_away_for_a_moment_is_asked_again_whenever_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    given = ["sweep=deit", f"sweep.folder={tmp_path}", "sweep.trials=2"]
    one = study(tmp_path, "sweep.trials=2")
    for nll in (0.5, 0.25):
        one.tell(one.claim(True), TrialState.COMPLETE, [nll])  # type: ignore[arg-type]
    failures, rng, read_trials = [], random.Random(seed), optuna.Study.get_trials

    def sometimes(*args: Any, **more: Any) -> Any:
        if rng.random() < 0.5:
            failures.append(optuna.exceptions.StorageInternalError("away"))
            raise failures[-1]
        return read_trials(*args, **more)

    monkeypatch.setattr(optuna.Study, "get_trials", sometimes)
    monkeypatch.setattr(storages.time, "sleep", lambda seconds: None)
    main(given)
    assert "2 of 2 trials: 2 complete, best 0.25 (trial 1)" in capsys.readouterr().out
    assert len(failures) > 1


@pytest.mark.slow
def test_30_trials_survive_kills_of_workers_and_drivers_on_sqlite(tmp_path: Path) -> None:
    happened = soak(tmp_path / "s", trials=30, kills=12, drivers=2, seed=0)
    assert 5 <= happened["worker"] + happened["driver"] <= 12  # a fast machine is done before the last
    assert happened["orphans"] == []
    found = _checked(tmp_path / "s", f"sqlite:///{tmp_path}/s/study.db", 30)
    assert {trial.state.name for trial in found} == {"COMPLETE", "PRUNED", "FAIL"}


@pytest.fixture
def server() -> Iterator[Server]:
    if not BINARIES:
        pytest.skip("no PostgreSQL server in /usr/lib/postgresql: apt-get install postgresql")
    folder = Path(tempfile.mkdtemp(prefix="facemask-postgresql-"))  # pytest's folders are closed to its user
    folder.chmod(0o755)
    running = Server(folder)
    running.start()
    try:
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder)


@pytest.mark.slow
def test_30_trials_survive_kills_and_a_server_that_goes_away_on_postgresql(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("psycopg")

    def away() -> None:
        server.stop()
        time.sleep(4)
        server.start()

    storm = threading.Timer(12, away)
    storm.start()
    happened = soak(tmp_path / "s", f"sweep.storage={server.url}", trials=30, kills=10, drivers=2, seed=1)
    storm.join()
    assert happened["orphans"] == []
    _checked(tmp_path / "s", server.url, 30)


# A small file system of its own, which is full after some trials, and has room again later.
FULL = """
mount -t tmpfs -o size=240k none "$1" || exit 99
"$2" "$3" drive sweep=deit logger=none sweep.folder="$1/s" sweep.trials=8 && exit 98
mount -o remount,size=9m "$1"
"$2" "$3" drive sweep=deit logger=none sweep.folder="$1/s" sweep.trials=8 && cp -r "$1/s" "$1.kept"
"""


@pytest.mark.slow
def test_a_full_disk_ends_in_a_sentence_and_loses_no_trial(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    arguments = [str(tmp_path / "disk"), sys.executable, str(ROOT / "tests" / "sweeping.py")]
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", FULL, "sh", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode in (1, 99) and "disk is full" not in result.stderr:
        pytest.skip(f"no file system can be mounted here: {result.stderr}")
    assert result.returncode == 0, result.stderr
    assert "UserError" in result.stderr
    assert "the disk is full; make room and give the same command again" in result.stderr
    assert 1 <= int(re.findall(r"(\d+) of 8 trials finished", result.stdout)[1]) < 8
    found = optuna.load_study(study_name="deit", storage=f"sqlite:///{tmp_path}/disk.kept/study.db").trials
    assert [trial.number for trial in found] == list(range(8))
    _check_histories(tmp_path / "disk.kept", found)


@pytest.mark.slow
def test_a_disturbed_sweep_finds_what_the_undisturbed_one_finds(tmp_path: Path) -> None:
    assert start(tmp_path / "a", "sweep.trials=6").wait(120) == 0
    process = start(tmp_path / "b", "sweep.trials=6")
    for _ in range(2):
        while not processes(tmp_path / "b"):
            time.sleep(0.05)
        time.sleep(1.5)
        process.kill()
        process.wait()
        process = start(tmp_path / "b", "sweep.trials=6")
    assert process.wait(120) == 0
    a, b = (optuna.load_study(study_name="deit", storage=f"sqlite:///{tmp_path}/{x}/study.db") for x in "ab")
    assert [(t.params, t.values, t.state) for t in a.trials] == [(t.params, t.values, t.state) for t in b.trials]
    assert a.best_value == b.best_value


# -- a real trial -----------------------------------------------------------------------------------------------


def _train(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    own = [f"run_dir={folder}", f"cache_dir={folder.parent}/cache", f"ledger={folder.parent}/ledger"]
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *own, *options]
    plain = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=plain | environment, timeout=300, check=False)


def test_a_pruner_is_chosen_by_name_and_is_no_option_of_the_trials() -> None:
    halving, median, none = (
        read(["sweep=deit", *more]).sweep for more in ([], ["sweep/pruner=median"], ["sweep.pruner=null"])
    )
    assert dict(halving.pruner) == {
        "_target_": "optuna.pruners.SuccessiveHalvingPruner", "min_resource": 2, "reduction_factor": 2
    }  # fmt: skip
    assert median.pruner._target_ == "optuna.pruners.MedianPruner"
    assert "min_resource" not in median.pruner
    assert none.pruner is None
    assert halving.overrides == median.overrides == none.overrides


def test_halving_stops_the_worse_half_after_two_epochs_and_again_after_four(tmp_path: Path) -> None:
    opened = study(tmp_path / "sweep", "sweep.trials=4", "logger=none")

    def epochs(nll: float) -> int:
        """Reports the same value after every epoch; returns the epoch that pruned it, or 5."""
        trial = opened.claim(True)
        assert trial is not None
        report = Report(opened.url, "deit", trial.number, "val/nll", dict(opened.sweep["pruner"]))
        return next((epoch for epoch in range(1, 5) if report._report(nll, epoch)), 5)

    # After two epochs .6 is the worse of two, .45 the second of four; after four .45 is the second of three.
    assert [epochs(nll) for nll in (0.5, 0.6, 0.4, 0.45)] == [5, 2, 5, 4]


@pytest.fixture
def reporting(tmp_path: Path) -> tuple[Study, dict[str, str]]:
    """A study with good trials and one that runs, and the environment of its process."""
    opened = study(tmp_path / "sweep", "sweep.trials=3", "sweep/pruner=median", "logger=none",
                   "sweep.pruner.n_startup_trials=1", "sweep.pruner.n_warmup_steps=0")  # fmt: skip
    for _ in range(2):
        trial = opened.claim(True)
        assert trial is not None
        for step in (1, 2, 3):
            opened.storage.set_trial_intermediate_value(trial._trial_id, step, 0.01)
        opened.tell(trial, TrialState.COMPLETE, [0.01])
    trial = opened.claim(True)
    assert trial is not None
    facts = {"storage": opened.url, "study": "deit", "number": trial.number, "monitor": "val/nll"}
    return opened, {storages.TRIAL: json.dumps({**facts, "pruner": opened.sweep["pruner"]})}


@pytest.mark.slow
def test_a_pruned_trial_stops_after_its_first_epoch_in_all_ranks(
    reporting: tuple[Study, dict[str, str]], tmp_path: Path
) -> None:
    opened, environment = reporting
    options = ("model=deit", "trainer=ddp_cpu", "evaluate.splits=[val]", "resume=true", "logger=[wandb]")
    result = _train(tmp_path / "run", *options, **environment)
    assert result.returncode == storages.PRUNED, result.stderr[-3000:]
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "pruned"
    assert list(opened.trials()[2].intermediate_values) == [1]
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert checkpoint["callbacks"]["Report"] == {"pruned": True}  # for a worker that dies before it can tell
    assert not (tmp_path / "run" / "predictions.parquet").exists()
    assert not (tmp_path / "ledger").exists()
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert "study.db" not in config


@pytest.mark.slow
def test_a_sweep_of_real_trials_contains_a_nan_and_reads_no_test_picture(tmp_path: Path) -> None:
    own = [f"sweep.folder={tmp_path}/s", f"cache_dir={tmp_path}/cache", f"ledger={tmp_path}/ledger"]
    command = [sys.executable, str(ROOT / "sweep.py"), "sweep=deit", "sweep.trials=2", *own, *TINY, "trainer=cpu"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    space = ["optim.lr=choice(0.001,1e20,1e21,1e22)"]
    result = subprocess.run([*command, *space], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    trials = optuna.load_study(study_name="deit", storage=f"sqlite:///{tmp_path}/s/study.db").trials
    assert len(trials) == 2
    for trial in trials:
        folder = tmp_path / "s" / f"trial{trial.number:04d}_seed0"
        if trial.params["optim.lr"] != "0.001":
            assert trial.state == TrialState.FAIL
            assert "val/nll is nan after epoch 1" in trial.user_attrs["reason"]
        else:
            assert trial.values == results(folder, ["val/nll"])
            assert list(json.loads((folder / "metrics.json").read_text())) == ["val"]
            assert list(trial.intermediate_values) == [1, 2, 3]
        assert yaml.safe_load((folder / "config.yaml").read_text())["evaluate"]["splits"] == ["val"]
    assert {trial.state for trial in trials} == {TrialState.FAIL, TrialState.COMPLETE}
    assert not (tmp_path / "ledger").exists()
    with pytest.raises(UserError, match="does not report training/speed: choose of training/epoch"):
        results(tmp_path / "s" / "trial0000_seed0", ["training/speed"])


def test_hydras_own_sweeper_points_here() -> None:
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra/sweeper=optuna", "optim.lr=interval(1e-4,1e-3)"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "error: Hydra's Optuna sweeper neither prunes nor resumes: use python sweep.py sweep=NAME"
    ]


# -- the storage, and what is shown -----------------------------------------------------------------------------


def test_a_storage_that_is_away_is_asked_again_and_given_up_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages.time, "sleep", lambda seconds: None)
    answers = iter([optuna.exceptions.StorageInternalError("gone"), optuna.exceptions.StorageInternalError("gone"), 7])

    def call() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert storages.patiently(call, "sqlite:///x") == 7
    monkeypatch.setattr(storages, "PATIENCE", -1.0)
    answers = iter([optuna.exceptions.StorageInternalError("gone")])
    with pytest.raises(UserError, match=r"sqlite:///x cannot be reached \(gone\): nothing is lost"):
        storages.patiently(call, "sqlite:///x")
    full = optuna.exceptions.StorageInternalError("x")
    full.__cause__ = Exception("database or disk is full")
    answers = iter([full])
    with pytest.raises(UserError, match="the disk is full; make room"):
        storages.patiently(call, "sqlite:///x")


def test_the_page_shows_every_trial_and_the_pareto_front(tmp_path: Path) -> None:
    two = ("sweep.objectives=[val/nll,training/parameters]", "sweep.directions=[minimize,minimize]")
    opened = study(tmp_path, *two, "sweep.trials=6")
    for values in ([3.0, 1.0], [1.0, 3.0], [2.0, 2.0], [3.0, 3.0]):
        trial = opened.claim(True)
        assert trial is not None
        opened.tell(trial, TrialState.COMPLETE, values)
    trial = opened.claim(True)
    assert trial is not None
    opened.tell(trial, TrialState.FAIL, reason="val/nll is <nan>")
    assert [trial.number for trial in ranked(opened.study)] == [0, 1, 2, 3]
    with Console(record=True, width=200) as console:
        page = show(open_study("deit", opened.url), tmp_path, console)
    text = page.read_text()
    assert "5 trials looked at on the validation split: 4 complete, 1 fail" in text
    assert "val/nll is &lt;nan&gt;" in text
    for name in ("slices", "slices1", "parallel", "pareto"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    with pytest.raises(UserError, match="holds no sweep other"):
        open_study("other", opened.url)
    with pytest.raises(UserError, match="holds no sweep deit"):
        open_study("deit", f"sqlite:///{tmp_path}/none.db")


def test_the_first_is_the_best_in_the_direction_of_the_objective(tmp_path: Path) -> None:
    opened = study(tmp_path, "sweep.objectives=[val/accuracy]", "sweep.directions=[maximize]")
    for value in (0.5, 0.9, 0.7):
        trial = opened.claim(True)
        assert trial is not None
        opened.tell(trial, TrialState.COMPLETE, [value])
    assert [trial.number for trial in ranked(opened.study)] == [1, 2, 0]
