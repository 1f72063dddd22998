"""What a model must beat: the majority class, and forests that see anything but the mask.

Everything here ends as predictions (id, split, group, label, logit/<head>/<class>), so that its numbers and intervals
are computed as a model's are.
"""

import math
from collections.abc import Collection

import numpy as np
import pandas as pd

SMALL = 32


def majority_baseline(table: pd.DataFrame, splits: Collection[str]) -> pd.DataFrame:
    """Predictions with the head `majority`: for every row the log of each class's share of the train split.

    Returns id, split, group, label and float32 `logit/majority/<class>` (classes sorted, those of train)
    for the rows of `splits`, in the table's order. Rows of other splits, but train, are not read.
    """
    share = table["label"][table["split"] == "train"].value_counts(normalize=True).sort_index()
    rows = table[table["split"].isin(list(splits))]
    return _predictions(rows, "majority", list(share.index), np.tile(np.log(share.to_numpy()), (len(rows), 1)))


def forest_baseline(
    table: pd.DataFrame, features: np.ndarray, splits: Collection[str], head: str, trees: int = 300, leaf: float = 1
) -> pd.DataFrame:
    """Predictions of a random forest fit on the train rows of `features` (N, D), one row for each of the table's.

    Columns and rows as in `majority_baseline`. Logits are the logs of the forest's probabilities, which are first
    raised to at least half a tree's vote (so a softmax gives them back up to that floor): a share of 0 would be -inf.
    Independent of row order.

    Args:
        leaf: fewest pictures of a leaf, or their share of train where below 1.
    """
    from sklearn.ensemble import RandomForestClassifier

    train = np.flatnonzero(table["split"] == "train")
    train = train[np.argsort(table["path"].to_numpy(dtype=object)[train])]
    forest = RandomForestClassifier(n_estimators=trees, min_samples_leaf=leaf, random_state=0, n_jobs=-1)
    forest.fit(features[train], table["label"].to_numpy(dtype=object)[train])
    forest.n_jobs = 1  # threads would add the trees' votes in an order of their own
    asked = table["split"].isin(list(splits)).to_numpy()
    classes = [str(name) for name in forest.classes_]
    probability = forest.predict_proba(features[asked]) if asked.any() else np.empty((0, len(classes)))
    return _predictions(table[asked], head, classes, np.log(np.maximum(probability, 0.5 / trees)))


def file_facts(table: pd.DataFrame) -> np.ndarray:
    """Width, height, bytes and format (N, D) of every picture; a format that train lacks is none of the known ones."""
    sizes = table[["width", "height", "bytes"]].to_numpy(dtype=float)
    formats = sorted(table["format"][table["split"] == "train"].unique())
    return np.column_stack([sizes, *(table["format"] == name for name in formats)])


def small(view: np.ndarray) -> np.ndarray:
    """A view, uint8 (S, S, 3), at 32 x 32 pixels, area-averaged."""
    import cv2

    return np.asarray(cv2.resize(view, (SMALL, SMALL), interpolation=cv2.INTER_AREA))


def border(small_view: np.ndarray) -> np.ndarray:
    """The outermost pixels of a small view, flat (372,)."""
    inside = np.zeros(small_view.shape[:2], dtype=bool)
    inside[1:-1, 1:-1] = True
    return small_view[~inside].ravel()


def blur(view: np.ndarray) -> np.ndarray:
    """Log of the variance of the Laplacian of a view's grey values, (1,): low where it is blurred."""
    import cv2

    grey = cv2.cvtColor(view, cv2.COLOR_RGB2GRAY)
    return np.log1p([cv2.Laplacian(grey, cv2.CV_64F).var()])


def padding(view: np.ndarray, tolerance: int = 16) -> np.ndarray:
    """How much of each side of a view is constant, (4,): top, bottom, left, right, 0 to 1.

    A row or column counts where its grey values differ by `tolerance` at most.
    """
    import cv2

    grey = cv2.cvtColor(view, cv2.COLOR_RGB2GRAY)
    shares = []
    for flat in (np.ptp(grey, axis=1) <= tolerance, np.ptp(grey, axis=0) <= tolerance):
        for side in (flat, flat[::-1]):
            shares.append((len(side) if side.all() else int(np.argmin(side))) / len(side))
    return np.array(shares)


def cover_lower_half(small_view: np.ndarray) -> np.ndarray:
    """A small view with grey where, in a framed face, mouth and nose are."""
    covered = small_view.copy()
    covered[len(covered) // 2 :] = 128
    return covered


def cover_box(pixels: np.ndarray, box: tuple[int, int, int, int], width: int, height: int) -> np.ndarray:
    """A picture, uint8 (H, W, 3), with grey in a box (left, top, right, bottom) of its original of width x height."""
    across, down = pixels.shape[1] / width, pixels.shape[0] / height
    left, top, right, bottom = box
    covered = pixels.copy()
    covered[int(top * down) : math.ceil(bottom * down), int(left * across) : math.ceil(right * across)] = 128
    return covered


def _predictions(rows: pd.DataFrame, head: str, classes: list[str], logits: np.ndarray) -> pd.DataFrame:
    facts = rows[["path", "split", "group", "label"]].rename(columns={"path": "id"}).reset_index(drop=True)
    columns = [f"logit/{head}/{name}" for name in classes]
    return pd.concat([facts, pd.DataFrame(logits.astype(np.float32), columns=columns)], axis=1)
