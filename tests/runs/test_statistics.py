from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom, binomtest, chi2, norm, t, ttest_1samp

from facemask.runs import simulate
from facemask.runs import statistics as st


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_sign_flip_counts_every_change_of_signs_of_few_groups():
    # |±3 ±1 ±1| >= 5 in 2 of 8 cases; zeros change nothing
    assert st.sign_flip(np.array([3.0, 1, 1, 0, 0]), rng(), 9999) == 2 / 8
    assert st.sign_flip(np.zeros(4), rng(), 9999) == st.sign_flip(np.array([0, 2.0]), rng(), 9999) == 1.0
    # single pictures: the exact sign-flip test is the exact McNemar test
    values = np.array([1.0] * 9 + [-1.0] * 2)
    assert st.sign_flip(values, rng(), 9999) == pytest.approx(binomtest(2, 11).pvalue)
    right = np.array([True] * 9 + [False] * 2)
    assert st.exact_mcnemar(right, ~right) == pytest.approx(binomtest(2, 11).pvalue)


def test_sign_flip_by_drawing_agrees_with_the_binomial():
    values = np.array([1.0] * 60 + [-1.0] * 40)
    assert st.sign_flip(values, rng(), 20_000) == pytest.approx(binomtest(40, 100).pvalue, abs=0.005)


def test_resamples_of_groups_have_the_spread_of_the_binomial():
    found = st.resampled(np.repeat([1.0, 0], [30, 70]), np.ones(100), rng(), 20_000)
    assert found.mean() == pytest.approx(0.3, abs=0.002)
    assert found.std() == pytest.approx(np.sqrt(0.3 * 0.7 / 100), rel=0.02)


def test_the_interval_of_accuracies_is_bonett_and_prices():
    """12 + 4 discordant of 200: standard error² = (13 + 5)/n² - difference²/n, up to the noise of the bootstrap."""
    difference = np.repeat([1.0, -1.0, 0.0], [12, 4, 184])
    found = st.mean_difference(difference, np.arange(200), rng(), 40_000)
    error = found.error
    assert found.difference == pytest.approx(0.04)
    assert error**2 == pytest.approx(18 / 200**2 - 0.04**2 / 200, rel=0.03)
    assert (found.low, found.high) == pytest.approx((0.04 - 1.96 * error, 0.04 + 1.96 * error), abs=1e-5)
    twice = st.mean_difference(np.repeat(difference, 2), np.repeat(np.arange(200), 2), rng(), 40_000)
    assert twice.error == pytest.approx(error, rel=0.02)  # every picture twice: nothing learned


def test_models_that_are_right_on_the_same_pictures_are_not_certainly_equal():
    found = st.mean_difference(np.zeros(300), np.arange(300), rng(), 100)
    assert found.high == -found.low == pytest.approx(1.96 * np.sqrt(2) / 300, rel=1e-3)


def power_of_exact_mcnemar(n: int, discordance: float, difference: float) -> float:
    total = 0.0
    for k in range(n + 1):
        wins = np.arange(k + 1)
        rejected = 2 * np.minimum(binom.cdf(wins, k, 0.5), binom.sf(wins - 1, k, 0.5)) <= 0.05
        share = (discordance + difference) / 2 / discordance
        total += binom.pmf(k, n, discordance) * binom.pmf(wins[rejected], k, share).sum()
    return total


@pytest.mark.parametrize(("n", "differing"), [(800, 80), (400, 20)])
def test_the_detectable_difference_is_found_four_times_in_five(n, differing):
    difference = np.repeat([1.0, -1.0, 0.0], [differing // 2, differing // 2, n - differing])
    delta = st.detectable_accuracy(difference, np.arange(n))
    # Connor's formula is of the uncorrected test; the exact one has a few percent less
    assert 0.70 < power_of_exact_mcnemar(n, differing / n, delta) < 0.81
    doubled = st.detectable_accuracy(np.repeat(difference, 2), np.repeat(np.arange(n), 2))
    assert doubled == pytest.approx(delta, rel=1e-6)


def test_without_any_disagreement_a_difference_must_make_its_own():
    # discordance = δ: n δ² = (z sqrt(δ) + z' sqrt(δ - δ²))², δ = 7.8/n
    assert st.detectable_accuracy(np.zeros(1000), np.arange(1000)) == pytest.approx(7.8 / 1000, rel=0.02)
    assert st.detectable_accuracy(np.zeros(1000), np.repeat(np.arange(500), 2)) == pytest.approx(7.8 / 500, rel=0.02)
    assert np.isnan(st.detectable_accuracy(np.zeros(3), np.arange(3)))


def test_the_recipe_has_students_interval():
    differences = np.array([0.010, 0.013, 0.004, 0.012])
    found, expected = st.recipe(differences), ttest_1samp(differences, 0)
    interval = expected.confidence_interval()
    assert (found.low, found.high, found.p) == pytest.approx((interval.low, interval.high, expected.pvalue))


def test_equal_differences_of_two_seeds_are_not_certain():
    """Both seeds 3 pictures of 600 better: the variance is that of rounding, (1/600)²/6."""
    found = st.recipe(np.array([0.005, 0.005]), step=1 / 600)
    assert found.high - found.difference == pytest.approx(12.706 * np.sqrt((1 / 600) ** 2 / 6 / 2), rel=1e-4)
    assert found.p > 0.05
    assert st.recipe(np.zeros(3), step=1 / 600).p == 1.0


def test_new_pictures_widen_the_recipes_interval_where_pictures_decide():
    """Better on the same 12 pictures of 200 with every seed: no spread over seeds, but over pictures."""
    one = np.repeat([1.0, 0.0], [12, 188])
    differences = np.stack([one, one, one])
    same = st.recipe(differences.mean(axis=1), 1 / 200)
    new = st.recipe_on_new_pictures(differences, np.arange(200), 1 / 200)
    spread = np.sqrt(0.06 * 0.94 / 199)
    seeds = same.high - same.difference
    assert new.high - new.difference == pytest.approx(np.hypot(seeds, 1.972 * spread), rel=1e-3)
    # p: the level at which the interval ends at 0
    assert (new.p < 0.05) == (new.low > 0)


def test_folds_share_training_pictures():
    """Nadeau & Bengio: variance times 1/5 + 1/4 for five folds; two seeds of each: 1/10 + 1/4, df 9."""
    differences = np.array([0.010, 0.013, 0.004, 0.012, 0.011])
    found, spread = st.recipe(differences, folds=5), np.std(differences, ddof=1)
    assert found.high - found.difference == pytest.approx(t.ppf(0.975, 4) * spread * np.sqrt(1 / 5 + 1 / 4))
    twice = np.repeat(differences, 2)
    expected = np.std(twice, ddof=1) * np.sqrt(1 / 10 + 1 / 4)
    assert st.recipe(twice, folds=5).error == pytest.approx(expected)


def test_runs_that_are_all_equal():
    assert st.recipe(np.zeros(3)).p == st.recipe_on_new_pictures(np.zeros((3, 9)), np.arange(9)).p == 1.0
    assert np.isnan(st.recipe(np.ones(3)).p)
    assert np.isnan(st.detectable(0.0))
    assert np.isnan(st.detectable_recipe(0.0, 3))


@pytest.mark.parametrize(("runs", "level"), [(2, 0.05), (2, 0.025), (3, 0.002), (5, 0.05)])
def test_the_detectable_difference_of_recipes_has_a_power_of_80_percent(runs, level):
    """P(T > c) = E Φ(shift - c s), s² = χ²/df."""
    shift = st.detectable_recipe(0.01, runs, level) / 0.01
    s = np.sqrt(chi2.ppf((np.arange(100_000) + 0.5) / 100_000, runs - 1) / (runs - 1))
    assert norm.cdf(shift - t.isf(level / 2, runs - 1) * s).mean() == pytest.approx(0.8, abs=1e-4)


def test_holm_by_hand():
    assert st.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    found = st.holm([0.02, float("nan")])
    assert found[0] == 0.02
    assert np.isnan(found[1])


def test_the_readme_is_written_from_the_figures():
    folder = Path(__file__).parents[2] / "experiments" / "compare"
    assert (folder / "README.md").read_text() == simulate.readme(folder / "simulation.csv")


@pytest.mark.slow
def test_sizes_and_coverage_by_simulation():
    """A small version of experiments/compare, tolerances three standard errors wide."""
    weights, by_pairs, recipe, folds, other = simulate.tables(repeats=100, seed=11).values()
    allowed = 6 + 300 * np.sqrt(0.05 * 0.95 / 100)
    assert (weights[["size, sign-flip", "size, McNemar"]].fillna(0) < allowed).all(axis=None)
    assert weights["size, sign-flip"].mean() < 6
    many = by_pairs[by_pairs["discordant pairs"].isin(["50 to 99", "100 to 9999"])]
    margin = 2 + 300 * np.sqrt(0.05 * 0.95 / many["repetitions"])
    assert ((many["coverage"] - 95).abs() < margin).all()
    alike = recipe[recipe["recipes"] == "alike"]
    assert (alike["p <= 0.05, same pictures"] < allowed).all()
    assert (recipe["size, new pictures"] < allowed).all()
    assert recipe["size, new pictures"].mean() < 6
    assert (recipe["p <= 0.05, same pictures"] > recipe["size, new pictures"] + 5).any()
    assert ((folds["size"] - 5).abs() < 2.1).all()
    assert (folds["size, uncorrected"] > 9).all()
    assert (other["size"] < 6 + 400 * np.sqrt(0.05 * 0.95 / 100)).all()  # of eighteen one may be three beyond
    assert other["size"].mean() < 7
    assert other["size"].mean() < 6
