"""What `facemask compare` compares: predictions of runs, of records, or of any table from elsewhere; needs no torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from facemask.errors import UserError
from facemask.files import read_yaml
from facemask.runs import predictions
from facemask.runs.folder import flat

NAMES = {
    "id": ("id", "path", "filename", "file", "image", "image_path"),
    "label": ("label", "target", "y_true"),
    "group": ("group", "dup_group"),
    "split": ("split",),
    "seed": ("seed",),
    "fold": ("fold",),
}
SCORES = r"(?i)(logit|prob|output|score)(?:s|ability|abilities)?(?:[/_](.+))?"
TINY = 1e-15
EXPERIMENTS, PREDICTIONS = Path("experiments"), "predictions.parquet"


@dataclass
class Arm:
    """One thing to compare. ``runs``: {"seed 0" or "": table with index id, columns label, group and one per class}.

    Columns of classes hold logits (or log-probabilities, which every metric takes for the same). ``label`` and
    ``group`` are None where a table from elsewhere has none.
    """

    name: str
    classes: list[str]
    runs: dict[str, pd.DataFrame]
    understood: str


def load(path: Path, head: str | None, split: str | None) -> Arm:
    """An arm from a run folder, a folder of run folders, a record or its name, or a CSV or Parquet file.

    Raises:
        UserError: nothing of that kind is there, or it cannot be understood.
    """
    if not path.exists() and (EXPERIMENTS / path / "record.json").is_file():
        path = EXPERIMENTS / path
    if (path / "record.json").is_file():
        from facemask.runs.record import read_record

        record = read_record(path)
        about = record.info["runs"]
        tables = {_key(about[n].get("seed"), about[n].get("fold")): record.predictions(n) for n in record.runs}
        return _ours(path, tables, head or record.info.get("reported_head"), split)
    if path.is_file():
        frame = _read(path)
        heads = predictions.heads(frame)
        if not heads:
            return _foreign(path, frame, split)
        classes = [c.split("/", 2)[2] for c in frame.columns if c.startswith(f"logit/{heads[0]}/")]
        return _ours(path, {"": (frame, classes)}, head, split)
    folders = [path] if (path / PREDICTIONS).is_file() else [f.parent for f in sorted(path.glob(f"*/{PREDICTIONS}"))]
    if not folders:
        wrong = f"holds no {PREDICTIONS}" if path.is_dir() else "does not exist"
        raise UserError(f"{path} {wrong}: name a finished run, a record, or a CSV or Parquet file")
    tables = {}
    for folder in folders:
        key, reported = _about(folder)
        if key in tables:
            raise UserError(f"{path} holds two runs of {key}: give each its own folder, or name the runs one by one")
        tables[key] = predictions.read_predictions(folder / PREDICTIONS)
        head = head or reported
    return _ours(path, tables, head, split)


def _key(seed: object, fold: object) -> str:
    return " ".join(f"{name} {value}" for name, value in (("seed", seed), ("fold", fold)) if value is not None)


def _about(folder: Path) -> tuple[str, str | None]:
    """Seed and fold, and the reported head, of a run folder."""
    if not (folder / "config.yaml").exists() or not (folder / "summary.json").exists():
        return "", None
    try:
        config = flat(read_yaml(folder / "config.yaml"))
        reported = json.loads((folder / "summary.json").read_text(encoding="utf-8")).get("reported_head")
    except (AttributeError, ValueError) as error:
        raise UserError(f"{folder / 'summary.json'} cannot be read; evaluate the run again") from error
    return _key(config.get("seed"), config.get("data.fold")), reported


def _ours(path: Path, tables: Mapping[str, tuple[pd.DataFrame, list[str]]], head: str | None, split: str | None) -> Arm:
    runs, understood = {}, []
    for key, (frame, classes) in tables.items():
        found = predictions.heads(frame)
        chosen = head or next(h for h in ("mean", *found) if h in found)
        part, name = _split(frame, split, path)
        runs[key] = _table(path, part, predictions.logits(part, chosen, classes), classes)
        understood.append(f"{key + ': ' if key else ''}{len(part):,} pictures of {name}, head {chosen}")
    return Arm(path.name, classes, runs, "; ".join(understood))


def _split(frame: pd.DataFrame, split: str | None, path: Path) -> tuple[pd.DataFrame, str]:
    if "split" not in frame:
        return frame, "the table"
    found = list(map(str, frame["split"].unique()))
    wanted = split or ("test" if "test" in found else found[-1])
    if wanted not in found:
        raise UserError(f"{path} has no split {wanted!r}: choose --split from {', '.join(found)}")
    return frame[frame["split"].astype(str) == wanted], wanted


def _table(path: Path, facts: pd.DataFrame, logits: np.ndarray, classes: list[str]) -> pd.DataFrame:
    for name in ("id", "label"):
        if name in facts and facts[name].isna().any():
            row = facts.reset_index(drop=True)[facts[name].isna().to_numpy()]
            raise UserError(f"{path}: row {row.index[0] + 1} (id {row['id'].iloc[0]}) has no {name}")
    if "id" not in facts:
        raise UserError(f"{path} has no column that names the picture: call it id")
    names = [str(i).replace("\\", "/").removeprefix("./") for i in facts["id"]]
    table = pd.DataFrame(logits, index=pd.Index(names, name="id"), columns=classes)
    if table.index.has_duplicates:
        raise UserError(f"{path}: {table.index[table.index.duplicated()][0]} occurs twice: keep one row per picture")
    bad = ~np.isfinite(logits).all(axis=1)
    if bad.any():
        raise UserError(f"{path}: {bad.sum()} rows have no finite scores (first: {names[int(bad.argmax())]})")
    table.insert(0, "label", _text(facts["label"]).to_numpy() if "label" in facts else None)
    table.insert(1, "group", facts["group"].astype(str).to_numpy() if "group" in facts else None)
    return table


def _text(column: pd.Series) -> pd.Series:
    """Class names or indices as text; 1.0 and True are 1."""
    whole = pd.api.types.is_float_dtype(column) and (column % 1 == 0).all()
    return (column.astype(int) if whole or pd.api.types.is_bool_dtype(column) else column).astype(str)


def _read(path: Path) -> pd.DataFrame:
    try:
        if path.suffix in (".parquet", ".pq"):
            frame = pd.read_parquet(path)
        else:  # any separator; 007 stays 007
            frame = pd.read_csv(path, sep=None, engine="python", dtype=dict.fromkeys(NAMES["id"], str))
    except Exception as error:  # pandas and pyarrow raise many kinds for a file that is none of theirs
        raise UserError(f"{path} is not a readable CSV or Parquet file (cut off?)") from error
    if not len(frame):
        raise UserError(f"{path} has no rows")
    return frame.reset_index(drop=frame.index.name is None).rename(columns=str)


def _foreign(path: Path, frame: pd.DataFrame, split: str | None) -> Arm:
    lower = {c.lower(): c for c in frame.columns}
    found = {role: lower[name] for role, names in NAMES.items() for name in reversed(names) if name in lower}
    facts, _ = _split(frame[list(found.values())].set_axis(list(found), axis=1), split, path)
    logits, classes, how = _scores(path, frame.drop(columns=list(found.values())).loc[facts.index], facts.get("label"))
    keys = facts.reindex(columns=["seed", "fold"]).astype(object)
    names = np.array([_key(*row) for row in keys.where(keys.notna(), None).itertuples(index=False)], dtype=object)
    runs = {key: _table(path, facts[names == key], logits[names == key], classes) for key in dict.fromkeys(names)}
    roles = ", ".join(f"{role} = {column}" for role, column in found.items())
    return Arm(path.name, classes, runs, f"{len(facts):,} rows; {roles}; {how} for {', '.join(classes)}")


def _scores(path: Path, frame: pd.DataFrame, label: pd.Series | None) -> tuple[np.ndarray, list[str], str]:
    """Logits, shape (N, C), the classes, and which columns they were taken from."""
    labels = sorted(_text(label.dropna()).unique()) if label is not None else []
    numeric = [c for c in frame.columns if pd.api.types.is_numeric_dtype(frame[c])]
    found: dict[str, dict[str, str]] = {}  # logit, prob, ... -> class -> column
    for column in frame.columns:
        match = re.fullmatch(SCORES, column)
        if match and (column in numeric or not match[2]):
            found.setdefault(match[1].lower(), {})[(match[2] or "").rpartition("/")[2]] = column
    word = next((w for w in ("logit", "prob", "output", "score") if w in found), "")
    by_class = found.get(word) or {c: c for c in numeric if c in labels or not labels}
    classes, columns = list(by_class), list(by_class.values())
    if not word and len(classes) < 2:
        none = f"{path} has no scores that can be understood (in {', '.join(frame.columns) or 'no column'})"
        raise UserError(f"{none}: give one column per class, logit_<class>, prob_<class> or <class>")
    lists = columns[0] not in numeric
    values = _lists(path, frame[columns[0]]) if lists else frame[columns].to_numpy(dtype=np.float64)
    classes = list(map(str, range(values.shape[1]))) if lists else classes
    known = values[np.isfinite(values).all(axis=1)]
    share = word != "logit" and bool(((known >= 0) & (known <= 1)).all())
    probabilities = share and (known.shape[1] == 1 or bool((np.abs(known.sum(axis=1) - 1) < 1e-2).all()))
    steps = np.diff(np.hstack([known, 1 - known]) if known.shape[1] == 1 and probabilities else known)
    unnamed = all(c.isdigit() or not c for c in classes)
    falling = classes != labels and (steps <= 0).all() and steps.any()
    ranks = {"index_0", "label_0", "index" if len(columns) == 1 else "index_0"} & set(frame.columns)
    if unnamed and (falling or ranks):
        best = (
            f"{path}: {', '.join(columns)} seem to hold the best classes (top-k) in falling order, whichever they are"
        )
        raise UserError(f"{best}: give all, in the order of classes (timm: --topk 0), or name the columns prob_<class>")
    if word == "prob" and not probabilities:
        raise UserError(f"{path}: the probabilities in {', '.join(columns)} are not between 0 and 1 with sum 1")
    if probabilities:
        values = np.log(np.clip(values, TINY, 1))
    if values.shape[1] == 1:  # of the second of two classes
        pair = ["0", "1"] if set(labels) <= {"0", "1"} else labels
        if len(pair) != 2:
            raise UserError(f"{path}: one column of scores is for two classes, the labels are {', '.join(pair)}")
        other = np.log(np.clip(-np.expm1(values), TINY, 1)) if probabilities else np.zeros_like(values)
        classes, values = pair[::-1] if classes[0] == pair[0] else pair, np.hstack([other, values])
    return values, classes, f"{'probabilities' if probabilities else 'logits'} = {', '.join(columns)}"


def _lists(path: Path, column: pd.Series) -> np.ndarray:
    """Numbers from lists, arrays, or their text with or without commas, shape (N, C)."""
    try:
        rows = [re.sub(r"[\[\],]", " ", v).split() if isinstance(v, str) else v for v in column]
        return np.array(rows, dtype=np.float64).reshape(len(rows), -1)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: column {column.name} holds no numbers and no lists of one length") from error
