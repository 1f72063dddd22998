"""From a checkpoint to numbers: predictions of every picture of a split, once and in fp32, whatever training used; and
`facemask evaluate`: a finished run on its own splits again, or on pictures from elsewhere."""

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import zip_longest
from pathlib import Path
from typing import Any

import hydra.utils
import numpy as np
import pandas as pd
import torch
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from facemask.audit import baselines
from facemask.config import as_plain, check, check_targets, composed, read_config, user_sentence
from facemask.data import duplicates
from facemask.data.datamodule import ImageData
from facemask.data.store import MANIFEST_COLUMNS
from facemask.data.transforms import Augmentation
from facemask.errors import UserError
from facemask.files import write_json, write_text
from facemask.modeling.classifier import Classifier
from facemask.modeling.teacher import Teacher, load_teacher
from facemask.runs import calibration, evaluation, predictions
from facemask.runs import metrics as run_metrics
from facemask.runs.checkpoints import read_checkpoint
from facemask.runs.folder import RunFolder, file_sha256
from facemask.runs.ledger import record_opening
from facemask.runs.page import show
from facemask.runs.provenance import collect
from facemask.runs.report import terminal_table

console = Console(highlight=False, markup=False, soft_wrap=True)
if not console.is_terminal:
    console.width = 110  # a log file is not 80 columns wide

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
    rank_of: tuple[int, int] = (0, 1),
) -> tuple[pd.DataFrame, dict[str, dict[str, float]]]:
    """Predictions of every picture of some splits, and how long the student took.

    Args:
        rank_of: (rank, number of ranks), which deal the batches among them and gather what they said. A batch holds the
            same pictures whatever the number of ranks, so that its predictions are the same bits.

    Returns:
        The predictions table (see `facemask.runs.predictions`) with the heads of the student and the teacher's,
        and {split: {"seconds", "images", "steps"}} of the student alone.
    """
    classifier = classifier.eval().to(device).float()
    if teacher is not None:
        teacher.to(device)
    parts, timing = [], {}
    for split in splits:
        said: list[dict[str, np.ndarray]] = []
        seconds = 0.0
        for batch in data.eval_loader(split, batch_size, *rank_of):
            pixels = batch["pixels"].to(device)
            start = time.perf_counter()
            outputs: dict[str, Any] = dict(classifier(pixels))
            outputs.pop("mean", None)
            outputs = {head: logits.cpu().numpy() for head, logits in outputs.items()}
            seconds += time.perf_counter() - start
            if teacher is not None:
                outputs["teacher"] = teacher(pixels).logits.cpu().numpy()
            said.append(outputs)
        if rank_of[1] > 1:
            of_ranks: list[Any] = [None] * rank_of[1]
            torch.distributed.all_gather_object(of_ranks, (said, seconds))
            seconds = max(took for _, took in of_ranks)
            said = [outputs for turn in zip_longest(*(part for part, _ in of_ranks)) for outputs in turn if outputs]
        rows, steps = data.table.iloc[data.rows(split)], len(said)
        heads = {head: np.concatenate([outputs[head] for outputs in said]) for head in said[0]}
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
    known = read_json(run_dir / "checkpoints.json").get(file.name)
    if known is not None and file_sha256(file) != known["sha256"]:
        raise UserError(f"{file} is not the file that the run wrote: checkpoints.json has another sha256")
    classifier = load_classifier(file)
    return cfg, classifier, list(classifier.hparams["classes"])


def load_classifier(file: Path) -> Classifier:
    """The classifier in a checkpoint, in evaluation mode, on the CPU.

    Raises:
        UserError: damaged, of another version, holds code, or asks for a class that is not allowed.
    """
    checkpoint = read_checkpoint(file)
    try:
        arguments, state = checkpoint["hyper_parameters"], checkpoint["state_dict"]
        check_targets(arguments, file)
        classifier = Classifier(**arguments)
        classifier.load_state_dict(state)
    except (KeyError, TypeError, RuntimeError, HydraException) as error:
        raise UserError(f"{file} does not fit this version of the project ({str(error).splitlines()[0]})") from error
    return classifier.eval()


def find_teacher(run_dir: Path, cfg: DictConfig, cache_dir: Path, classes: list[str]) -> Teacher | None:
    """The very teacher of a run, by the sha256 that its summary names; None where its file is gone."""
    wanted = (read_json(run_dir / "summary.json").get("distillation") or {}).get("teacher_sha256")
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
    cost: str = "1:1",
    positive: str | None = None,
    attributes: Path | None = None,
) -> Path:
    """Evaluate a finished run and print its table; returns the new folder below `run_dir/evaluations`.

    Args:
        overrides: options as of train.py: `data=...` and `data.*` name other pictures, without them the run's own
            splits are evaluated again; `evaluate.*`, `cache_dir` and `ledger` as in conf/train.yaml.
        exclude_duplicates: leave out other pictures that are near-duplicates of training pictures.
        names: label of the other pictures -> class of the run.
        name: of the new folder; None: the source and the time.
        cost: of a false negative and of a false positive, such as 10:1, for the threshold.
        positive: the class that is missed or falsely called; None: the last one.
        attributes: CSV with path and further columns, whose worst values are looked for beside those of the pictures'
            own table, of attributes.csv in their folder, and of size and brightness.

    Raises:
        UserError: whatever the user can mend, before anything is written.
    """
    if RunFolder(run_dir).status().get("state") != "finished":
        raise UserError(f"{run_dir} holds no finished run: finish it with resume=true, or name another folder")
    run, classifier, classes = load_run(run_dir)
    costs = evaluation.parse_cost(cost, positive, classes)
    further = None if attributes is None else read_attributes(attributes)
    cfg, own = compose_evaluation(run, overrides)
    if own and (exclude_duplicates or names):
        raise UserError("--exclude-duplicates and --classes are for other pictures: name them with data=...")
    target = run_dir / "evaluations" / (name or f"{_source(cfg, own)}_{datetime.now():%Y-%m-%d_%H-%M-%S}")
    if target.exists():
        raise UserError(f"{target} exists already and is not overwritten: choose another --name")
    if name and Path(name).name != name:
        raise UserError(f"--name {name} is no plain name of a folder: choose another")
    teacher = find_teacher(run_dir, run, Path(cfg.cache_dir), classes)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def predict(data: ImageData, splits: Sequence[str]) -> pd.DataFrame:
        return predict_splits(classifier, teacher, data, splits, cfg.evaluate.batch_size, device)[0]

    command = collect()[0]["command"]
    if own:
        frame, facts, data = _own(run_dir, run, cfg, predict, command)
    else:
        frame, facts, data = _other(run_dir, run, cfg, classes, names or {}, exclude_duplicates, predict, command)
    stored = predictions.read_predictions(run_dir / "predictions.parquet")[0]
    if teacher is None and "teacher" in predictions.heads(stored):
        facts["notes"].append("the run's teacher is no longer in the cache, so its row is missing")
    numbers = run_metrics.evaluate(frame, classes, resamples=cfg.evaluate.resamples)
    summary, before = (read_json(run_dir / f"{part}.json") for part in ("summary", "metrics"))
    if not own:
        facts["against"] = next(split for split in ("test", "val", *before) if split in before)
        source = before[facts["against"]]
        facts["drop"] = {
            head: {
                metric: run_metrics.difference(source[head][metric], entry[metric]) for metric in run_metrics.SCALARS
            }
            for head, entry in numbers[OTHER].items()
            if head in source
        }
    chosen, split = summary["reported_head"], next(s for s in (OTHER, "test", *numbers) if s in numbers)
    temperatures = calibration.temperatures(stored, classes)
    facts = {"command": command, "split": split, **facts}
    facts["calibration"], curves = evaluation.calibration_facts(frame, classes, temperatures, cfg.evaluate.resamples)
    part = frame[frame["split"] == split]
    if temperatures:
        val = stored[stored["split"] == "val"]
        facts["cost"] = evaluation.cost_facts(val, part, classes, chosen, temperatures[chosen], costs)
    else:
        facts["notes"].append("the run keeps no validation predictions: no temperature, no threshold")
    correct = predictions.logits(part, chosen, classes).argmax(axis=1) == calibration.class_indices(part, classes)
    of_pictures = picture_attributes(data, part["id"].tolist(), further)
    worst = calibration.worst_groups(correct, part["group"].to_numpy(), of_pictures)
    told = {**summary, "test_opened": facts.get("test_opened"), "notes": facts["notes"]}
    title = f"{summary['name']} on {_source(cfg, own)}"
    page, shown = evaluation.build_page(title, frame, classes, numbers, told, facts, curves, worst, data.picture)
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".evaluation.") as made:
        folder = Path(made) / target.name
        folder.mkdir()
        write_text(folder / "config.yaml", OmegaConf.to_yaml(run.data if own else cfg.data, resolve=True))
        predictions.write_predictions(folder / "predictions.parquet", frame, classes)
        write_json(folder / "metrics.json", numbers)
        write_json(folder / "evaluation.json", facts)
        worst.to_csv(folder / "groups.csv", index=False)
        curves.to_csv(folder / "risk_coverage.csv", index=False)
        page.write(folder / "evaluation.html")
        target.parent.mkdir(exist_ok=True)
        folder.replace(target)
    show(shown, Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 120), rows=8)
    console.print(terminal_table(numbers if own else {f"own {facts['against']}": source, **numbers}, told))
    for note in facts["notes"]:
        console.print(f"note      {note}")
    console.print(f"written   {target} (evaluation.html, predictions.parquet, and the figures as JSON and CSV)")
    return target


Predict = Callable[[ImageData, Sequence[str]], pd.DataFrame]


def _own(
    run_dir: Path, run: DictConfig, cfg: DictConfig, predict: Predict, command: str
) -> tuple[pd.DataFrame, dict[str, Any], ImageData]:
    """The run's own splits from its checkpoint, and how far that differs from what it stored."""
    splits = list(cfg.evaluate.splits)
    data = own_pictures(run_dir, run, cfg, splits)
    facts: dict[str, Any] = {"splits": splits, "notes": []}
    if "test" in splits:
        facts["test_opened"] = record_opening(Path(cfg.ledger), data.test_fingerprint, run_dir, command)
    frame = predict(data, splits)
    stored, classes = predictions.read_predictions(run_dir / "predictions.parquet")
    facts["against_stored"] = compare_predictions(frame, stored, classes)
    for split, found in facts["against_stored"].items():
        console.print(f"{split:<9} {found['sentence']}")
        if found.get("largest_difference") != 0:
            facts["notes"].append(f"{split}: {found['sentence']}")
    floor = baselines(data.table, splits, Path(cfg.cache_dir))
    return frame.merge(floor, on=predictions.COLUMNS, how="left"), facts, data


def _other(
    run_dir: Path,
    run: DictConfig,
    cfg: DictConfig,
    classes: list[str],
    names: Mapping[str, str],
    exclude_duplicates: bool,
    predict: Predict,
    command: str,
) -> tuple[pd.DataFrame, dict[str, Any], ImageData]:
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
        source = run_data(run_dir, run, cfg)
        split = pd.read_csv(run_dir / "split.csv", dtype=str, keep_default_na=False)
        split = split.loc[split["split"] == "train", ["path", "split"]]
        train = source.load_table().drop(columns="split", errors="ignore").merge(split, on="path")
        paths, known = data.table["path"].to_numpy(), train["path"].to_numpy()
        pairs = duplicates.find_pairs(data.thumbnails(paths.tolist()), source.thumbnails(known.tolist()))
    except UserError as error:
        if exclude_duplicates:
            raise UserError(f"--exclude-duplicates needs the run's training pictures: {error}") from error
        facts["notes"].append(f"near-duplicates of training pictures are unknown, and there is no baseline: {error}")
        return opened(), facts, data
    seen = set(paths[pairs[:, 0]])
    facts["near_duplicates"] = {
        "pictures": len(seen),
        "of": len(data.table),
        "excluded": exclude_duplicates,
        "pairs": [{"path": paths[i], "train_path": known[j]} for i, j in pairs],
    }
    action = "left out" if exclude_duplicates else "kept; --exclude-duplicates leaves them out"
    share = len(seen) / len(data.table)
    facts["notes"].append(f"{len(seen):,} ({share:.1%}) are near-duplicates of the run's training pictures: {action}")
    console.print(f"          {facts['notes'][-1]}")
    if exclude_duplicates and len(seen) == len(data.table):
        raise UserError("--exclude-duplicates leaves no picture: all of these are near-duplicates of training pictures")
    frame = opened()
    floor = baselines(pd.concat([train, data.table], ignore_index=True), [OTHER], Path(cfg.cache_dir))
    frame = frame.merge(floor, on=predictions.COLUMNS, how="left", validate="one_to_one")
    if exclude_duplicates:
        frame = frame[~frame["id"].isin(seen)].reset_index(drop=True)
    return frame, facts, data


# -- the parts --------------------------------------------------------------------------------------------------


def compose_evaluation(run: DictConfig, overrides: Sequence[str]) -> tuple[DictConfig, bool]:
    """The config of an evaluation, and whether it is of the run's own data."""
    given = {override.split("=")[0].lstrip("+~") for override in overrides}
    if foreign := sorted(key for key in given if key not in OPTIONS and key.split(".")[0] != "data"):
        raise UserError(f"{foreign[0]} says nothing about an evaluation: give data=..., data.* or {', '.join(OPTIONS)}")
    own = "data" not in given
    if own and (some := sorted(key for key in given if key.startswith("data."))):
        raise UserError(f"{some[0]} is of other pictures: name their kind as well, such as data=folder data.root=DIR")
    try:
        cfg = composed(*overrides)
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


def run_data(run_dir: Path, run: DictConfig, cfg: DictConfig) -> ImageData:
    """The run's own data with the splits that it kept."""
    data = {**as_plain(run.data), "cache_dir": cfg.cache_dir}
    if "split" in data:
        data |= {"split": str(run_dir / "split.csv"), "fold": None, "fraction": 1.0}
    return build_data(data)


def own_pictures(run_dir: Path, run: DictConfig, cfg: DictConfig, splits: Sequence[str]) -> ImageData:
    """The run's own data, prepared, and known to be what it was trained on.

    Raises:
        UserError: pictures, labels or drawing code that changed since.
    """
    data = run_data(run_dir, run, cfg)
    data.prepare(splits)
    if data.fingerprint != read_json(run_dir / "provenance.json").get("fingerprint"):
        raise UserError(f"the pictures, their labels or the code that draws them changed since {run_dir} was trained")
    return data


def open_split(run_dir: Path, run: DictConfig, split: str, cache_dir: Path) -> ImageData:
    """The run's own pictures, with one split to look at; a look at the test split is written down in the ledger.

    Raises:
        UserError: the test split, where training has not opened it; what `own_pictures` raises.
    """
    if not (run_dir / "split.csv").is_file():
        raise UserError(f"{run_dir} is no folder of a finished run: it has no split.csv")
    if split == "test" and "test" not in run.evaluate.splits:
        raise UserError(f"{run_dir} was trained without opening its test split: leave it closed with --split val")
    data = own_pictures(run_dir, run, OmegaConf.create({"cache_dir": str(cache_dir)}), [split])
    if split == "test":
        record_opening(Path(run.ledger), data.test_fingerprint, run_dir, collect()[0]["command"])
    return data


def compare_predictions(frame: pd.DataFrame, stored: pd.DataFrame, classes: list[str]) -> dict[str, dict[str, Any]]:
    """Per split: pictures compared, largest difference of a logit, decisions that changed, and a sentence of it."""
    result: dict[str, dict[str, Any]] = {}
    heads = [head for head in predictions.heads(frame) if head in predictions.heads(stored)]
    for split, now in frame.groupby("split", sort=False):
        before = stored[stored["split"] == split].set_index("id")
        if set(before.index) != set(now["id"]):
            result[str(split)] = {"sentence": "the run stored no predictions of these pictures"}
            continue
        before = before.loc[now["id"]].reset_index()
        pairs = [(predictions.logits(now, head, classes), predictions.logits(before, head, classes)) for head in heads]
        largest = max(float(np.abs(a - b).max()) for a, b in pairs)
        changed = max(int((a.argmax(axis=1) != b.argmax(axis=1)).sum()) for a, b in pairs)
        how = f"differ from the stored ones by at most {largest:.2g} in a logit, and {changed} decision(s) changed"
        how = how if largest else "equal to the stored ones, bit for bit"
        facts = {"pictures": len(now), "largest_difference": largest, "changed_decisions": changed}
        sentence = f"predictions of {len(now):,} pictures ({', '.join(heads)}) {how}"
        result[str(split)] = {**facts, "sentence": sentence}
    return result


def read_attributes(file: Path) -> pd.DataFrame:
    """A table of attributes by `path`.

    Raises:
        UserError: not readable, or no column path with every picture once.
    """
    try:
        table = pd.read_csv(file, keep_default_na=False, na_values=[""])
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable CSV file ({error})") from error
    if "path" not in table or table["path"].duplicated().any():
        raise UserError(f"{file} needs a column path that names every picture once, beside the attributes")
    return table.set_index("path")


# Columns of a table of pictures that are no attributes of what a picture shows.
_NO_ATTRIBUTES = {*MANIFEST_COLUMNS, "group", "split", "search"} - {"format"}


def picture_attributes(data: ImageData, ids: list[str], further: pd.DataFrame | None = None) -> dict[str, pd.Series]:
    """Attributes of pictures: columns of their manifest, of attributes.csv beside them and of another table, the short
    side in pixels, and the mean brightness (0 to 255) of the pixels."""
    beside = data.root / "attributes.csv" if data.root else None
    tables = [data.table.set_index("path"), further]
    if beside is not None and beside.is_file():
        tables.insert(1, read_attributes(beside))
    found: dict[str, pd.Series] = {}
    for table in tables:
        if table is not None:
            some = table.reindex(ids)
            found |= {str(name): some[name].reset_index(drop=True) for name in some if name not in _NO_ATTRIBUTES}
    rows = pd.Index(data.table["path"]).get_indexer(ids)
    sizes = data.table.iloc[rows][["width", "height"]].min(axis=1)
    found["short side, px"] = sizes.reset_index(drop=True)
    found["brightness"] = pd.Series([float(data.pixels[data.cache_rows[row]].mean()) for row in rows])
    return found


def _source(cfg: DictConfig, own: bool) -> str:
    """What the pictures are called in a folder's name."""
    if own:
        return "own"
    place = cfg.data.get("root") or cfg.data.get("name") or "drawn"
    return re.sub(r"[^\w.-]+", "_", Path(place).stem or "pictures")


def read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file of a run folder; {} where there is none.

    Raises:
        UserError: it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not readable JSON (cut off?)") from error
