"""Paired comparison of two models on the same pictures: pure functions, no torch; simulated in `simulate.py`.

*These weights*: pictures are the sample, whole groups of near-duplicates are drawn or swapped.

- interval: difference ± 1.96 standard errors, the standard error from resampled groups (cluster bootstrap, Field &
  Welsh 2007). Two further groups that differ, one each way, are added to the variance (Bonett & Price 2012, "Adjusted
  Wald confidence interval for a difference of binomial proportions based on paired data"). Percentile, BCa and
  bootstrap-t intervals covered less under strong clustering.
- test: sign-flip over groups: where both models are alike, swapping their outputs on a group changes nothing. Without
  duplicates exact McNemar is the test of accuracies.
- smallest detectable difference: Connor 1987, "Sample size for testing differences in proportions for the
  paired-sample design", solved for the difference, the pictures divided by the design effect; a difference of δ needs
  a discordance of at least δ. Other metrics: (z_{1-α/2} + z_{power}) standard errors.

*This recipe*: seeds or folds are the sample: t-interval of the paired differences. Folds share training pictures
(Nadeau & Bengio 2003). Seeds that share a test set say nothing about other pictures: :func:`recipe_on_new_pictures`
adds the variance between groups of pictures.
"""

from dataclasses import dataclass

import numpy as np

LEVEL, POWER = 0.05, 0.8
NAN = float("nan")


@dataclass(frozen=True)
class Estimate:
    """A difference with its 95 % interval, standard error and p-value; nan where it cannot be told."""

    difference: float
    low: float
    high: float
    error: float
    p: float = NAN


def resampled(values: np.ndarray, sizes: np.ndarray, rng: np.random.Generator, resamples: int) -> np.ndarray:
    """Mean per picture in each resample of groups, shape (resamples,), from groups' sums and sizes, shape (G,)."""
    # groups of equal sum and size are alike: how often each kind is drawn is multinomial
    kinds, count = np.unique(np.stack([values, sizes], axis=1), axis=0, return_counts=True)
    drawn = rng.multinomial(len(sizes), count / len(sizes), resamples) @ kinds
    return drawn[:, 0] / drawn[:, 1]


def sign_flip(values: np.ndarray, rng: np.random.Generator, flips: int) -> float:
    """Two-sided p-value of the sum of ``values`` (one per group) over changes of their signs; exact for few."""
    from scipy.stats import permutation_test

    values = values[values != 0]
    if len(values) < 2:
        return 1.0  # both signs of one group are equally far from 0
    found = permutation_test(
        (values,), np.sum, permutation_type="samples", vectorized=True, n_resamples=flips, batch=1000, rng=rng
    )
    return float(found.pvalue)


def wald(value: float, error: float) -> Estimate:
    """95 % interval of a difference with the given standard error."""
    from scipy.stats import norm

    reach = float(norm.ppf(1 - LEVEL / 2)) * error
    return Estimate(value, value - reach, value + reach, error)


def mean_difference(difference: np.ndarray, group: np.ndarray, rng: np.random.Generator, resamples: int) -> Estimate:
    """*These weights*, for a metric that is a mean over pictures; no p-value.

    Args:
        difference: per picture, shape (N,).
        group: of each picture, 0 to G - 1, shape (N,).
        rng: for resamples.
        resamples: of the bootstrap.
    """
    sizes, sums = np.bincount(group).astype(float), np.bincount(group, difference)
    variance = resampled(sums, sizes, rng, resamples).var(ddof=1)
    differing = sums[sums != 0]
    added = np.mean(differing**2) if len(differing) else np.sum(sizes**2) / sizes.sum()
    return wald(float(difference.mean()), float(np.sqrt(variance + 2 * added / len(group) ** 2)))


def exact_mcnemar(right_a: np.ndarray, right_b: np.ndarray) -> float:
    """p-value of the exact (binomial) McNemar test of two boolean vectors over the same independent pictures."""
    from statsmodels.stats.contingency_tables import mcnemar

    table = [[0, int((right_a & ~right_b).sum())], [int((right_b & ~right_a).sum()), 0]]
    return float(mcnemar(table, exact=True).pvalue)


def detectable_accuracy(difference: np.ndarray, group: np.ndarray, level: float = LEVEL) -> float:
    """Smallest difference of accuracies found with 80 % power on such pictures (formula above).

    The design effect is Σ(group sums)² / Σ(differences)² of the pictures seen; Σ(group sizes)² / N where none differ.
    """
    from scipy.optimize import brentq
    from statsmodels.stats.power import normal_power_het

    sums, sizes, n = np.bincount(group, difference), np.bincount(group), len(group)
    observed = np.mean(difference**2)
    effect = max(1.0, (sums**2).sum() / (difference**2).sum() if observed else (sizes**2).sum() / n)

    def missing(delta: float) -> float:
        discordance = min(1.0, max(observed, delta))
        spread = np.sqrt(max(1e-12, discordance - delta**2))
        return POWER - normal_power_het(delta, n / effect, level, std_null=discordance**0.5, std_alternative=spread)

    return float(brentq(missing, 1e-9, 1.0)) if missing(1.0) < 0 else NAN


def detectable(error: float, level: float = LEVEL) -> float:
    """The same for any metric, from the standard error of its difference; nan where that is 0 or undefined."""
    from scipy.stats import norm

    return float((norm.ppf(1 - level / 2) + norm.ppf(POWER)) * error) if error > 0 else NAN


def recipe(differences: np.ndarray, step: float = 0.0, folds: int = 1) -> Estimate:
    """*This recipe*: t-interval of the paired differences of runs, shape (R,), R >= 2.

    Args:
        differences: of runs.
        step: by how much a difference can change at least (accuracy: 1 / pictures). With few runs and few errors equal
            differences come about by rounding; the variance is never taken below that of rounding, step² / 6 (two
            roundings, Sheppard).
        folds: K, if runs have test sets of their own and share training pictures. The variance of the mean is then
            (1/R + n_test/n_train) that of the runs (Nadeau & Bengio 2003, "Inference for the generalization error";
            several seeds a fold: Bouckaert & Frank 2004), with n_test/n_train = 1/(K - 1), too much where folds are
            missing. Its df are R - 1.
    """
    from scipy.stats import t

    runs, value = len(differences), float(np.mean(differences))
    variance = max(float(np.var(differences, ddof=1)), step**2 / 6)
    error = float(np.sqrt(variance * (1 / runs + (1 / (folds - 1) if folds > 1 else 0))))
    reach = float(t.ppf(1 - LEVEL / 2, runs - 1)) * error
    p = float(2 * t.sf(abs(value) / error, runs - 1)) if error > 0 else (NAN if value else 1.0)
    return Estimate(value, value - reach, value + reach, error, p)


def recipe_on_new_pictures(differences: np.ndarray, group: np.ndarray, step: float = 0.0) -> Estimate:
    """*This recipe*, on other pictures like these: runs and groups of pictures are both a sample.

    Args:
        differences: of runs that share a test set, per run and picture, shape (R, N).
        group: of each picture, shape (N,).
        step: see :func:`recipe`.

    Variances between runs and between groups add up, less what is counted in both (crossed random effects; Owen 2007,
    "The pigeonhole bootstrap"). Each has its own t quantile, combined as the root of the sum of squares (MOVER; Zou &
    Donner 2008): with two runs Satterthwaite's degrees of freedom gave a size of 12 %.
    """
    from scipy.optimize import brentq
    from scipy.stats import t

    runs, n = differences.shape
    per_run, sizes = differences.mean(axis=1), np.bincount(group)
    between_runs = max(float(np.var(per_run, ddof=1)), step**2 / 6) / runs
    residuals = np.stack([np.bincount(group, d) for d in differences]) - per_run[:, None] * sizes
    groups = len(sizes)
    between_groups = (residuals.mean(axis=0) ** 2).sum() * groups / max(1, groups - 1) / n**2
    both = residuals.var(axis=0, ddof=1).sum() / runs / n**2
    pictures = max(0.0, float(between_groups - both))
    value = float(per_run.mean())

    def reach(level: float) -> float:
        parts = [t.isf(level / 2, df) ** 2 * v for df, v in ((runs - 1, between_runs), (groups - 1, pictures)) if v > 0]
        return float(np.sqrt(sum(parts)))

    # reach falls from infinity at 0 to 0 at 1
    p = float(brentq(lambda level: reach(level) - abs(value), 1e-15, 1.0)) if reach(1e-15) > abs(value) else 0.0
    if between_runs + pictures == 0:
        p = NAN if value else 1.0
    half = reach(LEVEL)
    return Estimate(value, value - half, value + half, half / float(t.isf(LEVEL / 2, runs - 1)), p)


def detectable_recipe(error: float, runs: int, level: float = LEVEL) -> float:
    """Smallest difference that a paired t-test of as many runs finds with 80 % power (noncentral t).

    statsmodels' TTestPower.solve_power is wrong without a word for two runs and small levels: it stops at 10.
    """
    from scipy.optimize import brentq
    from scipy.stats import nct, t

    critical = t.isf(level / 2, runs - 1)
    return brentq(lambda shift: nct.sf(critical, runs - 1, shift) - POWER, 0, 100 * critical) * error or NAN


def holm(p: list[float]) -> list[float]:
    """Holm's adjusted p-values; nan stays nan and counts for nothing."""
    from statsmodels.stats.multitest import multipletests

    adjusted = np.array(p, dtype=float)
    known = ~np.isnan(adjusted)
    if known.any():
        adjusted[known] = multipletests(adjusted[known], method="holm")[1]
    return adjusted.tolist()
