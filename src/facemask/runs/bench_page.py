"""The figures of `facemask bench` of one kind of machine as a page, and what follows from them for large data."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from facemask.runs.folder import flat
from facemask.runs.page import markdown, render

MEASURED_ON = ("hardware", "versions", "git", "load_average", "command")
TITLES = {
    "ours_per_s": "ours, images/s",
    "other_per_s": "other, images/s",
    "other_seconds": "other, seconds",
    "lowest": "lowest pair",
    "highest": "highest pair",
    "peak_gib": "peak, GiB",
}
# ImageNet-1k on H100s: dense bf16 rate, NVLink one way and a network port by the data sheets. The share of the rate
# that training reaches and the processor cores beside a GPU are assumptions.
LARGE = {
    "images": 1_281_167, "epochs": 300, "classes": 1000, "side": 224, "batch": 256, "flops": 989e12, "share": 0.35,
    "link": 450e9, "network": 50e9, "cores": 16,
}  # fmt: skip
LOADING = ("deit", "torchvision")  # the row of `facemask bench data` that says what a core loads
# Parameters, and multiply-adds of a forward pass at 224 px (timm's model cards).
MODELS = {"deit_tiny": (5.7e6, 1.3e9), "deit_small": (22.1e6, 4.6e9), "deit_base": (86.6e6, 17.6e9)}


def bench_page(folder: Path) -> str:
    """Markdown of all JSON files of a folder of experiments/bench."""
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    tables = {
        name: "\n".join(_tables({key: value for key, value in content.items() if key not in MEASURED_ON}))
        for name, content in found.items()
    }
    large = limits(found["data"]) if "data" in found else None
    return render("bench.md.j2", machine=folder.name, found=found, tables=tables, large=large)


def limits(data: Mapping[str, Any]) -> dict[str, Any]:
    """What limits training on ImageNet-1k with 8 and 64 GPUs first, from images/s loaded by one core.

    A step is forward and backward: 6 operations to a multiply-add. An all-reduce moves every fp32 gradient twice.

    Args:
        data: of `facemask bench data`.
    """
    (per_core,) = {row["ours_per_s"] for row in data["comparisons"] if (row["augment"], row["against"]) == LOADING}
    loads, rows, waiting = per_core * LARGE["cores"], [], []
    for model, (parameters, multiply_adds) in MODELS.items():
        computes, moved = LARGE["flops"] * LARGE["share"] / (6 * multiply_adds), 2 * 4 * parameters
        hours = LARGE["images"] * LARGE["epochs"] / min(computes, loads) / 3600
        waiting += [model] if loads < computes else []
        milliseconds = LARGE["batch"] / computes, moved / LARGE["link"], moved / (8 * LARGE["network"])
        times = [*(f"{1000 * seconds:.1f}" for seconds in milliseconds), f"{hours / 8:.1f}", f"{hours / 64:.2f}"]
        rows.append([model, f"{computes:,.0f}", f"{loads:,.0f}", *times])
    columns = ["", "a GPU computes, images/s", "its cores load, images/s", "step, ms", "all-reduce of 8 GPUs, ms"]
    columns += ["of 8 machines, ms", "hours, 8 GPUs", "hours, 64 GPUs"]
    return {**LARGE, "per_core": per_core, "table": "\n".join(markdown(columns, rows)), "waiting": waiting}


def _tables(content: Mapping[str, Any]) -> Iterator[str]:
    """Single values in one line, then a table for each list of rows or dictionary; rows that hold lists one by one."""
    nested = {name: value for name, value in content.items() if isinstance(value, dict) or _rows(value)}
    if single := [f"{TITLES.get(name, name)} {_figure(content[name])}" for name in content if name not in nested]:
        yield from (", ".join(single), "")
    for name, value in nested.items():
        if isinstance(value, dict):
            deeper = all(isinstance(part, dict) for part in value.values())
            yield from _table([{name: key, **part} for key, part in value.items()] if deeper else [{"": name, **value}])
        elif any(isinstance(part, list) for row in value for part in row.values()):
            for row in value:
                yield from _tables(row)
        else:
            yield from _table(value)


def _rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    flats = [flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flats for name in row))
    cells = [[_figure(row.get(name)) for name in columns] for row in flats]
    return [*markdown([TITLES.get(name, name) for name in columns], cells), ""]


def _figure(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
    return "–" if value is None else " x ".join(map(str, value)) if isinstance(value, list) else str(value)
