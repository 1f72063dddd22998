from pathlib import Path

import cv2
import hydra.utils
import numpy as np
import pytest
from hydra import compose, initialize_config_dir

from facemask.data.images import centre_crop
from facemask.data.transforms import Augmentation, Mix, apply_mix, epoch_order, hashed_rng

CONF = str(Path(__file__).parents[2] / "conf")


def augmentation(*overrides: str) -> Augmentation:
    """What `python train.py` with these overrides would use, at 32 pixels."""
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["model.img_size=32", *overrides])
        return hydra.utils.instantiate(cfg.augment, _convert_="all")


def noise(height: int = 40, width: int = 36) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", ["light", "vit", "deit"])
def test_a_view_depends_on_seed_epoch_and_path_alone(name: str) -> None:
    pixels = noise()
    # Two objects, and other views drawn in between: no hidden state may carry over.
    one, two = augmentation(f"augment={name}"), augmentation(f"augment={name}")
    views = [one.view(pixels, f"a/{i}.png", epoch) for epoch in range(3) for i in range(8)]
    for epoch in (2, 0, 1):
        for i in reversed(range(8)):
            view = two.view(pixels, f"a/{i}.png", epoch)
            assert view.shape == (32, 32, 3)
            assert view.dtype == np.uint8
            np.testing.assert_array_equal(view, views[8 * epoch + i])
    other_seed = augmentation(f"augment={name}", "seed=1").view(pixels, "a/0.png", 0)
    assert len({view.tobytes() for view in [*views, other_seed]}) == 25


def test_the_augmentation_seed_is_the_runs_unless_set() -> None:
    assert augmentation("augment=light", "seed=5").seed == 5
    assert augmentation("augment=light", "seed=5", "augment.seed=0").seed == 0
    pixels = noise()
    np.testing.assert_array_equal(
        augmentation("augment=light", "seed=5", "augment.seed=0").view(pixels, "a", 0),
        augmentation("augment=light", "seed=0").view(pixels, "a", 0),
    )


def test_a_view_leaves_the_global_random_state_and_the_picture_alone() -> None:
    pixels = noise()
    np.random.seed(7)  # noqa: NPY002  # the global state itself is what is tested
    before = np.random.get_state()[1].copy()  # type: ignore[index,union-attr]  # noqa: NPY002
    augmentation("augment=deit").view(pixels, "a", 0)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # type: ignore[index]  # noqa: NPY002
    np.testing.assert_array_equal(pixels, noise())


def test_transforms_of_a_sample_are_uncorrelated() -> None:
    import albumentations

    flips = albumentations.Compose([albumentations.HorizontalFlip(p=0.5), albumentations.VerticalFlip(p=0.5)])
    views = Augmentation(0, 2, flips)
    marked = np.zeros((2, 2, 3), np.uint8)
    marked[0, 0] = 1  # the mark's place tells both flips
    places = [np.argwhere(views.view(marked, f"{i}.png", 0)[..., 0])[0] for i in range(1000)]
    down, right = np.array(places).T
    assert 0.45 < down.mean() < 0.55
    assert 0.45 < right.mean() < 0.55
    assert abs(np.corrcoef(down, right)[0, 1]) < 0.1


def test_neighbouring_epochs_and_seeds_are_uncorrelated() -> None:
    first = {
        key: np.array([hashed_rng(*key, f"{i}.png").random() for i in range(1000)])
        for key in [(0, 0), (0, 1), (1, 0), (1, 1)]
    }
    correlations = np.corrcoef(list(first.values()))
    assert np.abs(correlations - np.eye(4)).max() < 0.1


def test_the_key_is_its_text_with_separators() -> None:
    assert hashed_rng(1, 23, "a").random() != hashed_rng(12, 3, "a").random()
    assert hashed_rng(0, 1, "a/b").random() == hashed_rng(0, 1, "a/b").random()


def test_none_is_the_evaluation_view_in_every_epoch() -> None:
    none = augmentation("augment=none")
    pixels = noise()
    for epoch in (0, 1):
        np.testing.assert_array_equal(none.view(pixels, "a", epoch), centre_crop(pixels, 32))
    assert none.mix("a", 0, 3) is None


def test_mixup_by_hand() -> None:
    view, partner = np.full((4, 4, 3), 200, np.uint8), np.full((4, 4, 3), 100, np.uint8)
    mixed = apply_mix(view, partner, Mix(partner=1, lam=0.75, box=None))
    assert mixed.dtype == np.uint8
    assert np.unique(mixed).tolist() == [175]  # 0.75 * 200 + 0.25 * 100
    view[:], partner[:] = 255, 0
    assert np.unique(apply_mix(view, partner, Mix(1, 0.3, None))).tolist() == [76]  # 76.5, halves to the even number
    assert np.unique(apply_mix(view, partner, Mix(1, 1.0, None))).tolist() == [255]


def test_cutmix_by_hand() -> None:
    view, partner = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 9, np.uint8)
    mixed = apply_mix(view, partner, Mix(partner=1, lam=1 - 6 / 16, box=(1, 3, 0, 3)))
    assert mixed[..., 0].tolist() == [[0, 0, 0, 0], [9, 9, 9, 0], [9, 9, 9, 0], [0, 0, 0, 0]]
    assert view.max() == 0  # the view itself may be another picture's partner


def test_cutmix_lambda_is_the_exact_share_of_the_area() -> None:
    cutmix = Augmentation(0, 24, mix_prob=1, cutmix_alpha=1.0)
    shares = []
    for i in range(500):
        mix = cutmix.mix(f"{i}.png", 0, 3)
        assert mix is not None
        mixed = apply_mix(np.ones((24, 24, 3), np.uint8), np.zeros((24, 24, 3), np.uint8), mix)
        assert mix.lam == pytest.approx(mixed[..., 0].mean(), abs=1e-12)
        shares.append(mix.lam)
    # Beta(1, 1) is uniform, with mean 1/2; boxes cut off at the border leave more of the view.
    assert 0.55 < np.mean(shares) < 0.75
    assert min(shares) < 0.2
    assert max(shares) > 0.9


def test_mixup_lambda_is_beta_distributed() -> None:
    mixup = Augmentation(0, 24, mix_prob=1, mixup_alpha=0.8)
    mixes = [mixup.mix(f"{i}.png", 0, 3) for i in range(4000)]
    lams = np.array([mix.lam for mix in mixes if mix is not None])
    assert len(lams) == 4000
    assert lams.mean() == pytest.approx(0.5, abs=0.02)
    assert lams.var() == pytest.approx(0.25 / (2 * 0.8 + 1), abs=0.006)  # variance of Beta(a, a)


def test_partners_are_mutual_of_one_fold_and_another_every_epoch() -> None:
    folds = np.arange(64) % 2
    seen = []
    for epoch in range(300):
        order, partner = epoch_order(folds, 3, epoch)
        assert sorted(order) == list(range(64))
        np.testing.assert_array_equal(partner[partner], np.arange(64))
        assert (partner != np.arange(64)).all()
        np.testing.assert_array_equal(folds[partner], folds)
        np.testing.assert_array_equal(epoch_order(folds, 3, epoch)[1], partner)
        seen.append(partner[0])
    assert set(seen) == set(range(2, 64, 2))  # all of its fold, over the epochs
    assert max(np.bincount(seen)) <= 25  # 9.7 expected
    other = epoch_order(folds, 4, 0)
    assert (other[0] != epoch_order(folds, 3, 0)[0]).mean() > 0.8
    assert (other[1] != epoch_order(folds, 3, 0)[1]).mean() > 0.8


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_partners_meet_in_one_batch_of_one_rank(ranks: int) -> None:
    order, partner = epoch_order(np.zeros(64, dtype=int), 0, 5)
    for start in range(0, 64, 16):
        for rank in range(ranks):
            batch = order[start : start + 16][rank::ranks]
            assert set(partner[batch]) == set(batch)


def test_the_odd_picture_of_a_fold_has_a_partner_too() -> None:
    folds = np.array([0] * 5 + [1] * 3 + [2])
    order, partner = epoch_order(folds, 0, 0)
    assert sorted(order) == list(range(9))
    np.testing.assert_array_equal(folds[partner], folds)
    assert partner[8] == 8  # alone in its fold


def test_share_of_mixed_views_and_the_coin_between_mixup_and_cutmix() -> None:
    both = Augmentation(0, 24, mix_prob=0.3, mixup_alpha=0.8, cutmix_alpha=1.0)
    mixes = [both.mix(f"{i}.png", 0, 3) for i in range(4000)]
    mixed = [mix for mix in mixes if mix is not None]
    assert len(mixed) / 4000 == pytest.approx(0.3, abs=0.03)
    assert np.mean([mix.box is not None for mix in mixed]) == pytest.approx(0.5, abs=0.05)
    always = Augmentation(0, 24, mix_prob=1, mixup_alpha=0.8, cutmix_alpha=1.0)
    assert all(always.mix(f"{i}.png", 0, 3) for i in range(200))
    assert Augmentation(0, 24, mix_prob=1).mix("a", 0, 3) is None


def test_recipes_mix_as_published() -> None:
    deit, vit = augmentation("data=folder", "recipe=deit"), augmentation("data=folder", "recipe=vit")
    assert (deit.mix_prob, deit.mixup_alpha, deit.cutmix_alpha) == (1.0, 0.8, 1.0)
    assert vit.mix("a", 0, 3) is None


@pytest.mark.parametrize("name", ["none", "flip", "light", "vit", "deit"])
def test_degradation_composes_with_every_choice(name: str) -> None:
    pixels = cv2.GaussianBlur(noise(80, 76), (5, 5), 0)
    plain = [augmentation(f"augment={name}").view(pixels, f"{i}", 0) for i in range(30)]
    degrading = augmentation(f"augment={name}", "augment.degrade=0.5")
    views = [degrading.view(pixels, f"{i}", 0) for i in range(30)]
    again = [degrading.view(pixels, f"{i}", 0) for i in reversed(range(30))]
    assert all(np.array_equal(one, two) for one, two in zip(views, reversed(again), strict=True))
    assert all(view.shape == (32, 32, 3) and view.dtype == np.uint8 for view in views)
    # All draws of the choice itself come first, so that only the degradation tells the two apart.
    changed = np.mean([not np.array_equal(one, two) for one, two in zip(views, plain, strict=True)])
    assert changed == pytest.approx(1 - 0.5**3, abs=0.2)


def test_degradation_lowers_sharpness_by_random_amounts() -> None:
    pixels = noise(64, 64)
    worse = Augmentation(0, 64, degrade=1.0)
    sharp = cv2.Laplacian(pixels, cv2.CV_64F).std()
    left = [cv2.Laplacian(worse.view(pixels, f"{i}", 0), cv2.CV_64F).std() / sharp for i in range(40)]
    assert max(left) < 0.6
    assert max(left) > 3 * min(left)


def test_small_epochs_have_small_views() -> None:
    augmentation = Augmentation(0, 4, small_epochs=2, small_size=2)
    view = np.arange(16, dtype=np.uint8).reshape(4, 4, 1).repeat(3, axis=2)
    small = augmentation.resize(view, 1)
    # means of 2 x 2 blocks: (0 + 1 + 4 + 5) / 4 = 2.5, 4.5, 10.5, 12.5, rounded to whole numbers
    assert small.shape == (2, 2, 3)
    assert np.abs(small[..., 0] - np.array([[2.5, 4.5], [10.5, 12.5]])).max() <= 0.5
    assert augmentation.resize(view, 2) is view
