"""Kill small runs at random moments, resume them, and compare every bit with a run that nobody killed.

`make soak`, or `python tests/soak.py KILLS SEED`; the tests run a short one.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import pkgutil
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parents[1]
# A network of two blocks on small pictures: every part of a run, in seconds.
SMALL = [
    "data.num_images=120",
    "data.batch_size=16",
    "model.img_size=32",
    "model.depth=2",
    "trainer.log_every_n_steps=1",
    "evaluate.resamples=100",
    "logger=none",
]
# A teacher is fitted and asked; half of the checkpoints lie inside an epoch.
DISTILLED = ["model=deit_distilled", "augment=light", "trainer.max_epochs=8", "callbacks.last.every_n_train_steps=2"]
# Averaged weights, random depth, mixed pictures, loader processes, two batches for a step.
AVERAGED = [
    "model=vit",
    "recipe=deit",
    "augment=deit",
    "callbacks=[default,ema]",
    "model.drop_path_rate=0.2",
    "data.num_workers=2",
    "data.batch_size=8",
    "trainer.accumulate_grad_batches=2",
    "trainer.max_epochs=8",
    "callbacks.last.every_n_train_steps=3",
]


# Imports what a run needs once; every run is a process forked from there, without what other runs have done.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["facemask.train"])


def start(run_dir: Path, *options: str, kill_at: tuple[str, int] | None = None) -> Any:
    """Start a small run that continues what is in its folder. Caches, ledger and what it prints lie beside the folder.

    Args:
        kill_at: (dotted name of a function, n): the process kills itself at the n-th call of it.
    """
    own = [f"run_dir={run_dir}", f"cache_dir={run_dir}.cache", f"ledger={run_dir}.ledger", "resume=true"]
    return launch([*SMALL, *own, *options], f"{run_dir}.log", kill_at)


def launch(arguments: list[str], log: str, kill_at: tuple[str, int] | None = None) -> Any:
    """Start train.py with these arguments; what it prints goes to a file."""
    process = _context.Process(target=_run, args=([str(ROOT / "train.py"), *arguments], log, kill_at))
    process.start()
    return process


def _run(arguments: list[str], log: str, kill_at: tuple[str, int] | None) -> None:
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    multiprocessing.set_start_method("fork", force=True)  # of loader processes, as outside of here: they end with us
    if kill_at is not None:
        _kill_at(*kill_at)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def _kill_at(target: str, count: int) -> None:
    path, name = target.rsplit(".", 1)
    owner: Any = pkgutil.resolve_name(path)
    original, calls = getattr(owner, name), itertools.count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def finish(run_dir: Path, *options: str) -> dict[str, str]:
    """Run to the end; returns what must be equal."""
    process = start(run_dir, *options)
    process.join()
    assert process.exitcode == 0, Path(f"{run_dir}.log").read_text()[-5000:]
    return bits(run_dir)


def kill_after(seconds: float, run_dir: Path, *options: str) -> bool:
    """Start the run and kill it -9 after a while; False where it has ended by then."""
    process = start(run_dir, *options)
    process.join(seconds)
    killed = process.exitcode is None
    process.kill()
    process.join()
    return killed


def bits(run_dir: Path) -> dict[str, str]:
    """sha256 of the weights, the predictions and the curves of a finished run."""
    checkpoints = json.loads((run_dir / "checkpoints.json").read_text())
    weights = {name: facts["weights_sha256"] for name, facts in checkpoints.items()}
    files = ("predictions.parquet", "metrics.json", "curves.csv")
    return weights | {name: hashlib.sha256((run_dir / name).read_bytes()).hexdigest() for name in files}


def soak(folder: Path, kills: int, seed: int) -> None:
    """Kill two kinds of run in turn until so many kills have met a live process, and compare each at its end."""
    rng = np.random.default_rng(seed)
    print(f"{kills} kills, seed {seed}")
    expected: list[dict[str, str]] = []
    took: list[float] = []
    number = met = 0
    while met < kills:
        kind, killed = number % 2, folder / f"killed{number}"
        options = (DISTILLED, AVERAGED)[kind]
        if len(expected) <= kind:
            warm = _context.Process(target=int)
            warm.start()  # the imports are not to be timed
            warm.join()
            begin = time.monotonic()
            expected.append(finish(folder / f"whole{kind}", *options))
            took.append(time.monotonic() - begin)
        moment = rng.uniform(0, 0.7 * took[kind])
        lived = kill_after(moment, killed, *options)
        if lived:
            met += 1
            found = [
                name for name in ("config.yaml", "checkpoints/last.ckpt", "metrics.json") if (killed / name).exists()
            ]
            print(f"{options[0]}: kill {met} after {moment:.2f} of {took[kind]:.1f} s; there: {found}", flush=True)
        if not lived or met == kills:
            got = finish(killed, *options)
            assert got == expected[kind], f"differ: {[name for name in got if got[name] != expected[kind].get(name)]}"
            print(f"{options[0]}: the same bits in {', '.join(got)}", flush=True)
            number += 1


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        soak(Path(scratch), *map(int, sys.argv[1:]))
