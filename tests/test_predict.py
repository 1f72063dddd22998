"""A finished run, made here without training or pictures, asked about files of every kind."""

import csv
import dataclasses
import errno
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from PIL import Image
from typer.testing import CliRunner

import facemask
from facemask import predict
from facemask.cli import app
from facemask.config import ROOT, as_plain
from facemask.data.images import BadImage, centre_crop, decode, resize_short
from facemask.errors import UserError
from facemask.files import write_json, write_text
from facemask.modeling.classifier import Classifier
from facemask.predict import Model, Prediction, expand, load_model, predict_files
from facemask.runs import predictions
from facemask.runs.calibration import fit_temperature, softmax
from facemask.runs.checkpoints import weights_sha256, write_checkpoint

CLASSES = ["with_mask", "without_mask"]
REAL = os.environ.get("FACEMASK_DATA")
needs_pictures = pytest.mark.skipif(not REAL, reason="FACEMASK_DATA is not set")


def write_run(folder: Path, model: str = "deit_distilled") -> Path:
    """A run folder with weights that nobody trained, and predictions of 40 validation pictures that nobody made."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        options = [f"model={model}", "distill=none", "model.img_size=32", "model.depth=1", "data=synthetic"]
        config = as_plain(compose("train", [*options, f"run_dir={folder}"]))
    classifier = Classifier(config["model"], config["distill"], config["optim"], CLASSES, 0, 64)
    content = {"hyper_parameters": dict(classifier.hparams), "state_dict": classifier.state_dict()}
    write_checkpoint(folder / "checkpoints" / "best.ckpt", content)
    write_text(folder / "config.yaml", yaml.safe_dump(config))
    rng = np.random.default_rng(0)
    labels = [CLASSES[i % 2] for i in range(40)]
    heads = {head: 3 * (np.eye(2)[[0, 1] * 20] + rng.normal(size=(40, 2))) for head in classifier.heads}
    ids = [f"{i}.jpg" for i in range(40)]
    frame = predictions.assemble(ids, ["val"] * 40, ids, labels, heads, CLASSES)
    frame = predictions.add_mean_head(frame, CLASSES)
    predictions.write_predictions(folder / "predictions.parquet", frame, CLASSES)
    write_json(folder / "summary.json", {"weights_sha256": weights_sha256(classifier.state_dict())})
    return folder


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("predict") / "run")


@pytest.fixture(scope="session")
def model(run) -> Model:
    return load_model(run, device="cpu", precision="fp32")


@pytest.fixture(scope="session")
def faces(tmp_path_factory) -> Path:
    """Five pictures, one of them below, and what is none: text, nothing, half of a picture, a huge header."""
    folder = tmp_path_factory.mktemp("faces")
    (folder / "below" / ".hidden").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["a.jpg", "b.png", "c, d.jpg", "e.JPG", "below/f.jpg"]
    for name in names:
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name, quality=90)
    (folder / "below" / ".hidden" / "no.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no picture")
    (folder / "zero.png").write_bytes(b"")
    (folder / "half.png").write_bytes((folder / "b.png").read_bytes()[:900])
    (folder / "notes.txt").write_text("not listed")
    return folder


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def call(*arguments: object, **more: object):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], **more)


# -- the model --------------------------------------------------------------------------------------------------


def test_a_prediction_is_the_calibrated_softmax_of_the_evaluation_view(run, model, faces):
    data = (faces / "a.jpg").read_bytes()
    view = centre_crop(resize_short(decode(data), int(32 / 0.875)), 32)
    with torch.inference_mode():
        logits = model.classifier(torch.from_numpy(view).permute(2, 0, 1)[None])
    frame, _ = predictions.read_predictions(run / "predictions.parquet")
    labels = np.array([0, 1] * 20)
    (found,) = model.predict(faces / "a.jpg")
    assert model.heads == ["head", "head_dist", "mean"]
    for head in model.heads:
        temperature = fit_temperature(predictions.logits(frame, head, CLASSES), labels)
        assert model.temperatures[head] == pytest.approx(temperature)
        p = softmax(logits[head].numpy(), temperature)[0]
        label, probability = found.heads[head]
        assert (label, probability) == (CLASSES[p.argmax()], pytest.approx(p.max(), abs=1e-6))
    assert (found.label, found.probability) == found.heads["mean"]
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert model.predict(faces / "a.jpg", head="head_dist")[0].label == found.heads["head_dist"][0]
    assert model.calibration == f"calibrated on 40 validation pictures, temperature {temperature:.3g} (mean)"
    assert facemask.load_model is load_model


def test_all_kinds_of_pictures_give_the_same(model, faces):
    file = faces / "b.png"
    pixels = np.asarray(Image.open(file))
    found = model.predict([file, str(file), file.read_bytes(), Image.open(file), pixels, Image.open(file).convert("P")])
    assert len({row.probability for row in found[:5]}) == 1
    assert found[5].label is not None
    grey = pixels[:, :, 0]
    assert model.predict(grey)[0].probability == model.predict(np.dstack([grey] * 3))[0].probability
    assert [row.source for row in model.predict(str(file))] == [str(file)]
    turned = Image.open(file).transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    assert model.predict(turned)[0].probability == pytest.approx(found[0].probability, abs=1e-6)


def test_the_batch_changes_nothing_and_the_order_stays(model, faces):
    files = [faces / name for name in ("a.jpg", "text.jpg", "b.png", "zero.png", "c, d.jpg", "e.JPG")] * 5
    whole = model.predict(files)
    assert [row.source for row in whole] == files
    small = model.predict(files, batch_size=2)
    assert [row.problem for row in small] == [row.problem for row in whole]
    given = [(a.probability, b.probability) for a, b in zip(whole, small, strict=True) if a.label]
    np.testing.assert_allclose(*zip(*given, strict=True), atol=1e-6)


@pytest.mark.parametrize(
    ("picture", "problem"),
    [
        ("text.jpg", "not a JPEG, PNG, WEBP or GIF picture"),
        ("zero.png", "empty file"),
        ("half.png", "truncated"),
        ("nowhere.jpg", r"cannot be read \(No such file or directory\)"),
        ("below", r"cannot be read \(Is a directory\)"),
        (os.devnull, "no regular file"),
        ("a\0b.jpg", r"cannot be read \(embedded null byte\)"),
        (np.zeros((4, 4, 3)), r"an array of float64 \(4, 4, 3\) is no picture"),
        (np.zeros((0, 4, 3), np.uint8), "no pixels"),
        (np.zeros((9000, 9000), np.uint8).T[:, :0], "no pixels"),
        (Image.new("1", (20_000, 10_000)), "is 200000000 pixels, more than"),
    ],
)
def test_what_gives_no_picture(model, faces, picture, problem):
    given = faces / picture if isinstance(picture, str) else picture
    (found,) = model.predict([given])
    assert (found.label, found.probability, found.unsure) == (None, None, False)
    with pytest.raises(BadImage, match=problem):
        model.view(given)


def test_a_huge_png_and_a_pipe_are_refused_unread(model, tmp_path):
    Image.new("1", (20_000, 10_000)).save(tmp_path / "huge.png")
    os.mkfifo(tmp_path / "pipe.jpg")  # nobody will ever write to it
    start = time.process_time()
    huge, pipe = model.predict([tmp_path / "huge.png", tmp_path / "pipe.jpg"])
    assert huge.problem == "20000x10000 is 200000000 pixels, more than data.max_pixels=64000000 allows"
    assert pipe.problem == "no regular file"
    assert time.process_time() - start < 0.5


def test_few_pictures_wait_in_memory(model):
    picture = np.zeros((32, 32, 3), np.uint8)
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield picture

    stream = model.stream(endless(), batch_size=4)
    for _ in range(9):
        next(stream)
    assert taken <= 3 * 4 + 2 * 4
    stream.close()


def test_bf16_is_asked_first_and_doubts_are_settled_in_fp32(model, faces, monkeypatch):
    files = [faces / name for name in ("a.jpg", "b.png", "e.JPG", "c, d.jpg")]
    views = np.stack([model.view(file) for file in files])
    exact = model.logits(views)
    rough = dataclasses.replace(model, half=model.classifier.backbone, temperatures=dict.fromkeys(model.heads, 1.0))
    asked = []

    def logits(self, pixels, *, bf16=False):
        asked.append((pixels, bf16))
        if not bf16:
            return {head: values[-2:] for head, values in exact.items()}
        # sure; sure; nearly even; near the threshold of 0.8
        margins = torch.tensor([50.0, 0.9, 0.1, float(np.log(4)) + 0.1])
        return {head: torch.stack([margins, torch.zeros(4)], dim=1) for head in exact}

    monkeypatch.setattr(Model, "logits", logits)
    found = rough.predict(files)
    assert [bf16 for _, bf16 in asked] == [True, False]
    np.testing.assert_array_equal(asked[1][0], views[2:])
    assert [row.probability for row in found[:2]] == pytest.approx([1, 1 / (1 + np.exp(-0.9))])
    expected = rough.probabilities(exact)["mean"][2:].max(axis=1)
    assert [row.probability for row in found[2:]] == pytest.approx(expected)


def test_bf16_moves_probabilities_by_less_than_the_margin(model, faces):
    half = predict._half(model.classifier)
    views = np.stack([model.view(faces / name) for name in ("a.jpg", "b.png", "e.JPG")])
    exact, rough = model.logits(views), dataclasses.replace(model, half=half).logits(views, bf16=True)
    for head, logits in rough.items():
        assert logits.dtype == torch.float32
        assert 0 < (exact[head] - logits).abs().max() < predict.MARGIN
    assert next(model.module.parameters()).dtype == torch.float32


# -- loading ----------------------------------------------------------------------------------------------------


def test_a_lone_checkpoint_and_one_of_a_run(run, model, tmp_path):
    best = run / "checkpoints" / "best.ckpt"
    (tmp_path / "alone.ckpt").symlink_to(best)
    alone = load_model(tmp_path / "alone.ckpt")
    assert not alone.calibrated
    assert alone.temperatures == {"head": 1.0, "head_dist": 1.0, "mean": 1.0}
    assert "not calibrated" in alone.calibration
    assert (alone.img_size, alone.crop_pct, alone.classes) == (32, 0.875, CLASSES)
    assert load_model(best).temperatures == model.temperatures


def test_predictions_of_other_weights_calibrate_nothing(tmp_path):
    run = write_run(tmp_path / "run", "deit")
    assert (load_model(run).heads, load_model(run).calibrated) == (["head"], True)
    write_json(run / "summary.json", {"weights_sha256": "0" * 64})
    assert not load_model(run).calibrated


def test_a_record_and_its_checkpoint(run, model, tmp_path):
    record = tmp_path / "record"
    (record / "runs" / "seed0").mkdir(parents=True)

    def claim(weights: str) -> None:
        runs = {"seed0": {"seed": 0, "weights_sha256": weights}}
        write_json(record / "record.json", {"format": 1, "name": "mine", "runs": runs})

    claim(model.weights_sha256)
    (record / "config.yaml").write_bytes((run / "config.yaml").read_bytes())
    (record / "claims.yaml").write_text("[]")
    (record / "runs" / "seed0" / "predictions.parquet").symlink_to(run / "predictions.parquet")
    best = run / "checkpoints" / "best.ckpt"
    assert load_model(record, best).temperatures == model.temperatures
    with pytest.raises(UserError, match=r"holds no weights: give its best\.ckpt with --checkpoint PATH"):
        load_model(record)
    claim("0")
    with pytest.raises(UserError, match="has none of the weights of the record"):
        load_model(record, best)


def edited(key: str, value: object):
    def edit(run: Path) -> None:
        config = yaml.safe_load((run / "config.yaml").read_text())
        group, name = key.split(".")
        config[group][name] = value
        write_text(run / "config.yaml", yaml.safe_dump(config))

    return edit


def other_version(run: Path) -> None:
    content = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    content["hyper_parameters"]["of_the_future"] = 1
    write_checkpoint(run / "checkpoints" / "best.ckpt", content)


class Code:
    def __reduce__(self):
        return os.system, ("touch was-here",)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (edited("model.img_size", 64), "model.img_size"),
        (edited("model.depth", 2), "has model.depth=2 and its checkpoint was trained with 1: restore config.yaml"),
        (edited("data.crop_pct", 7), "data.crop_pct=7 must be"),
        (edited("data.max_pixels", "many"), "data.max_pixels=many must be"),
        (edited("data._target_", "os.system"), "asks for 'os.system', which is never built"),
        (other_version, "does not fit this version of the project .*of_the_future"),
        (lambda run: (run / "checkpoints" / "best.ckpt").unlink(), "has no checkpoint"),
        (lambda run: (run / "config.yaml").write_text("a: !!python/object/apply:os.system [touch was-here]"), "YAML"),
        (lambda run: os.truncate(run / "checkpoints" / "best.ckpt", 1000), "is damaged or was not written by this"),
        (lambda run: (run / "predictions.parquet").write_bytes(b"PAR1"), "is not a readable Parquet file"),
        (lambda run: (run / "summary.json").write_text("{"), "is not readable JSON"),
        (lambda run: torch.save(Code(), run / "checkpoints" / "best.ckpt"), "is damaged or was not written by this"),
        (
            lambda run: write_checkpoint(run / "checkpoints" / "best.ckpt", {"state_dict": Code()}),
            "it may be code, and none of it was run",
        ),
    ],
)
def test_runs_that_are_refused(tmp_path, monkeypatch, run, change, sentence):
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(run, tmp_path / "run")
    change(copy)
    with pytest.raises(UserError, match=sentence):
        load_model(copy)
    assert not (tmp_path / "was-here").exists()


def test_what_is_no_run(tmp_path, run):
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="--checkpoint PATH goes with a record"):
        load_model(run, run / "checkpoints" / "best.ckpt")


# -- files and rows ---------------------------------------------------------------------------------------------


def test_files_folders_globs_and_lists(faces, monkeypatch):
    monkeypatch.chdir(faces)
    assert expand(["b.png", "a.jpg", "b.png"]) == ["b.png", "a.jpg"]
    whole = expand([str(faces)])
    assert [Path(path).relative_to(faces).as_posix() for path in whole] == [
        "a.jpg", "b.png", "c, d.jpg", "e.JPG", "half.png", "text.jpg", "zero.png", "below/f.jpg",
    ]  # fmt: skip
    assert expand(["*.png"]) == ["b.png", "half.png", "zero.png"]
    assert expand(["**/f.jpg", "none*.png", "below"]) == ["below/f.jpg", "none*.png"]
    assert expand(["-", "b.png"], b"a.jpg\nc, d.jpg\r\n\n") == ["a.jpg", "c, d.jpg", "b.png"]
    assert expand(["-"], b"a.jpg\0with\nline.jpg\0") == ["a.jpg", "with\nline.jpg"]
    (faces / "[1].jpg").write_bytes((faces / "a.jpg").read_bytes())
    assert expand(["[1].jpg"]) == ["[1].jpg"]
    (faces / "[1].jpg").unlink()


def test_csv_of_a_folder_names_bad_files_and_exits_with_1(run, model, faces, tmp_path):
    out = tmp_path / "out.csv"
    result = call(run, faces, "--out", out, "--unsure", "0.9", "--precision", "fp32")
    assert result.exit_code == 1
    rows = {Path(row["path"]).name: row for row in rows_of(out.read_text())}
    assert list(rows) == ["a.jpg", "b.png", "c, d.jpg", "e.JPG", "half.png", "text.jpg", "zero.png", "f.jpg"]
    assert {name: row["problem"] for name, row in rows.items() if row["problem"]} == {
        "half.png": "truncated",
        "text.jpg": "not a JPEG, PNG, WEBP or GIF picture",
        "zero.png": "empty file",
    }
    (expected,) = model.predict(faces / "c, d.jpg")
    row = rows["c, d.jpg"]
    assert row["label"] == expected.label
    assert float(row["probability"]) == pytest.approx(expected.probability, abs=1e-6)
    assert float(row["p/with_mask"]) + float(row["p/without_mask"]) == pytest.approx(1, abs=2e-6)
    assert float(row["head_dist/probability"]) == pytest.approx(expected.heads["head_dist"][1], abs=1e-6)
    assert row["unsure"] == str(expected.probability < 0.9)
    assert "5 of 8 files predicted" in result.stderr
    assert "calibrated on 40 validation pictures" in result.stderr


def test_json_lines_and_table(run, model, faces):
    result = call(run, faces / "a.jpg", faces / "zero.png", "--format", "jsonl", "--head", "head")
    good, bad = map(json.loads, result.stdout.splitlines())
    (expected,) = model.predict(faces / "a.jpg", head="head")
    assert (good["label"], good["unsure"], good["problem"]) == (expected.label, expected.unsure, None)
    assert {name: good[f"p/{name}"] for name in CLASSES} == pytest.approx(expected.probabilities, abs=2e-3)
    assert (good["head/label"], good["head_dist/label"]) == tuple(expected.heads[h][0] for h in ("head", "head_dist"))
    assert list(good) == list(bad)
    assert {name: value for name, value in bad.items() if value is not None} == {
        "path": str(faces / "zero.png"),
        "problem": "empty file",
    }
    table = call(run, faces / "a.jpg", faces / "zero.png", "--format", "table", "--unsure", "1").stdout.splitlines()
    assert table[0].split() == ["decision", "head", "head_dist", "file"]
    assert table[1].startswith(model.predict(faces / "a.jpg")[0].label)
    assert " unsure  " in table[1]
    assert table[2].endswith("zero.png: empty file")


def test_a_list_on_standard_input(run, faces):
    result = call(run, "-", input=f"{faces / 'a.jpg'}\n{faces / 'b.png'}\n")
    assert result.exit_code == 0
    assert [Path(row["path"]).name for row in rows_of(result.stdout)] == ["a.jpg", "b.png"]
    assert isinstance(call(run, "-", input="\n").exception, UserError)


def test_names_that_are_no_text(run, faces, tmp_path):
    odd = os.fsencode(tmp_path) + b"/\xff\x1b[31m.jpg"
    Path(os.fsdecode(odd)).write_bytes((faces / "a.jpg").read_bytes())
    for kind in ("csv", "jsonl", "table"):
        result = call(run, tmp_path, "--format", kind)
        assert result.exit_code == 0, result.output
        assert "\\udcff" in result.stdout
    assert "\x1b[31m" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--out", "a.txt"], "give a name that ends in .csv or .jsonl"),
        (["--out", "nowhere/a.csv"], "cannot be written"),
        (["--out", "mine.csv"], "exists already and is not overwritten"),
        (["--head", "tail"], "the model has no head tail: choose one of head, head_dist, mean"),
    ],
)
def test_wrong_options(run, faces, tmp_path, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").write_text("mine")
    result = call(run, faces / "a.jpg", *arguments)
    assert isinstance(result.exception, UserError)
    assert sentence in str(result.exception)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["mine"]


def test_ctrl_c_keeps_whole_rows(run, faces, tmp_path, monkeypatch):
    real, calls = Model.logits, itertools.count()

    def logits(self, pixels, *, bf16=False):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(self, pixels)

    monkeypatch.setattr(Model, "logits", logits)
    listed = "\n".join(f"{faces}/{'./' * i}a.jpg" for i in range(40))
    out = tmp_path / "out.csv"
    result = call(run, "-", "--out", out, "--batch-size", 2, "--precision", "fp32", input=listed)
    assert result.exit_code == 130
    assert "stopped: the rows written so far are whole" in result.stderr
    text = out.read_text()
    assert text.endswith("\n")
    assert [row["label"] in CLASSES and row["problem"] == "" for row in rows_of(text)] == [True] * 6


def test_a_full_disk_is_told_in_a_sentence(run, faces):
    program = "from facemask.cli import main; main()"
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, "-c", program, "predict", str(run), str(faces / "a.jpg")],
            stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: the disk is full; make room and give the same command again"
    assert "Traceback" not in result.stderr


def test_a_file_of_rows_that_fills_the_disk_is_named(model, faces, tmp_path, monkeypatch):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out, plain = tmp_path / "rows.csv", Path.open
    monkeypatch.setattr(Path, "open", lambda path, *args, **more: Full() if path == out else plain(path, *args, **more))
    with pytest.raises(UserError, match=rf"--out {out} is cut off: make room and choose another name"):
        predict_files(model, [str(faces / "a.jpg")], out, "csv", None, 0.5, 1)


@needs_pictures
def test_every_odd_file(model):
    folder = Path(str(REAL)).with_name("facemask_bad_inputs")
    kinds = {row["path"]: row["kind"] for row in csv.DictReader((folder / "manifest.csv").open())}
    found: dict[str, Prediction] = {path: model.predict(folder / path)[0] for path in kinds}
    for path, kind in kinds.items():
        if kind.startswith("decodable") and kind != "decodable_huge":
            assert found[path].label in CLASSES, path
        elif kind != "maybe_decodable":
            assert found[path].problem, path
