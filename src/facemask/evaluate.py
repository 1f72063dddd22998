"""From a checkpoint to numbers: predictions of every picture of a split, once and in fp32, whatever training used; and
`facemask evaluate`: a finished run on its own splits again, or on pictures from elsewhere."""

import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra.utils
import numpy as np
import pandas as pd
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.console import Console
from rich.table import Table

from facemask.audit import baselines
from facemask.config import ROOT, as_plain, check, check_targets, read_config, user_sentence
from facemask.data import duplicates
from facemask.data.datamodule import ImageData
from facemask.data.transforms import Augmentation
from facemask.errors import UserError
from facemask.files import write_json, write_text
from facemask.modeling.classifier import Classifier
from facemask.modeling.teacher import Teacher, load_teacher
from facemask.runs import metrics as run_metrics
from facemask.runs import predictions
from facemask.runs.checkpoints import read_checkpoint
from facemask.runs.folder import RunFolder, file_sha256
from facemask.runs.ledger import record_opening
from facemask.runs.provenance import collect
from facemask.runs.report import ROWS, terminal_table

console = Console(highlight=False, markup=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 110

OTHER = "other"  # the one split of pictures from elsewhere
# Options that say how a run is evaluated; data= and data.* say on what.
OPTIONS = ("evaluate.batch_size", "evaluate.resamples", "evaluate.splits", "cache_dir", "ledger")


@torch.inference_mode()
def predict_splits(
    classifier: Classifier,
    teacher: Teacher | None,
    data: ImageData,
    splits: Sequence[str],
    batch_size: int,
    device: torch.device,
) -> tuple[pd.DataFrame, dict[str, dict[str, float]]]:
    """Predictions of every picture of some splits, and how long the student took.

    Returns:
        The predictions table (see `facemask.runs.predictions`) with the heads of the student and the teacher's,
        and {split: {"seconds", "images", "steps"}} of the student alone.
    """
    classifier = classifier.eval().to(device).float()
    if teacher is not None:
        teacher.to(device)
    parts, timing = [], {}
    for split in splits:
        collected: dict[str, list[np.ndarray]] = {}
        seconds, steps = 0.0, 0
        for batch in data.eval_loader(split, batch_size):
            pixels = batch["pixels"].to(device)
            start = time.perf_counter()
            outputs: dict[str, Any] = dict(classifier(pixels))
            outputs.pop("mean", None)
            outputs = {head: logits.cpu().numpy() for head, logits in outputs.items()}
            seconds += time.perf_counter() - start
            steps += 1
            if teacher is not None:
                outputs["teacher"] = teacher(pixels).logits.cpu().numpy()
            for head, logits in outputs.items():
                collected.setdefault(head, []).append(logits)
        rows = data.table.iloc[data.rows(split)]
        heads = {head: np.concatenate(logits) for head, logits in collected.items()}
        ids, named, groups, labels = (rows[column].tolist() for column in ("path", "split", "group", "label"))
        parts.append(predictions.assemble(ids, named, groups, labels, heads, data.classes))
        timing[split] = {"seconds": seconds, "images": len(rows), "steps": steps}
    frame = pd.concat(parts, ignore_index=True)
    return (predictions.add_mean_head(frame, data.classes) if len(classifier.heads) > 1 else frame), timing


# -- a finished run ---------------------------------------------------------------------------------------------


def load_run(run_dir: Path) -> tuple[DictConfig, Classifier, list[str]]:
    """Config, best checkpoint (in evaluation mode, on the CPU) and classes of a run folder.

    Nothing in the folder is trusted: weights are read without unpickling objects, and only allowed classes are built.

    Raises:
        UserError: no run, no checkpoint, a checkpoint that is not the run's or is damaged, a class that is not allowed.
    """
    cfg = OmegaConf.create(read_config(run_dir / "config.yaml"))
    files = [run_dir / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(f"{run_dir} has no checkpoint (checkpoints/best.ckpt): give the folder of a finished run")
    checkpoint = read_checkpoint(file)
    known = _read_json(run_dir / "checkpoints.json").get(file.name)
    if known is not None and file_sha256(file) != known["sha256"]:
        raise UserError(f"{file} is not the file that the run wrote: checkpoints.json has another sha256")
    arguments, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
    check_targets(arguments, file)
    try:
        classifier = Classifier(**arguments)
        classifier.load_state_dict(state)
    except (TypeError, RuntimeError) as error:
        raise UserError(f"{file} does not fit this version of the project ({str(error).splitlines()[0]})") from error
    return cfg, classifier.eval(), list(arguments["classes"])


def find_teacher(run_dir: Path, cfg: DictConfig, cache_dir: Path, classes: list[str]) -> Teacher | None:
    """The very teacher of a run, by the sha256 that its summary names; None where its file is gone."""
    wanted = (_read_json(run_dir / "summary.json").get("distillation") or {}).get("teacher_sha256")
    if wanted is None:
        return None
    given = OmegaConf.select(cfg, "teacher.checkpoint")
    kept = [file for folder in (cache_dir, Path(cfg.cache_dir)) for file in (folder / "teachers").glob("*.safetensors")]
    for file in ([Path(given)] if given and Path(given).is_file() else []) + kept:
        if file_sha256(file) == wanted:
            return load_teacher(file, classes)
    return None


def evaluate(
    run_dir: Path,
    overrides: Sequence[str] = (),
    *,
    exclude_duplicates: bool = False,
    names: Mapping[str, str] | None = None,
    name: str | None = None,
) -> Path:
    """Evaluate a finished run and print its table; returns the new folder below `run_dir/evaluations`.

    Args:
        overrides: options as of train.py: `data=...` and `data.*` name other pictures, without them the run's own
            splits are evaluated again; `evaluate.*`, `cache_dir` and `ledger` as in conf/train.yaml.
        exclude_duplicates: leave out other pictures that are near-duplicates of training pictures.
        names: label of the other pictures -> class of the run.
        name: of the new folder; None: the source and the time.

    Raises:
        UserError: whatever the user can mend, before anything is written.
    """
    if RunFolder(run_dir).status().get("state") != "finished":
        raise UserError(f"{run_dir} holds no finished run: finish it with resume=true, or name another folder")
    run, classifier, classes = load_run(run_dir)
    cfg, own = _compose(run, overrides)
    if own and (exclude_duplicates or names):
        raise UserError("--exclude-duplicates and --classes are for other pictures: name them with data=...")
    target = run_dir / "evaluations" / (name or f"{_source(cfg, own)}_{datetime.now():%Y-%m-%d_%H-%M-%S}")
    if target.exists():
        raise UserError(f"{target} exists already and is not overwritten: choose another --name")
    teacher = find_teacher(run_dir, run, Path(cfg.cache_dir), classes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def predict(data: ImageData, splits: Sequence[str]) -> pd.DataFrame:
        return predict_splits(classifier, teacher, data, splits, cfg.evaluate.batch_size, device)[0]

    command = collect()[0]["command"]
    if own:
        frame, facts = _own(run_dir, run, cfg, predict, command)
    else:
        frame, facts = _other(run_dir, run, cfg, classes, names or {}, exclude_duplicates, predict, command)
    if teacher is None and "teacher" in predictions.heads(predictions.read_predictions(_stored(run_dir))[0]):
        facts["notes"].append("the run's teacher is no longer in the cache, so its row is missing")
    numbers = run_metrics.evaluate(frame, classes, resamples=cfg.evaluate.resamples)
    summary = _read_json(run_dir / "summary.json")
    if not own:
        before = _read_json(run_dir / "metrics.json")
        facts["against"] = next(split for split in ("test", "val", *before) if split in before)
        facts["drop"] = _drop(before[facts["against"]], numbers[OTHER])
    _write(target, run.data if own else cfg.data, frame, classes, numbers, {"command": command, **facts})

    shown = numbers if own else {f"own {facts['against']}": before[facts["against"]], **numbers}
    console.print(terminal_table(shown, {**summary, "test_opened": facts.get("test_opened")}))
    if not own:
        console.print(_drop_table(facts["drop"], facts["against"]))
    for note in facts["notes"]:
        console.print(f"note      {note}")
    console.print(f"written   {target} (predictions.parquet, metrics.json, evaluation.json)")
    return target


Predict = Callable[[ImageData, Sequence[str]], pd.DataFrame]


def _own(
    run_dir: Path, run: DictConfig, cfg: DictConfig, predict: Predict, command: str
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The run's own splits from its checkpoint, and how far that differs from what it stored."""
    data = _run_data(run_dir, run, cfg)
    splits = list(cfg.evaluate.splits)
    data.prepare(splits)
    if data.fingerprint != _read_json(run_dir / "provenance.json").get("fingerprint"):
        raise UserError(f"the pictures, their labels or the code that draws them changed since {run_dir} was trained")
    facts: dict[str, Any] = {"splits": splits, "notes": []}
    if "test" in splits:
        facts["test_opened"] = record_opening(Path(cfg.ledger), data.test_fingerprint, run_dir, command)
    frame = predict(data, splits)
    stored, classes = predictions.read_predictions(_stored(run_dir))
    facts["against_stored"] = compare_predictions(frame, stored, classes)
    for split, found in facts["against_stored"].items():
        console.print(f"{split:<9} {found['sentence']}")
    return frame.merge(baselines(data.table, splits, Path(cfg.cache_dir)), on=predictions.COLUMNS, how="left"), facts


def _other(
    run_dir: Path,
    run: DictConfig,
    cfg: DictConfig,
    classes: list[str],
    names: Mapping[str, str],
    exclude_duplicates: bool,
    predict: Predict,
    command: str,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """All pictures of another source, and which of them the run has nearly seen."""
    data = build_data(cfg.data)
    data.prepare_whole(OTHER, classes, names)
    counts = data.table["label"].value_counts()
    parts = ", ".join(f"{name} {counts.get(name, 0):,}" for name in classes)
    console.print(f"data      {len(data.table):,} pictures ({parts}) at {data.img_size} px")
    if data.left_out:
        console.print(f"          {len(data.left_out)} left out: {', '.join(sorted(data.left_out)[:5])}")
    facts: dict[str, Any] = {
        "fingerprint": data.fingerprint,
        "counts": {name: int(counts.get(name, 0)) for name in classes},
        "left_out": data.left_out,
        "notes": [],
    }

    def opened() -> pd.DataFrame:
        facts["opened"] = record_opening(Path(cfg.ledger), data.fingerprint, run_dir, command, split=OTHER)
        return predict(data, [OTHER])

    try:
        source = _run_data(run_dir, run, cfg)
        train = source.load_table().drop(columns="split", errors="ignore").merge(_trained_on(run_dir), on="path")
        pairs = near_duplicates(data, source, train)
    except UserError as error:
        if exclude_duplicates:
            raise UserError(f"--exclude-duplicates needs the run's training pictures: {error}") from error
        facts["notes"].append(f"near-duplicates of training pictures are unknown, and there is no baseline: {error}")
        return opened(), facts
    seen = set(pairs["path"])
    facts["near_duplicates"] = {
        "pictures": len(seen),
        "of": len(data.table),
        "excluded": exclude_duplicates,
        "pairs": pairs.to_dict("records"),
    }
    action = "left out" if exclude_duplicates else "kept; --exclude-duplicates leaves them out"
    share = len(seen) / len(data.table)
    console.print(f"          {len(seen):,} ({share:.1%}) are near-duplicates of the run's training pictures: {action}")
    if exclude_duplicates and len(seen) == len(data.table):
        raise UserError("--exclude-duplicates leaves no picture: all of these are near-duplicates of training pictures")
    frame = opened()
    floor = baselines(pd.concat([train, data.table], ignore_index=True), [OTHER], Path(cfg.cache_dir))
    frame = frame.merge(floor, on=predictions.COLUMNS, how="left", validate="one_to_one")
    if exclude_duplicates:
        frame = frame[~frame["id"].isin(seen)].reset_index(drop=True)
    return frame, facts


# -- the parts --------------------------------------------------------------------------------------------------


def _compose(run: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, bool]:
    """The config of an evaluation, and whether it is of the run's own data."""
    given = {override.split("=")[0].lstrip("+~") for override in overrides}
    if foreign := sorted(key for key in given if key not in OPTIONS and key.split(".")[0] != "data"):
        raise UserError(f"{foreign[0]} says nothing about an evaluation: give data=..., data.* or {', '.join(OPTIONS)}")
    own = "data" not in given
    if own and (some := sorted(key for key in given if key.startswith("data."))):
        raise UserError(f"{some[0]} is of other pictures: name their kind as well, such as data=folder data.root=DIR")
    try:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            cfg = compose("train", list(overrides))
        if not own and "data.img_size" in given and cfg.data.img_size != run.data.img_size:
            raise UserError(
                f"data.img_size={cfg.data.img_size}: the run's model sees pictures of {run.data.img_size} px"
            )
        check(cfg)
        for key in ("ledger", *OPTIONS[:3], *(() if own else ("data.img_size", "data.crop_pct"))):
            if key not in given:
                OmegaConf.update(cfg, key, OmegaConf.select(run, key))
        as_plain(cfg.data)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(user_sentence(error) or str(error)) from error
    return cfg, own


def build_data(data: Any) -> ImageData:
    """The data module of a data config, for evaluation views."""
    plain = as_plain(data)
    check_targets(plain, "data")
    views = Augmentation(seed=0, img_size=plain["img_size"])
    return hydra.utils.instantiate(plain, _partial_=True)(augmentation=views)


def _run_data(run_dir: Path, run: DictConfig, cfg: DictConfig) -> ImageData:
    """The run's own data with the splits that it kept."""
    data = {**as_plain(run.data), "cache_dir": cfg.cache_dir}
    if "split" in data:
        data |= {"split": str(run_dir / "split.csv"), "fold": None, "fraction": 1.0}
    return build_data(data)


def _trained_on(run_dir: Path) -> pd.DataFrame:
    rows = pd.read_csv(run_dir / "split.csv", dtype=str, keep_default_na=False)
    return rows.loc[rows["split"] == "train", ["path", "split"]]


def near_duplicates(data: ImageData, source: ImageData, train: pd.DataFrame) -> pd.DataFrame:
    """Pairs (`path`, `train_path`) of prepared pictures and near-duplicate training pictures of another source."""
    paths, seen = data.table["path"].to_numpy(), train["path"].to_numpy()
    pairs = duplicates.find_pairs(data.thumbnails(paths.tolist()), source.thumbnails(seen.tolist()))
    return pd.DataFrame({"path": paths[pairs[:, 0]], "train_path": seen[pairs[:, 1]]})


def compare_predictions(frame: pd.DataFrame, stored: pd.DataFrame, classes: list[str]) -> dict[str, dict[str, Any]]:
    """Per split: pictures compared, largest difference of a logit, decisions that changed, and a sentence of it."""
    result: dict[str, dict[str, Any]] = {}
    stored_heads = predictions.heads(stored)
    heads = [head for head in predictions.heads(frame) if head in stored_heads]
    for split, now in frame.groupby("split", sort=False):
        before = stored[stored["split"] == split].set_index("id")
        if set(before.index) != set(now["id"]):
            result[str(split)] = {"sentence": "the run stored no predictions of these pictures"}
            continue
        before = before.loc[now["id"]].reset_index()
        pairs = [(predictions.logits(now, head, classes), predictions.logits(before, head, classes)) for head in heads]
        largest = max(float(np.abs(a - b).max()) for a, b in pairs)
        changed = max(int((a.argmax(axis=1) != b.argmax(axis=1)).sum()) for a, b in pairs)
        how = (
            "equal to the stored ones, bit for bit"
            if largest == 0
            else f"differ from the stored ones by at most {largest:.2g} in a logit, and {changed} decision(s) changed"
        )
        sentence = f"predictions of {len(now):,} pictures ({', '.join(heads)}) {how}"
        result[str(split)] = {
            "pictures": len(now),
            "largest_difference": largest,
            "changed_decisions": changed,
            "sentence": sentence,
        }
    return result


def _drop(own: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Own figure minus the other's, of every head and scalar metric that both have."""
    return {
        head: {metric: run_metrics.difference(own[head][metric], other[head][metric]) for metric in run_metrics.SCALARS}
        for head in own
        if head in other
    }


def _drop_table(drop: dict[str, dict[str, Any]], split: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        caption=f"drop from the run's own {split} pictures to these, in points, 95 % intervals",
        caption_justify="left",
        pad_edge=False,
    )
    table.add_column("")
    for title in ("drop of accuracy", "drop of balanced accuracy"):
        table.add_column(title, justify="right", no_wrap=True)
    titles = ROWS if "head_dist" in drop else {**ROWS, "head": "student"}
    for head in [*(head for head in titles if head in drop), *(head for head in drop if head not in titles)]:
        cells = [drop[head]["accuracy"], drop[head]["balanced_accuracy"]]
        table.add_row(titles.get(head, head), *map(_points, cells))
    return table


def _points(entry: dict[str, Any]) -> str:
    if entry["value"] is None:
        return "–"
    text = f"{100 * entry['value']:+.1f}"
    return text if entry["low"] is None else f"{text} [{100 * entry['low']:+.1f}, {100 * entry['high']:+.1f}]"


def _write(
    target: Path,
    data: DictConfig,
    frame: pd.DataFrame,
    classes: list[str],
    numbers: dict[str, Any],
    facts: dict[str, Any],
) -> None:
    """The folder of an evaluation, whole or not at all."""
    target.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as made:
        scratch = Path(made) / target.name
        scratch.mkdir()
        write_text(scratch / "config.yaml", OmegaConf.to_yaml(data, resolve=True))
        predictions.write_predictions(scratch / "predictions.parquet", frame, classes)
        write_json(scratch / "metrics.json", numbers)
        write_json(scratch / "evaluation.json", facts)
        scratch.replace(target)


def _source(cfg: DictConfig, own: bool) -> str:
    """What the pictures are called in a folder's name."""
    if own:
        return "own"
    place = cfg.data.get("root") or cfg.data.get("name") or "drawn"
    return re.sub(r"[^\w.-]+", "_", Path(place).stem or "pictures")


def _stored(run_dir: Path) -> Path:
    return run_dir / "predictions.parquet"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON (cut off?)") from error
