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

from facemask.bench_scan import pairwise
from facemask.data import geometry
from facemask.data.duplicates import components, find_pairs, same_picture, thumbnail
from facemask.data.geometry import Agreement, View, agreement, candidates, describe, group, join, mirrored
from facemask.data.images import decode
from facemask.data.synthetic import synthetic_files
from facemask.embedding import build_embedder

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


@pytest.mark.parametrize(
    ("groups", "evidence", "found"),
    [
        # 3.7 * (4 + 3) = 25.9 between two groups of two, 3.7 * (1 + 3) = 14.8 between single pictures.
        ([0, 0, 1, 1], {(0, 2): 6.5, (0, 3): 6.5, (1, 2): 6.5, (1, 3): 6.5}, [0, 0, 0, 0]),
        ([0, 0, 1, 1], {(0, 2): 25.8, (0, 3): 0, (1, 2): 0, (1, 3): 0}, [0, 0, 1, 1]),
        ([0, 0, 1, 1], {(0, 2): 6.5, (0, 3): 6.5, (1, 2): 6.3, (1, 3): 6.5}, [0, 0, 1, 1]),
        ([0, 1], {(0, 1): 14.9}, [0, 0]),
        ([0, 1], {(0, 1): 14.7}, [0, 1]),
        # Links count from either side, and reach over a third group.
        ([0, 1, 2], {(2, 0): 15, (0, 1): 15}, [0, 0, 0]),
        ([0, 1], {}, [0, 1]),
        ([], {}, []),
    ],
)
def test_mean_evidence_joins_groups(groups: list[int], evidence: dict, found: list[int]) -> None:
    pairs = np.array(list(evidence), dtype=int).reshape(-1, 2)
    assert join(np.array(groups, dtype=int), pairs, np.array(list(evidence.values()))).tolist() == found


def test_evidence_of_a_pair() -> None:
    assert Agreement(10, 0.75, 0.06).evidence == pytest.approx(5.0)
    assert Agreement(10, 0.75, 0.05).evidence == 0.0
    assert Agreement(10, 0.25, 0.06).evidence == 0.0


@pytest.mark.parametrize(
    ("others", "found"), [(0.75, [0, 0, 0, 0, 1]), (0.2, [0, 0, 1, 1, 2])], ids=["all agree", "one agrees"]
)
def test_a_weak_candidate_has_its_groups_compared(
    monkeypatch: pytest.MonkeyPatch, others: float, found: list[int]
) -> None:
    asked = set()

    def fake(first: View, second: View) -> Agreement:
        pair = int(first.grey), int(second.grey)
        asked.add(pair)
        return Agreement(15, 0.75 if pair == (0, 3) else others if 4 not in pair else 0.0, 0.2)

    monkeypatch.setattr(geometry, "describe", lambda row: View(row, row, row))
    monkeypatch.setattr(geometry, "mirrored", lambda view: view)
    monkeypatch.setattr(geometry, "agreement", fake)
    shares: list[float] = []
    known, pairs = np.array([0, 0, 1, 1, 2]), np.array([[0, 1], [0, 3], [1, 4]])
    assert group(known, pairs, np.array, shares.append).tolist() == found
    assert asked == {(0, 3), (1, 4), (0, 2), (1, 2), (1, 3)}  # neither within a group nor without a reason
    assert shares == [1.0, 1.0]


@pytest.mark.parametrize(("inliers", "found"), [(50, [0, 0, 0, 0]), (49, [0, 0, 1, 1])])
def test_one_sure_pair_joins_its_groups(monkeypatch: pytest.MonkeyPatch, inliers: int, found: list[int]) -> None:
    def fake(first: View, second: View) -> Agreement:
        return (
            Agreement(inliers, 0.75, 0.2) if (int(first.grey), int(second.grey)) == (0, 3) else Agreement(0, 0.0, 0.0)
        )

    monkeypatch.setattr(geometry, "describe", lambda row: View(row, row, row))
    monkeypatch.setattr(geometry, "mirrored", lambda view: view)
    monkeypatch.setattr(geometry, "agreement", fake)
    assert group(np.array([0, 0, 1, 1]), np.array([[0, 3]]), np.array).tolist() == found


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
    pairs = np.array([[0, 4], [1, 5], [0, 1], [1, 4], [3, 5]])
    known = np.array([0, 1, 2, 2, 3, 4])
    assert group(known, pairs, lambda row: faces[row]).tolist() == [0, 1, 2, 2, 0, 1]
    assert group(np.arange(6), pairs[:0], lambda row: faces[row]).tolist() == list(range(6))


@pytest.fixture(scope="module")
def photographs() -> tuple[list[np.ndarray], pd.Series]:
    if not os.environ.get("FACEMASK_DATA"):
        pytest.skip("FACEMASK_DATA is not set: no real pictures")
    root = Path(os.environ["FACEMASK_DATA"])
    known = pd.read_csv(root / "manifest.csv")
    return [decode((root / path).read_bytes()) for path in known["path"]], known["dup_group"]


@pytest.mark.slow
def test_photographs(photographs: tuple[list[np.ndarray], pd.Series]) -> None:
    pictures, known = photographs
    sources = known.drop_duplicates().sample(60, random_state=0).index.tolist()
    pairs = np.array(sorted(check_copies(pictures, sources, 0.95)))
    groups = pd.Series(components(len(pictures), pairs))
    figures = pairwise(groups, known)
    assert figures["precision"] >= 0.98
    assert figures["recall"] >= 0.40  # thumbnails alone; the rest is rotated, noisy or edited
    assert groups.value_counts().max() <= 12


@pytest.mark.slow
def test_photographs_thoroughly(photographs: tuple[list[np.ndarray], pd.Series]) -> None:
    """On 450 pictures: every third of the known groups, whole, and single pictures."""
    several = photographs[1].duplicated(keep=False)
    known = photographs[1][photographs[1].isin(sorted(photographs[1][several].unique())[::3])]
    known = pd.concat([known, photographs[1][~several].sample(450 - len(known), random_state=0)])
    pictures = [photographs[0][row] for row in known.index]
    embed = build_embedder()
    likely = candidates(embed(pictures) + embed([np.ascontiguousarray(rgb[:, ::-1]) for rgb in pictures]))
    copies = components(len(pictures), find_pairs(np.stack([thumbnail(rgb) for rgb in pictures])))
    figures = pairwise(pd.Series(group(copies, likely, pictures.__getitem__)), known.reset_index(drop=True))
    assert figures["precision"] >= 0.98, figures
    assert figures["recall"] >= 0.83, figures
