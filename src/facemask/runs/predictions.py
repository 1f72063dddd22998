"""The predictions table: one row per picture, the logits of every head; all reported numbers come from it.

Columns: ``id`` (path relative to the data root), ``split``, ``group``, ``label`` (class name), and for every
head ``logit/<head>/<class>`` in float32. The order of the classes is kept in the Parquet schema's metadata.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from facemask.errors import UserError
from facemask.files import write_bytes

KEY = b"facemask"
COLUMNS = ["id", "split", "group", "label"]
HEAD_ORDER = ["head", "head_dist", "mean", "teacher"]


def _columns(head: str, classes: Sequence[str]) -> list[str]:
    return [f"logit/{head}/{name}" for name in classes]


def assemble(
    ids: Sequence[str],
    splits: Sequence[str],
    groups: Sequence[str],
    labels: Sequence[str],
    heads: Mapping[str, np.ndarray],
    classes: Sequence[str],
) -> pd.DataFrame:
    """Join what was predicted into one table; ``heads`` maps a head's name to its logits, shape (N, C).

    Logits are rounded to float32 here, so that numbers are the same before and after the table was stored.

    Raises:
        ValueError: shapes or names that do not fit each other.
        UserError: a picture that occurs twice, a label that is no class, logits that are not finite.
    """
    frame = pd.DataFrame({"id": list(ids), "split": list(splits), "group": list(groups), "label": list(labels)})
    twice = frame["id"][frame["id"].duplicated()]
    if len(twice):
        raise UserError(f"{twice.iloc[0]} was predicted more than once; give every picture one row.")
    foreign = frame["label"][~frame["label"].isin(list(classes))]
    if len(foreign):
        raise UserError(
            f"the label {foreign.iloc[0]!r} is not one of the classes {', '.join(classes)}; "
            "use data with the classes the model was trained on."
        )
    logit_columns: dict[str, np.ndarray] = {}
    for head, values in heads.items():
        array = np.asarray(values)
        if "/" in head or array.shape != (len(frame), len(classes)):
            raise ValueError(f"head {head!r}: shape {array.shape}, expected {(len(frame), len(classes))}")
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        bad = ~np.isfinite(array).all(axis=1)
        if bad.any():
            raise UserError(
                f"the logits of head {head!r} are not finite for {bad.sum()} of {len(frame)} pictures "
                f"(first: {frame['id'][int(bad.argmax())]}); training diverged, try a lower optim.lr."
            )
        logit_columns.update(zip(_columns(head, classes), array.T, strict=True))
    return pd.concat([frame, pd.DataFrame(logit_columns, index=frame.index)], axis=1)


def heads(frame: pd.DataFrame) -> list[str]:
    """The table's heads: head, head_dist, mean, teacher, then any others in the order of the columns."""
    found = list(dict.fromkeys(c.split("/", 2)[1] for c in frame.columns if c.startswith("logit/")))
    return [h for h in HEAD_ORDER if h in found] + [h for h in found if h not in HEAD_ORDER]


def logits(frame: pd.DataFrame, head: str, classes: Sequence[str]) -> np.ndarray:
    """Logits of one head, shape (N, C), float64. Raises UserError where the table has no such head."""
    columns = _columns(head, classes)
    if not set(columns) <= set(frame.columns):
        raise UserError(
            f"the predictions have no head {head!r} for the classes {', '.join(classes)}; "
            f"choose one of {', '.join(heads(frame))}."
        )
    return frame[columns].to_numpy(dtype=np.float64)


def add_mean_head(frame: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Add the head ``mean``, the average of both heads' logits; without ``head_dist`` nothing is added.

    This is what timm's ``VisionTransformerDistilled.forward_head`` returns outside distilled training
    (``(x + x_dist) / 2``, timm/models/deit.py), so it is what a user of the exported model gets. (The DeiT
    paper adds the two softmax outputs instead: "Classification with our approach: joint classifiers".)
    """
    if "head_dist" not in heads(frame):
        return frame
    mean = (logits(frame, "head", classes) + logits(frame, "head_dist", classes)) / 2
    return frame.assign(**dict(zip(_columns("mean", classes), mean.astype(np.float32).T, strict=True)))


def write_predictions(path: Path, frame: pd.DataFrame, classes: Sequence[str]) -> None:
    """Write the table as Parquet with its class order, whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pandas(frame, preserve_index=False)
    note = json.dumps({"classes": list(classes)}).encode()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), KEY: note})
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        compression_level=19,
        use_dictionary=["split", "label"],
        use_byte_stream_split=[name for name in frame.columns if name.startswith("logit/")],
    )
    write_bytes(path, buffer.getvalue())


def read_predictions(path: Path) -> tuple[pd.DataFrame, list[str]]:
    """Read a table that :func:`write_predictions` wrote; returns it and its classes in the logits' order.

    Raises:
        UserError: the file is missing, broken, or was written by something else.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise UserError(f"{path} does not exist; finish the run, or evaluate its checkpoint, to get predictions.")
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file (cut off?); evaluate the run again.") from error
    try:
        classes = [str(name) for name in json.loads((table.schema.metadata or {})[KEY])["classes"]]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no predictions of facemask; give the predictions.parquet of a run.") from error
    frame = table.to_pandas()
    expected = [*COLUMNS, *(c for head in heads(frame) for c in _columns(head, classes))]
    missing = [c for c in expected if c not in frame.columns]
    if missing:
        raise UserError(f"{path} lacks the column {missing[0]!r}; evaluate the run again.")
    return frame, classes
