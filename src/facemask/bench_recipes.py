"""Less work for one accuracy: `recipe=fast` against the plain recipe, and shorter steps; `facemask bench recipes`."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from facemask.bench import console, in_turn, machine_kind, ratio, show, spread, write_result
from facemask.bench_data import DRAWN
from facemask.bench_train import Loops, default_precision
from facemask.config import ROOT
from facemask.errors import UserError
from facemask.parent import followed
from facemask.runs.provenance import collect

ARMS = {
    "plain": ["recipe=deit"],
    "fast": ["recipe=fast"],
    "fast, one size": ["recipe=fast", "augment.small_epochs=0"],
}
BATCH = 32
SAVED_STEPS = 200  # whose features are saved, more than are measured
AT_MOST = 0.25  # of the plain recipe's time, to its last accuracy
SOONER = 2.5  # times as soon as Hugging Face's Trainer would be at the end of the plain recipe


def bench_recipes(root: Path | None, epochs: int, side: int, seeds: Sequence[int], out: Path) -> Path:
    """Validation accuracy against time of DeiT-Ti on labels, by recipe and seed, in turn.

    An arm has reached its target where the mean of three consecutive validation accuracies is at least the last one of
    the plain recipe with the same seed. Time counts from the first step, validation included. What Hugging Face's
    Trainer needs for the plain recipe is arithmetic: as many times as long as its steps were in `facemask bench train`
    at equal settings, where that was measured on this kind of machine. Of half of the patches and of a linear probe on
    saved features (of a second run; the first saves them) the time of a step is measured, not the accuracy.

    Args:
        root: one sub-folder per class; None: drawn faces.
        epochs: of the plain recipe.
        side: pixels.

    Returns: the JSON file. Raises UserError where a run fails.
    """
    source = ["data=folder", f"data.root={root.resolve()}", "data.on_bad_file=skip"] if root else DRAWN
    curves: dict[str, list[list[tuple[float, float]]]] = {arm: [] for arm in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for arm, options in ARMS.items():
                name = f"{folder}/{len(curves[arm])} {arm}"
                own = [f"trainer.max_epochs={epochs}"] if arm == "plain" else []
                own += [f"seed={seed}", f"model.img_size={side}", f"run_dir='{name}'", f"ledger='{folder}/ledger'"]
                own += ["+callbacks.clock._target_=facemask.bench_peers.clock", f"+callbacks.clock.file='{name}.json'"]
                common = ["model=deit", "logger=none", "evaluate.splits=[val]"]
                command = [sys.executable, str(ROOT / "train.py"), *source, *common, *options, *own]
                done = subprocess.run(command, env={**os.environ, **followed()}, check=False)
                if done.returncode != 0:
                    raise UserError(f"train.py {' '.join(options)} ended with exit code {done.returncode}: see above")
                curves[arm].append(json.loads(Path(f"{name}.json").read_text()))
        steps = _steps(source, side, f"{folder}/0 plain/checkpoints/best.ckpt")
    whole = [curve[-1][0] for curve in curves["plain"]]
    targets = [curve[-1][1] for curve in curves["plain"]]
    rows: list[dict[str, Any]] = []
    for arm, of_seeds in curves.items():
        times = [reached(curve, target) for curve, target in zip(of_seeds, targets, strict=True)]
        shares = [None if t is None else t / plain for t, plain in zip(times, whole, strict=True)]
        rows.append(
            {
                "recipe": arm,
                "seconds": statistics.mean(curve[-1][0] for curve in of_seeds),
                "accuracy": statistics.mean(curve[-1][1] for curve in of_seeds),
                **{f"accuracy.{seed}": curve[-1][1] for seed, curve in zip(seeds, of_seeds, strict=True)},
                **{f"share_of_plain.{seed}": share for seed, share in zip(seeds, shares, strict=True)},
                "share_of_plain": None if None in shares else statistics.mean(s for s in shares if s is not None),
            }
        )
    slower = _hugging_face(out, side)
    content: dict[str, Any] = {
        "source": "a folder" if root else "drawn faces",
        "hugging_face_step": slower,
        "sooner_than_hugging_face": slower and rows[1]["share_of_plain"] and slower / rows[1]["share_of_plain"],
        "recipes": rows,
        "steps": steps,
    }
    cells = [[row["recipe"], f"{row['seconds']:.0f}", f"{100 * row['accuracy']:.1f}", _share(row)] for row in rows]
    columns = ["", "seconds", "accuracy, %", f"plain's accuracy after, of its time (asked {AT_MOST})"]
    show(f"DeiT-Ti at {side} pixels, validation, mean of {len(seeds)} seeds", columns, cells)
    if sooner := content["sooner_than_hugging_face"]:
        missed = "" if sooner >= SOONER else ", missed"
        console.print(f"recipe=fast: {sooner:.1f} times as soon as Hugging Face's Trainer (asked {SOONER}{missed})")
    shown = [[row["step"], row["against"], *spread(row)] for row in steps]
    show("Steps, times as fast", ["", "against", "ratio", "spread"], shown)
    measured: dict[str, Any] = {"epochs": epochs, "side": side, "seeds": ",".join(map(str, seeds))}
    return write_result(content, "recipes", out, **measured)


def _steps(source: list[str], side: int, checkpoint: str) -> list[dict[str, Any]]:
    """Times of a step in turn; checkpoint: of the backbone on which heads alone are trained."""
    probe = ["model.freeze_backbone=true", f"model.checkpoint='{checkpoint}'"]
    saved, rows = [*probe, "model.save_features=true"], []
    with Loops(source, "tiny", side, BATCH, default_precision()) as loops:
        saving = loops.ours(*saved)
        saving.seconds(SAVED_STEPS)
        saving.end()
        sides = {"all patches": [], "half of the patches": ["model.patch_drop_rate=0.5"]}
        sides |= {"linear probe": probe, "linear probe, saved features": saved}
        timers = {name: partial(loops.ours(*options).seconds, 4) for name, options in sides.items()}
        seconds = in_turn(timers, 7)
    for name, against in (("half of the patches", "all patches"), ("linear probe, saved features", "linear probe")):
        times = list(zip(seconds[name], seconds[against], strict=True))
        rows.append({"step": name, "against": against, **ratio(times)})
    return rows


def reached(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Seconds after which the mean of three consecutive accuracies is at least `target`; None: never.

    Args:
        curve: (seconds, accuracy) after every epoch.
    """
    for last in range(2, len(curve)):
        if statistics.mean(accuracy for _, accuracy in curve[last - 2 : last + 1]) >= target:
            return curve[last][0]
    return None


def _share(row: dict[str, Any]) -> str:
    share = row["share_of_plain"]
    if row["recipe"] == "plain":
        return "–"
    return "not by all seeds, missed" if share is None else f"{share:.2f}{'' if share <= AT_MOST else ' missed'}"


def _hugging_face(out: Path, side: int) -> float | None:
    """How many times as long as ours a step of Hugging Face's Trainer takes, by a measurement in `out`."""
    file = out / "bench" / machine_kind(collect()[0]["hardware"]) / "train.json"
    cases = json.loads(file.read_text())["cases"] if file.is_file() else []
    rows = [
        row for case in cases if (case["model"], case["side"]) == ("deit_tiny", side) for row in case["comparisons"]
    ]
    return next((row["ratio"] for row in rows if row["against"] == "Hugging Face"), None)
