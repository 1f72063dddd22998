"""What the records of a study say, by the rules of its protocol: contrasts, and a sentence for each finding."""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from facemask.errors import UserError
from facemask.runs import statistics as st
from facemask.runs.compare import compare
from facemask.runs.folder import flat
from facemask.runs.predictions import logits, write_predictions
from facemask.runs.record import Record

POST_HOC = "post hoc"
HEADS = {"head": "class head", "head_dist": "distillation head", "mean": "mean head"}
FLOOR = {"teacher": "teacher", "majority": "majority", "no_pixels": "no pixels"}


# -- contrasts --------------------------------------------------------------------------------------------------


def contrast(reference: Record, arm: Record, head: str | None = None) -> dict[str, Any]:
    """What `compare` says of two records: `recipe`, over folds, or over seeds on new pictures; beside it
    `weights`, these weights on the out-of-fold predictions of all pictures, or `same`, over seeds on the same ones;
    and `auroc`, the recipes' difference without a threshold, on the same pictures.

    Raises:
        UserError: the records are of different pictures.
    """
    heads = [head or part.info["reported_head"] for part in (reference, arm)]
    over = {row["on"]: row for row in compare([reference.path, arm.path], "accuracy", heads)["recipe"]}
    for row in over.values():
        del row["p_holm"]  # of a family of one
    other = UserError(f"{arm.name} and {reference.name} were not tested on the same pictures")
    if over["same pictures"]["over"] == "seeds":
        if "new pictures" not in over:
            raise other
        return {"recipe": over["new pictures"], "same": over["same pictures"], "auroc": ranks(reference, arm, heads)}
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"{number}.parquet" for number in (0, 1)]
        for part, file in zip((reference, arm), files, strict=True):
            write_predictions(file, *out_of_fold(part))
        (weights,) = compare(files, "accuracy", heads, "test")["weights"]
    if any(weights.pop("lost").values()):
        raise other
    del weights["p_holm"], weights["disagree"]  # which pictures: in the records
    return {"recipe": over["same pictures"], "weights": weights, "auroc": ranks(reference, arm, heads)}


def ranks(reference: Record, arm: Record, heads: Sequence[str]) -> dict[str, Any]:
    """The difference of areas under the ROC curve over the runs that both have: what no threshold moves."""
    both = [run for run in arm.runs if run in reference.runs]
    pair = zip((reference, arm), heads, strict=True)
    areas = [[measured(part, run, "auroc", head) for run in both] for part, head in pair]
    folds = len({arm.info["runs"][run]["fold"] for run in both})
    return vars(st.recipe(np.subtract(areas[1], areas[0]), folds=folds))


def out_of_fold(part: Record) -> tuple[pd.DataFrame, list[str]]:
    """The test predictions of all folds of a record as one table: every picture once."""
    tables = [part.predictions(run) for run in part.runs]
    frame = pd.concat([table for table, _ in tables], ignore_index=True)
    return frame[frame["split"] == "test"].reset_index(drop=True), tables[0][1]


def made(pairs: Sequence[Mapping[str, Any]], records: Mapping[str, Record]) -> list[dict[str, Any]]:
    """The contrasts whose records there are, with what `contrast` says; for the exploratory ones Holm's p (one that is
    not made counts in their family as p = 1), and what Holm's first step would have found in 80 % of cases."""
    there = [pair for pair in pairs if pair["arm"] in records and pair["reference"] in records]
    rows = [{**pair, **contrast(records[pair["reference"]], records[pair["arm"]])} for pair in there]
    family = [row for row in rows if row["kind"] == "exploratory"]
    known = [row["recipe"]["p"] for row in family]
    size = sum(pair["kind"] == "exploratory" for pair in pairs)
    for row, p in zip(family, st.holm([*known, *[1.0] * (size - len(known))]), strict=False):
        over = row["recipe"]
        row["p_holm"] = p
        row["detectable_holm"] = st.detectable_recipe(over["error"], over["runs"], st.LEVEL / size)
    return rows


def verdict(row: Mapping[str, Any], worth: float) -> str:
    """By the protocol: shown at 5 % (an exploratory contrast by Holm's p), and claimed from the size `worth` on."""
    if row["kind"] == POST_HOC:
        return "not tested, since both records were known when it was added"
    over, corrected = row["recipe"], "p_holm" in row
    could = f"{100 * over['detectable']:.1f} points"
    shown = row.get("p_holm", over["p"]) <= st.LEVEL
    if row["kind"] == "control":
        if not (shown and over["difference"] > 0):
            return "NOT shown, so no other null counts"
        return (
            f"shown, so such gains are seen; one of {could} would have been in 80 % of cases, of less it says nothing"
        )
    if not shown:
        if corrected:
            could += f", Holm's first step one of {100 * row['detectable_holm']:.1f},"
        test = "a test of this contrast alone" if corrected else "the test"
        return f"no difference shown; {test} would have found one of {could} in 80 % of cases"
    if abs(over["difference"]) < worth:
        return "a difference too small to be claimed"
    whole = min(abs(over["low"]), abs(over["high"])) >= worth
    by = f"whole interval{', which is not corrected' * corrected}" if whole else "estimate, not its whole interval"
    return f"a difference worth claiming, by its {by}"


# -- sentences --------------------------------------------------------------------------------------------------


def findings(
    spec: Mapping[str, Any], rows: Sequence[dict[str, Any]], records: Mapping[str, Record], small: Mapping[str, float]
) -> Iterator[str]:
    """What the primary contrast, the controls, those that are told in any case, and the targets say.

    Args:
        spec: conf/study.yaml.
        rows: of :func:`made`.
        records: by their names in the study.
        small: accuracy of a forest on 32 x 32 pixels, by the fingerprint of the pictures.
    """
    yield from answer(spec.get("factorial", {}), records, small)
    for row in rows:
        if row["kind"] in ("primary", "control") or row.get("told"):
            yield f"{row['kind'].capitalize()}. {said(spec, row, records, small)}"
    names = spec["same_weights"]
    if all(name in records for name in names):
        one, other = (
            {(run["seed"], run["fold"]): run["weights_sha256"] for run in records[name].info["runs"].values()}
            for name in names
        )
        alike = all(other.get(at) == weights for at, weights in one.items())
        where = ", ".join(f"seed {seed}" + (f" of fold {fold}" if fold is not None else "") for seed, fold in one)
        yield f"Negative control. {' and '.join(names)} have {'the same' if alike else 'OTHER'} weights" + (
            f", bit for bit ({where})." if alike else "."
        )
    for target in spec.get("targets", []):
        if target["arm"] in records:
            yield _target(target, records[target["arm"]], small)


def answer(
    factorial: Mapping[str, Mapping[str, str]], records: Mapping[str, Record], small: Mapping[str, float]
) -> Iterator[str]:
    """How good the arms of the factorial are, by recipe, and whether any is better than what sees no content."""
    there = {recipe: {w: records[a] for w, a in arms.items() if a in records} for recipe, arms in factorial.items()}
    parts = [part for arms in there.values() for part in arms.values()]
    if not parts:
        return
    levels = "; ".join(
        f"{recipe}: {', '.join(f'{what} {reported(part):.1f} %' for what, part in arms.items())}"
        for recipe, arms in there.items()
    )
    beside = max(parts, key=lambda part: percent(part, "teacher") is not None)
    over = f"{len(beside.runs)} {beside.info['over']}s"
    yield f"In short, accuracy over {over}, {trained(beside)}. {levels} ({floor(beside, small)})."
    above = sum(reported(part) > blind for part in parts if (blind := percent(part, "no_pixels")) is not None)
    limit = ": differences between them say how fast a small network learns from few pictures, not how good it can get"
    yield (
        f"{above or 'None'} of these {len(parts)} arms {'is' if above < 2 else 'are'} above a forest that sees no "
        f"pixels, only size and format of the file{'' if above else limit}."
    )


def hypotheses(
    spec: Mapping[str, Any], rows: Sequence[dict[str, Any]], records: Mapping[str, Record], small: Mapping[str, float]
) -> Iterator[str]:
    """What came of the protocol's other hypotheses, in their order, whatever it is."""
    for row in sorted((row for row in rows if "hypothesis" in row), key=lambda row: row["hypothesis"]):
        yield f"{row['hypothesis']}. {said(spec, row, records, small)}"
    for pair in spec.get("described", []):
        if {pair["arm"], pair["reference"]} <= records.keys():
            yield f"{pair['hypothesis']}. {_described(pair, records[pair['arm']], records[pair['reference']])}"


def said(
    spec: Mapping[str, Any], row: Mapping[str, Any], records: Mapping[str, Record], small: Mapping[str, float]
) -> str:
    """A contrast in words: difference, what was expected of it, the verdict, and how good both arms are."""
    over, arm = row["recipe"], records[row["arm"]]
    what = f"{row['question'][0].upper()}{row['question'][1:]}: {row['arm']} - {row['reference']} is "
    what += f"{points(over)} points over {over['runs']} {over['over']}"
    if over["over"] == "folds":
        what += f" at seed {', '.join(sorted({str(run['seed']) for run in arm.info['runs'].values()}))}"
    what += f", expected {text} ({outcome(row)})" if (text := expected(row)) else ""
    what += f", Holm's p {row['p_holm']:.2g}" if "p_holm" in row else ""
    sentences = [f"{what}: {verdict(row, spec['worth'])}."]
    if row["kind"] == "primary":
        sentences += _beyond(row, records)
    short = {name for part in spec.get("runs", []) if part["tier"] == "ablation" for name in part["arms"]}
    under = ", under-trained" if row["arm"].removesuffix("-seeds") in short else ""
    levels = ", ".join(f"{row[key]} {reported(records[row[key]]):.1f} %" for key in ("arm", "reference"))
    sentences.append(f"{levels} ({floor(arm, small)}); {trained(arm)}{under}.")
    return " ".join([*sentences, *([row["note"]] if "note" in row else [])])


def _beyond(row: Mapping[str, Any], records: Mapping[str, Record]) -> Iterator[str]:
    """How far a contrast hangs on the head that was chosen beforehand, and on its one seed."""
    reference, arm = records[row["reference"]], records[row["arm"]]
    common = [head for head in HEADS if all(percent(part, head) is not None for part in (reference, arm))]
    each = [(HEADS[head], contrast(reference, arm, head)["recipe"]) for head in common]
    if len(each) > 1:
        by_head = [f"{name} {points(over)}, p {over['p']:.2g}" for name, over in each]
        yield f"By head: {'; '.join(by_head)}."
    pair = [records.get(f"{row[key]}-seeds") for key in ("arm", "reference")]
    if all(pair):
        labels, taught = ([measured(part, run, "accuracy") for run in part.runs] for part in pair if part)
        spread = 100 * float(np.std(np.subtract(labels, taught), ddof=1))
        yield (
            f"Over {len(labels)} seeds of one fold the difference varied by {spread:.1f} points (standard "
            "deviation), which an interval over folds of one seed does not hold."
        )


def measured(part: Record, run: str, metric: str, head: str | None = None) -> float:
    """A metric of one run on its test pictures, by the reported head or another."""
    return float(part.metrics(run)["test"][head or part.info["reported_head"]][metric]["value"])


def _described(pair: Mapping[str, Any], arm: Record, reference: Record) -> str:
    """Two arms that were tested on different pictures."""
    levels = reported(arm), reported(reference)
    return (
        f"{pair['question'][0].upper()}{pair['question'][1:]}: {pair['arm']} {levels[0]:.1f} %, {pair['reference']} "
        f"{levels[1]:.1f} %, {levels[0] - levels[1]:+.1f} points, expected {expected(pair)}; on other test pictures, "
        "so not tested."
    )


def _target(target: Mapping[str, Any], part: Record, small: Mapping[str, float]) -> str:
    head = part.info["reported_head"]
    (claim,) = (claim for claim in part.claims if claim["claim"] == f"test/{head}/accuracy")
    value, low, high = (min(1.0, max(0.0, claim.get(key, claim["value"]))) for key in ("value", "low", "high"))
    what = f"Target. {target['arm']} ({target['what']}) is right on {100 * value:.2f} % of the test pictures"
    ends, n = (low, high), 0
    if part.info["over"]:
        what += f", mean of {len(part.runs)} {part.info['over']}s; 95 % interval [{100 * low:.2f}, {100 * high:.2f}]"
    if part.info["over"] == "seed":
        ends, n = on_new_pictures(part, head)
        what += f" on these pictures, [{100 * ends[0]:.2f}, {100 * ends[1]:.2f}] on new ones"
        what += ", cut off at 100" * (ends[1] == 1)
    what += f" ({floor(part, small)})"
    if "predicted" in target:
        least, most = target["predicted"]
        foretold = f"below {100 * most:.2f} %" if least == 0 else f"over {100 * least:.2f} %"
        if least <= value <= most:
            came = "so it is"
        elif ends[0] <= most and ends[1] >= least:
            came = "the mean is not, but the interval does not exclude it"
        else:
            came = "that was wrong"
        what += f". Predicted: {foretold}; {came}"
    each = "; ".join(f"{100 * asked:.2f} % asked, {reached(value, low, asked, n)}" for asked in target["asked"])
    note = f" {target['note']}" if "note" in target else ""
    return f"{what}. {each}{target.get('source', '')}.{note}"


def on_new_pictures(part: Record, head: str) -> tuple[tuple[float, float], int]:
    """95 % interval of the accuracy over seeds on pictures like these, and how many there were."""
    tables = [part.predictions(run) for run in part.runs]
    tests = [(frame[frame["split"] == "test"].sort_values("id"), classes) for frame, classes in tables]
    right = [
        np.array(classes)[logits(test, head, classes).argmax(axis=1)] == test["label"].to_numpy()
        for test, classes in tests
    ]
    group, n = pd.factorize(tests[0][0]["group"])[0], len(right[0])
    found = st.recipe_on_new_pictures(np.stack(right).astype(float), group, 1 / n)
    return (max(0.0, found.low), min(1.0, found.high)), n


def reached(value: float, low: float, asked: float, n: int) -> str:
    """Whether a mean accuracy with the lower end of its interval reaches what was asked, on n pictures (0: unknown)."""
    if value < asked:
        return f"{100 * (asked - value):.2f} points short"
    if low >= asked:
        return "reached"
    within = n and value - asked < 1 / n
    return f"reached by the mean{' (by less than one picture)' if within else ''}, not by the whole interval"


# -- figures in words -------------------------------------------------------------------------------------------


def points(row: Mapping[str, Any]) -> str:
    return f"{100 * row['difference']:+.2f} [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]"


def expected(row: Mapping[str, Any]) -> str:
    """Points that the protocol predicts: one number, or a range with one or both ends."""
    if "expected" not in row:
        return ""
    ends = row["expected"] if isinstance(row["expected"], list) else [row["expected"]]
    low, *high = (f"{end:+d}" if end else "0" for end in ends if end is not None)
    if len(ends) == 1:
        return low
    return f"{low} to {high[0]}" if high else f"{low} or {'less' if ends[0] is None else 'more'}"


def outcome(row: Mapping[str, Any]) -> str:
    """Whether the interval of a contrast is within what was expected of it, outside of it, or holds both."""
    ends = row["expected"] if isinstance(row["expected"], list) else [row["expected"]] * 2
    least, most = (sign * math.inf if end is None else end / 100 for end, sign in zip(ends, (-1, 1), strict=True))
    low, high = row["recipe"]["low"], row["recipe"]["high"]
    if least <= low and high <= most:
        return "which holds"
    return "which does not hold" if high < least or low > most else "undecided"


def percent(part: Record, head: str | None = None) -> float | None:
    """Test accuracy of a head (the reported one) or of what stands for a head; None where there is none."""
    wanted = f"test/{head or part.info['reported_head']}/accuracy"
    return next((100 * claim["value"] for claim in part.claims if claim["claim"] == wanted), None)


def reported(part: Record) -> float:
    """Test accuracy of the reported head, in %."""
    value = percent(part)
    return math.nan if value is None else value


def floor(part: Record, small: Mapping[str, float]) -> str:
    """What stands beside every figure: teacher, no pixels, 32 x 32 pixels, majority class."""
    known = {name: percent(part, head) for head, name in FLOOR.items()}
    known["32×32"] = small_pixels(part, small)
    return ", ".join(f"{name} {value:.1f}" for name, value in known.items() if value is not None)


def small_pixels(part: Record, small: Mapping[str, float]) -> float | None:
    """Mean test accuracy, in %, of the forests on 32 x 32 pixels for a record's pictures."""
    found = [100 * small[run["fingerprint"]] for run in part.info["runs"].values() if run["fingerprint"] in small]
    return sum(found) / len(found) if found else None


def trained(part: Record) -> str:
    config = flat(part.config)
    small = config.get("augment.small_epochs", 0)
    first = f", the first {small} at {config['augment.small_size']} px" if small else ""
    return f"{config['trainer.max_epochs']} epochs at {config['model.img_size']} px{first}"
