"""Sweeps whose trials are naps: `sweeping.py drive ARGUMENTS` is sweep.py with this file for train.py, so that hundreds
of kills take seconds. `soak` kills workers and drivers at random; `make soak-sweep` runs a long one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

SPACE = ["sweep=deit", "model=deit", "logger=none"]


def drive(arguments: list[str]) -> None:
    from facemask import study, sweep

    sweep.TRAIN = Path(__file__).resolve()
    sweep.HEARTBEAT = study.HEARTBEAT = 1
    study.GRACE = 5
    sweep.main(arguments)


def nap(options: dict[str, str]) -> None:
    """A run of four epochs that goes on where it was killed; large rates are pruned, small layer decays crash."""
    from facemask.parent import die_with_parent

    die_with_parent()
    from facemask.runs.folder import RunFolder

    folder = RunFolder(Path(options["run_dir"]))
    folder.lock()
    if folder.status().get("state") == "finished":
        return
    folder.set_status("running")
    done = folder.path / "history"  # its checkpoint: one line for every epoch
    lr, decay = float(options["optim.lr"]), float(options["optim.layer_decay"])
    for epoch in range(len(done.read_text().split()) if done.exists() else 0, 4):
        time.sleep(0.1)
        if epoch == 2 and lr > 2e-3:
            folder.set_status("pruned")
            sys.exit(4)
        if epoch == 2 and decay < 0.65:
            folder.set_status("failed")
            sys.exit("FloatingPointError: val/nll is nan")
        with done.open("a") as file:
            file.write(f"{epoch}\n")
    value = {"value": abs(lr - 1e-3) * 1e3 + decay}
    metrics = dict.fromkeys(("accuracy", "balanced_accuracy", "macro_f1", "auroc", "nll", "brier", "ece"), value)
    (folder.path / "metrics.json").write_text(json.dumps({"val": {"head": metrics}}))
    (folder.path / "summary.json").write_text(json.dumps({"reported_head": "head", "training": {"epoch": 4.0}}))
    folder.set_status("finished")


def start(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "drive", *SPACE, f"sweep.folder={folder}", *options]
    log = Path(f"{folder}.log").open("ab")  # noqa: SIM115
    return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def processes(folder: Path) -> list[int]:
    """Trainings of a sweep that are alive, by what their command line says."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if f"run_dir={folder}".encode() in line:
            found.append(int(entry.name))
    return found


def soak(folder: Path, *options: str, trials: int, kills: int, drivers: int, seed: int) -> dict[str, Any]:
    """Sweep with several drivers while processes are killed -9 at random; returns what happened."""
    rng = random.Random(seed)
    given = (*options, f"sweep.trials={trials}", "n_workers=2", "sweep.retries=100")
    running = [start(folder, *given) for _ in range(drivers)]
    killed = {"driver": 0, "worker": 0}
    begin = time.monotonic()
    while running:
        time.sleep(rng.uniform(0.1, 0.6))
        if sum(killed.values()) < kills:
            workers = processes(folder)
            if workers and (killed["driver"] >= kills // 5 or rng.random() < 0.8):
                _kill(rng.choice(workers))
                killed["worker"] += 1
            elif workers and killed["driver"] < kills // 5:
                victim = rng.choice(running)
                _kill(victim.pid)
                victim.wait()
                killed["driver"] += 1
                running[running.index(victim)] = start(folder, *given)
        for process in [process for process in running if process.poll() is not None]:
            assert process.returncode == 0, Path(f"{folder}.log").read_text()[-3000:]
            running.remove(process)
        assert time.monotonic() - begin < 20 * trials, Path(f"{folder}.log").read_text()[-3000:]
    time.sleep(1)
    return {**killed, "orphans": processes(folder), "seconds": time.monotonic() - begin}


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    if sys.argv[1] == "drive":
        drive(sys.argv[2:])
    elif sys.argv[1] == "soak":
        scratch = Path(tempfile.mkdtemp())
        print(soak(scratch / "sweep", trials=30, kills=int(sys.argv[2]), drivers=2, seed=int(sys.argv[3])))
        shutil.rmtree(scratch)
    else:
        nap(dict(option.split("=", 1) for option in sys.argv[1:]))
