from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut

from facemask.data import counterfactual
from facemask.data.counterfactual import find_faces, kept_faces, paint
from facemask.data.datamodule import FolderData, TrainViews
from facemask.data.transforms import Augmentation
from facemask.errors import UserError

PORTRAIT = np.ascontiguousarray(astronaut()[0:260, 90:350])  # eyes near row 102, mouth near row 150, column 133
CENTRE_FACE = np.array([0.25, 0.25, 0.5, 0.5], dtype=np.float32)


def test_the_face_of_a_photograph_is_found_in_shares_of_its_sides() -> None:
    wide = np.pad(PORTRAIT, [(0, 0), (0, 130), (0, 0)], mode="edge")
    found = find_faces([PORTRAIT, cv2.resize(PORTRAIT, (112, 112)), wide, np.zeros((90, 60, 3), np.uint8)])
    assert found.dtype == np.float32
    for (left, top, width, height), across in ((found[0], 260), (found[2], 390)):
        assert left < 133 / across < left + width
        assert top < 102 / 260 < 150 / 260 < top + height
        assert 0.3 < height < 0.6
        assert width * across == pytest.approx(height * 260, rel=0.05)
    np.testing.assert_allclose(found[1], found[0], atol=0.03)
    assert np.isnan(found[3]).all()


def test_a_mask_covers_nose_and_mouth_and_no_other_cloth_does() -> None:
    """Of 100 of each kind; nose and mouth at 0.68 and 0.82 of the face's height, eyes at 0.38."""
    grey = np.full((120, 120, 3), 128, np.uint8)
    rows = [30 + round(60 * share) for share in (0.68, 0.82)]
    eyes = 0
    for seed in range(100):
        covered = paint(grey, CENTRE_FACE, True, np.random.default_rng(seed))
        elsewhere = paint(grey, CENTRE_FACE, False, np.random.default_rng(seed))
        for row in rows:
            # a cloth of the background's own colour would not show at one point
            assert (covered[row - 3 : row + 4, 50:70] != 128).any()
            assert (elsewhere[row, 57:64] == 128).all(), seed
        assert (covered[30 + round(60 * 0.38), 50:70] == 128).all()
        eyes += bool((elsewhere[30 + round(60 * 0.3), 50:70] != 128).any())
    assert 15 <= eyes <= 35  # a quarter lies over them
    assert (grey == 128).all()


def test_paint_is_a_function_of_its_generator() -> None:
    face = find_faces([PORTRAIT])[0]
    one, two, other = (paint(PORTRAIT, face, True, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert one.shape == PORTRAIT.shape
    assert one.dtype == np.uint8
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)
    assert np.array_equal(one[:60], PORTRAIT[:60])  # hair and background stay


def test_faces_are_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(counterfactual, "find_faces", lambda pictures: calls.append(1) or np.ones((2, 4), np.float32))
    for names in (["a", "b"], ["a", "b"], ["a", "c"]):
        assert np.array_equal(kept_faces([], names, tmp_path), np.ones((2, 4)))
    assert len(calls) == 2


# -- training views -----------------------------------------------------------------------------------------------


@pytest.fixture
def views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for label in ("with_mask", "without_mask"):
        (tmp_path / "faces" / label).mkdir(parents=True)
        for number in range(40):
            level = 60 + number + 100 * (label == "with_mask")
            Image.new("RGB", (32, 32), (level, level, level)).save(tmp_path / "faces" / label / f"{number:02}.png")

    def find(pictures: Any) -> np.ndarray:  # none in every fourth
        found = np.stack([CENTRE_FACE for _ in pictures])
        found[::4] = np.nan
        return found

    monkeypatch.setattr(counterfactual, "find_faces", find)

    def make(share: float, **options: Any) -> TrainViews:
        augmentation = Augmentation(0, 28, counterfactual=share, **options)
        data = FolderData(
            root=str(tmp_path / "faces"), augmentation=augmentation, img_size=28, cache_dir=tmp_path / "cache"
        )
        data.prepare()
        return data.train_views()

    return make


def test_pairs_are_painted_on_bare_faces_alone_and_the_label_says_what_is_covered(views: Any) -> None:
    plain, painted = views(0.0), views(1.0)
    assert list(plain.paths) == list(painted.paths)
    masked, elsewhere = [], 0
    for epoch in range(4):
        for row, path in enumerate(plain.paths):
            before, after = plain[epoch, row], painted[epoch, row]
            if path.startswith("with_mask") or np.isnan(painted.faces[row, 0]):
                assert np.array_equal(before["pixels"], after["pixels"])
                assert np.array_equal(before["target"], after["target"])
                continue
            mouth = after["pixels"][:, 17:19, 12:16] != before["pixels"][:, 17:19, 12:16]
            assert after["target"].tolist() == ([1, 0] if mouth.any() else [0, 1])
            masked.append((epoch, row, bool(mouth.any())))
            elsewhere += bool((after["pixels"] != before["pixels"]).any()) and not mouth.any()
    assert len(masked) == 4 * np.isfinite(painted.faces[:, 0]).sum() == 4 * 21
    assert 0.35 < np.mean([covered for *_, covered in masked]) < 0.65
    assert elsewhere > 20
    by_row = {row: {covered for _, r, covered in masked if r == row} for _, row, _ in masked}
    assert sum(len(kinds) == 2 for kinds in by_row.values()) > 12  # both halves of a pair, in other epochs


def test_the_share_is_of_views(views: Any) -> None:
    painted = views(0.3)
    rows = np.flatnonzero(np.isfinite(painted.faces[:, 0]))
    share = np.mean([painted._painting(row, epoch) is not None for row in rows for epoch in range(60)])
    assert 0.26 < share < 0.34


def test_a_mixed_view_has_the_labels_of_what_was_painted(views: Any) -> None:
    mixed = views(1.0, mix_prob=1.0, mixup_alpha=0.8)
    for row in range(len(mixed)):
        mix = mixed.mix(row, 0)
        wanted = np.zeros(2, dtype=np.float32)
        wanted[mixed.label(row, 0)] += mix.lam
        wanted[mixed.label(mix.partner, 0)] += 1 - mix.lam
        np.testing.assert_allclose(mixed[0, row]["target"], wanted)
    covered = [row for row in range(len(mixed)) if mixed.labels[row] == 1 and mixed.label(row, 0) == 0]
    assert covered


def test_classes_of_other_names_must_be_named(views: Any) -> None:
    with pytest.raises(UserError, match=r"augment.bare=naked is none of the data's classes with_mask, without_mask"):
        views(0.5, bare="naked")
