"""Runs notebooks/*.py and keeps them as .ipynb with their outputs: `notebooks.py [--check] [NAME...]`.

--check writes nothing and exits with 1 where a committed notebook is stale: another source, or other text than what its
cells print now. Images are not compared, nor the figures of cells tagged "varies", which depend on the machine.
"""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jupytext
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

OWN = ("DATA", "RUN", "SWEEP", "SWEEP_STORAGE")
FOLDER = Path(__file__).resolve().parents[1] / "notebooks"


def run(script: Path) -> Any:
    """The notebook of a percent script, executed in the repository's root, with nothing of this machine in it."""
    book = jupytext.read(script)
    where = {"metadata": {"path": str(FOLDER.parent)}}
    for name in OWN:  # what readers set to see their own pictures, runs and sweeps must not be committed
        os.environ.pop(name, None)
    with TemporaryDirectory() as sockets:  # no port that others could reach
        kernels = AsyncKernelManager(transport="ipc", ip=f"{sockets}/kernel")
        NotebookClient(book, kernels, timeout=1800, coalesce_streams=True, resources=where).execute(cleanup_kc=True)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    book.metadata = {"jupytext": {"formats": "ipynb,py:percent"}, "kernelspec": kernel}
    for number, cell in enumerate(book.cells):
        cell.id = f"cell-{number}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [part for part in cell.outputs if not _passing(part)]
    return book


def _passing(part: Any) -> bool:
    """Whether an output is a warning or a progress bar."""
    text = "".join(part.get("data", {}).get("text/plain", "-"))
    return part.get("name") == "stderr" or not text.strip() or "ipywidgets" in text


def texts(cell: Any) -> list[str]:
    """What a cell shows, but pictures."""
    found = []
    for part in cell.get("outputs", []):
        shown = part.get("text", part.get("data", {}).get("text/plain", ""))
        found.append("".join(shown) if "image/png" not in part.get("data", {}) else "picture")
    return found


def stale(committed: Any, fresh: Any) -> Iterator[str]:
    """What differs, a line each."""
    if [cell.source for cell in committed.cells] != [cell.source for cell in fresh.cells]:
        yield "its source is not that of the .py file"
        return
    for old, new in zip(committed.cells, fresh.cells, strict=True):
        was, now = texts(old), texts(new)
        if "varies" in new.metadata.get("tags", []):
            was, now = [_words(text) for text in was], [_words(text) for text in now]
        if was != now:
            yield f"the cell {old.source.splitlines()[-1]!r} showed {was} and shows {now}"


def _words(text: str) -> str:
    """A text without its figures and what their length moves: spaces and rules."""
    return re.sub(r"[\s─━]+", " ", re.sub(r"[-+]?\d[\d.,]*(e[-+]?\d+)?", "#", text))


def main(arguments: list[str]) -> int:
    check = "--check" in arguments
    names = [name for name in arguments if name != "--check"]
    bad = 0
    for script in sorted(FOLDER.glob("*.py")):
        if names and script.stem not in names:
            continue
        start, target = time.monotonic(), script.with_suffix(".ipynb")
        fresh = run(script)
        found = ["it is missing"] if check and not target.exists() else []
        found += stale(jupytext.read(target), fresh) if check and target.exists() else []
        for line in found:
            print(f"{target.name} is stale (make notebooks): {line}", file=sys.stderr)
        bad += bool(found)
        if not check:
            text = json.dumps(fresh, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
            target.write_text(re.sub(r" at 0x[0-9a-f]+", "", text), encoding="utf-8")
        print(f"{target.name}: {time.monotonic() - start:.0f} s")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
