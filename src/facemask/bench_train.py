"""Training steps of ours and of others in turn, their memory, and where a step's time goes: `facemask bench ...`."""

import importlib.util
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from facemask.bench import asked, console, in_turn, rates, ratio, show, spread, write_result
from facemask.bench_data import DRAWN, training_data
from facemask.bench_peers import TICKS
from facemask.config import ROOT
from facemask.devices import auto_precision
from facemask.errors import UserError
from facemask.files import write_json
from facemask.parent import followed

PEER_BATCH = 128  # timm's default, the largest
PRECISIONS = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}
# What is asked of our step, as a multiple of the other's images/s.
ASKED = {
    "bare": 0.95,
    "timm": 1.0,
    "timm, distilling": 1.0,
    "Hugging Face": 1.0,
    "timm's defaults": 1.5,
    "Hugging Face's defaults": 1.5,
}


class Loop:
    """A training loop in a process of its own, which stands still unless it is watched.

    Args:
        command: ticks after every step (`facemask.bench_peers.tick`).
        batch: images per step.
        log: takes what it prints.
    """

    def __init__(self, command: Sequence[str], batch: int, log: Path) -> None:
        self.batch = batch
        self.log = log
        read, write = os.pipe()
        threads = str(torch.get_num_threads())
        environment = {**os.environ, **followed(), TICKS: str(write), "OMP_NUM_THREADS": threads}
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, env=environment, pass_fds=[write], start_new_session=True, stdout=out, stderr=out
            )
        os.close(write)
        self._ticks = os.fdopen(read)
        try:
            begin, told = time.perf_counter(), {"start": True}
            while "start" in told:
                told = self._told()
            self.first_step_after = told["time"] - begin
            self.seconds(1)
        except BaseException:
            self.end()
            raise

    def _told(self) -> dict[str, Any]:
        line = self._ticks.readline()
        if not line:
            end = self.log.read_text(errors="replace").strip().splitlines()[-1:]
            why = "it was killed (too little memory?)" if self.process.wait() == -signal.SIGKILL else " ".join(end)
            raise UserError(f"a training loop ended by itself: {why}")
        return json.loads(line)

    def seconds(self, steps: int) -> float:
        """Let it make so many whole steps, and some more: the median seconds of a step. `told`: its ticks."""
        since, durations = time.perf_counter(), list[float]()
        self.told: list[dict[str, Any]] = []
        os.killpg(self.process.pid, signal.SIGCONT)
        while len(durations) < steps:
            told = self._told()
            if told["time"] < since:  # written before it stood still
                continue
            if self.told and "start" not in told:
                durations.append(told["time"] - self.told[-1]["time"])
            self.told.append(told)
        os.killpg(self.process.pid, signal.SIGSTOP)
        os.waitpid(self.process.pid, os.WUNTRACED)  # until it stands still
        return statistics.median(durations)

    def peak_memory(self) -> float:
        """Most GiB that its processes had in memory so far, added up (Linux)."""
        peaks = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.getpgid(int(folder.name)) == self.process.pid:
                    peaks += [line for line in (folder / "status").read_text().splitlines() if "VmHWM" in line]
            except OSError:  # ended meanwhile
                continue
        return sum(int(line.split()[1]) for line in peaks) / 2**20

    def end(self) -> None:
        """Kill it and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._ticks.close()


class Loops(ExitStack):
    """Starts loops on the same pictures, of one model, batch and precision; they end with the context.

    Args:
        source: overrides of train.py that choose the data.
        size, side, batch, precision: of the model, its input, a step, and its arithmetic (of `PRECISIONS`).
    """

    def __init__(self, source: list[str], size: str, side: int, batch: int, precision: str) -> None:
        super().__init__()
        self.source, self.size, self.side, self.batch, self.precision = source, size, side, batch, precision
        self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
        self._names = map(str, itertools.count())

    def _start(self, command: list[str], batch: int, log: Path) -> Loop:
        loop = Loop(command, batch, log)
        self.callback(loop.end)
        return loop

    def ours(self, *overrides: str) -> Loop:
        """`python train.py` as it is, without validation in between, and without drop path, which no peer has."""
        run = self.folder / next(self._names)
        command = [sys.executable, str(ROOT / "train.py"), *self.source, "model=deit", "augment=vit", "logger=none"]
        command += [f"model.size={self.size}", f"model.img_size={self.side}", f"data.batch_size={self.batch}"]
        command += [f"trainer.precision={PRECISIONS[self.precision]}", "trainer.max_epochs=1000", f"run_dir={run}"]
        command += ["model.drop_path_rate=0.0"]
        command += ["+trainer.check_val_every_n_epoch=1000", "evaluate.splits=[val]", f"ledger={self.folder}/ledger"]
        command += ["+callbacks.tick._target_=facemask.bench_peers.ticker", *overrides]
        return self._start(command, self.batch, run.with_suffix(".log"))

    def peer(self, name: str, pictures: tuple[str, list[str]], **changes: Any) -> Loop:
        """A loop of `facemask.bench_peers`; pictures: root, and the training files below it."""
        settings = {
            "model": f"deit_{self.size}_patch16_224",
            "side": self.side,
            "batch": self.batch,
            "precision": self.precision,
            "workers": 0,
            "defaults": False,
            "root": pictures[0],
            "pictures": pictures[1],
            "scratch": str(self.folder),
            **changes,
        }
        file = self.folder / f"{next(self._names)}.json"
        write_json(file, settings)
        command = [sys.executable, "-m", "facemask.bench_peers", name, str(file)]
        return self._start(command, settings["batch"], file.with_suffix(".log"))


def bench_train(
    root: Path | None, cases: Sequence[str], batch: int, precision: str | None, rounds: int, steps: int, out: Path
) -> Path:
    """Our whole training step against the bare limit, timm and Hugging Face's Trainer, in turn.

    Ours is `python train.py` with its loader, callbacks and curves. Every loop is a process of its own with as many
    threads; while one is measured, the others stand still.

    Args:
        root: one sub-folder per class; None: drawn faces.
        cases: "SIZE/SIDE", such as "tiny/224".
        batch, precision: of all but the peers' defaults; precision None: as train.py chooses.
        rounds: windows of each loop.
        steps: of one window, whose median counts; peers with another batch see as many images in theirs.

    Returns: the JSON file.
    """
    precision = precision or default_precision()
    source, pictures = _pictures(root)
    if len(pictures[1]) < PEER_BATCH:
        raise UserError(f"the training split has fewer than {PEER_BATCH} pictures: give a larger folder")
    done = []
    for case in cases:
        size, side = case.split("/")
        rows, shown = [], []
        for overrides, peers in _groups(size):
            with Loops(source, size, int(side), batch, precision) as loops:
                sides = {"ours": loops.ours(*overrides)}
                sides |= {name: loops.peer(loop, pictures, **changes) for name, (loop, changes) in peers.items()}
                timers = {name: partial(_per_image, loop, steps * batch) for name, loop in sides.items()}
                seconds = in_turn(timers, rounds)
            for name in peers:
                figures = rates(list(zip(seconds["ours"], seconds[name], strict=True)))
                rows.append({"against": name, "batch": sides[name].batch, **figures})
                per_s = f"{figures['ours_per_s']:.1f}", f"{figures['other_per_s']:.1f}"
                shown.append([name, *per_s, *spread(figures), asked(figures, ASKED[name])])
        title = f"Training steps of deit_{size} at {side} pixels, batch {batch}, {precision}: images/s"
        show(title, ["against", "ours", "theirs", "ratio", "spread", "asked"], shown)
        done.append({"model": f"deit_{size}", "side": int(side), "batch": batch, "comparisons": rows})
    content = {
        "source": "a folder" if root else "drawn faces",
        "precision": precision,
        "threads": torch.get_num_threads(),
        "cases": done,
    }
    options: dict[str, Any] = {"batch": batch, "precision": precision, "rounds": rounds, "steps": steps}
    return write_result(content, "train", out, at=" --at ".join(cases), **options)


def _per_image(loop: Loop, images: int) -> float:
    return loop.seconds(max(1, images // loop.batch)) / loop.batch


def default_precision(device: str | None = None) -> str:
    """As train.py chooses on a device, which it chooses, too."""
    chosen = auto_precision(device or ("gpu" if torch.cuda.is_available() else "cpu"))
    return next(name for name, precision in PRECISIONS.items() if precision == chosen)


def bench_profile(root: Path | None, size: str, side: int, batch: int, steps: int, distill: str, out: Path) -> Path:
    """Where the time of a training step of `python train.py` goes. Returns the JSON file."""
    precision = default_precision()
    model = "deit" if distill in ("none", "logit") else "deit_distilled"
    profiler = "+trainer.profiler._target_=facemask.bench_peers.parts"
    with Loops(_pictures(root)[0], size, side, batch, precision) as loops:
        loop = loops.ours(f"model={model}", f"distill={distill}", profiler)
        loop.seconds(steps)
        first, *_, last = (told for told in loop.told if "start" not in told)
    count = last["steps"] - first["steps"]
    took = parts_of_a_step(
        {name: 1000 * (total - first["seconds"].get(name, 0)) / count for name, total in last["seconds"].items()}
    )
    show(
        f"A step of deit_{size} at {side} pixels, batch {batch}, {precision}, distill={distill}",
        ["part", "ms", "share"],
        ([name, f"{ms:.2f}", f"{ms / sum(took.values()):.2%}"] for name, ms in took.items()),
    )
    content = {"precision": precision, "milliseconds": took}
    options: dict[str, Any] = {"size": size, "side": side, "batch": batch, "steps": steps, "distill": distill}
    return write_result(content, "profile", out, **options)


def parts_of_a_step(actions: dict[str, float]) -> dict[str, float]:
    """What each part of a step takes, from the times of Lightning's nested actions; the parts add up to "step"."""

    def of(*ends: str) -> float:
        return sum(took for name, took in actions.items() if name.endswith(ends))

    def own(*names: str) -> float:
        return sum(actions.get(name, 0.0) for name in names)

    parts = {
        "data wait": of(".train_dataloader_next"),
        "teacher": own("on_before_batch_transfer", "_ask_teacher"),
        "logging": own("log_dict", "_add")
        + sum(t for n, t in actions.items() if re.match(r"\[Callback\].*_batch_", n)),
        "backward": of("Strategy.backward"),
    }
    parts["forward"] = of("Strategy.training_step") - own("_ask_teacher", "log_dict", "_add")
    parts["optimizer"] = of(".optimizer_step") - of("Strategy.training_step", "Strategy.backward")
    parts["Lightning"] = actions["step"] - sum(parts.values())
    return parts


def bench_memory(root: Path | None, size: str, side: int, batch: int, steps: int, out: Path) -> Path:
    """Peak memory of the processes of ours and of the peers, after so many training steps. Returns the JSON file."""
    precision, (source, pictures) = default_precision(), _pictures(root)
    peaks: dict[str, float] = {}
    for name in ("ours", "timm", *(["huggingface"] if _has_peers() else [])):
        with Loops(source, size, side, batch, precision) as loops:
            loop = loops.ours() if name == "ours" else loops.peer(name, pictures)
            loop.seconds(steps)
            peaks[name] = loop.peak_memory()
    text = ", ".join(f"{name} {peak:.2f} GiB" for name, peak in peaks.items())
    console.print(f"peak of deit_{size} at {side} pixels, batch {batch}, {precision}: {text}")
    content = {"precision": precision, "peak_gib": peaks}
    return write_result(content, "memory", out, size=size, side=side, batch=batch, steps=steps)


# Size, pixels (of whole patches) and ranks.
GROWTH = [*(("tiny", side, 1) for side in (64, 112, 224)), ("small", 224, 1), ("base", 224, 1), ("tiny", 224, 2)]


def bench_growth(root: Path | None, batch: int, steps: int, out: Path) -> Path:
    """Images/s and memory of `python train.py` from tiny to base, from few to many pixels, and with 1 and 2 ranks.

    Two ranks share the threads and the global batch. Returns the JSON file.
    """
    precision, source, threads = default_precision(), _pictures(root)[0], torch.get_num_threads()
    rows = []
    for size, side, ranks in GROWTH:
        more = [f"threads={max(1, threads // ranks)}"]
        more += ["trainer=ddp_cpu", f"trainer.devices={ranks}"] if ranks > 1 else []
        with Loops(source, size, side, batch, precision) as loops:
            loop = loops.ours(*more)
            rate = batch / loop.seconds(steps)
            rows.append(
                {"size": size, "side": side, "ranks": ranks, "images_per_s": rate, "peak_gib": loop.peak_memory()}
            )
        console.print(rows[-1])
    content = {"precision": precision, "threads": threads, "rows": rows}
    return write_result(content, "growth", out, batch=batch, steps=steps)


# Seconds at most (multiples of the imports, for the first step).
START = {"facemask --help": 0.4, "train.py --help": 1.5, "train.py --cfg job": 1.5, "a config error": 1.5}
FIRST_STEP_AT_MOST = 2.0


def bench_startup(rounds: int, out: Path) -> Path:
    """Seconds of commands that need no torch, and to the first training step, caches warm, against the imports of
    torch, timm and pytorch_lightning, in turn. Returns the JSON file."""

    def seconds(*command: str) -> float:
        begin = time.perf_counter()
        subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
        return time.perf_counter() - begin

    train, python = str(ROOT / "train.py"), sys.executable
    commands = {
        "facemask --help": (python, "-c", "from facemask.cli import main; main()", "--help"),
        "train.py --help": (python, train, "--help"),
        "train.py --cfg job": (python, train, "--cfg", "job"),
        "a config error": (python, train, "optim.lr=-1"),
    }
    took = in_turn({name: partial(seconds, *command) for name, command in commands.items()}, rounds)
    medians = {name: statistics.median(of) for name, of in took.items()}

    def first_step() -> float:
        with Loops(DRAWN, "tiny", 32, 8, default_precision()) as loops:
            return loops.ours().first_step_after

    first_step()  # warms the caches
    imports = partial(seconds, python, "-c", "import torch, timm, pytorch_lightning")
    figures = ratio(list(zip(*in_turn({"first step": first_step, "imports": imports}, rounds).values(), strict=True)))
    first = {"seconds": figures["seconds"], "imports": figures["other_seconds"], "times_as_long": 1 / figures["ratio"]}
    for name, most in START.items():
        console.print(f"{name}: {medians[name]:.2f} s (asked {most}{'' if medians[name] <= most else ', missed'})")
    missed = "" if first["times_as_long"] <= FIRST_STEP_AT_MOST else ", missed"
    console.print(
        f"first step after {first['times_as_long']:.2f} times the imports (asked {FIRST_STEP_AT_MOST}{missed})"
    )
    return write_result({"seconds": medians, "first_step": first}, "startup", out, rounds=rounds)


def _groups(size: str) -> list[tuple[list[str], dict[str, tuple[str, dict[str, Any]]]]]:
    """What is measured in turn: overrides of ours, and name -> loop and settings of its peers. Few at a time, since all
    of them stay in memory; the limit alone, since that comparison is the closest."""
    taught = {"model": f"deit_{size}_distilled_patch16_224", "teacher": "tf_efficientnet_lite0"}
    timms = {"batch": PEER_BATCH, "precision": "fp32", "workers": 4, "defaults": True}
    groups: list[tuple[list[str], dict[str, tuple[str, dict[str, Any]]]]] = [
        ([], {"bare": ("bare", {})}),
        ([], {"timm": ("timm", {})}),
        ([], {"timm's defaults": ("timm", timms)}),
        (["model=deit_distilled", "distill=soft"], {"timm, distilling": ("timm", taught)}),
    ]
    if _has_peers():
        groups[1][1]["Hugging Face"] = "huggingface", {}
        theirs = {"batch": 8, "precision": "fp32", "defaults": True}
        groups[2][1]["Hugging Face's defaults"] = "huggingface", theirs
    return groups


def _has_peers() -> bool:
    there = all(importlib.util.find_spec(name) for name in ("transformers", "accelerate"))
    if not there:
        console.print("without Hugging Face's Trainer: pip install 'facemask[peers]'", markup=False)
    return there


def _pictures(root: Path | None) -> tuple[list[str], tuple[str, list[str]]]:
    """Overrides that choose the data; its folder, and its training files."""
    data = training_data(root, "vit")
    assert data.root is not None
    folder = data.root.resolve()
    files = [str(folder / path) for path in data.table["path"].iloc[data.rows("train")]]
    source = ["data=folder", f"data.root={folder}", "data.on_bad_file=skip"] if root else DRAWN
    return source, (str(folder), files)
