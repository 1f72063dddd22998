"""`facemask compare`: do two models differ, on the same pictures (these weights) and over seeds or folds (this recipe)?

The first arm is the reference; differences are arm - reference. How: see `statistics.py`, and what it is worth:
`experiments/compare/README.md`.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from facemask.errors import UserError
from facemask.files import write_json
from facemask.runs import statistics as st
from facemask.runs.arms import Arm, load
from facemask.runs.metrics import SCALARS, Scalars, losses
from facemask.runs.page import INK, MUTED, SERIES, Cell, Page, plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
RESAMPLES, FLIPS = 2000, 9999
LOSSES = ("nll", "brier", "ece")
POINTS = ("accuracy", "balanced_accuracy", "macro_f1")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _weight(metric: str, labels: np.ndarray) -> np.ndarray:
    """What a picture that is right adds to N times the metric, shape (N,)."""
    _, code, support = np.unique(labels, return_inverse=True, return_counts=True)
    return np.ones(len(labels)) if metric == "accuracy" else len(labels) / (len(support) * support[code])


def _per_picture(metric: str, logits: np.ndarray, labels: np.ndarray) -> np.ndarray | None:
    """Values of the pictures whose mean is the metric, shape (N,); None where there are none such."""
    if metric in ("accuracy", "balanced_accuracy"):
        return _weight(metric, labels) * (logits.argmax(axis=1) == labels)
    if metric == "nll":
        return losses(logits, labels)
    if metric == "brier":
        p = np.exp(-np.stack([losses(logits, np.full(len(labels), c)) for c in range(logits.shape[1])], axis=1))
        return ((p - np.eye(logits.shape[1])[labels]) ** 2).sum(axis=1)
    return None


def difference(
    metric: str,
    pair: Sequence[np.ndarray],
    labels: np.ndarray,
    group: np.ndarray,
    rng: np.random.Generator,
    resamples: int,
    flips: int,
) -> tuple[st.Estimate, float, np.ndarray | None]:
    """Any metric of the second less that of the first; see `statistics.py`.

    Args:
        metric: one of metrics.SCALARS.
        pair: logits of both, each of shape (N, C).
        labels: class indices, shape (N,).
        group: of each picture, 0 to G - 1, shape (N,).
        rng: for resamples and flips.
        resamples: of the bootstrap.
        flips: of signs.

    Returns:
        The estimate, the sign-flip test's p-value, and what each picture adds to it (a mean), where that can be told.
    """
    from scipy.stats import rankdata

    each = [_per_picture(metric, logits, labels) for logits in pair]
    if each[0] is not None and each[1] is not None:
        change = each[1] - each[0]
        found = st.mean_difference(change, group, rng, resamples)
        return found, st.sign_flip(np.bincount(group, change), rng, flips), change
    n, groups = len(labels), int(group.max()) + 1
    # one table of both models' rows: resampling draws a group in both, swapping exchanges its two copies
    scalars = Scalars(np.concatenate(pair), np.tile(labels, 2), np.concatenate([group, group + groups]))
    # both models ranked first: swapping scores of other scales would say nothing (Bandos, Rockette & Gur 2005)
    scalars.log_odds = np.concatenate([rankdata(odds, axis=0) for odds in np.split(scalars.log_odds, 2)])

    def differences(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return scalars(np.hstack([second, first]))[metric] - scalars(np.hstack([first, second]))[metric]

    value = float(differences(np.ones((1, groups)), np.zeros((1, groups)))[0])
    chunk = max(1, 1_000_000 // n)
    drawn, hits = [], 0
    for start in range(0, resamples, chunk):
        counts = rng.multinomial(groups, np.full(groups, 1 / groups), min(chunk, resamples - start)).astype(float)
        drawn.append(differences(counts, np.zeros_like(counts)))
    for start in range(0, flips, chunk):
        kept = rng.integers(0, 2, (min(chunk, flips - start), groups)).astype(float)
        hits += int((np.abs(differences(kept, 1 - kept)) >= abs(value) - 1e-12).sum())
    error = float(np.nanstd(np.concatenate(drawn), ddof=1))
    return st.wald(value, error), (1 + hits) / (1 + flips), None


def _join(a: pd.Series, b: pd.Series) -> tuple[np.ndarray, bool]:
    """Group of every picture, 0 to G - 1: what either arm puts together; False: neither knows groups."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    first, known = np.arange(len(a)), [pd.factorize(g)[0] for g in (a, b) if g.notna().all()]
    if not known:
        return first, False
    columns = np.concatenate([len(a) * (k + 1) + codes for k, codes in enumerate(known)])
    rows, size = np.tile(first, len(known)), len(a) * (len(known) + 1)
    found = connected_components(coo_matrix((np.ones(len(rows)), (rows, columns)), (size, size)), directed=False)[1]
    return pd.factorize(found[: len(a)])[0], True


def _by_the_end(name: str, table: pd.DataFrame, known: pd.Index) -> pd.DataFrame:
    """Ids that are longer paths to known ones, shortened: elsewhere they often start with the folder."""
    wanted = set(known)
    ends = [["/".join(i.split("/")[k:]) for k in range(i.count("/") + 1)] for i in table.index]
    table = table.set_axis([next((end for end in longer if end in wanted), longer[0]) for longer in ends])
    if table.index.has_duplicates:
        twice = table.index[table.index.duplicated()][0]
        raise UserError(f"{name} has several pictures {twice}: give both tables paths that tell them apart")
    return table


def _pair(reference: Arm, arm: Arm, key_a: str, key_b: str) -> tuple[pd.DataFrame, pd.DataFrame, Row]:
    """Both tables on their common ids, labels filled in, and what was lost."""
    a, b = reference.runs[key_a], arm.runs[key_b]
    if not len(a.index.intersection(b.index)):
        a, b = _by_the_end(reference.name, a, b.index), _by_the_end(arm.name, b, a.index)
    common = a.index.intersection(b.index, sort=False)
    if not len(common):
        none = f"{reference.name} and {arm.name} have no picture in common ({a.index[0]} ..., {b.index[0]} ...)"
        raise UserError(f"{none}: compare predictions for the same split of the same data")
    lost = {reference.name: len(a) - len(common), arm.name: len(b) - len(common)}
    a, b = a.loc[common].copy(), b.loc[common].copy()
    for one, other in ((a, b), (b, a)):
        if one["label"].isna().all():
            one["label"] = other["label"]
    if a["label"].isna().any():
        raise UserError(f"neither {reference.name} nor {arm.name} has labels: add a column label")
    wrong = common[(a["label"] != b["label"]).to_numpy()]
    if len(wrong):
        some = ", ".join(f"{i} ({a['label'][i]}, {b['label'][i]})" for i in wrong[:3])
        odd = f"{reference.name} and {arm.name} label {len(wrong)} of {len(common)} pictures differently: {some}"
        raise UserError(f"{odd}; where the column is the model's decision, leave it out")
    return a, b, lost


def _name_classes(arms: Sequence[Arm]) -> list[str]:
    """Give all arms the classes of the first that names them; indices stand for their order."""
    named = next((arm for arm in arms if not all(c.isdigit() for c in arm.classes)), arms[0])
    for arm in arms:
        if set(arm.classes) == set(named.classes):
            continue
        if len(arm.classes) != len(named.classes) or not all(c.isdigit() for c in arm.classes):
            both = f"{arm.name} has the classes {', '.join(arm.classes)}, {named.name} has {', '.join(named.classes)}"
            raise UserError(f"{both}: rename the columns and labels of one of them")
        order = dict(zip(sorted(arm.classes, key=int), named.classes, strict=True))
        for key, table in arm.runs.items():
            arm.runs[key] = table.rename(columns=order).assign(label=table["label"].replace(order))
        arm.understood += f"; classes {', '.join(order)} taken for {', '.join(order.values())}"
    return named.classes


def compare(
    paths: Sequence[Path], metric: str = "accuracy", heads: Sequence[str] = (), split: str | None = None
) -> dict[str, Any]:
    """Compare the first arm with every other.

    Args:
        paths: run folders, folders of runs, records, or tables; the first is the reference.
        metric: one of metrics.SCALARS.
        heads: none: each arm's reported head; one for all, or one per arm.
        split: test where there is one.

    Returns:
        ``{"metric", "classes", "arms": [{"name", "understood"}], "weights": [row], "recipe": [row], "notes":
        [sentence]}``; nan is what cannot be told.

    Raises:
        UserError: what is to be compared cannot be read or does not fit together.
    """
    if metric not in SCALARS:
        raise UserError(f"there is no metric {metric!r}: choose one of {', '.join(SCALARS)}")
    if not 2 <= len(paths) <= len(LETTERS):
        raise UserError(f"name 2 to {len(LETTERS)} things to compare; the first is the reference")
    if len(heads) not in (0, 1, len(paths)):
        raise UserError(f"{len(heads)} heads for {len(paths)} arms: give --head once, or once per arm")
    chosen = list(heads) if len(heads) == len(paths) else [*heads, None][:1] * len(paths)
    arms = [load(path, head, split) for path, head in zip(paths, chosen, strict=True)]
    for letter, path, arm in zip(LETTERS, paths, arms, strict=False):
        arm.name, arm.understood = letter, f"{path}: {arm.understood}"
    classes = _name_classes(arms)
    matched = [(arm, _matched(arms[0], arm)) for arm in arms[1:]]
    # Holm's first step
    level = st.LEVEL / sum(len(keys) for _, keys in matched)
    level_recipe = st.LEVEL / max(1, sum(len(keys) > 1 for _, keys in matched))
    weights: list[Row] = []
    recipes: list[Row] = []
    notes: list[str] = []
    for arm, keys in matched:
        rows, changes = [], []
        for key_a, key_b in keys:
            a, b, lost = _pair(arms[0], arm, key_a, key_b)
            run = key_a if key_a == key_b else " against ".join(filter(None, (key_a, key_b)))
            row, change = _weights(a, b, classes, metric, level)
            rows.append({"arm": arm.name, "run": run, "lost": lost} | row)
            changes.append(change)
        weights += rows
        if len(rows) > 1:
            recipes += _recipe(arm.name, [a for a, _ in keys], rows, changes, level_recipe)
        else:
            notes.append(
                f"{arm.name}: nothing can be said about the recipe from one run of each; train at least two seeds or "
                "folds of both and give folders or records that hold them."
            )
    for family in (weights, *([r for r in recipes if r["on"] == on] for on in ("same pictures", "new pictures"))):
        for row, adjusted in zip(family, st.holm([row["p"] for row in family]), strict=True):
            row["p_holm"] = adjusted
    said = [{"name": arm.name, "understood": arm.understood} for arm in arms]
    return {
        "metric": metric, "classes": classes, "arms": said, "weights": weights, "recipe": recipes, "notes": notes
    }  # fmt: skip


def _matched(reference: Arm, arm: Arm) -> list[tuple[str, str]]:
    common = [key for key in reference.runs if key in arm.runs]
    if common:
        return [(key, key) for key in common]
    if len(reference.runs) == len(arm.runs) == 1:
        return [(next(iter(reference.runs)), next(iter(arm.runs)))]
    both = f"{reference.name} has {', '.join(reference.runs)}, {arm.name} has {', '.join(arm.runs)}"
    raise UserError(f"{both}: runs are paired by seed and fold, and none is in both")


def _weights(
    a: pd.DataFrame, b: pd.DataFrame, classes: Sequence[str], metric: str, level: float
) -> tuple[Row, pd.DataFrame | None]:
    """*These weights*: the row, and by picture its group and what it adds (where the metric is a mean)."""
    group, known = _join(a["group"], b["group"])
    labels = a["label"].map({name: i for i, name in enumerate(classes)})
    if labels.isna().any():
        raise UserError(f"the label {a['label'][labels.isna()].iloc[0]!r} is none of the classes {', '.join(classes)}")
    y, n, groups = labels.to_numpy(dtype=np.int64), len(a), int(group.max()) + 1
    logits = [table[list(classes)].to_numpy(dtype=np.float64) for table in (a, b)]
    values = [float(Scalars(table, y, group)(np.ones((1, groups)))[metric][0]) for table in logits]
    if not np.isfinite(values).all():
        raise UserError(f"{metric} is undefined on these {n} pictures: they are all of one class")
    found, p, change = difference(metric, logits, y, group, np.random.default_rng(0), RESAMPLES, FLIPS)
    decided = [table.argmax(axis=1) for table in logits]
    sure = [np.exp(-losses(table, choice)) for table, choice in zip(logits, decided, strict=True)]
    differing = np.flatnonzero((decided[0] == y) != (decided[1] == y))
    exact = metric == "accuracy" and groups == n
    row = {
        "n": n,
        "groups": groups,
        "reference_value": values[0],
        "arm_value": values[1],
        **vars(found),
        "p": st.exact_mcnemar(decided[1] == y, decided[0] == y) if exact else p,
        "test": "exact McNemar" if exact else "sign-flip over groups",
        "p_sign_flip": p,
        "detectable": st.detectable(found.error, level)
        if change is None or metric != "accuracy"
        else st.detectable_accuracy(change, group, level),
        "step": float(_weight(metric, y).min()) / n if metric in POINTS[:2] else 0.0,
        "differing": len(differing),
        "independent": not known,
        "disagree": [
            [a.index[i], a["label"].iloc[i], *(x for k in (0, 1) for x in (classes[decided[k][i]], float(sure[k][i])))]
            for i in differing.tolist()
        ],
    }
    return row, None if change is None else pd.DataFrame({"group": group, "change": change}, a.index)


def _recipe(
    name: str, keys: Sequence[str], rows: Sequence[Row], changes: Sequence[pd.DataFrame | None], level: float
) -> list[Row]:
    """*This recipe*: over the matched runs, on these pictures and on others like them."""
    folds = len({match[0] for key in keys if (match := re.search(r"fold \S+", key))})
    differences, step = np.array([row["difference"] for row in rows]), rows[0]["step"]
    found = {"same pictures": st.recipe(differences, step, folds)}
    first = changes[0]
    if folds < 2 and first is not None and all(c is not None and c.index.equals(first.index) for c in changes):
        matrix = np.stack([c["change"] for c in changes if c is not None])
        found["new pictures"] = st.recipe_on_new_pictures(matrix, first["group"].to_numpy(), step)
    shared = {"arm": name, "runs": len(rows), "over": "folds" if folds > 1 else "seeds"}
    return [
        {**shared, "on": on, "differences": differences.tolist(), **vars(estimate)}
        | {"detectable": st.detectable_recipe(estimate.error, len(rows), level)}
        for on, estimate in found.items()
    ]


def _text(value: float, metric: str, *, sign: bool = False) -> str:
    """A value or difference: share metrics in points of a hundred."""
    if value != value:
        return "–"
    scale, digits = (100, 2) if metric in POINTS else (1, 4)
    return f"{scale * value:{'+' if sign else ''}.{digits}f}"


def _where(row: Row) -> str:
    if "run" in row:
        return row["run"]
    return f"{row['runs']} {row['over']}" + (f", {row['on']}" if row["over"] == "seeds" else "")


def _verdict(row: Row, metric: str) -> str:
    who = f"{'These weights' if 'run' in row else 'This recipe'}, {row['arm']} {_where(row)}".rstrip()
    if row["p_holm"] <= st.LEVEL:
        sense = "better" if (row["difference"] > 0) == (metric not in LOSSES) else "worse"
        return f"{who}: {sense} than A (p {row['p_holm']:.2g}, Holm)."
    smallest, unit = _text(row["detectable"], metric), "points" if metric in POINTS else "units"
    if smallest == "–":
        return f"{who}: no difference shown; how small a one could have been cannot be told."
    return f"{who}: no difference shown; one of {smallest} {unit} would have been in {st.POWER:.0%} of cases."


def _remark(row: Row) -> str:
    """What a reader must know about a row: pictures lost, groups, tests."""
    lost = ", ".join(f"{count} of {name}" for name, count in row["lost"].items() if count)
    return (
        f"{row['arm']} {row['run']}".strip()
        + f": {row['n']:,} pictures in {row['groups']:,} groups"
        + (", duplicates unknown" if row["independent"] else "")
        + (f"; not in both and left out: {lost}" if lost else "")
        + f"; right or wrong differently on {row['differing']}; {row['test']}, sign-flip p {row['p_sign_flip']:.3g}"
    )


def _forest(figure: "Figure", rows: Sequence[Row], metric: str) -> None:
    axes = figure.add_subplot()
    for i, row in enumerate(rows):
        colour = SERIES[0] if "run" in row else SERIES[1]
        axes.plot([row["low"], row["high"]], [i, i], color=colour, linewidth=2)
        axes.plot(row["difference"], i, "s", color=colour, markersize=5)
        axes.plot([-row["detectable"], row["detectable"]], [i, i], "|", color=MUTED, markersize=9)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [f"{row['arm']} {_where(row)}".strip() for row in rows])
    axes.set(ylim=(len(rows) - 0.4, -0.6), xlabel=f"difference in {metric} from A")


def page(result: dict[str, Any]) -> Page:
    """The comparison as a page: forest plot, tables, and every picture on which just one is right."""
    metric, rows = result["metric"], [*result["weights"], *result["recipe"]]
    made = Page(f"Comparison: {metric}, paired by picture", f"{len(result['arms'])} arms, A is the reference.")
    made.table([], [[arm["name"], arm["understood"]] for arm in result["arms"]])
    for row in rows:
        made.text(_verdict(row, metric))
    made.heading("Differences")
    made.figure(
        plot(lambda figure: _forest(figure, rows, metric), 7.6, 1.1 + 0.34 * len(rows)),
        "Difference and 95 % interval; ticks: the smallest difference that could have been shown.",
    )
    for title, part in (("These weights", result["weights"]), ("This recipe", result["recipe"])):
        cells: list[list[Cell]] = [
            [row["arm"], _where(row)]
            + [_text(row[name], metric) for name in ("reference_value", "arm_value") if name in row]
            + [_text(row["difference"], metric, sign=True)]
            + [" to ".join(_text(row[end], metric, sign=True) for end in ("low", "high"))]
            + [*(f"{row[p]:.3g}".replace("nan", "–") for p in ("p", "p_holm")), _text(row["detectable"], metric)]
            for row in part
        ]
        columns = ["", "run", "A", "other"] if title == "These weights" else ["", "over"]
        columns += ["difference", "95 % interval", "p", "p Holm", "detectable"]
        if part:
            made.table(columns, cells, f"{title}: {metric}, {'points' if metric in POINTS else 'units'}")
    made.text(
        "These weights: pictures are the sample; groups of near-duplicates are resampled or swapped whole. This "
        "recipe: seeds or folds are the sample; 'new pictures' counts the pictures as a sample too; folds share "
        "training pictures (Nadeau & Bengio's corrected t). p Holm: corrected for all tests of the question. "
        "Detectable: the difference found with 80 % probability at Holm's first step."
    )
    for line in [*map(_remark, result["weights"]), *result["notes"]]:
        made.text(line)
    made.heading("Where they disagree")
    for row in result["weights"]:
        made.heading(f"{row['arm']} {row['run']}".strip() + f": {row['differing']} pictures", 3)
        listed = [[i, label, one, f"{p:.3f}", other, f"{q:.3f}"] for i, label, one, p, other, q in row["disagree"]]
        if listed:
            made.table(["picture", "label", "A", "confidence", row["arm"], "confidence"], listed)
    return made


def check_out(out: Path) -> None:
    """Raises UserError where :func:`write` could not write."""
    if out.suffix not in (".html", ".json"):
        raise UserError(f"--out {out}: end the name in .html or .json")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")


def write(result: dict[str, Any], shown: Page, out: Path) -> None:
    """Write the page (.html) or all figures (.json; null is what cannot be told)."""
    if out.suffix == ".html":
        shown.write(out)
    else:
        write_json(out, json.loads(json.dumps(result), parse_constant=lambda _: None))
