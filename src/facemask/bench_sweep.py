"""Trials per hour of a sweep against a naive loop of train.py, each run of which does everything anew:
`facemask bench sweep`."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from facemask.bench import asked, rates, show, spread, write_result
from facemask.config import ROOT
from facemask.errors import UserError
from facemask.parent import followed

AT_LEAST = 3


def bench_sweep(root: Path | None, trials: int, epochs: int, side: int, workers: int, out: Path) -> Path:
    """A sweep of the distilled DeiT as conf/sweep has it, with its pruner; before and after it a single run of the
    naive loop: soft distillation with a cache of its own, alone on the machine.

    Args:
        root: one sub-folder per class; None: drawn faces.
        epochs, side: of every trial and naive run; side in pixels.
        workers: of the sweep.

    Returns: the JSON file. Raises UserError where a command fails.
    """
    data = [f"data.root={root.resolve()}", "data=folder", "data.on_bad_file=skip"] if root else []
    options = [*data, f"model.img_size={side}", f"trainer.max_epochs={epochs}", "logger=none"]
    with tempfile.TemporaryDirectory() as folder:

        def took(name: str, script: str, *own: str) -> float:
            own = (*own, f"cache_dir={folder}/{name}_cache", f"ledger={folder}/ledger.jsonl")
            start = time.perf_counter()
            command = [sys.executable, str(ROOT / script), *own, *options]
            done = subprocess.run(command, cwd=folder, env={**os.environ, **followed()}, check=False)
            if done.returncode != 0:
                raise UserError(f"{script} ended with exit code {done.returncode}: see above")
            return time.perf_counter() - start

        def naive(name: str) -> float:
            distilled = "model=deit_distilled", "distill=soft", "evaluate.splits=[val]"
            return took(name, "train.py", *distilled, f"run_dir={folder}/{name}")

        before = naive("before")
        own = f"sweep.trials={trials}", f"n_workers={workers}", f"sweep.folder={folder}/sweep"
        sweep = took("sweep", "sweep.py", "sweep=deit_distilled", *own) / trials
        runs = [before, naive("after")]
    figures = rates([(sweep, seconds) for seconds in runs], 3600)
    figures = {"trials_per_hour": figures.pop("ours_per_s"), "naive_per_hour": figures.pop("other_per_s"), **figures}
    row = ["trials/h", *(f"{figures[of]:.0f}" for of in ("trials_per_hour", "naive_per_hour")), *spread(figures)]
    title = f"Trials per hour: {trials} trials of at most {epochs} epochs at {side} pixels, {workers} workers"
    show(title, ["", "sweep", "naive loop", "ratio", "spread", "asked"], [[*row, asked(figures, AT_LEAST)]])
    content: dict[str, Any] = {"source": "a folder" if root else "drawn faces", "sweep / naive loop": figures}
    return write_result(content, "sweep", out, trials=trials, epochs=epochs, side=side, workers=workers)
