"""experiments/<study>/README.md and contrasts.json, from the records of a study and the list of its runs alone."""

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from facemask.errors import UserError
from facemask.files import write_json, write_text
from facemask.runs import statistics as st
from facemask.runs.compare import compare
from facemask.runs.folder import flat
from facemask.runs.page import markdown
from facemask.runs.predictions import logits, write_predictions
from facemask.runs.record import Record, cell, read_record

HEADS = {"head": "class head", "head_dist": "distillation head", "mean": "mean head"}
FLOOR = {"teacher": "teacher", "majority": "majority", "no_pixels": "no pixels"}
ARMS = (
    "Accuracy on test in %. In brackets 95 % intervals: over folds (t, not corrected for the training pictures that "
    "folds share, so too narrow), over seeds (t, on these pictures), of one run over pictures. Bold: the reported "
    "head. Teacher ≠ label: how often the teacher's decision is not the class with the larger share of the label, on "
    "the views that the arm was trained on, mixed ones too. Arms on different pictures are not comparable. CPU-hours: "
    "wall time × threads, on machines that did other work, too; a run that two records share counts in both."
)
COLUMNS = ["arm - reference", "asks", "n", "expected", "recipe", "p", "p Holm", "detectable", "verdict"]
COLUMNS += ["these weights", "same pictures"]
GRID = (
    "Gain of test accuracy over the same number of pictures with labels alone, in points: expected (PROTOCOL.md) → "
    "measured, over seeds on new pictures, with its 95 % interval, not corrected; bold where shown by Holm's p. "
)
CONTRASTS = (
    "Differences of test accuracy in points with 95 % intervals. Recipe: over folds (Nadeau and Bengio's corrected t, "
    "n_test/n_train as 1/(K - 1); all folds have one seed, so the spread over seeds is not in it) or over seeds on new "
    "pictures; p, detectable and the verdict are of this column. These weights: on the out-of-fold predictions of all "
    "pictures, sign-flip p. Same pictures: over seeds. Expected: in PROTOCOL.md. Detectable: found in 80 % of cases by "
    "one test at 5 %, from the spread that was seen. Holm: over all exploratory contrasts of the list; one that is not "
    "made yet counts as p = 1."
)


def contrast(reference: Record, arm: Record, head: str | None = None) -> dict[str, Any]:
    """What `compare` says of two records: `recipe`, over folds, or over seeds on new pictures; beside it
    `weights`, these weights on the out-of-fold predictions of all pictures, or `same`, over seeds on the same ones.

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
        return {"recipe": over["new pictures"], "same": over["same pictures"]}
    with tempfile.TemporaryDirectory() as scratch:
        files = [Path(scratch) / f"{number}.parquet" for number in (0, 1)]
        for part, file in zip((reference, arm), files, strict=True):
            write_predictions(file, *out_of_fold(part))
        (weights,) = compare(files, "accuracy", heads, "test")["weights"]
    if any(weights.pop("lost").values()):
        raise other
    del weights["p_holm"], weights["disagree"]  # which pictures: in the records
    return {"recipe": over["same pictures"], "weights": weights}


def out_of_fold(part: Record) -> tuple[pd.DataFrame, list[str]]:
    """The test predictions of all folds of a record as one table: every picture once."""
    tables = [part.predictions(run) for run in part.runs]
    frame = pd.concat([table for table, _ in tables], ignore_index=True)
    return frame[frame["split"] == "test"].reset_index(drop=True), tables[0][1]


def kept(folder: Path, what: str) -> dict[str, Any]:
    """What the tables need and no record holds."""
    file = folder / f"{what}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def write_page(
    spec: Mapping[str, Any], name: str, planned: Sequence[str], experiments: Path, draw: Callable[[Sequence[str]], str]
) -> Path:
    """Write README.md and contrasts.json; returns the former.

    Args:
        spec: conf/study.yaml.
        name: of the study; its records' names begin with it.
        planned: names of its records, most important first.
        experiments: folder of all records.
        draw: names of records -> their curves over epochs, as SVG.
    """
    there = [record for record in planned if (experiments / record / "record.json").exists()]
    records = {record.removeprefix(f"{name}-"): read_record(experiments / record) for record in there}
    folder = experiments / name
    folder.mkdir(parents=True, exist_ok=True)
    small, searches = kept(folder, "pixels32"), kept(folder, "searches")
    asked = ({"question": ", ".join(pair.get("grid", [])), **pair} for pair in spec["contrasts"])
    made = [pair for pair in asked if pair["arm"] in records and pair["reference"] in records]
    rows = [{**pair, **contrast(records[pair["reference"]], records[pair["arm"]])} for pair in made]
    family = [row for row in rows if row["kind"] == "exploratory"]
    size = sum(pair["kind"] == "exploratory" for pair in spec["contrasts"])
    known = [row["recipe"]["p"] for row in family]
    for row, p in zip(family, st.holm([*known, *[1.0] * (size - len(known))]), strict=False):
        row["p_holm"] = p
    trained = {
        (run["weights_sha256"], run["command"]): run for r in records.values() for run in r.info["runs"].values()
    }
    left = ", ".join(record.removeprefix(f"{name}-") for record in planned if record not in there)
    lines = [
        f"# {name}",
        "",
        "Written by `facemask study` from the records beside it, and from what no record holds (`pixels32.json`: "
        "forests on 32×32 pixels; `searches.json`); nothing here is typed by hand. What was asked, and why so: "
        "[PROTOCOL.md](../PROTOCOL.md). Arms of the ablation are trained equally short, so under-trained.",
        "",
        *(f"- {sentence}" for sentence in _findings(spec, rows, records)),
        f"- Exploratory: {len(family)} of {size} contrasts are made, {_shown(family)}.",
        f"- {len(there)} of {len(planned)} records are made; {len(trained)} runs trained for "
        f"{sum(map(_hours, trained.values())):.1f} CPU-hours, {sum(s['trials'] for s in searches.values())} trials of "
        f"searches on validation for {sum(s['cpu_hours'] for s in searches.values()):.1f} more.",
        "",
        f"Left out so far: {left or 'nothing'}.",
        "",
        "## Contrasts",
        "",
        *markdown(COLUMNS, [_line(row, spec["worth"]) for row in rows]),
        "",
        CONTRASTS,
        "",
        *_by_head(rows, records),
        *_grid(rows, records),
        "## Arms",
        "",
        *markdown(
            ["", *HEADS.values(), *FLOOR.values(), "32×32", "teacher ≠ label", "n", "CPU-hours"],
            [_arm(label, part, small) for label, part in records.items()],
        ),
        "",
        ARMS,
        "",
        *_searches(searches),
    ]
    for number, arms in enumerate(spec.get("curves", [])):
        drawn = [record for record in there if record.removeprefix(f"{name}-") in arms]
        if drawn:
            write_text(folder / f"curves{number}.svg", draw(drawn))
            lines += [f"![Validation accuracy by epoch](curves{number}.svg)", ""]
    write_json(folder / "contrasts.json", json.loads(json.dumps(rows), parse_constant=lambda _: None))
    write_text(folder / "README.md", "\n".join(lines))
    return folder / "README.md"


# -- sentences --------------------------------------------------------------------------------------------------


def _findings(spec: Mapping[str, Any], rows: Sequence[dict[str, Any]], records: Mapping[str, Record]) -> list[str]:
    """What the primary contrast, the controls and the targets say, by the rules of the protocol."""
    found = []
    for row in rows:
        if row["kind"] == "exploratory" and not row.get("told"):
            continue
        over, arm, reference = row["recipe"], records[row["arm"]], records[row["reference"]]
        what = f"{row['question'][0].upper()}{row['question'][1:]}: {row['arm']} - {row['reference']} is "
        what += f"{_points(over)} points over {over['runs']} {over['over']}"
        if over["over"] == "folds":
            what += f" at seed {', '.join(sorted({str(run['seed']) for run in arm.info['runs'].values()}))}"
        what += f", expected {text}" if (text := _expected(row)) else ""
        what += f", Holm's p {row['p_holm']:.2g}" if "p_holm" in row else ""
        found.append(
            f"{row['kind'].capitalize()}. {what}: {verdict(row, spec['worth'])}. {_levels(row, arm, reference)}"
        )
        found[-1] += f" {row['note']}" if "note" in row else ""
    names = spec["same_weights"]
    if all(name in records for name in names):
        one, other = (
            {(run["seed"], run["fold"]): run["weights_sha256"] for run in records[name].info["runs"].values()}
            for name in names
        )
        alike = all(other.get(at) == weights for at, weights in one.items())
        say = "the same weights, bit for bit" if alike else "OTHER weights"
        found.append(f"Negative control. {' and '.join(names)} have {say}.")
    described = [pair for pair in spec.get("described", []) if {pair["arm"], pair["reference"]} <= records.keys()]
    targets = [target for target in spec.get("targets", []) if target["arm"] in records]
    found += [_described(pair, records[pair["arm"]], records[pair["reference"]]) for pair in described]
    return found + [_target(target, records[target["arm"]]) for target in targets]


def _described(pair: Mapping[str, Any], arm: Record, reference: Record) -> str:
    """Two arms that were tested on different pictures."""
    levels = {pair[key]: _percent(part) or math.nan for key, part in (("arm", arm), ("reference", reference))}
    less = levels[pair["arm"]] - levels[pair["reference"]]
    return (
        f"Described. {pair['question'][0].upper()}{pair['question'][1:]}: {pair['arm']} {levels[pair['arm']]:.1f} %, "
        f"{pair['reference']} {levels[pair['reference']]:.1f} %, {less:+.1f} points, expected {_expected(pair)}; on "
        "other test pictures, so not tested."
    )


def verdict(row: Mapping[str, Any], worth: float) -> str:
    """By the protocol: shown at 5 % (an exploratory contrast by Holm's p), and claimed from the size `worth` on."""
    over = row["recipe"]
    could = f"{100 * over['detectable']:.1f} points"
    shown = row.get("p_holm", over["p"]) <= st.LEVEL
    if row["kind"] == "control":
        if not (shown and over["difference"] > 0):
            return "NOT shown, so no other null counts"
        return (
            f"shown, so such gains are seen; one of {could} would have been in 80 % of cases, of less it says nothing"
        )
    if not shown:
        return f"no difference shown; one of {could} would have been, in 80 % of cases of a single test"
    if abs(over["difference"]) < worth:
        return "a difference too small to be claimed"
    whole = min(abs(over["low"]), abs(over["high"])) >= worth
    return f"a difference worth claiming, by its {'whole interval' if whole else 'estimate, not its whole interval'}"


def _levels(row: Mapping[str, Any], arm: Record, reference: Record) -> str:
    """How good both arms of a contrast are, and after what training."""
    config = flat(arm.config)
    values = {row["arm"]: _percent(arm), row["reference"]: _percent(reference), "no pixels": _percent(arm, "no_pixels")}
    said = ", ".join(f"{name} {value:.1f} %" for name, value in values.items() if value is not None)
    small = config.get("augment.small_epochs", 0)
    first = f", the first {small} at {config['augment.small_size']} px" if small else ""
    return f"{said}; {config['trainer.max_epochs']} epochs at {config['model.img_size']} px{first}."


def _percent(part: Record, head: str | None = None) -> float | None:
    """Test accuracy of a head (the reported one) or of what stands for a head; None where there is none."""
    wanted = f"test/{head or part.info['reported_head']}/accuracy"
    return next((100 * claim["value"] for claim in part.claims if claim["claim"] == wanted), None)


def _shown(family: Sequence[dict[str, Any]]) -> str:
    names = [
        f"{row['arm']} - {row['reference']} {_points(row['recipe'])}" for row in family if row["p_holm"] <= st.LEVEL
    ]
    of = "shown by Holm's p, which counts those that are not made yet as p = 1"
    return f"{len(names)} {of}{': ' * bool(names)}{', '.join(names)}"


def _target(target: Mapping[str, Any], part: Record) -> str:
    head = part.info["reported_head"]
    (claim,) = (claim for claim in part.claims if claim["claim"] == f"test/{head}/accuracy")
    value, low, high = (min(1.0, max(0.0, claim.get(key, claim["value"]))) for key in ("value", "low", "high"))
    what = f"Target. {target['arm']} ({target['what']}) is right on {100 * value:.2f} % of the test pictures"
    n = 0
    if part.info["over"]:
        what += f", mean of {len(part.runs)} {part.info['over']}s; 95 % interval [{100 * low:.2f}, {100 * high:.2f}]"
    if part.info["over"] == "seed":
        ends, n = on_new_pictures(part, head)
        what += f" on these pictures, [{100 * ends[0]:.2f}, {100 * ends[1]:.2f}] on new ones"
    if "predicted" in target:
        least, most = target["predicted"]
        said = f"below {100 * most:.2f} %" if least == 0 else f"over {100 * least:.2f} %"
        what += f". Predicted: {said}, {'so it is' if least <= value <= most else 'which was wrong'}"
    each = "; ".join(f"{100 * asked:.2f} % asked, {reached(value, low, asked, n)}" for asked in target["asked"])
    return f"{what}. {each}{target.get('source', '')}."


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


# -- tables -----------------------------------------------------------------------------------------------------


def _points(row: Mapping[str, Any]) -> str:
    return f"{100 * row['difference']:+.2f} [{100 * row['low']:+.2f}, {100 * row['high']:+.2f}]"


def _expected(row: Mapping[str, Any]) -> str:
    """Points that the protocol predicts: one number, or a range with or without an upper end."""
    if "expected" not in row:
        return ""
    ends = row["expected"] if isinstance(row["expected"], list) else [row["expected"]]
    low, *high = (f"{end:+d}" if end else "0" for end in ends if end is not None)
    if len(ends) == 1:
        return low
    return f"{low} to {high[0]}" if high else f"{low} or {'less' if ends[0] is None else 'more'}"


def _line(row: Mapping[str, Any], worth: float) -> list[str]:
    over = row["recipe"]
    short = verdict(row, worth).partition(",")[0].partition(";")[0]
    beside = [f"{_points(row[name])}, p {row[name]['p']:.2g}" if name in row else "" for name in ("weights", "same")]
    return [
        f"{row['arm']} - {row['reference']}",
        row["question"],
        f"{over['runs']} {over['over']}",
        _expected(row),
        _points(over),
        f"{over['p']:.2g}",
        f"{row['p_holm']:.2g}" if "p_holm" in row else "",
        f"{100 * over['detectable']:.2f}",
        short,
        *beside,
    ]


def _by_head(rows: Sequence[Mapping[str, Any]], records: Mapping[str, Record]) -> list[str]:
    """The primary contrast by every head that both arms have: how far it hangs on the one chosen beforehand."""
    lines = []
    for row in rows:
        if row["kind"] != "primary":
            continue
        pair = records[row["reference"]], records[row["arm"]]
        common = [h for h in HEADS if all(_percent(part, h) is not None for part in pair)]
        each = [f"{HEADS[head]} {_points(found)}, p {found['p']:.2g}" for head in common
                for found in [contrast(*pair, head)["recipe"]]]  # fmt: skip
        lines += [f"By head, {row['arm']} - {row['reference']}: {'; '.join(each)}.", ""]
    return lines


def _grid(rows: Sequence[Mapping[str, Any]], records: Mapping[str, Record]) -> list[str]:
    """When does distillation help: what was expected and found by pictures, teacher and kind."""
    cells = {tuple(row["grid"]): row for row in rows if "grid" in row}
    if not cells:
        return []
    pictures, teachers, kinds = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
    lines, held = [], 0
    for part in pictures:
        for teacher in teachers:
            line = []
            for kind in kinds:
                if row := cells.get((part, teacher, kind)):
                    held += row["recipe"]["low"] <= row["expected"] / 100 <= row["recipe"]["high"]
                    said = _points(row["recipe"])
                    line.append(f"{_expected(row)} → {f'**{said}**' if row['p_holm'] <= st.LEVEL else said}")
                else:
                    line.append("–")
            found = (row["reference"] for key, row in cells.items() if key[:2] == (part, teacher))
            labels = next((f"{_percent(records[name]):.1f} %" for name in found), "–")
            lines.append([f"{part}, {teacher}", labels, *line])
    counted = f"{held} of {len(cells)} intervals hold what was expected; wide ones hold much."
    return [
        "## When does it help",
        "",
        *markdown(["pictures, teacher", "labels alone", *kinds], lines),
        "",
        GRID + counted,
        "",
    ]


def _arm(label: str, part: Record, small: Mapping[str, float]) -> list[str]:
    claims, runs = {claim["claim"]: claim for claim in part.claims}, part.info["runs"].values()
    cells = [cell(claims.get(f"test/{head}/accuracy"), "accuracy") for head in (*HEADS, *FLOOR)]
    reported = list(HEADS).index(part.info["reported_head"])
    cells[reported] = f"**{cells[reported]}**"
    pixels = [100 * small[run["fingerprint"]] for run in runs if run["fingerprint"] in small]
    differs = claims.get("train/teacher_label_disagreement")
    return [
        f"[{label}](../{part.path.name}/README.md)",
        *cells,
        f"{sum(pixels) / len(pixels):.1f}" if pixels else "–",
        f"{100 * differs['value']:.2f} %" if differs else "–",
        f"{len(part.runs)} {part.info['over']}s" if part.info["over"] else "1 run",
        f"{sum(map(_hours, runs)):.2f}",
    ]


def _hours(run: Mapping[str, Any]) -> float:
    return run["training"]["train_runtime"] * run["hardware"]["torch_threads"] / 3600


def _searches(searches: Mapping[str, Any]) -> list[str]:
    """Every trial of every search: with few, which values won is part of what an arm is."""
    trials = [(arm, number, trial) for arm, search in searches.items() for number, trial in enumerate(search["tried"])]
    if not trials:
        return []
    best = {
        arm: min((t["value"] for t in search["tried"] if t["value"] is not None), default=None)
        for arm, search in searches.items()
    }
    params = list(dict.fromkeys(key for _, _, trial in trials for key in trial["params"]))
    rows = []
    for arm, number, trial in trials:
        value = "not completed" if trial["value"] is None else f"{trial['value']:.4f}"
        value = f"**{value}**" if trial["value"] is not None and trial["value"] == best[arm] else value
        values = [f"{trial['params'][key]:.3g}" if key in trial["params"] else "" for key in params]
        rows.append([arm, str(number), *values, value])
    return [
        "## Searches",
        "",
        *markdown(["arm", "trial", *params, "validation NLL"], rows),
        "",
        "On validation pictures alone, the first trial with the arm's own values; the arm is trained with those of the "
        "best one (bold). So arms with searches of their own differ in these values, too.",
        "",
    ]
