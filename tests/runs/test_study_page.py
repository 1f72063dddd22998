import json
import re
from typing import Any

import numpy as np
import pytest

from facemask.data.splits import fingerprint
from facemask.errors import UserError
from facemask.runs import statistics as st
from facemask.runs.compare import compare
from facemask.runs.findings import contrast, on_new_pictures, outcome, reached, verdict
from facemask.runs.predictions import read_predictions, write_predictions
from facemask.runs.record import Record, read_record, record
from facemask.runs.study_page import write_page


@pytest.mark.parametrize(
    ("kind", "difference", "half", "p", "said"),
    [
        ("primary", 0.05, 0.03, 0.01, "a difference worth claiming, by its whole interval"),
        ("primary", -0.05, 0.045, 0.01, "a difference worth claiming, by its estimate, not its whole interval"),
        ("primary", 0.009, 0.001, 0.01, "a difference too small to be claimed"),
        (
            "primary",
            0.05,
            0.06,
            0.051,
            "no difference shown; the test would have found one of 7.0 points in 80 % of cases",
        ),
        ("control", 0.05, 0.03, 0.01, "shown, so such gains are seen; one of 7.0 points"),
        ("control", -0.05, 0.03, 0.01, "NOT shown, so no other null counts"),
        ("control", 0.05, 0.06, 0.3, "NOT shown, so no other null counts"),
    ],
)
def test_verdicts(kind, difference, half, p, said):
    ends = {"low": difference - half, "high": difference + half}
    row = {"kind": kind, "recipe": {"difference": difference, **ends, "p": p, "detectable": 0.07}}
    row["detectable_holm"] = 0.3
    assert verdict(row, 0.01).startswith(said)
    assert verdict({**row, "p_holm": 0.3}, 0.01).startswith("NOT shown" if kind == "control" else "no difference shown")
    alone = "a test of this contrast alone would have found one of 7.0 points, Holm's first step one of 30.0, in 80 %"
    assert (alone in verdict({**row, "p_holm": p}, 0.01)) == said.startswith("no")
    assert verdict({**row, "kind": "post hoc"}, 0.01) == "not tested, since both records were known when it was added"
    whole = said.endswith("by its whole interval")
    assert verdict({**row, "p_holm": p}, 0.01).endswith("which is not corrected") == whole


@pytest.mark.parametrize(
    ("expected", "low", "high", "said"),
    [
        ([0, 3], 0.01, 0.08, "undecided"),
        ([0, 3], 0.01, 0.03, "which holds"),
        ([0, 3], 0.04, 0.08, "which does not hold"),
        ([0, None], 0.01, 0.08, "which holds"),
        ([None, 0], 0.01, 0.08, "which does not hold"),
        (1, -0.05, 0.08, "undecided"),
        (1, 0.02, 0.08, "which does not hold"),
    ],
)
def test_what_came_of_an_expectation(expected, low, high, said):
    assert outcome({"expected": expected, "recipe": {"low": low, "high": high}}) == said


def test_reached():
    assert reached(0.9, 0.8, 0.9, 100) == "reached by the mean (by less than one picture), not by the whole interval"
    assert reached(0.92, 0.8, 0.9, 100) == "reached by the mean, not by the whole interval"
    assert reached(0.9, 0.8, 0.9, 0) == "reached by the mean, not by the whole interval"
    assert reached(0.9, 0.85, 0.85, 100) == "reached"
    assert reached(0.9, 0.85, 0.95, 100) == "5.00 points short"


def test_a_contrast_that_is_not_made_counts_in_holms_family_and_other_pictures_are_refused(make_run, tmp_path):
    def made(name: str, **more: Any) -> Record:
        how = {"model": {"img_size": 32}, "trainer": {"max_epochs": 2}}
        runs = [make_run(seed, name=f"{name}{seed}", **how, **more) for seed in (0, 1, 2)]
        return read_record(record(runs, f"mini-{name}", tmp_path, fingerprint))

    reference, arm = made("labels", noise=2.0), made("hard", noise=0.5)
    pair = {"kind": "exploratory", "arm": "hard", "reference": "labels", "grid": ["10 %", "ImageNet", "hard"]}
    pair["expected"] = 2
    described = {
        "arm": "hard",
        "reference": "labels",
        "expected": [None, 0],
        "hypothesis": "H6",
        "question": "other pictures",
    }
    later = {"arm": "hard", "reference": "labels", "question": "later", "told": True}
    spec = {"post_hoc": [later], "factorial": {"R": {"none": "labels", "taught": "hard", "more": "never"}},
            "arms": {"labels": {"base": "b"}, "hard": {"like": "labels", "options": ["y=2"]}}, "bases": {"b": ["x=1"]},
            "contrasts": [pair, {**pair, "arm": "never"}, {**pair, "arm": "neither"}], "worth": 0.01,
            "targets": [{"arm": "hard", "asked": [0.01], "predicted": [0, 0.02], "what": "noise"}],
            "described": [described, {**described, "arm": "never"}], "same_weights": ["hard", "labels"]}  # fmt: skip
    planned = ["mini-hard", "mini-labels", "mini-never"]
    page = write_page(spec, "mini", planned, tmp_path, lambda names: "").read_text()
    row, after = json.loads((tmp_path / "mini" / "contrasts.json").read_text())
    own = {line["on"]: line for line in compare([reference.path, arm.path])["recipe"]}
    assert row["recipe"]["p"] == own["new pictures"]["p"] < 0.3
    assert row["p_holm"] == 3 * row["recipe"]["p"]
    assert row["detectable_holm"] == st.detectable_recipe(row["recipe"]["error"], 3, 0.05 / 3)
    areas = [[part.metrics(run)["test"]["head"]["auroc"]["value"] for run in part.runs] for part in (arm, reference)]
    assert row["auroc"]["difference"] == pytest.approx(np.mean(areas[0]) - np.mean(areas[1]))
    assert row["auroc"]["difference"] > 0
    assert after.keys() == {*row, "told"} - {"p_holm", "detectable_holm", "grid", "expected"}
    differences = " ".join(f"{100 * d:+.1f}" for d in row["recipe"]["differences"])
    assert page.count(f" | {differences} |\n") == 2
    assert row["same"]["difference"] == own["same pictures"]["difference"] > 0
    assert "- Exploratory: 1 of 3 contrasts are made, 0 shown" in page
    shared = "their 3 runs trained for 3.0 CPU-hours"  # of the same command and weights: the same runs in both
    assert f"- 2 of 3 records are made; {shared}, 0 trials" in page
    assert "Left out so far: never." in page
    assert "Predicted: below 2.00 %; that was wrong. 1.00 % asked, reached." in page
    assert "| hard - labels | 10 %, ImageNet, hard | no difference shown | 3 seeds | +2 |" in page
    assert re.search(r"\| hard - labels \| later \| post hoc \| 3 seeds \|  \| [^|]+ \|  \|  \|  \|\n", page)
    assert re.search(r"- Post hoc. Later: hard - labels is .* over 3 seeds: not tested, since both records were", page)
    assert "in the first half of training: hard seed1 (1 of 2), labels seed1 (1 of 2).\n" in page
    assert "Holm's first step (p < 0.017) would have found differences of " in page
    assert "| hard | b | `y=2` |\n| labels | b |  |\n" in page
    assert "| base | options |\n| --- | --- |\n| b | `x=1` |\n" in page
    levels = [next(c["value"] for c in part.claims if c["claim"] == "test/head/accuracy") for part in (reference, arm)]
    points = 100 * (levels[1] - levels[0])
    short = f"R: none {100 * levels[0]:.1f} %, taught {100 * levels[1]:.1f} % ("
    assert f"- In short, accuracy over 3 seeds, 2 epochs at 32 px. {short}" in page
    blind = [
        np.mean([p.metrics(r)["test"]["no_pixels"]["accuracy"]["value"] for r in p.runs]) for p in (reference, arm)
    ]
    above = sum(level > floor for level, floor in zip(levels, blind, strict=True))
    assert above == 2
    assert "- 2 of these 2 arms are above a forest that sees no pixels, only size and format of the file.\n" in page
    ends = [100 * row["recipe"][key] for key in ("low", "high")]
    cell = f"+2 → {points:+.2f} [{ends[0]:+.2f}, {ends[1]:+.2f}]"
    assert "| pictures, teacher | labels alone | hard |\n" in page
    assert f"| 10 %, ImageNet | {100 * levels[0]:.1f} % | {cell} |\n" in page
    assert f"{int(ends[0] <= 2 <= ends[1])} of 1 intervals hold what was expected" in page
    assert page.count("1. H6.") == 1
    said = f"hard {100 * levels[1]:.1f} %, labels {100 * levels[0]:.1f} %, {points:+.1f} points, expected 0 or less;"
    assert f"1. H6. Other pictures: {said} on other test pictures, so not tested." in page
    assert "Negative control. hard and labels have the same weights, bit for bit (seed 0, seed 1, seed 2)." in page
    (low, high), n = on_new_pictures(arm, "head")
    claim = next(claim for claim in arm.claims if claim["claim"] == "test/head/accuracy")
    assert n == 16
    assert low < claim["low"] < min(1, claim["high"]) <= high  # pictures add to the spread over seeds

    file = arm.path / "runs" / "seed1" / "predictions.parquet"
    frame, classes = read_predictions(file)
    write_predictions(file, frame.drop(frame.index[frame["split"] == "test"][0]), classes)
    with pytest.raises(UserError, match="mini-hard and mini-labels were not tested on the same pictures"):
        contrast(reference, arm)
