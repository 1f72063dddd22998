import io
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from facemask.data.duplicates import components, find_pairs, same_picture, thumbnail
from facemask.data.geometry import Agreement, agreement, candidates, confirm, describe, join, mirrored
from facemask.data.images import decode
from facemask.data.synthetic import synthetic_files

WHOLE = (0.0, 0.0, 1.0, 1.0)


def resized(rgb: np.ndarray, factor: float) -> np.ndarray:
    height, width = (max(8, round(side * factor)) for side in rgb.shape[:2])
    return np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))


def encoded(rgb: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, "JPEG", quality=quality)
    return decode(buffer.getvalue())


def cropped(rgb: np.ndarray, left: float, top: float, right: float, bottom: float) -> np.ndarray:
    height, width = rgb.shape[:2]
    rows = slice(round(top * height), height - round(bottom * height))
    return np.ascontiguousarray(rgb[rows, round(left * width) : width - round(right * width)])


def copies(rgb: np.ndarray, rng: np.random.Generator) -> Iterator[tuple[str, np.ndarray]]:
    mirrored = np.ascontiguousarray(rgb[:, ::-1])
    left, top, right, bottom = 0.1 * np.eye(4)[rng.integers(4)]
    yield "resized", resized(rgb, rng.uniform(0.35, 2))
    yield "re-encoded", encoded(rgb, int(rng.integers(20, 95)))
    yield "mirrored", mirrored
    yield "one side", cropped(rgb, left, top, right, bottom)
    yield "all sides", cropped(rgb, *rng.uniform(0, 0.1, 4))
    yield "all of it", encoded(resized(cropped(mirrored, *rng.uniform(0, 0.1, 4)), rng.uniform(0.5, 1.5)), 70)


def check_copies(pictures: list[np.ndarray], sources: list[int], least: float) -> set[tuple[int, int]]:
    """Recall of each kind of copy of `sources`, at least `least`; returns the pairs found within `pictures`."""
    rng = np.random.default_rng(0)
    made = [(source, kind, copy) for source in sources for kind, copy in copies(pictures[source], rng)]
    thumbs = np.stack([thumbnail(rgb) for rgb in [*pictures, *(copy for _, _, copy in made)]])
    pairs = {(int(i), int(j)) for i, j in find_pairs(thumbs)}
    count, found = Counter(kind for _, kind, _ in made), Counter()
    for row, (source, kind, _) in enumerate(made, len(pictures)):
        found[kind] += (source, row) in pairs
    recall = {kind: found[kind] / number for kind, number in count.items()}
    assert min(recall.values()) >= least, recall
    return {pair for pair in pairs if max(pair) < len(pictures)}


def pairwise(groups: pd.Series, known: pd.Series) -> tuple[float, float]:
    """Precision and recall of pairs within groups."""
    within = [(sizes * (sizes - 1) // 2).sum() for sizes in (groups.value_counts(), known.value_counts())]
    both = pd.Series(list(zip(groups, known, strict=True))).value_counts()
    agreed = (both * (both - 1) // 2).sum()
    return agreed / within[0], agreed / within[1]


def test_drawn_copies_are_found_and_drawn_faces_are_not_confused() -> None:
    faces = [decode(file.content) for file in synthetic_files(120, 0, workers=0)]
    assert check_copies(faces, list(range(30)), 0.95) == set()


def test_between_two_sets() -> None:
    faces = [decode(file.content) for file in synthetic_files(12, 0, workers=0)]
    thumbs = np.stack([thumbnail(rgb) for rgb in faces])
    part = thumbnail(cropped(faces[7][:, ::-1].copy(), 0.06, 0, 0.06, 0.06))
    wider = np.stack([thumbs[3], part])
    assert find_pairs(thumbs, wider).tolist() == [[3, 0], [7, 1]]
    assert find_pairs(wider, thumbs).tolist() == [[0, 3], [1, 7]]


def test_few_and_flat_pictures() -> None:
    flat = np.full((3, 64, 64), 200, dtype=np.uint8)
    assert find_pairs(flat).shape == (0, 2)
    assert find_pairs(flat[:1]).shape == (0, 2)
    assert find_pairs(flat[:0]).shape == (0, 2)


def test_a_picture_is_no_copy_of_its_rotation() -> None:
    face = decode(next(synthetic_files(2, 3, workers=0)).content)
    thumb = thumbnail(face)
    assert same_picture(thumb, thumb, WHOLE)
    assert not same_picture(thumb, np.ascontiguousarray(np.rot90(thumb)), WHOLE)
    assert not same_picture(thumb, 255 - thumb, WHOLE)


def test_components() -> None:
    number = components(6, np.array([[0, 3], [3, 5], [1, 2]]))
    assert number[0] == number[3] == number[5]
    assert number[1] == number[2]
    assert len(set(number)) == 3
    assert len(set(components(4, np.empty((0, 2), dtype=np.int64)))) == 4


def test_three_likely_pairs_join_two_groups() -> None:
    sure = np.array([[0, 1], [2, 3], [4, 5]])
    likely = np.array([[0, 2], [0, 3], [1, 2], [3, 4], [3, 5]])
    assert join(6, sure, likely[:2]).tolist() == [0, 0, 1, 1, 2, 2]
    assert join(6, sure, likely).tolist() == [0, 0, 0, 0, 1, 1]
    # Once they are one group, their links to a third are counted together.
    assert len(set(join(6, sure, np.array([[0, 2], [0, 3], [1, 2], [3, 4], [3, 5], [1, 4]])))) == 1
    assert join(2, np.empty((0, 2), dtype=np.int64), np.empty((0, 2), dtype=np.int64)).tolist() == [0, 1]


def test_the_mirrored_view_is_that_of_the_mirrored_picture() -> None:
    face = decode(next(synthetic_files(2, 3, workers=0)).content)
    flipped = describe(np.ascontiguousarray(face[:, ::-1]))
    inliers, correlation, spread = agreement(mirrored(describe(face)), flipped)
    assert inliers >= 0.7 * min(len(flipped.points), 200)
    assert correlation > 0.99
    assert 0.1 < spread < 0.5
    assert agreement(describe(face), flipped)[:2] < (inliers // 2, 1.0)
    assert agreement(describe(np.full((50, 40, 3), 9, dtype=np.uint8)), flipped) == Agreement(0, 0.0, 0.0)


def test_candidates_are_the_nearest_by_angle() -> None:
    vectors = np.array([[1, 0], [5, 0.1], [0, 1], [0, 0]], dtype=np.float32)
    assert candidates(vectors).tolist() == [[0, 1]]


def test_rotated_and_noisy_copies_are_confirmed() -> None:
    faces = [decode(file.content) for file in synthetic_files(4, 5, workers=0)]
    height, width = faces[0].shape[:2]
    turn = cv2.getRotationMatrix2D((width / 2, height / 2), 20, 1.0)
    noise = np.random.default_rng(0).normal(0, 10, faces[1].shape)
    faces += [
        cv2.warpAffine(faces[0], turn, (width, height)),
        np.clip(faces[1][:, ::-1] + noise, 0, 255).astype(np.uint8),
    ]
    pairs = np.array([[0, 4], [1, 5], [0, 1], [2, 3], [1, 4], [3, 5]])
    assert sorted(confirm(pairs, lambda row: faces[row])[0].tolist()) == [[0, 4], [1, 5]]


@pytest.mark.slow
def test_photographs() -> None:
    if not os.environ.get("FACEMASK_DATA"):
        pytest.skip("FACEMASK_DATA is not set: no real pictures")
    root = Path(os.environ["FACEMASK_DATA"])
    known = pd.read_csv(root / "manifest.csv")
    pictures = [decode((root / path).read_bytes()) for path in known["path"]]
    sources = known.drop_duplicates("dup_group").sample(60, random_state=0).index.tolist()
    pairs = np.array(sorted(check_copies(pictures, sources, 0.95)))
    groups = pd.Series(components(len(pictures), pairs))
    precision, recall = pairwise(groups, known["dup_group"])
    assert precision >= 0.98
    assert recall >= 0.40  # hashes and thumbnails alone; the rest is rotated, noisy or edited
    assert groups.value_counts().max() <= 12
