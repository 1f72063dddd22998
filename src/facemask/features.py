"""The encoder for a task of one's own: embeddings of any pictures, and how far simple classifiers get with them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from facemask.data.manifest import load_manifest
from facemask.data.splits import assign_folds
from facemask.errors import UserError
from facemask.files import write_bytes
from facemask.predict import BATCH, Model, pictures_below
from facemask.runs.calibration import accuracy_interval

KEY = b"facemask"
FOLDS = 5
NEIGHBOURS = 5


@torch.inference_mode()
def embed(model: Model, views: np.ndarray) -> dict[str, np.ndarray]:
    """Embeddings (B, D), float32, of uint8 views (B, S, S, 3), after the network's last norm.

    Returns: `cls`, what the class head reads ([CLS], or the pooled features of a network without); `dist`, the
    distillation token, and `patch_mean`, the mean of the patch tokens, where there are any.
    """
    pixels = torch.from_numpy(views).permute(0, 3, 1, 2).contiguous().to(model.device)
    outputs = model.classifier.backbone(pixels)
    found: dict[str, Tensor] = {"cls": outputs.pooled}
    if model.classifier.backbone.has_token:
        found["dist"] = outputs.taught
    if outputs.patch_tokens is not None:
        found["patch_mean"] = outputs.patch_tokens.mean(dim=1)
    return {name: values.float().cpu().numpy() for name, values in found.items()}


def features(
    model: Model, root: Path, out: Path, cache_dir: Path, batch_size: int = BATCH
) -> tuple[pd.DataFrame, dict[str, str], pd.DataFrame | None]:
    """Embed every picture of a folder and write them to a Parquet file: path, label and group (where sub-folders name
    at least two classes), and a list of float32 for each embedding.

    Returns: the table without the embeddings, {path: problem} of files left out, and `scores`, None without labels.

    Raises:
        UserError: no pictures, an output that exists or cannot be written.
    """
    if out.exists():
        raise UserError(f"--out {out} exists already and is not overwritten: choose another name")
    if not out.absolute().parent.is_dir() or out.suffix != ".parquet":
        raise UserError(f"--out {out} cannot be written: name a .parquet file in a folder that exists")
    table = _table(root, cache_dir, model.max_pixels)
    parts: list[dict[str, np.ndarray]] = []
    problems: dict[str, str] = {}
    batches = model.views((root / path for path in table["path"]), batch_size)
    count, terminal = -(-len(table) // batch_size), Console(stderr=True)
    for batch, found, views in track(batches, "embedding", total=count, console=terminal, transient=True):
        paths = [file.relative_to(root).as_posix() for file in batch]
        problems |= {path: problem for path, problem in zip(paths, found, strict=True) if problem}
        if len(views):
            parts.append(embed(model, views))
    table = table[~table["path"].isin(list(problems))].reset_index(drop=True)
    if table.empty:
        raise UserError(f"none of the {len(problems)} pictures in {root} can be decoded")
    vectors = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    _write(out, table, vectors, model)
    return table, problems, scores(table, vectors, model) if "label" in table else None


def _table(root: Path, cache_dir: Path, max_pixels: int) -> pd.DataFrame:
    paths = [Path(path).relative_to(root).as_posix() for path in pictures_below(str(root))]
    if not paths:
        raise UserError(f"{root} is no folder with pictures")
    if len({path.split("/")[0] for path in paths if "/" in path}) < 2:
        return pd.DataFrame({"path": paths})
    return load_manifest(root, cache_dir=cache_dir, max_pixels=max_pixels)[["path", "label", "group", "sha256"]]


def _write(out: Path, table: pd.DataFrame, vectors: dict[str, np.ndarray], model: Model) -> None:
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    for name, values in vectors.items():
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        arrow = arrow.append_column(name, column)
    view = {"img_size": model.img_size, "crop_pct": model.crop_pct, "mean": model.mean, "std": model.std}
    note = json.dumps({"weights_sha256": model.weights_sha256, "view": view}).encode()
    buffer = io.BytesIO()
    pq.write_table(arrow.replace_schema_metadata({**(arrow.schema.metadata or {}), KEY: note}), buffer)
    write_bytes(out, buffer.getvalue())


def scores(table: pd.DataFrame, vectors: dict[str, np.ndarray], model: Model) -> pd.DataFrame | None:
    """Accuracy of a linear probe and of the nearest neighbours on each embedding, cross-validated.

    Every picture is decided by a classifier that saw none of its group (near-duplicates): 5 folds of whole groups. The
    probe is a logistic regression (C = 1) on standardised embeddings; neighbours are the 5 nearest by cosine. Neither
    was tuned. Pictures that the encoder was trained on are left out of the accuracy, where others remain.

    Returns: embedding, method, and what `accuracy_interval` says; None with one class, or one of a single group.
    """
    from sklearn.dummy import DummyClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    of_classes = table.groupby("label")["group"].nunique()
    if len(of_classes) < 2 or of_classes.min() < 2:
        return None
    folds = assign_folds(table, min(FOLDS, int(of_classes.min())), seed=0).to_numpy()
    labels, groups = table["label"].to_numpy(dtype=object), table["group"].to_numpy()
    tested = ~seen(table, model)
    tested = tested if tested.any() else ~tested
    nearest = min(NEIGHBOURS, len(labels) - int(np.bincount(folds).max()))
    classifiers: dict[str, Any] = {
        "linear probe": make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        f"{NEIGHBOURS} nearest neighbours": KNeighborsClassifier(nearest, metric="cosine"),
    }
    asked = [(name, method) for name in vectors for method in classifiers]
    rows: list[dict[str, Any]] = []
    for name, method in [("–", "majority class"), *asked]:
        classifier, values = classifiers.get(method, DummyClassifier()), vectors.get(name, np.zeros((len(labels), 1)))
        decided = cross_val_predict(classifier, values, labels, cv=PredefinedSplit(folds))
        found = accuracy_interval((decided == labels)[tested], groups[tested])
        rows.append({"embedding": name, "method": method, **found})
    return pd.DataFrame(rows)


def seen(table: pd.DataFrame, model: Model) -> np.ndarray:
    """Whether the encoder was trained on a picture (N,), by the sha256 of its file; needs the run's split.csv."""
    split = model.source / "split.csv"
    if not split.is_file() or "sha256" not in table:
        return np.zeros(len(table), dtype=bool)
    rows = pd.read_csv(split, dtype=str, keep_default_na=False)
    return table["sha256"].isin(rows.loc[rows["split"] == "train", "sha256"]).to_numpy()
