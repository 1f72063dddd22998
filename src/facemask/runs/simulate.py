"""What the tests and intervals of `facemask compare` are worth, by simulation: `python -m facemask.runs.simulate`.

A model errs on a picture where a standard normal variable falls below a threshold. The variable has parts shared by
both models (hard groups, hard pictures), a part of the recipe (with it the two recipes find different groups hard) and
a part of the run; the threshold varies from seed to seed. So the true differences are known without simulation.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm

from facemask.files import write_text
from facemask.runs import statistics as st
from facemask.runs.compare import difference

FOLDER = Path("experiments/compare")
SIZES = {"alone": {1: 1.0}, "duplicates": {1: 0.7, 2: 0.15, 3: 0.08, 4: 0.04, 6: 0.02, 10: 0.01}}
SEED_SPREAD = 0.1  # of the threshold: at 2 % errors about 0.5 points between seeds
SETTINGS = [(0.005, 800), (0.005, 3000), (0.02, 800), (0.02, 3000), (0.05, 800)]
KINDS = ("alone", "duplicates", "one-sided")
BINS = [0, 10, 20, 50, 100, 10_000]


def draw_groups(kind: str, pictures: int, rng: np.random.Generator) -> np.ndarray:
    """Group of each picture, 0 to G - 1; about so many pictures."""
    choice = SIZES["alone" if kind == "alone" else "duplicates"]
    mean = sum(k * p for k, p in choice.items())
    counts = rng.choice(list(choice), round(pictures / mean), p=list(choice.values()))
    return np.repeat(np.arange(len(counts)), counts)


def draw_margins(
    group: np.ndarray, thresholds: np.ndarray, interaction: float, kind: str, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Margins of models x runs (an error where negative) and what is fixed of their variable.

    Args:
        group: of each picture, shape (N,).
        thresholds: shape (2, R).
        interaction: variance of the recipe's own part, 0 to 0.4.
        kind: of "one-sided" the second model's own part differs from picture to picture even inside a group.
        rng: of everything.

    Returns:
        Shape (2, R, N), and (2, N): the part that does not change with the seed.
    """
    groups, n = group[-1] + 1, len(group)
    shared = np.sqrt(0.3) * rng.normal(size=groups)[group] + np.sqrt(0.1) * rng.normal(size=n)
    fixed = shared + np.sqrt(interaction) * rng.normal(size=(2, groups))[:, group]
    own = rng.normal(size=(*thresholds.shape, groups))[:, :, group]
    if kind == "one-sided":
        own[1] = rng.normal(size=own[1].shape)
    return fixed[:, None] + np.sqrt(0.6 - interaction) * own - thresholds[:, :, None], fixed


def weights(repeats: int, rng: np.random.Generator) -> pd.DataFrame:
    """Accuracy of two fixed models: one row per repetition."""
    rows = []
    for (rate, pictures), kind in [(s, k) for s in SETTINGS for k in KINDS for _ in range(repeats)]:
        row = {"groups": kind, "errors, %": 100 * rate, "pictures": pictures}
        for spread in (0, SEED_SPREAD):
            threshold = norm.ppf(rate) + spread * rng.normal(size=(2, 1))
            group = draw_groups(kind, pictures, rng)
            wrong = draw_margins(group, threshold, 0.2, kind, rng)[0][:, 0] < 0
            change = wrong[0].astype(float) - wrong[1]
            if spread:
                found = st.mean_difference(change, group, rng, 300)
                truth = float(np.subtract(*norm.cdf(threshold[:, 0])))
                row |= {"coverage": found.low <= truth <= found.high, "discordant": int((change != 0).sum())}
            else:
                row["size, sign-flip"] = st.sign_flip(np.bincount(group, change), rng, 999) <= st.LEVEL
                mcnemar = st.exact_mcnemar(wrong[1], wrong[0]) <= st.LEVEL if kind == "alone" else np.nan
                row["size, McNemar"] = mcnemar
        rows.append(row)
    return pd.DataFrame(rows)


def recipes(repeats: int, rng: np.random.Generator) -> pd.DataFrame:
    """Accuracy of two recipes of equal expected error over seeds on one test set: one row per repetition."""
    rows = []
    cases = itertools.product({"alike": 0.0, "differ in what is hard": 0.3}.items(), (2, 3, 5), (0.005, 0.02, 0.05))
    for ((name, interaction), runs, rate), _ in itertools.product(cases, range(repeats)):
        group = draw_groups("duplicates", 800, rng)
        mean = norm.ppf(rate) * np.sqrt(1 + SEED_SPREAD**2)
        thresholds = mean + SEED_SPREAD * rng.normal(size=(2, runs))
        margins, fixed = draw_margins(group, thresholds, interaction, "duplicates", rng)
        expected = norm.cdf((mean - fixed) / np.sqrt(0.6 - interaction + SEED_SPREAD**2)).mean(axis=1)
        change = (margins[0] < 0).astype(float) - (margins[1] < 0)
        here = st.recipe(change.mean(axis=1), 1 / len(group))
        anywhere = st.recipe_on_new_pictures(change, group, 1 / len(group))
        rows.append(
            {"recipes": name, "seeds": runs, "errors, %": 100 * rate}
            | {"p <= 0.05, same pictures": here.p <= st.LEVEL}
            | {"coverage, same pictures": here.low <= expected[0] - expected[1] <= here.high}
            | {
                "size, new pictures": anywhere.p <= st.LEVEL,
                "coverage, new pictures": anywhere.low <= 0 <= anywhere.high,
            }
        )
    return pd.DataFrame(rows)


def folds(repeats: int, rng: np.random.Generator) -> pd.DataFrame:
    """Folds whose differences have the correlation 1/K, as Nadeau & Bengio take it for shared training pictures."""
    rows = []
    for count, _ in itertools.product((3, 5, 10), range(repeats)):
        change = np.sqrt(1 / count) * rng.normal() + np.sqrt(1 - 1 / count) * rng.normal(size=count)
        plain, corrected = st.recipe(change), st.recipe(change, folds=count)
        row = {"folds": count, "size": corrected.p <= st.LEVEL, "coverage": corrected.low <= 0 <= corrected.high}
        rows.append(row | {"size, uncorrected": plain.p <= st.LEVEL})
    return pd.DataFrame(rows)


def other_metrics(repeats: int, rng: np.random.Generator) -> pd.DataFrame:
    """Equally good models on pictures with duplicates: one row per repetition and metric."""
    rows = []
    for (rate, pictures), _ in itertools.product(((0.005, 800), (0.02, 800), (0.05, 1500)), range(repeats)):
        group = draw_groups("duplicates", pictures, rng)
        labels = rng.integers(0, 2, group[-1] + 1)[group]
        margin = draw_margins(group, np.full((2, 1), norm.ppf(rate)), 0.2, "duplicates", rng)[0][:, 0]
        logits = 2 * margin[:, :, None] * (2 * np.eye(2)[labels] - 1)
        for metric in ("balanced_accuracy", "macro_f1", "auroc", "nll", "brier", "ece"):
            found, p, _ = difference(metric, logits, labels, group, rng, 200, 199)
            row = {"metric": metric, "errors, %": 100 * rate, "pictures": pictures, "size": p <= st.LEVEL}
            rows.append(row | {"coverage": found.low <= 0 <= found.high})
    return pd.DataFrame(rows)


def _shares(frame: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """Percentages per setting of what is true or false, and of how many repetitions."""
    grouped = frame.astype({c: float for c in frame.columns if frame[c].dtype == bool}).groupby(by, observed=True)
    return (100 * grouped.mean()).astype(float).round(1).assign(repetitions=grouped.size()).reset_index()


def tables(repeats: int, seed: int) -> dict[str, pd.DataFrame]:
    """Title -> table; ``repeats`` per setting."""
    rng = np.random.default_rng(seed)
    fixed = weights(repeats, rng)
    names = [f"{low} to {high - 1}" for low, high in itertools.pairwise(BINS)]
    pairs = pd.cut(fixed.pop("discordant"), BINS, right=False, labels=names)
    by_pairs = fixed[["groups", "coverage"]].assign(**{"discordant pairs": pairs})
    return {
        "These weights: accuracy": _shares(fixed, ["groups", "errors, %", "pictures"]),
        "These weights: accuracy, by discordant pairs seen": _shares(by_pairs, ["groups", "discordant pairs"]),
        "This recipe: accuracy over seeds": _shares(recipes(repeats, rng), ["recipes", "seeds", "errors, %"]),
        "This recipe: over folds": _shares(folds(10 * repeats, rng), ["folds"]),
        "These weights: other metrics": _shares(other_metrics(repeats, rng), ["metric", "errors, %", "pictures"]),
    }


def readme(simulation: Path) -> str:
    """The tables of a simulation.csv in Markdown."""
    long = pd.read_csv(simulation, dtype=str)
    command = f"python -m facemask.runs.simulate --repeats {long['repetitions'][0]} --seed {long['seed'][0]}"
    text = f"""# What `facemask compare` is worth

Written by `{command}`; nothing here is typed.

Percentages: size = how often p <= 0.05 where there is no difference (nominal 5, less where a test is exact),
coverage = how often the 95 % interval holds the true difference. Groups: *alone* (no duplicates),
*duplicates* (30 % of the groups have 2 to 10 pictures, on which a model is mostly right or wrong together),
*one-sided* (so for one model, not for the other). A 5 from 1,000 repetitions has a standard error of 0.7.
How it is drawn: `src/facemask/runs/simulate.py`.

"""
    for title, part in long.groupby("table", sort=False):
        table = part.drop(columns=["table", "seed"]).dropna(axis=1, how="all").fillna("–")
        body = [list(table.columns), ["---"] * table.shape[1], *table.to_numpy().tolist()]
        text += "\n".join([f"## {title}", "", *(f"| {' | '.join(row)} |" for row in body), "", ""])
    return f"""{text}Over seeds on one test set the t-interval speaks of that test set. Where two recipes differ in what
is hard for them, its p-value says little of other pictures (column `p <= 0.05, same pictures`, where the recipes are
equal over all pictures but not on those drawn); use the row `new pictures`.
"""


def main() -> None:
    """Simulate and write README.md and simulation.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=1000, help="per setting (some ten minutes on one core)")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    found = tables(options.repeats, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    long = pd.concat([table.assign(table=title, seed=options.seed) for title, table in found.items()])
    write_text(options.out / "simulation.csv", long.convert_dtypes().to_csv(index=False))
    write_text(options.out / "README.md", readme(options.out / "simulation.csv"))


if __name__ == "__main__":
    main()
