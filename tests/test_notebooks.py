"""Committed notebooks: paired with their scripts, with outputs, and with nothing of a machine in them.

That their outputs are those of today is checked by `make notebooks-check`, which executes all.
"""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest

jupytext = pytest.importorskip("jupytext", reason="needs jupytext, nbclient and ipykernel")
pytest.importorskip("nbclient", reason="needs nbclient")
import notebooks  # noqa: E402

SCRIPTS = sorted(notebooks.FOLDER.glob("*.py"))


def test_there_are_five():
    names = ["01_data_audit", "02_ablation", "03_what_it_looks_at", "04_sweeps", "05_reproduce_a_number"]
    assert [script.stem for script in SCRIPTS] == names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_is_committed_as_its_script_says_and_shows_something(script):
    target = script.with_suffix(".ipynb")
    committed, source = jupytext.read(target), jupytext.read(script)
    assert [cell.source for cell in committed.cells] == [cell.source for cell in source.cells]
    outputs = [output for cell in committed.cells for output in cell.get("outputs", [])]
    assert len(outputs) >= 3
    assert not [output for output in outputs if output["output_type"] == "error"]
    text = target.read_text()
    assert len(text) < 1_500_000
    assert not re.findall(r"(?:/work|/home|/root|/tmp|site-packages|\\u001b\[)[^\"]{0,60}", text)


def small(tmp_path: Path, *cells: str) -> Path:
    script = tmp_path / "small.py"
    script.write_text("".join(f"# %% {cell}\n\n" for cell in cells))
    return script


@pytest.mark.slow
def test_what_makes_a_notebook_stale(tmp_path):
    script = small(
        tmp_path,
        "\nprint(1 + 1)",
        'tags=["varies"]\nimport time\nprint("mean ", -time.time_ns() / 7, "s")',
        "\nimport sys\nprint(3, file=sys.stderr)",
    )
    book = notebooks.run(script)
    assert [notebooks.texts(cell) for cell in book.cells][::2] == [["2\n"], []]
    again = notebooks.run(script)
    assert notebooks.texts(again.cells[1]) != notebooks.texts(book.cells[1])
    assert list(notebooks.stale(book, again)) == []

    old = copy.deepcopy(book)
    old.cells[0].outputs[0].text = "3\n"
    assert list(notebooks.stale(old, book)) == ["the cell 'print(1 + 1)' showed ['3\\n'] and shows ['2\\n']"]
    old = copy.deepcopy(book)
    old.cells[1].outputs[0].text = "median -1.2e-05 s\n"
    assert [line.partition(" showed ")[2] for line in notebooks.stale(old, again)] == [
        "['median # s '] and shows ['mean # s ']"
    ]
    old.cells[0].source = "print(3)"
    assert list(notebooks.stale(old, book)) == ["its source is not that of the .py file"]


@pytest.mark.slow
def test_the_check_executes_and_passes():
    command = [sys.executable, notebooks.__file__, "--check", "05_reproduce_a_number"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("05_reproduce_a_number.ipynb: ")
