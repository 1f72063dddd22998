import json

import numpy as np
import pytest
from typer.testing import CliRunner

from facemask.cli import app
from facemask.errors import UserError
from facemask.runs.folder import RunFolder, write_json
from facemask.runs.metrics import evaluate
from facemask.runs.predictions import assemble, write_predictions
from facemask.runs.record import record

CLASSES = ["with_mask", "without_mask"]


@pytest.fixture
def run(tmp_path):
    """A finished run of 20 pictures on a machine with paths of its own."""
    folder = tmp_path / "elsewhere" / "run"
    data = tmp_path / "photographs"
    config = {
        "run_dir": str(folder),
        "cache_dir": str(tmp_path / "cache"),
        "ledger": str(tmp_path / "ledger"),
        "evaluate": {"resamples": 200},
        "data": {"root": str(data), "split": f"{data}/split.csv"},
    }
    provenance = {
        "command": f"python train.py data.root={data} run_dir={folder}",
        "git": {"commit": "c" * 40},
        "hardware": {"processor": "some CPU", "torch_threads": 2},
        "versions": {"torch": "2.9"},
    }
    RunFolder(folder).start(config, provenance, "")
    rng = np.random.default_rng(0)
    labels = [CLASSES[i % 2] for i in range(20)]
    splits = ["val"] * 8 + ["test"] * 12
    ids = [f"{label}/{i}.jpg" for i, label in enumerate(labels)]
    frame = assemble(ids, splits, ids, labels, {"head": rng.normal(size=(20, 2))}, CLASSES)
    write_predictions(folder / "predictions.parquet", frame, CLASSES)
    write_json(folder / "metrics.json", evaluate(frame, CLASSES, resamples=200))
    write_json(
        folder / "summary.json",
        {"reported_head": "head", "test_opened": 3, "distillation": {}, "training": {"epoch": 1.0, "parameters": 7}},
    )
    for name in ("curves.csv", "checkpoints.json", "split.csv"):
        (folder / name).write_text("x\n")
    (folder / "report.html").write_text("has pictures")
    RunFolder(folder).set_status("finished")
    return folder, frame


def test_a_record_holds_numbers_and_no_paths_or_pictures(run, tmp_path):
    folder, frame = run
    target = record(folder, "mine", tmp_path / "experiments")
    names = {path.name for path in target.iterdir()}
    assert names == {
        "README.md", "checkpoints.json", "config.yaml", "curves.csv", "metrics.json", "predictions.parquet",
        "provenance.json", "split.csv", "summary.json",
    }  # fmt: skip
    text = "".join((target / name).read_text() for name in names if not name.endswith("parquet"))
    assert str(tmp_path) not in text
    assert "split: $FACEMASK_DATA/split.csv" in text
    assert "python train.py data.root=$FACEMASK_DATA run_dir=runs/run" in (target / "README.md").read_text()
    metrics = json.loads((target / "metrics.json").read_text())
    assert metrics == json.loads(json.dumps(evaluate(frame, CLASSES, resamples=200)))
    accuracy = metrics["test"]["head"]["accuracy"]
    shown = f"{100 * accuracy['value']:.1f} [{100 * accuracy['low']:.1f}, {100 * accuracy['high']:.1f}]"
    assert f"| {shown} |" in (target / "README.md").read_text()


def test_a_record_is_not_overwritten_and_an_unfinished_run_not_recorded(run, tmp_path):
    folder, _ = run
    record(folder, "mine", tmp_path / "experiments")
    with pytest.raises(UserError, match="exists already and is not overwritten"):
        record(folder, "mine", tmp_path / "experiments")
    RunFolder(folder).set_status("failed")
    with pytest.raises(UserError, match="holds no finished run"):
        record(folder, "other", tmp_path / "experiments")
    assert not (tmp_path / "experiments" / "other").exists()


def test_the_command(run, tmp_path):
    folder, _ = run
    result = CliRunner().invoke(app, ["record", str(folder), "--name", "a", "--experiments", str(tmp_path / "e")])
    assert result.exit_code == 0
    assert (tmp_path / "e" / "a" / "README.md").exists()
