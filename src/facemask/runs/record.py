"""A run's published record: what its numbers are computed from, without pictures, weights or paths of a machine."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from facemask.errors import UserError
from facemask.runs import predictions
from facemask.runs.folder import RunFolder, write_json, write_text
from facemask.runs.metrics import evaluate
from facemask.runs.report import markdown_table, training_blocks

COPIED = ("predictions.parquet", "curves.csv", "checkpoints.json", "split.csv")


def record(run_dir: Path, name: str, experiments: Path) -> Path:
    """Write `experiments/<name>/` from a finished run; returns it.

    config.yaml, provenance.json and summary.json have the paths of this machine replaced by $FACEMASK_DATA, the run
    folder's name and so on; metrics.json and README.md are computed anew from predictions.parquet.

    Raises:
        UserError: the run is not finished, or there is a record of this name already.
    """
    if RunFolder(run_dir).status().get("state") != "finished":
        raise UserError(f"{run_dir} holds no finished run: finish it with resume=true, or name another folder")
    target = experiments / name
    if target.exists():
        raise UserError(f"{target} exists already and is not overwritten: remove it first, or choose another --name")
    frame, classes = predictions.read_predictions(run_dir / "predictions.parquet")
    config = (run_dir / "config.yaml").read_text()
    provenance = json.loads((run_dir / "provenance.json").read_text())
    summary = json.loads((run_dir / "summary.json").read_text())
    places = _places(run_dir, config)
    resamples = int(_value(config, "resamples"))
    experiments.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=experiments, prefix=f".{name}.") as made:
        scratch = Path(made) / name
        scratch.mkdir()
        for file in COPIED:
            shutil.copyfile(run_dir / file, scratch / file)
        write_text(scratch / "config.yaml", _without_paths(config, places))
        clean: dict[str, Any] = json.loads(_without_paths(json.dumps(provenance), places))
        write_json(scratch / "provenance.json", clean)
        write_json(scratch / "summary.json", json.loads(_without_paths(json.dumps(summary), places)))
        metrics = evaluate(frame, classes, resamples=resamples)
        write_json(scratch / "metrics.json", metrics)
        write_text(scratch / "README.md", _readme(name, metrics, summary, clean))
        scratch.replace(target)  # whole or not at all
    return target


def _value(config: str, key: str) -> str:
    (line,) = [line for line in config.splitlines() if line.strip().startswith(f"{key}:")]
    return line.split(":", 1)[1].strip()


def _places(run_dir: Path, config: str) -> list[tuple[str, str]]:
    """Paths of this machine and what stands for them, longest first."""
    import yaml

    parsed = yaml.safe_load(config)
    found = {
        str(Path.cwd()): ".",
        str(run_dir.absolute()): f"runs/{run_dir.name}",
        str(parsed["run_dir"]): f"runs/{run_dir.name}",
        str(parsed["cache_dir"]): ".cache/facemask",
        str(parsed["ledger"]): "runs/test_openings.jsonl",
    }
    if parsed["data"].get("root"):
        found[str(Path(parsed["data"]["root"]))] = "$FACEMASK_DATA"
    return sorted(found.items(), key=lambda item: -len(item[0]))


def _without_paths(text: str, places: list[tuple[str, str]]) -> str:
    for path, name in places:
        if path != name:
            text = text.replace(path, name)
    return text


def _readme(name: str, metrics: dict[str, Any], summary: dict[str, Any], provenance: dict[str, Any]) -> str:
    opened = summary.get("test_opened")
    distillation = summary.get("distillation") or {}
    lines = [
        f"# {name}",
        "",
        "Computed from `predictions.parquet` in this folder; nothing here is typed by hand.",
        "",
        f"    {provenance['command']}",
        "",
        markdown_table(metrics, summary),
        "",
    ]
    if opened is not None:
        lines.append(
            f"The test split of this data had been opened {opened} time(s), this run included, by the ledger of the "
            "clone that made the record."
        )
    if distillation:
        lines.append(
            f"On the training views the teacher's decision differed from the label on "
            f"{distillation['teacher_label_disagreement']:.2%}; student and teacher agreed on "
            f"{distillation['student_teacher_agreement']:.2%}."
        )
    hardware = provenance["hardware"]
    lines += [
        "",
        f"Trained on {hardware['processor']}, {hardware['torch_threads']} threads, torch "
        f"{provenance['versions']['torch']}, commit {provenance['git']['commit']}.",
        "",
        "```",
        *training_blocks(summary["training"]),
        "```",
        "",
    ]
    return "\n".join(lines)
