from pathlib import Path

import pytest
import yaml
from scipy.stats import binomtest, fisher_exact

from facemask.runs import cards

FOLDER = Path(__file__).parents[2] / "experiments" / "cards"
PRINTED = yaml.safe_load((FOLDER / "printed.yaml").read_text())


def test_what_is_printed_means_an_interval():
    low, high = cards.printed_interval("train_runtime", "1:37:16.87")
    assert (float(low), float(high)) == pytest.approx((5836.87, 5836.88))
    low, high = cards.printed_interval("total_flos", "3GF")
    assert (int(low) >> 30, int(high) >> 30, (int(high) + 1) >> 30) == (3, 3, 4)
    low, high = cards.printed_interval("eval_steps_per_second", "2.28")
    assert (float(low), float(high)) == pytest.approx((2.2795, 2.2805))


@pytest.mark.parametrize(("card", "errors"), [("vit", 38), ("deit", 28)])
def test_the_evaluation_set_has_3596_images_in_batches_of_8(card, errors):
    assert cards.evaluation(PRINTED[card]) == [(3596, 8, 450, errors)]


def test_one_transformer_fits_each_card():
    (vit,) = [t for t in cards.training(PRINTED["vit"]) if t.model]
    assert vit == cards.Training(14428, 4, 16, 800, 12800, 224, 85_800_194, "ViT-B/16")
    (deit,) = [t for t in cards.training(PRINTED["deit"]) if t.model]
    assert deit == cards.Training(14428, 4, 32, 900, 28796, 224, 85_801_730, "DeiT-B/16 with one head")
    # 451 steps an epoch, the last of 28 images: 14,428 + 449 x 32
    assert deit.images_seen == 14428 + 449 * 32 == 900 * 32 - 4
    assert 6 * 150_528 * 85_801_730 * 28_796 >> 30 == 2_078_245_655
    assert 6 * 150_528 * 85_800_194 * 12_800 >> 30 == 923_776_502


@pytest.mark.parametrize(
    ("name", "size", "prefix", "heads"),
    [
        ("vit_tiny_patch16_224", "Ti", 1, 1),
        ("vit_base_patch16_224", "B", 1, 1),
        ("vit_large_patch14_224", "L", 1, 1),
        ("deit_base_distilled_patch16_224", "B", 2, 2),
    ],
)
def test_parameters_are_timms(name, size, prefix, heads):
    timm, torch = pytest.importorskip("timm"), pytest.importorskip("torch")
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=2)
    found = sum(p.numel() for p in model.parameters())
    assert found == cards.parameters(size, 14 if "patch14" in name else 16, 224, prefix, heads)
    if "deit" in name:
        head = sum(p.numel() for p in model.head_dist.parameters())
        assert found - head == cards.parameters(size, 16, 224, 2, 1) == 85_801_730


def test_the_accuracies_do_not_differ_beyond_chance():
    found = cards.comparison((38, 28), 3596)
    assert found["fisher"] == pytest.approx(fisher_exact([[38, 3558], [28, 3568]]).pvalue)
    assert 0.2 < found["fisher"] < 0.3
    assert found["difference"][0] < 0 < found["difference"][1]
    # all 28 among the 38: 10 discordant; none in common: 66
    assert found["paired"] == pytest.approx([2 * 0.5**10, binomtest(28, 66).pvalue])
    exact = binomtest(3558, 3596).proportion_ci(method="exact")
    assert found["clopper_pearson"][0] == pytest.approx((exact.low, exact.high))


def test_the_readme_is_what_the_code_writes():
    text = cards.readme(PRINTED)
    assert (FOLDER / "README.md").read_text() == text
    for figure in ("3,596", "14,428", "85,800,194", "85,801,730", "28,796", "12,800", "5.3 samples/s", "4.9 samples/s"):
        assert figure in text


def test_a_card_that_contradicts_itself_is_not_explained():
    with pytest.raises(ValueError, match="unpack"):
        cards.readme(PRINTED | {"vit": PRINTED["vit"] | {"eval_steps_per_second": "12.324"}})
