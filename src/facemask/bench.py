"""What all benches share: things measured in turn on one machine, their ratios, and the file that keeps them."""

import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from facemask.files import write_json
from facemask.runs.provenance import collect

LIBRARIES = {"torch", "torchvision", "timm", "albumentations", "opencv-python-headless", "pillow", "numpy", "facemask"}
LIBRARIES |= {"faiss-cpu", "imagehash", "pytorch-lightning", "transformers", "accelerate"}
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def in_turn(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each side gives when all are asked in turn (A B C A B C ...), so many times."""
    given: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            given[name].append(measure())
    return given


def pairs(a: Callable[[], Any], b: Callable[[], Any], rounds: int) -> list[tuple[float, float]]:
    """Seconds of `a` and of `b`, taken in turn, after one call of each that is not counted."""

    def seconds(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    a(), b()
    return list(zip(*in_turn({"a": partial(seconds, a), "b": partial(seconds, b)}, rounds).values(), strict=True))


def ratio(times: Sequence[tuple[float, float]]) -> dict[str, float]:
    """How many times as fast A is as B: ratio of the medians, and lowest and highest ratio of single pairs."""
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    single = [second / first for first, second in times]
    return {"seconds": a, "other_seconds": b, "ratio": b / a, "lowest": min(single), "highest": max(single)}


def rates(times: Sequence[tuple[float, float]], images: int = 1) -> dict[str, float]:
    """`ratio` of times that so many images took, with images per second in place of the seconds."""
    figures = ratio(times)
    ours, other = images / figures.pop("seconds"), images / figures.pop("other_seconds")
    return {"ours_per_s": ours, "other_per_s": other, **figures}


def spread(figures: Mapping[str, float], digits: int = 2) -> list[str]:
    """Cells of a table: the ratio, and its spread over single pairs."""
    return [f"{figures['ratio']:.{digits}f}", f"{figures['lowest']:.{digits}f}-{figures['highest']:.{digits}f}"]


def asked(figures: Mapping[str, float], at_least: float) -> str:
    """Cell of a table: what is asked of the ratio, and whether it is missed."""
    return f"{at_least}{'' if figures['ratio'] >= at_least else ' missed'}"


def show(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table whose first column holds names and whose others hold figures."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def machine_kind(hardware: dict[str, Any]) -> str:
    """Name of a kind of machine, fit for a folder: processor, cores and GPUs."""
    processor = re.sub(r"\(.*?\)", "", hardware["processor"])
    parts = [processor, f"{hardware['cores']} cores", *hardware["gpus"]]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def write_result(content: dict[str, Any], name: str, out: Path, **options: Any) -> Path:
    """Write figures, on what they were measured, and the command with its options, to
    out/bench/<machine kind>/<name>.json."""
    command = " ".join(["facemask bench", name, *(f"--{key} {value}" for key, value in options.items())])
    provenance, _ = collect()
    versions = {name: version for name, version in provenance["versions"].items() if name.lower() in LIBRARIES}
    measured_on = {
        "load_average": os.getloadavg()[0],
        "hardware": provenance["hardware"],
        "versions": versions,
        "git": provenance["git"]["commit"],
    }
    file = out / "bench" / machine_kind(provenance["hardware"]) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"command": command, **content, **measured_on})
    return file
