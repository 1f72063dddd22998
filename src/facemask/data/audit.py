"""What a model must beat: the majority class, and a forest that sees file facts but no pixels."""

from collections.abc import Collection

import numpy as np
import pandas as pd

TREES = 300
# A share of 0 would be a log-probability of -inf; half a tree's vote is below anything the forest can tell.
FLOOR = 0.5 / TREES


def majority_baseline(table: pd.DataFrame, splits: Collection[str]) -> pd.DataFrame:
    """Predictions with the head `majority`: for every row the log of each class's share of the train split.

    Returns id, split, group, label and float32 `logit/majority/<class>` (classes sorted, those of train)
    for the rows of `splits`, in the table's order. Rows of other splits, but train, are not read.
    """
    train = table[table["split"] == "train"]
    share = train["label"].value_counts(normalize=True).sort_index()
    rows = table[table["split"].isin(list(splits))]
    return _predictions(rows, "majority", list(share.index), np.tile(np.log(share.to_numpy()), (len(rows), 1)))


def no_pixels_baseline(table: pd.DataFrame, splits: Collection[str], seed: int) -> pd.DataFrame:
    """Predictions with the head `no_pixels`: a random forest on width, height, bytes, format, fit on train.

    Columns and rows as in `majority_baseline`. Logits are the logs of the forest's probabilities, which are
    first raised to at least `FLOOR` (so a softmax gives them back up to that floor). Says how far the label
    can be told from where a picture comes from; a format that train lacks is none of the known ones.
    Independent of row order.
    """
    from sklearn.ensemble import RandomForestClassifier

    train = table[table["split"] == "train"].sort_values("path")
    formats = sorted(train["format"].unique())
    forest = RandomForestClassifier(n_estimators=TREES, random_state=seed, n_jobs=1)
    forest.fit(_facts(train, formats), train["label"].to_numpy(dtype=object))
    rows = table[table["split"].isin(list(splits))]
    classes = [str(name) for name in forest.classes_]
    probability = forest.predict_proba(_facts(rows, formats)) if len(rows) else np.empty((0, len(classes)))
    return _predictions(rows, "no_pixels", classes, np.log(np.maximum(probability, FLOOR)))


def _facts(rows: pd.DataFrame, formats: list[str]) -> np.ndarray:
    sizes = rows[["width", "height", "bytes"]].to_numpy(dtype=float)
    return np.column_stack([sizes, *(rows["format"] == name for name in formats)])


def _predictions(rows: pd.DataFrame, head: str, classes: list[str], logits: np.ndarray) -> pd.DataFrame:
    facts = rows[["path", "split", "group", "label"]].rename(columns={"path": "id"}).reset_index(drop=True)
    columns = [f"logit/{head}/{name}" for name in classes]
    return pd.concat([facts, pd.DataFrame(logits.astype(np.float32), columns=columns)], axis=1)
