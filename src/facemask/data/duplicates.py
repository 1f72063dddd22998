"""Stage 1 of the search for near-duplicates: resized, re-encoded, mirrored and slightly cropped copies.

Candidates come from a nearest-neighbour index over low frequencies of small grey thumbnails, asked once for each of a
few windows of every picture, plain and mirrored. A candidate pair counts if the thumbnails, aligned by enhanced
correlation (Evangelidis & Psarakis 2008), correlate both as they are and in their fine detail alone: photographs that
are merely alike agree in the large and differ in the small.
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import cv2
import numpy as np

SIDE = 64
# Left, top, right, bottom of the part of a picture that another picture may be a copy of: none or some of every side is
# cut away, so that crops of up to a tenth off any sides fall close to one of the sixteen.
WINDOWS = [(left, top, 1 - right, 1 - bottom) for left, top, right, bottom in product((0.0, 0.06), repeat=4)]
NEIGHBOURS = 12
# Squared distance of two descriptors of length 1; 99 % of copies lie below it.
MAX_DISTANCE = 0.13
# Set by looking at all pairs of one photographic set and at generated copies; not held out. Drawn faces agree.
MIN_CORRELATION = 0.95
MIN_DETAIL = 0.85
_FREQUENCIES = 8
_CHUNK = 4096
_ONES = np.ones((SIDE, SIDE), dtype=np.uint8)


def thumbnail(rgb: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> grey uint8 (64, 64): squashed, averaged over areas."""
    return cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), (SIDE, SIDE), interpolation=cv2.INTER_AREA)


def find_pairs(
    thumbs: np.ndarray, others: np.ndarray | None = None, progress: Callable[[float], None] | None = None
) -> np.ndarray:
    """Near-duplicate pairs.

    Args:
        thumbs: uint8 (N, 64, 64), see `thumbnail`.
        others: uint8 (M, 64, 64); None searches within `thumbs`.
        progress: told the share done, from 0 to 1.

    Returns:
        int64 (P, 2), sorted, none twice: rows i < j of `thumbs`, or (row of `thumbs`, row of `others`).
    """
    if others is None:
        candidates = _candidates(thumbs, thumbs)
        candidates = candidates[candidates[:, 0] != candidates[:, 1]]
    else:
        forth, back = _candidates(thumbs, others), _candidates(others, thumbs)
        candidates = np.concatenate([forth, back + np.array([len(thumbs), 0, 0, 0])])

    def check(candidate: np.ndarray) -> bool:
        query, found, window, mirror = (int(value) for value in candidate)
        if others is None:
            picture, copy = thumbs[query], thumbs[found]
        elif query < len(thumbs):
            picture, copy = thumbs[query], others[found]
        else:
            picture, copy = others[query - len(thumbs)], thumbs[found]
        return same_picture(picture[:, ::-1] if mirror else picture, copy, WINDOWS[window])

    kept: list[np.ndarray] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(candidates), _CHUNK):
            part = candidates[start : start + _CHUNK]
            kept.append(part[np.fromiter(pool.map(check, part), dtype=bool, count=len(part)), :2])
            if progress:
                progress((start + len(part)) / len(candidates))
    pairs = np.concatenate([np.empty((0, 2), dtype=np.int64), *kept])
    if others is not None:
        back = pairs[:, 0] >= len(thumbs)
        pairs[back] = pairs[back][:, ::-1] - [0, len(thumbs)]
        return np.unique(pairs, axis=0)
    return np.unique(np.sort(pairs, axis=1), axis=0)


def components(count: int, pairs: np.ndarray) -> np.ndarray:
    """int (count,): the number of the connected component of each row, given pairs of rows (P, 2)."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(len(pairs), dtype=bool)
    graph = coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def index(vectors: np.ndarray) -> "faiss.IndexHNSWFlat":  # type: ignore[name-defined]  # noqa: F821
    """Graph index (HNSW) of float32 (N, D), squared distances; built in one thread, so that it is always the same."""
    logging.getLogger("faiss.loader").setLevel(logging.WARNING)  # tells which build of itself it could not find
    import faiss

    graph = faiss.IndexHNSWFlat(vectors.shape[1], 16)
    graph.hnsw.efConstruction = 40
    graph.hnsw.efSearch = 24
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    graph.add(vectors)
    faiss.omp_set_num_threads(threads)
    return graph


def same_picture(picture: np.ndarray, copy: np.ndarray, window: tuple[float, float, float, float]) -> bool:
    """Whether `copy` shows about that `window` of `picture`; both uint8 (64, 64)."""
    picture, copy = (cv2.GaussianBlur(thumb.astype(np.float32), (0, 0), 1) for thumb in (picture, copy))
    left, top, right, bottom = window
    across, down = right - left, bottom - top
    # In pixel coordinates, whose origin is the middle of the first pixel.
    shift = [left * SIDE + (across - 1) / 2, top * SIDE + (down - 1) / 2]
    warp = np.array([[across, 0, shift[0]], [0, down, shift[1]]], dtype=np.float32)
    if _agree(picture, copy, warp):
        return True
    try:
        _, moved = cv2.findTransformECC(copy, picture, warp, cv2.MOTION_AFFINE, (3, 25, 1e-4))
    except cv2.error:  # does not converge: nothing in common
        return False
    # A copy is cut along the picture's sides: neither rotated nor sheared.
    moved = np.asarray(moved)
    upright = abs(moved[0, 1]) < 0.06 and abs(moved[1, 0]) < 0.06
    return bool(upright) and _agree(picture, copy, moved)


def _agree(picture: np.ndarray, copy: np.ndarray, warp: np.ndarray) -> bool:
    """Whether the pictures correlate where they overlap, both as they are and in their detail."""
    size, flags = (SIDE, SIDE), cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(picture, warp, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
    inside = cv2.warpAffine(_ONES, warp, size, flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP) > 0
    if inside.mean() < 0.6 or _correlation(moved[inside], copy[inside]) < MIN_CORRELATION:
        return False
    detail = [img - cv2.GaussianBlur(img, (0, 0), 4) for img in (moved, copy)]
    return _correlation(detail[0][inside], detail[1][inside]) >= MIN_DETAIL


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    spread = np.sqrt((a * a).mean() * (b * b).mean())
    return float((a * b).mean() / spread) if spread > 0.05 else 0.0  # flat pictures have nothing to compare


def _candidates(queries: np.ndarray, base: np.ndarray) -> np.ndarray:
    """int64 (P, 4): row of `queries`, row of `base`, window of the query, mirrored or not; the nearest window of each
    pair, plain and mirrored apart."""
    graph = index(_descriptors(base, WINDOWS[0], mirror=False))
    found = []
    for mirror in (False, True):
        for number, window in enumerate(WINDOWS):
            distance, row = graph.search(_descriptors(queries, window, mirror), NEIGHBOURS)
            query, rank = np.nonzero((distance < MAX_DISTANCE) & (row >= 0))
            facts = (query, row[query, rank], np.full(len(query), number), np.full(len(query), mirror))
            found.append(np.column_stack([*facts, distance[query, rank]]))
    rows = np.concatenate(found)
    rows = rows[np.lexsort((rows[:, 4], rows[:, 3], rows[:, 1], rows[:, 0]))]
    _, first = np.unique(rows[:, [0, 1, 3]], axis=0, return_index=True)
    return rows[first, :4].astype(np.int64)


def _descriptors(thumbs: np.ndarray, window: tuple[float, float, float, float], mirror: bool) -> np.ndarray:
    """float32 (N, 63): the 8 x 8 lowest frequencies (DCT-II) of a window, without the mean, at length 1."""
    left, top, right, bottom = window
    across, down = _cosines(left, right), _cosines(top, bottom)
    parts = [np.empty((0, _FREQUENCIES**2 - 1), dtype=np.float32)]
    for start in range(0, len(thumbs), _CHUNK):
        grey = thumbs[start : start + _CHUNK].astype(np.float32)
        grey = grey[:, :, ::-1] if mirror else grey
        grey = grey - grey.mean(axis=(1, 2), keepdims=True)
        waves = (down @ grey @ across.T).reshape(len(grey), -1)[:, 1:]
        parts.append(waves / np.maximum(np.linalg.norm(waves, axis=1, keepdims=True), 1e-3))
    return np.ascontiguousarray(np.concatenate(parts))


def _cosines(low: float, high: float) -> np.ndarray:
    position = ((np.arange(SIDE) + 0.5) / SIDE - low) / (high - low)
    inside = (position > 0) & (position < 1)
    return (np.cos(np.pi * np.arange(_FREQUENCIES)[:, None] * position) * inside).astype(np.float32)
