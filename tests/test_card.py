"""Model cards of the committed record and of a run, read back with the hub's own classes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from test_export import caches, finished
from typer.testing import CliRunner

from facemask import audit
from facemask.card import _cell, card
from facemask.cli import app
from facemask.config import ROOT
from facemask.errors import UserError
from facemask.evaluate import compose_evaluation, load_run, own_pictures
from facemask.files import write_json
from facemask.runs.predictions import assemble, read_predictions, write_predictions

SMOKE = ROOT / "experiments" / "smoke"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return finished(tmp_path_factory.mktemp("card"), "model=deit_distilled")


def test_the_card_of_a_record_has_the_numbers_of_its_predictions() -> None:
    text = card(SMOKE)
    read = ModelCard(text).data
    assert (read.license, read.pipeline_tag, read.datasets) == (
        "apache-2.0",
        "image-classification",
        ["drawn-faces-600"],
    )
    found = {(r.dataset_split, r.metric_name): r.metric_value for r in read.eval_results}
    claims = {claim["claim"]: claim["value"] for claim in yaml.safe_load((SMOKE / "claims.yaml").read_text())}
    for split in ("val", "test"):
        for metric in ("accuracy", "balanced_accuracy", "nll"):
            assert found[split, metric] == pytest.approx(claims[f"{split}/mean/{metric}"], abs=1e-12)
    right = []
    for seed in range(3):
        frame, classes = read_predictions(SMOKE / "runs" / f"seed{seed}" / "predictions.parquet")
        part = frame[frame["split"] == "test"]
        decided = part[[f"logit/mean/{name}" for name in classes]].to_numpy().argmax(axis=1)
        right.append(np.mean(np.array(classes)[decided] == part["label"]))
    assert found["test", "accuracy"] == pytest.approx(np.mean(right), abs=1e-12)
    assert f"Accuracy on test **{100 * np.mean(right):.1f} [" in text
    for run in json.loads((SMOKE / "record.json").read_text())["runs"].values():
        assert run["weights_sha256"] in text
        assert f"{run['training']['train_samples_per_second']:.0f} images/s" in text
    assert "facemask reproduce smoke --tier train" in text
    assert "No evaluation on pictures from another source is stored in a record" in text
    assert "{{" not in text
    assert "None" not in text


def test_an_interval_over_few_seeds_ends_where_the_metric_does() -> None:
    entries = {"accuracy": {"mean": 0.98, "low": 0.9, "high": 1.06}, "nll": {"mean": 0.5, "low": -0.25, "high": 1.25}}
    assert _cell(entries, "accuracy") == "98.0 [90.0, 100.0]"
    assert _cell(entries, "nll") == "0.500 [0.000, 1.250]"
    assert _cell(entries, "ece") == "–"


def test_a_changed_record_gets_no_card(tmp_path: Path) -> None:
    record = shutil.copytree(SMOKE, tmp_path / "smoke")
    (record / "runs" / "seed0" / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match=r"runs/seed0/metrics\.json was changed"):
        card(record)


def test_the_card_of_a_run_says_what_is_missing(run: Path) -> None:
    text = card(run, run.parent / "cache")
    assert "The test split was not opened" in text
    assert "What can be told without any pixel was not measured" in text
    assert "`facemask data audit` does, then write this card again" in text
    assert "The run evaluated no validation split, so there are no `eval_*` figures" in text
    assert "No evaluation on pictures from another source is stored:" in text
    for line in ("train_runtime            = 0:01:01.25", "total_flos               =        3GF"):
        assert line in text
    assert "| train | 21 | 21 |" in text
    assert str(run.parent) not in text


def test_shortcuts_and_another_source_are_told_where_they_were_measured(run: Path, tmp_path: Path) -> None:
    cfg, _ = compose_evaluation(load_run(run)[0], caches(run))
    data = own_pictures(run, load_run(run)[0], cfg, ["test"])
    frame = audit.shortcut_predictions(data, 0.5)
    copy = shutil.copytree(run, tmp_path / "run")
    names = [f"{i}.jpg" for i in range(40)]
    labels = [data.classes[i % 2] for i in range(40)]
    decided = np.eye(2)[[i % 2 if i < 30 else 1 - i % 2 for i in range(40)]]  # 10 of 40 wrong
    heads = dict.fromkeys(("head", "head_dist", "mean"), decided)
    other = copy / "evaluations" / "elsewhere_2026-01-01"
    other.mkdir(parents=True)
    table = assemble(names, ["other"] * 40, names, labels, heads, data.classes)
    write_predictions(other / "predictions.parquet", table, data.classes)
    facts = {"against": "val", "near_duplicates": {"pictures": 3, "excluded": False}}
    write_json(other / "evaluation.json", facts)
    text = card(copy, run.parent / "cache")
    line = next(line for line in text.splitlines() if line.startswith("| elsewhere |"))
    assert line.startswith("| elsewhere | 40 | 75.0 [59.8, 85.8] | 75.0")  # Wilson of 30 in 40
    assert line.endswith("| 3, kept |")
    result = next(r for r in ModelCard(text).data.eval_results if r.dataset_split == "other")
    assert (result.dataset_name, result.metric_name, result.metric_value) == ("elsewhere", "accuracy", 0.75)
    border = frame[[f"logit/border/{name}" for name in data.classes]].to_numpy().argmax(axis=1)
    right = np.mean(np.array(data.classes)[border] == frame["label"])
    assert f"| 1-pixel border | {100 * right:.1f} [" in text
    assert "| mask region covered |" in text


def test_the_command_writes_a_file_or_prints(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["card", str(SMOKE), "--out", str(tmp_path / "card.md")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "card.md").read_text().startswith("---\ndatasets:")
    for arguments, sentence in (
        (["card", str(tmp_path)], "holds neither a finished run nor a record"),
        (["card", str(SMOKE), "--out", str(tmp_path / "no" / "card.md")], "name a file in a folder that exists"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, UserError)
        assert sentence in str(result.exception)
