"""Records that were tampered with: each way is found, and named by a sentence of its own."""

import copy
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from facemask import cli, reproduce
from facemask.cli import app
from facemask.data.splits import fingerprint
from facemask.errors import UserError
from facemask.runs.folder import file_sha256
from facemask.runs.predictions import read_predictions, write_predictions
from facemask.runs.record import read_record, record
from facemask.runs.reproduce import (
    compare_predictions,
    hardware_differences,
    judge,
    prediction_interval,
    software_differences,
    worst,
)

RUN = "runs/seed1"


@pytest.fixture
def path(make_record):
    return make_record()


def check(path, tier="metrics", **options):
    lines: list[str] = []
    result = reproduce.reproduce(path, tier, lines.append, **options)
    return result, "\n".join(lines)


def edit(file, pattern, new, count=1):
    text = file.read_text()
    assert re.search(pattern, text)
    file.write_text(re.sub(pattern, new, text, count=count))


def sum_again(path):
    """What someone does who changes a record on purpose."""
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    lines = [f"{file_sha256(path / file)}  {file}\n" for file in files if file != "SHA256SUMS"]
    (path / "SHA256SUMS").write_text("".join(lines))


def rewrite_predictions(path, change):
    file = path / RUN / "predictions.parquet"
    frame, classes = read_predictions(file)
    write_predictions(file, change(frame), classes)


def test_an_untouched_record_passes(path):
    result, output = check(path)
    assert result == "PASS"
    assert "FAIL" not in output
    assert "DRIFT" not in output
    accuracy = read_record(path).info["summary"]["test"]["head"]["accuracy"]["mean"]
    assert f"PASS   test/head/accuracy: {accuracy:.6f}" in output
    assert output.endswith(
        "PASS   mine, tier metrics: 29 PASS"
    )  # 2 splits x 4 heads x 3 metrics, 2 of curves, 3 weights


def test_tier_metrics_runs_without_torch(path):
    program = (
        "import sys; sys.modules['torch'] = None; from facemask.cli import main; "
        f"sys.argv = ['facemask', 'reproduce', 'mine', '--experiments', {str(path.parent)!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "PASS   mine, tier metrics" in done.stdout


TEXTS = ["record.json", "config.yaml", "claims.yaml", "versions.txt", "README.md"]


@pytest.mark.parametrize("name", [*TEXTS, f"{RUN}/metrics.json", f"{RUN}/curves.csv"])
def test_one_digit_is_found_in_every_text_file(path, name):
    text = (path / name).read_text()
    place = [i for i, c in enumerate(text) if c.isdigit()][-1]
    (path / name).write_text(text[:place] + str((int(text[place]) + 1) % 10) + text[place + 1 :])
    try:
        result, output = check(path)
    except UserError as error:  # the digit made it unreadable
        pytest.fail(str(error))
    assert result == "FAIL"
    assert f"FAIL   {name} was changed: its sha256 is not the recorded one" in output


def test_a_digit_of_a_claim_is_found_by_recomputing(path):
    claims = yaml.safe_load((path / "claims.yaml").read_text())
    (claim,) = [claim for claim in claims if claim["claim"] == "test/head/accuracy"]
    true = claim["value"]
    claim["value"] += 2e-9
    (path / "claims.yaml").write_text(yaml.safe_dump(claims))
    sum_again(path)
    result, output = check(path)
    assert result == "FAIL"
    assert f"FAIL   test/head/accuracy: value is {claim['value']} in claims.yaml, and {true} follows" in output
    assert output.endswith("28 PASS, 1 FAIL")


def test_metrics_and_claims_changed_alike_are_found_by_recomputing(path):
    metrics = json.loads((path / RUN / "metrics.json").read_text())
    metrics["test"]["head"]["accuracy"]["value"] += 0.03
    (path / RUN / "metrics.json").write_text(json.dumps(metrics))
    claims = yaml.safe_load((path / "claims.yaml").read_text())
    next(c for c in claims if c["claim"] == "test/head/accuracy")["value"] += 0.01
    (path / "claims.yaml").write_text(yaml.safe_dump(claims))
    sum_again(path)
    result, output = check(path)
    assert result == "FAIL"
    assert re.search(
        rf"FAIL   {RUN}/metrics.json: test.head.accuracy.value is 0.\d+, and 0.\d+ follows from the rest", output
    )
    assert "FAIL   test/head/accuracy: value is" in output


def test_a_wider_tolerance_and_a_claim_made_twice_are_found(path):
    claims = yaml.safe_load((path / "claims.yaml").read_text())
    claims[0]["tolerance"]["predict"] = 1.0
    claims.append(copy.deepcopy({**claims[1], "value": 0.99}))
    (path / "claims.yaml").write_text(yaml.safe_dump([claims[-1], *claims[:-1]]))
    sum_again(path)
    result, output = check(path)
    assert result == "FAIL"
    assert f"{claims[0]['claim']}: tolerance.predict is 1.0 in claims.yaml, and 0.005 follows" in output
    assert f"{claims[1]['claim']}: value is 0.99 in claims.yaml" in output
    assert f"{claims[1]['claim']}: claimed twice" in output


def test_facts_of_a_record_that_others_contradict_are_found(path):
    info = json.loads((path / "record.json").read_text())
    info["runs"]["seed0"]["weights_sha256"] = "f" * 64
    info["runs"]["seed1"]["audit"]["test_with_a_copy_in_train"] += 1
    info["test_opened"] = 1
    (path / "record.json").write_text(json.dumps(info))
    rewrite_predictions(path, lambda frame: frame.assign(group=["other", *frame["group"][1:]]))
    sum_again(path)
    output = check(path)[1]
    assert "record.json: no checkpoint of seed0 has its weights_sha256" in output
    assert "record.json: seed1.audit.test_with_a_copy_in_train is 1, and 0 follows from the rest" in output
    assert "record.json: test_opened is 1, and 5 follows from the rest" in output
    assert re.search(rf"{RUN}/predictions.parquet has no picture for 1 prediction.*, other", output)


def test_an_interpolation_in_a_config_is_named_and_not_resolved(path):
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["data"]["augmentation"] = "${oc.decode:'{_target_: os.system, command: true}'}"
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    sum_again(path)
    with pytest.raises(UserError, match=r"config\.yaml holds [\"']\$\{oc\.decode:.*, which a run never stores"):
        check(path)


def test_a_claim_removed_or_added_is_found(path):
    claims = yaml.safe_load((path / "claims.yaml").read_text())
    (path / "claims.yaml").write_text(yaml.safe_dump([*claims[1:], {**claims[0], "claim": "test/oracle/accuracy"}]))
    sum_again(path)
    result, output = check(path)
    assert result == "FAIL"
    assert f"FAIL   {claims[0]['claim']}: the README prints it and claims.yaml lacks it" in output
    assert "FAIL   test/oracle/accuracy: nothing here supports it" in output


def test_a_prediction_row_removed_is_found(path):
    gone = []

    def drop(frame):
        gone.append(frame.iloc[5])
        return frame.drop(index=5).reset_index(drop=True)

    rewrite_predictions(path, drop)
    assert f"FAIL   {RUN}/predictions.parquet was changed" in check(path)[1]
    sum_again(path)
    result, output = check(path)
    assert result == "FAIL"
    row = ", ".join(gone[0][["id", "split", "label"]])
    assert f"FAIL   {RUN}/predictions.parquet lacks 1 prediction(s), such as {row}" in output


def test_a_prediction_row_twice_or_foreign_or_relabelled_is_found(path):
    def change(frame):
        frame = frame.copy()
        frame.loc[0, "id"] = "with_mask/99.jpg"
        frame.loc[1] = frame.loc[2]
        return frame

    rewrite_predictions(path, change)
    sum_again(path)
    output = check(path)[1]
    assert f"{RUN}/predictions.parquet has no picture for 1 prediction(s), such as with_mask/99.jpg" in output
    assert f"{RUN}/predictions.parquet has two predictions for" in output


def test_a_logit_changed_is_found(path):
    def change(frame):
        frame.loc[3, "logit/head/with_mask"] += np.float32(1e-3)
        return frame

    rewrite_predictions(path, change)
    sum_again(path)
    result, output = check(path)
    assert result == "FAIL"
    assert re.search(rf"{RUN}/metrics.json: (val|test).head.\S+ is \S+, and \S+ follows from the rest", output)
    assert re.search(r"FAIL   (val|test)/head/nll: .*value is", output)


def test_a_truncated_parquet_file_is_named(path):
    for name in (f"{RUN}/predictions.parquet", "pictures.parquet"):
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=rf"{name} is not a readable Parquet file \(cut off\?\)"):
            check(path)
        (path / name).write_bytes(content)


def test_a_record_of_a_newer_format_is_named(path):
    edit(path / "record.json", r'"format": 1', '"format": 2')
    with pytest.raises(UserError, match=r"is a record of format 2, facemask here reads up to 1: update"):
        check(path)


@pytest.mark.parametrize("target", ["os.system", "facemask.config.os.system", "builtins.eval", "subprocess.run"])
def test_a_dangerous_target_is_named_and_not_built(path, target):
    edit(path / "config.yaml", r"facemask\.data\.transforms\.Augmentation", target)
    sum_again(path)
    with pytest.raises(UserError, match=re.escape(f"{path / 'config.yaml'} asks for '{target}'")):
        check(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config-dir=/tmp", "is no override of train.py"),
        ("-m", "is no override of train.py"),
        ("hydra.launcher._target_=os.system", "is no override of train.py"),
        ("+hydra.callbacks.x._target_=os.system", "is no override of train.py"),
        ("+callbacks@hydra.callbacks.x=default", "is no override of train.py"),
        ("+callbacks.x._target_=os.system", "asks for 'os.system'"),
        ("model=nothing", "does not fit this version of the project: model=nothing does not exist"),
    ],
)
def test_a_dangerous_command_is_not_run(path, override, message, monkeypatch):
    info = json.loads((path / "record.json").read_text())
    info["runs"]["seed0"]["overrides"] = ["model=vit", override]
    (path / "record.json").write_text(json.dumps(info, indent=1))
    sum_again(path)
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("it was run"))
    monkeypatch.setattr(reproduce, "code_and_versions", lambda: (HERE, ""))
    with pytest.raises(UserError, match=re.escape(message)):
        check(path, "train")


HERE = {
    "git": {"commit": "c" * 40, "trees": ["t"], "dirty": False, "untracked": []},
    "platform": {"python": "3.11.0"},
    "versions": {"numpy": np.__version__, "torch": "2.9"},
}


def bomb(path):
    lines = [f"{b}: &{b} [{', '.join(['*' + a] * 9)}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True)]
    with (path / "config.yaml").open("a") as file:
        file.write("\n".join(["", "a: &a [x, x, x, x, x, x, x, x, x]", *lines, ""]))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (bomb, r"config\.yaml is longer than .* or has aliases"),
        (lambda p: edit(p / "config.yaml", "resamples: 100", "resamples: 1000000000"), "at most 100,000 are drawn"),
        (lambda p: (p / "claims.yaml").write_text("[" * 2000), r"claims\.yaml is not readable YAML"),
        (lambda p: edit(p / "claims.yaml", r"value: [\d.]+", "value: much"), r"'value': 'much', .* which is no claim"),
        (lambda p: edit(p / "record.json", '"seed": 1', '"seed": 2'), "has no name, runs or claims"),
        (lambda p: (p / RUN / "metrics.json").write_text(""), r"metrics\.json is not a readable Json file"),
        (lambda p: (p / RUN / "curves.csv").unlink(), r"curves\.csv is missing"),
        (lambda p: (p / "versions.txt").write_bytes(b"\xff"), r"versions\.txt is not a readable Txt file"),
        (lambda p: rewrite_predictions(p, lambda f: f.filter(regex="^(?!logit/teacher)")), "do not agree on 'logit/t"),
        (lambda p: rewrite_predictions(p, lambda f: f.iloc[:0]), "the predictions table is empty"),
        (lambda p: rewrite_predictions(p, lambda f: f.assign(label="mask")), "the label 'mask' is not one of"),
    ],
)
def test_what_cannot_be_read_is_named_though_its_sum_is_right(path, change, sentence):
    change(path)
    sum_again(path)
    with pytest.raises(UserError, match=sentence):
        check(path)


def test_a_file_that_no_record_has_is_found_though_it_is_in_the_sums(path):
    (path / "face.jpg").write_bytes(b"x")
    sum_again(path)
    assert "FAIL   face.jpg is no part of a record" in check(path)[1]


def test_files_missing_new_or_sums_gone_are_named(path):
    (path / "config.yaml.bak").write_text("")
    (path / "diff.patch").symlink_to("/etc/hostname")
    output = check(path)[1]
    assert "FAIL   config.yaml.bak is no part of the record" in output
    assert "FAIL   diff.patch is no part of the record" in output
    (path / "versions.txt").unlink()
    with pytest.raises(UserError, match=r"versions\.txt"):
        check(path)
    (path / "SHA256SUMS").unlink()
    (path / "versions.txt").write_text("")
    assert "FAIL   SHA256SUMS is missing or cannot be read" in check(path)[1]


def test_a_record_without_its_parts_ends_in_one_sentence(path):
    info = json.loads((path / "record.json").read_text())
    for key in ("git", "runs", "summary", "classes", "data"):
        (path / "record.json").write_text(json.dumps({k: v for k, v in info.items() if k != key}))
        with pytest.raises(UserError, match="in the form that `facemask record` writes"):
            check(path)
    (path / "record.json").write_text("[1")
    with pytest.raises(UserError, match=r"record\.json is not a readable Json file"):
        check(path)
    with pytest.raises(UserError, match=r"holds no record\.json"):
        check(path.parent / "absent")


@pytest.mark.parametrize(("old", "new"), [(r'"seed1": \{', '"../seed1": {'), ('"name": "mine"', '"name": "../mine"')])
def test_names_cannot_lead_out_of_the_record(path, old, new):
    edit(path / "record.json", old, new)
    with pytest.raises(UserError, match="has no name, runs or claims"):
        check(path)


# -- pictures ---------------------------------------------------------------------------------------------------


def test_a_replaced_picture_stops_everything(path, photographs):
    picture = photographs / "with_mask" / "03.jpg"
    content = picture.read_bytes()
    sentence = r"not those of the record: 1 replaced \(with_mask/03\.jpg\); nothing was computed"
    for other in (content + b"!", content[:-1] + b"!"):
        picture.write_bytes(other)
        with pytest.raises(UserError, match=sentence):
            check(path)
    picture.unlink()
    (photographs / "with_mask" / "new.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"1 missing \(with_mask/03\.jpg\); 1 unknown \(with_mask/new\.jpg\)"):
        check(path)


def test_pictures_that_a_fraction_left_out_are_not_unknown(make_run, photographs, tmp_path):
    data = {"root": str(photographs), "split": None, "fold": None, "fraction": 0.5}
    path = record([make_run(0, data=data)], "part", tmp_path / "e", fingerprint)
    (photographs / "with_mask" / "left_out.jpg").write_bytes(b"x")
    assert check(path)[0] == "PASS"


def test_the_quick_check_looks_at_the_newest_and_full_at_all(path, photographs, monkeypatch):
    import os

    monkeypatch.setattr(reproduce, "QUICK", -1.0)  # no time to hash any
    picture = photographs / "with_mask" / "03.jpg"
    picture.write_bytes(picture.read_bytes()[:-1] + b"!")
    os.utime(picture, (0, 0))
    assert check(path)[0] == "PASS"
    with pytest.raises(UserError, match=r"1 replaced \(with_mask/03\.jpg\)"):
        check(path, full=True)
    for tier in ("predict", "train"):
        with pytest.raises(UserError, match=r"1 replaced \(with_mask/03\.jpg\)"):
            check(path, tier)


def test_without_pictures_only_tier_metrics_works(path, monkeypatch):
    monkeypatch.delenv("FACEMASK_DATA")
    result, output = check(path)
    assert result == "PASS"
    assert "data   not here" in output
    with pytest.raises(UserError, match="tier train needs the pictures: give their folder with --data"):
        check(path, "train")
    with pytest.raises(UserError, match="the picture folder nowhere does not exist"):
        check(path, data_root="nowhere")


# -- checkpoints ------------------------------------------------------------------------------------------------


def test_tier_predict_wants_the_recorded_checkpoint(path, tmp_path):
    with pytest.raises(UserError, match=r"tier predict needs --checkpoint PATH.*--tier train makes it anew"):
        check(path, "predict")
    with pytest.raises(UserError, match=r"gone\.ckpt does not exist"):
        check(path, "predict", checkpoint=tmp_path / "gone.ckpt")
    flipped = tmp_path / "flipped.ckpt"
    flipped.write_bytes(b"weightr")  # one bit of "weights"
    with pytest.raises(UserError, match=r"is not the recorded checkpoint \(its sha256 [0-9a-f]{12}\.\.\. is none"):
        check(path, "predict", checkpoint=flipped)


# -- verdicts ---------------------------------------------------------------------------------------------------


def test_prediction_interval_by_hand():
    # mean 0.9, s 0.01, t(2) = 4.3026527: 4.3026527 * 0.01 * sqrt(4/3) = 0.0496828
    assert prediction_interval([0.89, 0.90, 0.91]) == pytest.approx((0.8503172, 0.9496828), abs=1e-6)
    assert prediction_interval([0.9]) is None
    assert prediction_interval([0.9, 0.9, 0.9]) is None


def moved(path, by):
    """The predictions of seed1 with `by` pictures decided the other way, worst first; and how many there are."""
    frame, _ = read_record(path).predictions("seed1")
    test = frame.index[frame["split"] == "test"]
    columns = ["logit/head/with_mask", "logit/head/without_mask"]
    right = [
        i
        for i in test
        if (frame.loc[i, columns[0]] > frame.loc[i, columns[1]]) == (frame.loc[i, "label"] == "with_mask")
    ]
    frame.loc[right[:by], columns] = frame.loc[right[:by], columns[::-1]].to_numpy()
    return frame, len(test)


def verdict_of(verdicts, claim):
    (found,) = [v for v in verdicts if v.claim == claim]
    return found


def test_equal_predictions_pass_at_every_tier(path):
    record = read_record(path)
    frame, _ = record.predictions("seed1")
    for tier in ("predict", "train"):
        verdicts = judge(record, "seed1", frame, tier, must_be_equal=True, weights=f"{1:064}")
        assert worst(verdicts) == "PASS"
        assert len(verdicts) == 25  # 24 of metrics and the weights of this run
    assert compare_predictions(record, "seed1", frame) == (0.0, [])


def test_other_numbers_drift_within_the_interval_of_the_seeds_and_fail_outside(path):
    record = read_record(path)
    values = [record.metrics(run)["test"]["head"]["accuracy"]["value"] for run in record.runs]
    low, high = prediction_interval(values)
    seen = set()
    for by in range(1, 13):
        frame, n = moved(path, by)
        expected = values[1] - by / n
        verdict = verdict_of(judge(record, "seed1", frame, "train", must_be_equal=False), "test/head/accuracy")
        assert verdict.verdict == ("DRIFT" if low <= expected <= high else "FAIL")
        assert f"prediction interval {low:.6f} to {high:.6f}" in verdict.text
        seen.add(verdict.verdict)
    assert seen == {"DRIFT", "FAIL"}
    frame, _ = moved(path, 1)
    verdict = verdict_of(judge(record, "seed1", frame, "train", must_be_equal=True), "test/head/accuracy")
    assert verdict.verdict == "FAIL"
    assert "nothing else differs, so it must be equal" in verdict.text
    gap, flips = compare_predictions(record, "seed1", frame)
    assert gap > 0
    assert len(flips) == 1
    assert re.fullmatch(r"with\w*_mask/\d\d\.jpg \(test, with\w*_mask\): with\w*_mask -> with\w*_mask", flips[0])


def test_one_seed_and_tier_predict_have_the_tolerance_of_the_claim(make_record):
    path = make_record(seeds=(1,))
    record = read_record(path)
    frame, _ = moved(path, 1)  # 1 of 16: 0.0625
    for tier, tolerance in (("train", 0.02), ("predict", 0.005)):
        verdict = verdict_of(judge(record, "seed1", frame, tier, must_be_equal=False), "test/head/accuracy")
        assert verdict.verdict == "FAIL"
        assert f"tolerance {tolerance}" in verdict.text
    frame, _ = record.predictions("seed1")
    frame["logit/head/with_mask"] *= np.float32(1.0001)
    nll = verdict_of(judge(record, "seed1", frame, "predict", must_be_equal=False), "test/head/nll")
    assert nll.verdict == "DRIFT"


def test_predictions_of_other_pictures_are_refused(path):
    record = read_record(path)
    frame, _ = record.predictions("seed1")
    with pytest.raises(UserError, match="1 predictions are of other pictures than those of seed1"):
        compare_predictions(record, "seed1", frame.iloc[1:])


def test_what_differs_is_named(path):
    record = read_record(path)
    python = record.info["platform"]["python"]
    here = {**HERE, "platform": {"python": python}}
    assert software_differences(record, here) == []
    other = {
        "git": {"commit": "d" * 40, "trees": ["t"], "dirty": True, "untracked": []},
        "platform": {"python": python},
        "versions": {"torch": "2.10"},
    }
    assert software_differences(record, other) == [
        f"code: commit {'d' * 40} with uncommitted changes here, {'c' * 40} in the record",
        f"versions: numpy not installed here, {np.__version__} in the record",
        "versions: torch 2.10 here, 2.9 in the record",
    ]
    edit(path / "versions.txt", r"torch==2\.9", "torch==2.8")
    assert "versions: torch" in "\n".join(software_differences(read_record(path), here))
    assert "versions.txt was changed" in check(path)[1]


def test_hardware_and_environment_that_differ_are_named(path):
    record = read_record(path)
    facts = record.info["runs"]["seed1"]
    assert hardware_differences(record, "seed1", facts) == []
    here = {
        "hardware": {**facts["hardware"], "capability": "AVX512", "cores": 64},
        "environment": {**facts["environment"], "OMP_NUM_THREADS": "8", "FACEMASK_DATA": "set"},
    }
    assert hardware_differences(record, "seed1", here) == [
        "hardware: capability AVX512 here, AVX2 in the record",
        "environment: OMP_NUM_THREADS 8 here, 2 in the record",
    ]


# -- the command ------------------------------------------------------------------------------------------------


def invoke(*arguments):
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])


def test_exit_codes(path, monkeypatch):
    place = ("--experiments", path.parent)
    assert invoke("mine", *place).exit_code == 0
    assert invoke("--all", *place).exit_code == 0
    done = invoke("absent", "mine", *place)
    assert done.exit_code == 2
    assert "holds no record.json" in done.output
    assert "PASS   mine, tier metrics" in done.output
    for verdict, code in (("DRIFT", 3), ("FAIL", 1)):
        monkeypatch.setattr(reproduce, "reproduce", lambda *a, verdict=verdict, **k: verdict)
        assert invoke("mine", *place).exit_code == code
    assert isinstance(invoke(*place).exception, UserError)
    monkeypatch.setattr(sys, "argv", ["facemask", "reproduce", *map(str, place)])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    assert exit.value.code == 2
