"""`python sweep.py`: workers that train the trials of a study, each in a process of its own; and what follows."""

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from facemask.config import ROOT
from facemask.errors import DISK_FULL, UserError, is_disk_full
from facemask.parent import followed
from facemask.runs.folder import RunFolder
from facemask.runs.metrics import SCALARS
from facemask.runs.storage import PRUNED, TRIAL, patiently
from facemask.space import read
from facemask.study import DEFAULT_STORAGE, HEARTBEAT, Study, finished, open_study, status

TRAIN = ROOT / "train.py"

console = Console(highlight=False, markup=False, soft_wrap=True)


# -- the workers ------------------------------------------------------------------------------------------------


class Workers:
    """Threads that claim trials and wait for their processes."""

    def __init__(self, study: Study, count: int, hours: float | None) -> None:
        self.study, self.count = study, count
        self.deadline = time.monotonic() + hours * 3600 if hours else math.inf
        self.stop = threading.Event()
        self.error: Exception | None = None
        pruner, objectives = study.sweep["pruner"], study.sweep["objectives"]
        self.monitor = objectives[0] if pruner and len(objectives) == 1 and objectives[0].startswith("val/") else None
        self.threads = [threading.Thread(target=self._work, args=(number,), daemon=True) for number in range(count)]

    def _work(self, number: int) -> None:
        try:
            while not self.stop.is_set():
                may_start = time.monotonic() < self.deadline
                trial = patiently(lambda may=may_start: self.study.claim(may), self.study.shown)  # type: ignore[misc]
                if trial is not None:
                    try:
                        self._train(trial, number)
                    finally:
                        self.study.mine.discard(trial.number)
                elif not may_start or self._all_finished():
                    return
                else:
                    self.stop.wait(2)  # one of those that others train may come free
        except Exception as error:
            self.error = UserError(f"{self.study.folder}: {DISK_FULL}") if is_disk_full(error) else error
            self.stop.set()

    def _all_finished(self) -> bool:
        trials = patiently(self.study.trials, self.study.shown)
        return all(trial.state.is_finished() for trial in trials)

    def _train(self, trial: FrozenTrial, worker: int) -> None:
        """Train a trial with every seed, and tell the study how it ended; one that is interrupted is left as it is."""
        found = []
        for seed in self.study.sweep["seeds"]:
            folder = self.study.folder / f"trial{trial.number:04d}_seed{seed}"
            prunable = seed == self.study.sweep["seeds"][0]
            code, text = self._run(trial, folder, seed, worker, self.monitor if prunable else None)
            state = RunFolder(folder).status().get("state")
            if self.stop.is_set() or code is None:
                return
            last = next((line for line in reversed(text.splitlines()) if re.match(r"error: |[\w.]*Error", line)), "")
            if code == PRUNED:
                return self._tell(trial, TrialState.PRUNED)
            told = any(words in text for words in (DISK_FULL, "No space left on device"))
            if code != 0 and (told or shutil.disk_usage(self.study.folder).free < 2**16):
                raise OSError(errno.ENOSPC, text[-200:])
            if code < 0 or state == "killed" or (code == 0 and state != "finished"):
                kills = trial.user_attrs["kills"] + 1
                if kills > self.study.sweep["retries"]:
                    return self._tell(trial, TrialState.FAIL, reason=f"killed {kills} times (the last: {code})")
                attribute = (trial._trial_id, "kills", kills)
                return patiently(lambda: self.study.storage.set_trial_user_attr(*attribute), self.study.shown)  # noqa: B023
            if code == 2 and trial.number == 0:
                raise UserError(f"the first trial, with the recipe's own values, did not start: {last[7:]}")
            if code != 0:
                return self._tell(trial, TrialState.FAIL, reason=last or f"exit code {code}")
            found.append(results(folder, self.study.sweep["objectives"]))
        values = np.mean(found, axis=0).tolist()
        if not np.isfinite(values).all():
            return self._tell(trial, TrialState.FAIL, reason=f"values {values}")
        self._tell(trial, TrialState.COMPLETE, values)

    def _tell(self, trial: FrozenTrial, state: TrialState, values: list[float] | None = None, reason: str = "") -> None:
        patiently(lambda: self.study.tell(trial, state, values, reason), self.study.shown)
        shown = " ".join(f"{value:.4g}" for value in values or []) or reason
        params = " ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
        console.print(f"trial {trial.number:4d} {state.name.lower():9s} {shown}  {params}")

    def _run(
        self, trial: FrozenTrial, folder: Path, seed: int, worker: int, monitor: str | None
    ) -> tuple[int | None, str]:
        """Run train.py; returns its exit code (None: the trial is no longer ours) and what it printed."""
        while _is_locked(folder):  # by a process that is being killed
            if self.stop.wait(1):
                return None, ""
        command = [*trial.user_attrs["options"], f"seed={seed}", f"run_dir={folder}"]
        environment = {**os.environ, **followed(), **_devices(worker, self.count)}
        if monitor is not None:
            facts = {"storage": self.study.url, "study": self.study.name, "number": trial.number}
            environment[TRIAL] = json.dumps({**facts, "monitor": monitor, "pruner": self.study.sweep["pruner"]})
        log = self.study.folder / f"{folder.name}.log"
        with log.open("ab") as file:
            start = file.tell()
            process = subprocess.Popen(
                [sys.executable, str(TRAIN), *command],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        try:
            beaten = time.monotonic()
            while True:
                try:
                    code = process.wait(0.5)
                    break
                except subprocess.TimeoutExpired:
                    if self.stop.is_set():
                        return None, ""
                if time.monotonic() - beaten > HEARTBEAT:
                    if not patiently(lambda: self.study.beat(trial), self.study.shown):
                        return None, ""
                    beaten = time.monotonic()
        finally:  # with all its ranks and loaders
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with log.open("rb") as file:
            file.seek(start)
            return code, file.read()[-20000:].decode(errors="replace")


def _is_locked(folder: Path) -> bool:
    run = RunFolder(folder)
    try:
        run.lock()
    except UserError:
        return True
    run.release()
    return False


def _devices(worker: int, count: int) -> dict[str, str]:
    """Workers that run beside each other share the GPUs."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = given.split(",") if given else [str(n) for n, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
    if given == "" or not there or count == 1:
        return {}
    return {"CUDA_VISIBLE_DEVICES": ",".join(there[worker::count] or [there[worker % len(there)]])}


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def results(folder: Path, objectives: Sequence[str]) -> list[float]:
    """The objectives of a finished run; nan where one is undefined.

    Raises:
        UserError: the run does not report one.
    """
    summary, metrics = (json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "metrics"))
    val = metrics["val"][summary["reported_head"]]
    reported = {f"training/{name}": value for name, value in summary["training"].items() if not isinstance(value, str)}
    reported |= {f"val/{name}": val[name]["value"] for name in SCALARS}
    for name in objectives:
        if name not in reported:
            raise UserError(f"the run in {folder} does not report {name}: choose of {', '.join(sorted(reported))}")
    return [math.nan if reported[name] is None else float(reported[name]) for name in objectives]


# -- the command ------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str]) -> None:
    """`python sweep.py ARGUMENTS`: train what is missing of a sweep, and show how it goes.

    Raises:
        UserError: whatever the user can mend; nothing is lost.
    """
    cfg = read(arguments)
    study = Study(cfg)
    workers = Workers(study, cfg.n_workers, cfg.sweep.hours)

    def look() -> tuple[int, str]:
        trials = study.trials()
        return finished(trials), status(study.study, trials)

    done, shown = patiently(look, study.shown)
    console.print(f"sweep     {study.name} in {study.shown}, {done} of {study.total} trials finished")
    console.print(f"runs      {study.folder}")
    if len(cfg.sweep.objectives) > 1:
        console.print("pruning   off: Optuna has none for several objectives")
    elif workers.monitor is None:
        console.print("pruning   off")
    for thread in workers.threads:
        thread.start()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    try:
        with Progress(*columns, TextColumn("ETA"), TimeRemainingColumn(), console=console) as progress:
            task = progress.add_task("", total=None if study.total == math.inf else study.total, completed=done)
            alive = True
            while alive:  # once more when all have ended
                alive = any(thread.is_alive() for thread in workers.threads)
                done, shown = patiently(look, study.shown)
                progress.update(task, completed=done, description=shown)
                workers.stop.wait(alive) if workers.error is None else time.sleep(0.5)
    except KeyboardInterrupt:
        workers.stop.set()
        for thread in workers.threads:
            thread.join(10)
        console.print("interrupted: the same command goes on from here")
        sys.exit(130)
    if workers.error is not None:
        raise workers.error
    console.print(f"{done} of {study.total} trials: {shown}")
    option = "" if study.url == DEFAULT_STORAGE.format(study.name) else f" --storage {study.shown}"
    console.print(f"facemask sweep show {study.name}{option}")


def finish(
    name: str, storage: str | None, k: int, seeds: Sequence[int], record_name: str, experiments: Path, allow_dirty: bool
) -> Path:
    """Train the best trials again with fresh seeds, the best of them on validation with the test split, and record it.

    Args:
        k: so many trials are trained again; with one, nothing is left to choose.
        seeds: fresh ones; default: three that the sweep did not have.

    Raises:
        UserError: no best trial, seeds that the sweep used, uncommitted code, or a record of this name.
    """
    from facemask.data.splits import fingerprint
    from facemask.runs.provenance import code_and_versions
    from facemask.runs.record import record
    from facemask.runs.sweep_page import ranked

    study = open_study(name, storage)
    sweep, trials = study.user_attrs["sweep"], study.get_trials(deepcopy=False)
    candidates = ranked(study)[:k]
    used, folder, target = set(sweep["seeds"]), Path(study.user_attrs["folder"]), experiments / record_name
    fresh = list(seeds) or [max(used) + number for number in (1, 2, 3)]
    if len(study.directions) > 1:
        raise UserError(f"{name} has several objectives and so no best trial: choose one of its front, and train it")
    if not candidates:
        raise UserError(f"{name} has no completed trial yet: {status(study, trials)}")
    if used & set(fresh):
        raise UserError(f"--seeds must be fresh, and the sweep was trained with {sorted(used & set(fresh))}")
    if target.exists():
        raise UserError(f"{target} exists already and is not overwritten: choose another --record")
    if code_and_versions()[0]["git"]["dirty"] and not allow_dirty:
        raise UserError("the code has changes that are in no commit: commit them first, or give --allow-dirty")

    def runs(trial: FrozenTrial, splits: str) -> list[Path]:
        options = [option for option in trial.user_attrs["options"] if not option.startswith("evaluate.splits=")]
        if not any(option.startswith("augment.seed=") for option in sweep["overrides"]):
            options = [option for option in options if not option.startswith("augment.seed=")]
        folders = [folder / f"best{trial.number:04d}_{splits.replace(',', '_')}_seed{seed}" for seed in fresh]
        for seed, run_dir in zip(fresh, folders, strict=True):
            own = [f"evaluate.splits=[{splits}]", f"seed={seed}", f"run_dir={run_dir}"]
            code = subprocess.run([sys.executable, str(TRAIN), *options, *own], check=False).returncode
            if code != 0:
                raise UserError(f"{run_dir} was not trained (exit code {code}): the same command goes on from there")
        return folders

    chosen = candidates[0]
    if len(candidates) > 1:
        objectives = sweep["objectives"]
        scores = [np.mean([results(run, objectives)[0] for run in runs(trial, "val")]) for trial in candidates]
        sign = -1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        chosen = candidates[int(np.argmin(sign * np.array(scores)))]
    selection = (
        f"The parameters are those of trial {chosen.number} of the sweep {name}: {len(trials)} trials were looked at "
        f"on the validation split ({status(study, trials)}), the best {len(candidates)} trained again with fresh "
        "seeds, and the test split was opened for the chosen one alone."
    )
    return record(runs(chosen, "val,test"), record_name, experiments, fingerprint, allow_dirty, selection)
