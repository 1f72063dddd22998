"""The Hugging Face model card of a run or a record; every number is computed from stored predictions and facts."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from facemask import audit
from facemask.data.splits import fingerprint
from facemask.errors import UserError
from facemask.runs import metrics as run_metrics
from facemask.runs import record as records
from facemask.runs.folder import RunFolder
from facemask.runs.page import markdown, render
from facemask.runs.predictions import read_predictions
from facemask.runs.report import ROWS, SHOWN, hugging_face_metrics, number, title

INDEXED = {"accuracy": "accuracy", "balanced_accuracy": "balanced_accuracy", "macro_f1": "f1", "nll": "loss"}
LIBRARIES = {"timm": "timm", "hf": "transformers", "onnx": "onnx", "onnx-int8": "onnx"}
Summary = Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]]


def card(source: Path, cache_dir: Path = Path(".cache/facemask"), export: dict[str, Any] | None = None) -> str:
    """The card of a run folder or a record, front matter and text.

    Args:
        cache_dir: where `facemask data audit` kept what shortcuts alone reach.
        export: what `facemask.export.verify` found, where the card goes with exported weights.

    Raises:
        UserError: neither a finished run nor a record, or one that was changed.
    """
    of_record = (source / "record.json").exists()
    if not of_record and RunFolder(source).status().get("state") != "finished":
        raise UserError(f"{source} holds neither a finished run nor a record: name another folder")
    info, config, metrics = _of_record(source) if of_record else records.describe_run(source, fingerprint)
    summary = records.summarise(metrics)
    split = "test" if "test" in summary else next(iter(summary))
    dataset, elsewhere = _dataset(config), [] if of_record else _elsewhere(source, config)
    heads = [head for head in ROWS if head in summary[split]]
    first = next(iter(info["runs"].values()))
    front = ModelCardData(
        license="apache-2.0",
        library_name=LIBRARIES[export["to"]] if export else None,
        pipeline_tag="image-classification",
        tags=["image-classification", "vision", "face-mask", *_kinds(config)],
        datasets=[dataset["name"]],
        metrics=sorted(set(INDEXED.values()) - {"loss"}),
        model_name=info["name"],
        eval_results=_eval_results(info, summary, dataset, elsewhere),
    )
    text = render(
        "card.md.j2",
        info=info,
        config=config,
        first=first,
        of_record=of_record,
        dataset=dataset,
        split=split,
        head=title(info["reported_head"], heads),
        result=_cell(summary[split][info["reported_head"]], "accuracy"),
        baselines={
            head: head in heads and _cell(summary[split][head], "accuracy") for head in ("majority", "no_pixels")
        },
        counts=_counts(first["audit"]["counts"], info["classes"]),
        results={name: _results(entries, heads, info["reported_head"]) for name, entries in summary.items()},
        elsewhere=_elsewhere_table(elsewhere, metrics, split, info["reported_head"]),
        shortcuts="" if of_record else _shortcuts(source, config, cache_dir, dataset["drawn"]),
        printed={run: _printed(facts["training"]) for run, facts in info["runs"].items()},
        commands=list(dict.fromkeys(facts["command"] for facts in info["runs"].values())),
        export=export,
        size=int(config["data"]["img_size"]),
        working_size=int(config["data"]["img_size"] / config["data"]["crop_pct"]),
    )
    whole = f"---\n{front.to_yaml()}\n---\n\n{text}"
    return str(ModelCard(whole))  # raises where the hub's own classes cannot read it


def _of_record(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    record = records.read_record(path)
    if changed := records.changed_files(path):
        raise UserError(f"{path}: {changed[0]}; restore the record from its repository")
    resamples = record.config["evaluate"]["resamples"]
    numbers = {run: run_metrics.evaluate(*record.predictions(run), resamples=resamples) for run in record.runs}
    return record.info, record.config, numbers


# -- the front matter -------------------------------------------------------------------------------------------


def _dataset(config: Mapping[str, Any]) -> dict[str, Any]:
    data = config["data"]
    kind = data["_target_"].rpartition(".")[2]
    if kind == "SyntheticData":
        words = f"{data['num_images']:,} faces drawn by the project itself (draw_seed {data['draw_seed']})"
        return {"type": "synthetic", "name": f"drawn-faces-{data['num_images']}", "words": words, "drawn": True}
    place = str(data.get("name") or data.get("root"))
    name = "photographs" if place.startswith("$") else Path(place).name
    words = f"the folder of pictures “{name}”" if kind == "FolderData" else f"“{place}” through Hugging Face datasets"
    return {"type": "imagefolder" if kind == "FolderData" else place, "name": name, "words": words, "drawn": False}


def _kinds(config: Mapping[str, Any]) -> list[str]:
    family = config["model"]["name"].split("_")[0]
    return [family, *([] if config["distill"]["_target_"].endswith(".Labels") else ["knowledge-distillation"])]


def _cell(entries: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    """A figure of `summarise` with its interval; a t-interval over few seeds ends where the metric does."""
    if (found := entries.get(metric)) is None:
        return number(None)
    ends = {"low": found["low"], "high": found["high"]}
    if found["low"] is not None:
        ends = {"low": max(0.0, found["low"]), "high": found["high"] if metric == "nll" else min(1.0, found["high"])}
    return number({"value": found["mean"], **ends}, percent=metric.endswith("accuracy"))


def _eval_results(
    info: Mapping[str, Any], summary: Summary, dataset: Mapping[str, Any], elsewhere: list[dict[str, Any]]
) -> list[EvalResult]:
    head = info["reported_head"]
    found = [(dataset["name"], dataset["type"], split, entries[head]) for split, entries in summary.items()]
    found += [(other["name"], "imagefolder", "other", other["summary"][head]) for other in elsewhere]
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type=kind,
            dataset_name=name,
            dataset_split=split,
            metric_type=INDEXED[metric],
            metric_name=metric,
            metric_value=entry[metric]["mean"],
        )
        for name, kind, split, entry in found
        for metric in INDEXED
        if metric in entry
    ]


# -- tables -----------------------------------------------------------------------------------------------------


def _counts(counts: Mapping[str, Mapping[str, int]], classes: list[str]) -> str:
    order = [split for split in ("train", "val", "test") if split in counts]
    rows = [[split, *(f"{counts[split].get(name, 0):,}" for name in classes)] for split in order]
    return "\n".join(markdown(["", *classes], rows))


def _results(entries: Mapping[str, Mapping[str, Any]], heads: list[str], reported: str) -> str:
    rows = [
        [title(head, heads) + (" \\*" if head == reported else ""), *(_cell(entries[head], metric) for metric in SHOWN)]
        for head in heads
        if head in entries
    ]
    return "\n".join(markdown(["", *SHOWN.values()], rows))


def _printed(training: Mapping[str, Any]) -> str:
    """The two blocks that public cards quote."""
    starts = {"train": ("epoch", "train_", "total_"), "eval": ("eval_",)}
    figures = {
        split: {k: v for k, v in training.items() if isinstance(v, int | float) and k.startswith(names)}
        for split, names in starts.items()
    }
    return "\n".join(hugging_face_metrics(split, part) for split, part in figures.items() if part)


def _elsewhere(run_dir: Path, config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The evaluations of a run on pictures from elsewhere, from their predictions."""
    found = []
    for file in sorted((run_dir / "evaluations").glob("*/evaluation.json")):
        facts = json.loads(file.read_text())
        if "against" not in facts:  # the run's own pictures again
            continue
        frame, classes = read_predictions(file.parent / "predictions.parquet")
        numbers = run_metrics.evaluate(frame, classes, resamples=config["evaluate"]["resamples"])
        (split,) = numbers
        copies = facts.get("near_duplicates")
        said = f"{copies['pictures']:,}, {'left out' if copies['excluded'] else 'kept'}" if copies else "unknown"
        entry = {"name": file.parent.name.split("_20")[0], "numbers": numbers[split], "copies": said}
        found.append({**entry, "summary": records.summarise({"": numbers})[split]})
    return found


def _elsewhere_table(elsewhere: list[dict[str, Any]], metrics: Mapping[str, Any], split: str, head: str) -> str:
    rows = []
    own = next(iter(metrics.values()))[split][head]
    for other in elsewhere:
        entry = other["numbers"][head]
        drop = run_metrics.difference(own["accuracy"], entry["accuracy"])
        shown = [number(entry[metric], percent=True) for metric in ("accuracy", "balanced_accuracy")]
        rows.append([other["name"], f"{entry['n']:,}", *shown, number(drop, percent=True), other["copies"]])
    titles = ["source", "pictures", "accuracy, %", "balanced, %", f"points below {split}", "near-duplicates of train"]
    return "\n".join(markdown(titles, rows)) if rows else ""


def _shortcuts(run_dir: Path, config: Mapping[str, Any], cache_dir: Path, drawn: bool) -> str:
    """Test accuracy of each shortcut, where `facemask data audit` was run on these pictures; else ""."""
    table = pd.read_csv(run_dir / "split.csv", dtype=str, keep_default_na=False)
    frame = audit.kept_shortcuts(table, config["data"]["img_size"], config["data"]["crop_pct"], cache_dir)
    if frame is None:
        return ""
    classes, resamples = sorted(frame["label"].unique()), config["evaluate"]["resamples"]
    (heads,) = run_metrics.evaluate(frame, classes, resamples=resamples).values()
    titles = {**audit.HEADS, **({"covered": "mask region covered"} if drawn else {})}
    rows = [[titles[head], number(heads[head]["accuracy"], percent=True)] for head in titles if head in heads]
    return "\n".join(markdown(["what a forest sees", "test accuracy, %"], rows))
