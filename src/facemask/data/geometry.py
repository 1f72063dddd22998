"""Stage 2 of the search for near-duplicates: rotated, cropped, noisy and edited copies.

Candidates are nearest neighbours by embedding. Two pictures agree by their SIFT keypoints (Lowe 2004) that fit one
similarity transform, if these spread over the picture (captions and logos are the same on many photographs, but small)
and the pictures correlate, laid over each other. One pair is weak evidence: where a candidate agrees at all, all
pictures of its two groups of known copies are compared, and the groups are joined by what these pairs say on average.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import cv2
import numpy as np

from facemask.data.duplicates import components, index

NEIGHBOURS = 10
# Least cosine of two embeddings: all but a hundredth of the pairs lie above it.
MIN_COSINE = 0.6
# Evidence of a pair: its keypoints that fit, times what it correlates above `CHANCE`; none where they spread less.
CHANCE, MIN_SPREAD = 0.25, 0.06
# So much joins two pictures alone. Else two groups are joined by the mean evidence of the pairs between them and of so
# many more without any, so that a single pair must say more than many do. All of these were set on one photographic
# set, whose figures are therefore not held out.
SURE = 25.0
MIN_EVIDENCE, EMPTY_PAIRS = 3.7, 3
# Pairs between two groups that are compared, at most.
MOST = 400
_LEAST = 6
_SIDE = 240
_KEYPOINTS = 500
_RATIO = 0.8
_CHUNK = 1024
_KEPT = 4096  # pictures whose keypoints are in memory: about half a gigabyte
# A mirrored patch has the rows of its 4 x 4 x 8 descriptor, and the sense of the 8 directions, reversed.
_MIRRORED = np.arange(128).reshape(4, 4, 8)[::-1][:, :, -np.arange(8) % 8].ravel()


class View(NamedTuple):
    """Grey picture (of about 240 x 240 pixels), its keypoints (K, 2) and their descriptors uint8 (K, 128)."""

    grey: np.ndarray
    points: np.ndarray
    descriptors: np.ndarray


class Agreement(NamedTuple):
    """Number of keypoints that fit the best similarity transform, correlation of the pictures where they overlap, and
    standard deviation of these keypoints along the narrower way, as a share of the picture's side."""

    inliers: int
    correlation: float
    spread: float

    @property
    def evidence(self) -> float:
        return self.inliers * max(self.correlation - CHANCE, 0.0) * (self.spread >= MIN_SPREAD)


def candidates(embeddings: np.ndarray) -> np.ndarray:
    """int64 (P, 2): rows i < j of float32 (N, D), one among the 10 nearest of the other by angle."""
    vectors = embeddings / np.maximum(np.linalg.norm(embeddings, axis=1, keepdims=True), 1e-9)
    vectors = np.ascontiguousarray(vectors, dtype=np.float32)
    distance, near = index(vectors).search(vectors, NEIGHBOURS + 1)
    close = (near >= 0) & (distance <= 2 - 2 * MIN_COSINE)
    pairs = np.column_stack([np.nonzero(close)[0], near[close]])
    return np.unique(np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1), axis=0)


def group(
    known: np.ndarray,
    pairs: np.ndarray,
    picture: Callable[[int], np.ndarray],
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """int (N,): number of the group of each row; a group shows one photograph or shoot, plain or mirrored.

    Args:
        known: number of the group of copies found already, of each row (N,).
        pairs: candidates i < j (P, 2).
        picture: row -> uint8 (H, W, 3).
        progress: told the share done, from 0 to 1, of the candidates and then of all pairs between their groups.
    """
    view = lru_cache(_KEPT)(lambda row: describe(picture(row)))

    def compare(pairs: np.ndarray) -> np.ndarray:
        def check(pair: np.ndarray) -> float:
            first, second = view(int(pair[0])), view(int(pair[1]))
            return max(agreement(first, second).evidence, agreement(mirrored(first), second).evidence)

        order, found = _near_in_time(pairs), np.zeros(len(pairs))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(pairs), _CHUNK):
                part = order[start : start + _CHUNK]
                found[part] = list(pool.map(check, pairs[part]))
                if progress:
                    progress((start + len(part)) / len(pairs))
        return found

    pairs = pairs[known[pairs[:, 0]] != known[pairs[:, 1]]]
    evidence = compare(pairs)
    groups = components(known.max(initial=-1) + 1, known[pairs[evidence >= SURE]])[known]
    links = np.unique(np.sort(groups[pairs[evidence > 0]], axis=1), axis=0)
    members = np.split(np.argsort(groups, kind="stable"), np.cumsum(np.bincount(groups))[:-1])
    between = [list(product(members[a], members[b])) for a, b in links if a != b]
    some = [pair for every in between for pair in every[:: -(-len(every) // MOST)]]
    pairs = np.sort(np.array(some, dtype=np.int64).reshape(-1, 2), axis=1)
    return join(groups, pairs, compare(pairs))


def join(groups: np.ndarray, pairs: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """int (N,): `groups` (N,), of which those are one now that the `evidence` (P,) of `pairs` (P, 2) joins."""
    links, link = np.unique(np.sort(groups[pairs], axis=1), axis=0, return_inverse=True)
    total, count = (np.bincount(link.ravel(), weights, len(links)) for weights in (evidence, None))
    agreed = total >= MIN_EVIDENCE * (count + EMPTY_PAIRS)
    return components(groups.max(initial=-1) + 1, links[agreed])[groups]


def agreement(first: View, second: View) -> Agreement:
    """How well two pictures fit, seen as they are."""
    nothing = Agreement(0, 0.0, 0.0)
    if min(len(first.points), len(second.points)) < _LEAST:
        return nothing
    # The cosines of all descriptors by one product of matrices: faster than a matcher's loops.
    cosine = _unit(first.descriptors) @ _unit(second.descriptors).T
    # What either picture would match: else it mattered which is the first.
    matches = np.unique(np.concatenate([_matches(cosine), _matches(cosine.T.copy())[:, ::-1]]), axis=0)
    if len(matches) < _LEAST:
        return nothing
    source, target = first.points[matches[:, 0]], second.points[matches[:, 1]]
    warp, fits = cv2.estimateAffinePartial2D(source, target, ransacReprojThreshold=5.0, maxIters=1000, confidence=0.999)
    if warp is None or not 0.15 < np.hypot(warp[0, 0], warp[1, 0]) < 6:
        return nothing
    source, target = source[fits.ravel() > 0], target[fits.ravel() > 0]
    # Several keypoints may lie at one and the same place: it counts once.
    inliers = min(len(np.unique(points.round(), axis=0)) for points in (source, target))
    if inliers < _LEAST:
        return nothing
    spread = float((target.std(axis=0) / second.grey.shape[::-1]).min())
    return Agreement(inliers, _overlap(first.grey, second.grey, warp), spread)


def describe(rgb: np.ndarray) -> View:
    """Keypoints of uint8 (H, W, 3)."""
    height, width = rgb.shape[:2]
    scale = _SIDE / (height * width) ** 0.5
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    flags = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    grey = cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), size, interpolation=flags)
    # Half of the usual contrast threshold: many of these pictures are small and soft.
    points, descriptors = cv2.SIFT.create(nfeatures=_KEYPOINTS, contrastThreshold=0.02).detectAndCompute(grey, None)
    if descriptors is None:
        return View(grey, np.empty((0, 2), dtype=np.float32), np.empty((0, 128), dtype=np.uint8))
    return View(grey, np.array([point.pt for point in points], dtype=np.float32), descriptors.astype(np.uint8))


def mirrored(view: View) -> View:
    """The view of the mirrored picture, without looking for its keypoints."""
    points = view.points * [-1, 1] + [view.grey.shape[1] - 1, 0]
    grey = np.ascontiguousarray(view.grey[:, ::-1])
    return View(grey, points.astype(np.float32), view.descriptors[:, _MIRRORED])


def _overlap(first: np.ndarray, second: np.ndarray, warp: np.ndarray) -> float:
    size = second.shape[::-1]
    inside = cv2.warpAffine(np.ones_like(first), warp, size, flags=cv2.INTER_NEAREST) > 0
    if inside.sum() < 400:
        return 0.0
    a = cv2.GaussianBlur(cv2.warpAffine(first, warp, size), (0, 0), 2)[inside].astype(np.float32)
    b = cv2.GaussianBlur(second, (0, 0), 2)[inside].astype(np.float32)
    spread = a.std() * b.std()
    return float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 1 else 0.0


def _matches(cosine: np.ndarray) -> np.ndarray:
    """int (M, 2): rows, and for each the column that is clearly nearer to it than all others (Lowe's ratio)."""
    rows, nearest = np.arange(len(cosine)), cosine.argmax(axis=1)
    best = cosine[rows, nearest]
    cosine[rows, nearest] = -1
    clear = 1 - best < _RATIO**2 * (1 - cosine.max(axis=1))
    cosine[rows, nearest] = best
    return np.column_stack([rows, nearest])[clear]


def _unit(descriptors: np.ndarray) -> np.ndarray:
    vectors = descriptors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)


def _near_in_time(pairs: np.ndarray) -> np.ndarray:
    """int (P,): an order of the pairs that comes back to a picture soon, while its keypoints are still in memory."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import reverse_cuthill_mckee

    count = pairs.max(initial=0) + 1
    both = np.concatenate([pairs, pairs[:, ::-1]])
    graph = csr_array((np.ones(len(both), dtype=bool), (both[:, 0], both[:, 1])), shape=(count, count))
    place = np.empty(count, dtype=np.int64)
    place[reverse_cuthill_mckee(graph, symmetric_mode=True)] = np.arange(count)
    return np.lexsort((place[pairs].min(axis=1), place[pairs].max(axis=1)))
