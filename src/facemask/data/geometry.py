"""Stage 2 of the search for near-duplicates: rotated, cropped, noisy and edited copies.

Candidates are nearest neighbours by embedding; a pair counts if its SIFT keypoints (Lowe 2004) fit one similarity
transform and the pictures, laid over each other by it, correlate.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np

from facemask.data.duplicates import index

NEIGHBOURS = 10
# A pair counts from so many keypoints that fit on, with at least this correlation: few keypoints can agree by chance,
# many can on different photographs before one background.
RULES = ((12, 0.92), (20, 0.85), (30, 0.75), (50, 0.65))
_SIDE = 256
_KEYPOINTS = 400
_RATIO = 0.8
_CHUNK = 1024


class View(NamedTuple):
    """Grey picture (longer side 256), its keypoints (K, 2) and their descriptors uint8 (K, 128)."""

    grey: np.ndarray
    points: np.ndarray
    descriptors: np.ndarray


def candidates(embeddings: np.ndarray) -> np.ndarray:
    """int64 (P, 2): rows i < j of float32 (N, D), one among the 10 nearest of the other by angle."""
    vectors = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-9)
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    _, near = index(vectors).search(vectors, NEIGHBOURS + 1)
    pairs = np.column_stack([np.repeat(np.arange(len(vectors)), near.shape[1]), near.ravel()])
    pairs = pairs[(pairs[:, 1] >= 0) & (pairs[:, 0] != pairs[:, 1])]
    return np.unique(np.sort(pairs, axis=1), axis=0)


def confirm(
    pairs: np.ndarray, picture: Callable[[int], np.ndarray], progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """The pairs (P, 2) of rows that show the same photograph, plain or mirrored.

    Args:
        pairs: candidates.
        picture: row -> uint8 (H, W, 3).
        progress: told the share done, from 0 to 1.
    """
    rows = np.unique(pairs)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        views: dict[int, tuple[View, View]] = {}
        for start in range(0, len(rows), _CHUNK):
            part = rows[start : start + _CHUNK].tolist()
            views.update(zip(part, pool.map(lambda row: _views(picture(row)), part), strict=True))
            if progress:
                progress(0.4 * (start + len(part)) / len(rows))

        def check(pair: np.ndarray) -> bool:
            (first, _), seconds = views[int(pair[0])], views[int(pair[1])]
            return any(accepted(*agreement(first, second)) for second in seconds)

        kept = [np.empty((0, 2), dtype=np.int64)]
        for start in range(0, len(pairs), _CHUNK):
            chunk = pairs[start : start + _CHUNK]
            kept.append(chunk[np.fromiter(pool.map(check, chunk), dtype=bool, count=len(chunk))])
            if progress:
                progress(0.4 + 0.6 * (start + len(chunk)) / len(pairs))
    return np.concatenate(kept)


def accepted(inliers: int, correlation: float) -> bool:
    """Whether keypoints that fit and the correlation of the pictures are enough."""
    return any(inliers >= count and correlation >= least for count, least in RULES)


def agreement(first: View, second: View) -> tuple[int, float]:
    """Number of keypoints that fit the best similarity transform, and the correlation where the pictures overlap."""
    least = RULES[0][0]
    if min(len(first.points), len(second.points)) < least:
        return 0, 0.0
    # Squared distances from a product of matrices: several times as fast as a matcher's loops.
    a, b = first.descriptors.astype(np.float32), second.descriptors.astype(np.float32)
    distance = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    two = np.argpartition(distance, 1, axis=1)[:, :2]
    near = np.take_along_axis(distance, two, axis=1)
    good = np.flatnonzero(near.min(axis=1) < _RATIO**2 * near.max(axis=1))
    if len(good) < least:
        return 0, 0.0
    target = second.points[two[good, near[good].argmin(axis=1)]]
    warp, fits = cv2.estimateAffinePartial2D(first.points[good], target, ransacReprojThreshold=4.0, maxIters=500)
    if warp is None or not 0.3 < np.hypot(warp[0, 0], warp[1, 0]) < 3.3:
        return 0, 0.0
    # Several keypoints may fit one and the same place: it counts once.
    inliers = len(np.unique(target[fits.ravel() > 0].round(), axis=0))
    return (inliers, _overlap(first.grey, second.grey, warp)) if inliers >= least else (inliers, 0.0)


def _overlap(first: np.ndarray, second: np.ndarray, warp: np.ndarray) -> float:
    size = second.shape[::-1]
    inside = cv2.warpAffine(np.ones_like(first), warp, size, flags=cv2.INTER_NEAREST) > 0
    if inside.mean() < 0.2:
        return 0.0
    a = cv2.GaussianBlur(cv2.warpAffine(first, warp, size), (0, 0), 2)[inside].astype(np.float32)
    b = cv2.GaussianBlur(second, (0, 0), 2)[inside].astype(np.float32)
    spread = a.std() * b.std()
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 1 else 0.0


def _views(rgb: np.ndarray) -> tuple[View, View]:
    """A picture plain and mirrored."""
    height, width = rgb.shape[:2]
    scale = _SIDE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    flags = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    grey = cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), size, interpolation=flags)
    return _view(grey), _view(np.ascontiguousarray(grey[:, ::-1]))


def _view(grey: np.ndarray) -> View:
    points, descriptors = cv2.SIFT.create(nfeatures=_KEYPOINTS).detectAndCompute(grey, None)
    if descriptors is None:
        return View(grey, np.empty((0, 2), dtype=np.float32), np.empty((0, 128), dtype=np.uint8))
    return View(grey, np.array([point.pt for point in points], dtype=np.float32), descriptors.astype(np.uint8))
