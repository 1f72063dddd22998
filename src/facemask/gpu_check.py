"""Do the GPU paths hold on this machine: `facemask bench gpu` (`make gpu-check`), whose output is a record.

Every check trains with train.py as it is. With `device="cpu"` the same checks run without a GPU.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from facemask.bench import console, rates, write_result
from facemask.bench_train import Loops, default_precision
from facemask.config import ROOT
from facemask.devices import auto_precision
from facemask.errors import UserError
from facemask.parent import followed
from facemask.runs.predictions import heads, logits, read_predictions

# Nothing random in the student, no rounding but of sums: what two ways of computing one thing are compared in.
EXACT = ["trainer.precision=32-true", "model.drop_path_rate=0", "model.drop_rate=0"]
# What is asked for: our share of the bare loop's images/s; relative differences of losses in the first ten steps and in
# all, in fp32 and in 16 bits.
BARE = 0.9
FP32, BITS16 = (1e-4, 1e-3), (0.02, 0.05)


def gpu_check(out: Path, device: str, size: str, side: int, batch: int) -> tuple[Path, bool]:
    """Run every check and print each.

    Args:
        out: parent of bench/<machine kind>/gpu.json.
        device: "gpu" or "cpu".
        size, side, batch: of the DeiT that is trained for 50 steps, and its input.

    Returns: the JSON file, and whether all that was asked for holds.

    Raises:
        UserError: there is no GPU.
    """
    if device == "gpu" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here, so there is nothing to check: run this on a machine that has one")
    checks: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        drawn = ["data=synthetic", f"data.num_images={16 * batch}", f"trainer={device}", f"cache_dir={folder}/cache"]
        shape = [f"model.size={size}", f"model.img_size={side}", f"data.batch_size={batch}"]
        runs = Runs(Path(folder), [*drawn, *shape, "trainer.max_epochs=5"])
        parts = {
            "throughput": lambda: throughput(drawn, device, size, side, batch),
            "determinism": lambda: determinism(runs),
            "16 bits": lambda: agreement(runs, auto_precision(device)),
            "2 devices": lambda: exactness(runs, device),
        }
        for name, part in parts.items():
            checks[name] = part()
            verdict = {True: "holds", False: "FAILS", None: "left out"}[checks[name]["holds"]]
            console.print(f"{name:<12} {verdict}: {checks[name]['sentence']}")
    file = write_result({"device": device, "checks": checks}, "gpu", out, size=size, side=side, batch=batch)
    return file, all(check["holds"] is not False for check in checks.values())


class Runs:
    """Runs of train.py that share drawn faces and caches.

    Args:
        folder: takes them.
        options: of all.
    """

    def __init__(self, folder: Path, options: list[str]) -> None:
        self.folder = folder
        self.options = [*options, "model=deit", "distill=logit", "augment=light", "logger=none"]
        self.options += ["trainer.log_every_n_steps=1", "evaluate.resamples=100", "evaluate.splits=[val,test]"]
        self.options += [f"ledger={folder}/ledger"]

    def __call__(self, name: str, *options: str) -> Path:
        """The folder of a run, trained where it is not there yet."""
        run = self.folder / name
        if not run.exists():
            command = [sys.executable, str(ROOT / "train.py"), *self.options, f"run_dir={run}", *options]
            environment = {**os.environ, **followed()}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode != 0:
                raise UserError(f"the run {name} ended with exit code {done.returncode}: {done.stderr[-2000:]}")
        return run


def throughput(source: list[str], device: str, size: str, side: int, batch: int) -> dict[str, Any]:
    """train.py against the bare loop (one batch that lies on the device), in turn, at the precision of auto."""
    precision = default_precision(device)
    with Loops(source, size, side, batch, precision) as loops:
        ours, bare = loops.ours(), loops.peer("bare", ("", []))
        figures = rates([(ours.seconds(10), bare.seconds(10)) for _ in range(5)], batch)
    sentence = (
        f"{figures['ours_per_s']:.0f} images/s in {precision}, the bare loop {figures['other_per_s']:.0f}; "
        f"asked: {BARE} of it"
    )
    return {"holds": figures["ratio"] >= BARE, "asked": BARE, **figures, "sentence": sentence}


def determinism(runs: Runs) -> dict[str, Any]:
    """One command twice, at the precision that auto chooses, gives the same weights, losses and predictions."""

    def bits(run: Path) -> list[Any]:
        checkpoints = json.loads((run / "checkpoints.json").read_text())
        weights = [facts["weights_sha256"] for facts in checkpoints.values()]
        return [*weights, *((run / name).read_bytes() for name in ("curves.csv", "predictions.parquet"))]

    same = bits(runs("first")) == bits(runs("second"))
    return {"holds": same, "sentence": f"two runs of one command are {'' if same else 'not '}the same bits"}


def agreement(runs: Runs, precision: str) -> dict[str, Any]:
    """16 bits against fp32."""
    if precision == "32-true":
        return {"holds": None, "sentence": "this device computes in fp32"}
    return _compare(runs("fp32", *EXACT), runs("16", *EXACT, f"trainer.precision={precision}"), BITS16)


def exactness(runs: Runs, device: str) -> dict[str, Any]:
    """Two devices against one, in fp32."""
    if device == "gpu" and torch.cuda.device_count() < 2:
        return {"holds": None, "sentence": "this machine has one GPU"}
    two = "trainer=ddp" if device == "gpu" else "trainer=ddp_cpu"
    return _compare(runs("fp32", *EXACT), runs("two", two, "trainer.devices=2", *EXACT), FP32)


def _compare(one: Path, other: Path, asked: tuple[float, float]) -> dict[str, Any]:
    curves = [pd.read_csv(run / "curves.csv")["train/loss_step"].dropna().to_numpy() for run in (one, other)]
    apart = np.abs(curves[1] / curves[0] - 1)
    (frame, classes), (second, _) = (read_predictions(run / "predictions.parquet") for run in (one, other))
    same = frame["id"].tolist() == second["id"].tolist()
    gap = max(float(np.abs(logits(frame, h, classes) - logits(second, h, classes)).max()) for h in heads(frame))
    found = float(apart[:10].max()), float(apart.max())
    sentence = (
        f"losses differ by at most {found[0]:.1e} (asked {asked[0]:.0e}) in ten steps and {found[1]:.1e} "
        f"(asked {asked[1]:.0e}) in {len(apart)}, logits of {len(frame)} pictures by {gap:.1e}"
    )
    holds = same and found[0] <= asked[0] and found[1] <= asked[1]
    return {"holds": holds, "losses": found, "asked": asked, "largest_logit_difference": gap, "sentence": sentence}
