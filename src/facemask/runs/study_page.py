"""experiments/<study>/README.md and contrasts.json, from the records of a study and the list of its runs alone."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from facemask.files import write_json, write_text
from facemask.runs import statistics as st
from facemask.runs.compare import FLIPS
from facemask.runs.findings import (
    FLOOR,
    HEADS,
    POST_HOC,
    expected,
    findings,
    hypotheses,
    made,
    measured,
    points,
    reported,
    small_pixels,
    trained,
    verdict,
)
from facemask.runs.page import markdown
from facemask.runs.record import Record, cell, read_record

ABOUT = (
    "Written by `facemask study` from the records beside it, and from what no record holds (`pixels32.json`: forests "
    "on 32×32 pixels; `searches.json`); nothing here is typed by hand. What was asked, why so, and what this cannot "
    "show: [PROTOCOL.md](../PROTOCOL.md). What each arm is: [below](#what-the-arms-are). A name with `-seeds` is a "
    "record over seeds of fold 0; the same name without it, over five folds. Arms of the ablation are trained equally "
    "short, so under-trained: what they say holds for short training from nothing."
)
ARMS = (
    "Accuracy on test in %. In brackets 95 % intervals: over folds (t, not corrected for the training pictures that "
    "folds share, so too narrow), over seeds (t, on these pictures), of one run over pictures. Bold: the reported "
    "head. AUROC: of the reported head, mean over runs; no threshold moves it. Teacher ≠ label: how often the "
    "teacher's decision is not the class with the larger share of the label, on the views that the arm was trained on: "
    "DeiT's recipe mixes two pictures in every view and crops, colours and erases them, and the teacher's head was "
    "fitted on whole clean ones, so that it errs there much more than on test (column teacher). Arms of different "
    "tables are not comparable. CPU-hours: wall time × threads, on machines that did other work, too; a run that two "
    "records share counts in both; an arm that is trained later takes the teacher's answers on views that an earlier "
    "one asked about, and costs less."
)
CONTRASTS = (
    "Differences of test accuracy in points with 95 % intervals, not corrected. Recipe: over folds (Nadeau and "
    "Bengio's corrected t, n_test/n_train as 1/(K - 1); all folds have one seed, so the spread over seeds is not in "
    "it) or over seeds on new pictures; p, detectable and the verdict are of this column. Expected: in PROTOCOL.md. "
    "Detectable: found in 80 % of cases by one test at 5 %, from the spread that was seen; behind it what Holm's first "
    "step finds. Holm: over all exploratory contrasts of the list; one that is not made yet counts as p = 1. Post hoc: "
    "added when both records were known, for what readers ask, so not tested."
)
BESIDE = (
    "The same differences on other terms. These weights: on the out-of-fold predictions of all pictures, with a "
    f"sign-flip p over groups of near-duplicates ({2 / (FLIPS + 1):.1g} is the least there is). Same pictures: over "
    "seeds, as if there were no others. AUROC: difference of areas under the ROC curve in hundredths, over folds or "
    "over seeds on the same pictures; where accuracies differ and these hardly do, a threshold may be off, rather "
    "than knowledge missing. Each run: the differences of accuracy of which the recipe's is the mean."
)
GRID = (
    "Gain of test accuracy over labels alone on the same pictures, in points: expected (PROTOCOL.md) → measured, over "
    "seeds on new pictures, with its 95 % interval, not corrected; bold where shown by Holm's p. Fewer pictures are "
    "trained on for more epochs (25 %: 2 times, 10 %: 4 times)."
)


def kept(folder: Path, what: str) -> dict[str, Any]:
    """What the tables need and no record holds."""
    file = folder / f"{what}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def own_options(spec: Mapping[str, Any], arm: str) -> list[str]:
    """The options in which an arm differs from its base."""
    about = spec["arms"][arm]
    return [*(own_options(spec, about["like"]) if "like" in about else []), *about.get("options", [])]


def own_base(spec: Mapping[str, Any], arm: str) -> str:
    about = spec["arms"][arm]
    return about["base"] if "base" in about else own_base(spec, about["like"])


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

    Raises:
        UserError: two records of a contrast are of different pictures.
    """
    there = [record for record in planned if (experiments / record / "record.json").exists()]
    records = {record.removeprefix(f"{name}-"): read_record(experiments / record) for record in there}
    folder = experiments / name
    folder.mkdir(parents=True, exist_ok=True)
    small, searches = kept(folder, "pixels32"), kept(folder, "searches")
    later = [{"kind": POST_HOC, **pair} for pair in spec.get("post_hoc", [])]
    asked = [{"question": ", ".join(pair.get("grid", [])), **pair} for pair in [*spec["contrasts"], *later]]
    rows = made(asked, records)
    left = ", ".join(record.removeprefix(f"{name}-") for record in planned if record not in there)
    lines = [
        f"# {name}",
        "",
        ABOUT,
        "",
        *(f"- {sentence}" for sentence in findings(spec, rows, records, small)),
        f"- Exploratory: {_family(asked, rows)}.",
        f"- {_degenerate(records)}",
        f"- {len(there)} of {len(planned)} records are made; {_cost(spec, records, searches)}.",
        "",
        f"Left out so far: {left or 'nothing'}.",
        "",
    ]
    if found := [*hypotheses(spec, rows, records, small)]:
        lines += ["## Hypotheses", "", "H1 is the primary contrast, H5 the grid, H7 the targets.", ""]
        lines += [*(f"1. {sentence}" for sentence in found), ""]
    lines += [
        *_grid(rows, records),
        "## Contrasts",
        "",
        *markdown(COLUMNS, [_line(row, spec["worth"]) for row in rows], left=3),
        "",
        CONTRASTS,
        "",
        *_notes(rows),
        *markdown(BESIDE_COLUMNS, [_beside(row) for row in rows], left=3),
        "",
        BESIDE,
        "",
        "## Arms",
        "",
        *_arms(records, small),
        ARMS,
        "",
        *_early(records),
        *_glossary(spec, records),
        *_searches(searches),
    ]
    for number, (title, arms) in enumerate(spec.get("curves", {}).items()):
        drawn = [record for record in there if record.removeprefix(f"{name}-") in arms]
        if drawn:
            write_text(folder / f"curves{number}.svg", draw(drawn))
            lines += [f"![Validation accuracy by epoch: {title}](curves{number}.svg)", ""]
            lines += [f"Validation accuracy by epoch, mean and range of an arm's runs: {title}.", ""]
    write_json(folder / "contrasts.json", json.loads(json.dumps(rows), parse_constant=lambda _: None))
    write_text(folder / "README.md", "\n".join(lines))
    return folder / "README.md"


# -- sums -------------------------------------------------------------------------------------------------------


def _family(asked: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    size = sum(pair["kind"] == "exploratory" for pair in asked)
    family = [row for row in rows if row["kind"] == "exploratory"]
    names = [
        f"{row['arm']} - {row['reference']} {points(row['recipe'])}" for row in family if row["p_holm"] <= st.LEVEL
    ]
    of = "shown by Holm's p, which counts those that are not made yet as p = 1"
    found = f"{len(family)} of {size} contrasts are made, {len(names)} {of}{': ' * bool(names)}{', '.join(names)}"
    if not family:
        return found
    could = [100 * row["detectable_holm"] for row in family]
    return (
        f"{found}. Holm's first step (p < {st.LEVEL / size:.2g}) would have found differences of {min(could):.0f} to "
        f"{max(could):.0f} points in 80 % of cases: smaller ones this family can hardly show"
    )


def _degenerate(records: Mapping[str, Record]) -> str:
    """Whether a hard teacher hardly differs from the labels, by the rule of the protocol."""
    alike = [
        name
        for name, part in records.items()
        if any(r["teacher"].get("degenerate") for r in part.info["runs"].values())
    ]
    rule = "Degenerate, because teacher and label differ on less than 0.5 % of the views"
    return f"{rule}: {', '.join(alike)}: trained on labels." if alike else f"{rule}: no hard arm."


def _cost(spec: Mapping[str, Any], records: Mapping[str, Record], searches: Mapping[str, Any]) -> str:
    """What the runs of the records took, each run once."""
    runs = [run for part in records.values() for run in part.info["runs"].values()]
    once = {(run["weights_sha256"], run["command"]): _hours(run) for run in runs}
    of = f"; {spec['budget']} were planned for all of them" if "budget" in spec else ""
    return (
        f"their {len(once)} runs trained for {sum(once.values()):.1f} CPU-hours, "
        f"{sum(s['trials'] for s in searches.values())} trials of searches on validation for "
        f"{sum(s['cpu_hours'] for s in searches.values()):.1f} more{of}"
    )


def _hours(run: Mapping[str, Any]) -> float:
    return run["training"]["train_runtime"] * run["hardware"]["torch_threads"] / 3600


# -- tables -----------------------------------------------------------------------------------------------------

COLUMNS = ["arm - reference", "asks", "verdict", "n", "expected", "recipe", "p", "p Holm", "detectable, by Holm"]
BESIDE_COLUMNS = ["arm - reference", "these weights", "same pictures", "AUROC", "each run"]


def _line(row: Mapping[str, Any], worth: float) -> list[str]:
    over, holm = row["recipe"], "p_holm" in row
    could = f"{100 * over['detectable']:.1f}" + (f", {100 * row['detectable_holm']:.1f}" if holm else "")
    tested = [f"{over['p']:.2g}", f"{row['p_holm']:.2g}" if holm else "", could]
    return [
        f"{row['arm']} - {row['reference']}",
        row["question"],
        row["kind"] if row["kind"] == POST_HOC else verdict(row, worth).partition(",")[0].partition(";")[0],
        f"{over['runs']} {over['over']}",
        expected(row),
        points(over),
        *(["", "", ""] if row["kind"] == POST_HOC else tested),
    ]


def _notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What there is to know of contrasts that have no sentence."""
    silent = [row for row in rows if "note" in row and row["kind"] == "exploratory"]
    silent = [row for row in silent if not row.get("told") and "hypothesis" not in row]
    return [line for row in silent for line in (f"{row['arm']} - {row['reference']}: {row['note']}", "")]


def _beside(row: Mapping[str, Any]) -> list[str]:
    cells = [f"{points(row[name])}, p {row[name]['p']:.2g}" if name in row else "" for name in ("weights", "same")]
    each = " ".join(f"{100 * difference:+.1f}" for difference in row["recipe"]["differences"])
    return [f"{row['arm']} - {row['reference']}", *cells, points(row["auroc"]), each]


def _grid(rows: Sequence[Mapping[str, Any]], records: Mapping[str, Record]) -> list[str]:
    """When does distillation help: what was expected and found by pictures, teacher and kind."""
    cells = {tuple(row["grid"]): row for row in rows if "grid" in row}
    if not cells:
        return []
    pictures, teachers, kinds = (list(dict.fromkeys(keys)) for keys in zip(*cells, strict=True))
    lines, held = [], 0
    for part in pictures:
        for teacher in teachers:
            line, labels = [], "–"
            for kind in kinds:
                if row := cells.get((part, teacher, kind)):
                    held += row["recipe"]["low"] <= row["expected"] / 100 <= row["recipe"]["high"]
                    labels = f"{reported(records[row['reference']]):.1f} %"
                    found = points(row["recipe"])
                    line.append(f"{expected(row)} → {f'**{found}**' if row['p_holm'] <= st.LEVEL else found}")
                else:
                    line.append("–")
            lines.append([f"{part}, {teacher}", labels, *line])
    return [
        "## When does it help",
        "",
        *markdown(["pictures, teacher", "labels alone", *kinds], lines),
        "",
        f"{GRID} {held} of {len(cells)} intervals hold what was expected; wide ones hold much.",
        "",
    ]


def _pictures(part: Record) -> str:
    """Which pictures a record was tested on."""
    data = part.config["data"]
    if "num_images" in data:
        return "Drawn faces"
    if data.get("split"):
        return f"Split {Path(data['split']).stem}"
    folds = sorted({run["fold"] for run in part.info["runs"].values()} - {None})
    return f"Fold{'s' * (len(folds) > 1)} {', '.join(map(str, folds))}" if folds else "A split of its own"


def _arms(records: Mapping[str, Record], small: Mapping[str, float]) -> list[str]:
    """One table for each set of test pictures."""
    lines = []
    columns = ["", "trained", "n", *HEADS.values(), "AUROC", *FLOOR.values(), "32×32", "teacher ≠ label", "CPU-hours"]
    for pictures in dict.fromkeys(map(_pictures, records.values())):
        part = {label: record for label, record in records.items() if _pictures(record) == pictures}
        cells = [_arm(label, record, small) for label, record in part.items()]
        lines += [f"### {pictures}", "", *markdown(columns, cells, left=2), ""]
    return lines


def _arm(label: str, part: Record, small: Mapping[str, float]) -> list[str]:
    claims, runs = {claim["claim"]: claim for claim in part.claims}, part.info["runs"].values()
    cells = [cell(claims.get(f"test/{head}/accuracy"), "accuracy") for head in (*HEADS, *FLOOR)]
    own = list(HEADS).index(part.info["reported_head"])
    cells[own] = f"**{cells[own]}**"
    cells.insert(len(HEADS), f"{np.mean([measured(part, run, 'auroc') for run in part.runs]):.3f}")
    pixels, differs = small_pixels(part, small), claims.get("train/teacher_label_disagreement")
    return [
        f"[{label}](../{part.path.name}/README.md)",
        trained(part),
        f"{len(part.runs)} {part.info['over']}s" if part.info["over"] else "1 run",
        *cells,
        f"{pixels:.1f}" if pixels is not None else "–",
        f"{100 * differs['value']:.2f} %" if differs else "–",
        f"{sum(map(_hours, runs)):.2f}",
    ]


def _early(records: Mapping[str, Record]) -> list[str]:
    """Runs whose least validation NLL, so their checkpoint, came in the first half of training."""
    found = []
    for label, part in records.items():
        for run in part.runs:
            curve = part.curves(run).dropna(subset="val/nll")
            best, last = curve["epoch"].iloc[curve["val/nll"].argmin()] + 1, curve["epoch"].max() + 1
            found += [f"{label} {run} ({best:.0f} of {last:.0f})"] if 2 * best <= last else []
    sentence = "Runs whose least validation NLL, so their checkpoint, is of an epoch in the first half of training: "
    return [f"{sentence}{', '.join(found) or 'none'}.", ""]


def _glossary(spec: Mapping[str, Any], records: Mapping[str, Record]) -> list[str]:
    names = [
        name
        for name in dict.fromkeys(label.removesuffix("-seeds") for label in records)
        if name in spec.get("arms", {})
    ]
    if not names:
        return []
    rows = [[name, own_base(spec, name), _code(own_options(spec, name))] for name in names]
    bases = [[base, _code(spec["bases"][base])] for base in dict.fromkeys(row[1] for row in rows)]
    intro = "Options of `train.py`: those of a base, then the arm's own; the last of a kind holds."
    tables = [*markdown(["arm", "base", "options"], rows, left=3), "", *markdown(["base", "options"], bases, left=2)]
    return ["## What the arms are", "", intro, "", *tables, ""]


def _code(options: Sequence[str]) -> str:
    return " ".join(f"`{option}`" for option in options)


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
