"""Exports of untrained models, read by the libraries that they are for, and refused where they decide otherwise."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from drawn_run import drawn_run
from PIL import Image
from typer.testing import CliRunner

from facemask import export as exports
from facemask.cli import app
from facemask.config import ROOT
from facemask.data.images import centre_crop, decode, resize_short
from facemask.errors import UserError
from facemask.evaluate import load_run
from facemask.export import Reported, Source, export, hugging_face_weights, write_hugging_face, write_timm
from facemask.files import write_json
from facemask.modeling.backbones import Backbone, build_backbone
from facemask.modeling.classifier import Classifier

DRAWN = ["data=synthetic", "data.num_images=60"]


def finished(place: Path, *options: str) -> Path:
    """A run of drawn faces with all facts that a card tells."""
    run = drawn_run(place, *DRAWN, *options)
    facts = json.loads((run / "provenance.json").read_text())
    write_json(
        run / "provenance.json",
        {
            **facts,
            "command": "python train.py data=synthetic",
            "overrides": ["data=synthetic"],
            "hardware": {"processor": "CPU", "capability": "", "cores": 2, "torch_threads": 1, "gpus": []},
            "environment": {},
            "platform": {"system": "Linux", "python": "3.11"},
            "versions": {"torch": "2.9"},
            "git": {"commit": "c" * 40, "trees": [], "dirty": False, "untracked": []},
        },
    )
    summary = json.loads((run / "summary.json").read_text())
    classes = ["with_mask", "without_mask"]
    data = {"fingerprint": facts["fingerprint"], "classes": classes, "left_out": {}, "not_in_split_file": 0}
    training = {"epoch": 2.0, "total_flos": 3 << 30, "train_loss": 0.5, "train_runtime": 61.25, "parameters": 7}
    rates = {"train_samples_per_second": 80.0, "train_steps_per_second": 2.5, "precision": "32-true"}
    write_json(
        run / "summary.json", {**summary, "name": "a run", "data": data, "training": {**training, **rates}, "notes": []}
    )
    return run


@pytest.fixture(scope="module")
def distilled(tmp_path_factory) -> Path:
    return finished(tmp_path_factory.mktemp("distilled"), "model=deit_distilled")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return finished(tmp_path_factory.mktemp("plain"), "model=vit")


def caches(run: Path) -> list[str]:
    return [f"cache_dir={run.parent / 'cache'}"]


def source_of(run: Path) -> Source:
    _, classifier, classes = load_run(run)
    return Source(classifier, classes, 32, 0.875)


def reported(run: Path, images: torch.Tensor) -> np.ndarray:
    with torch.inference_mode():
        return Reported(source_of(run).classifier)(images).numpy()


IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
FILES = {"README.md", "LICENSE", "verification.json"}


def kept(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_timm_loads_the_folder_with_its_card_and_licence(distilled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(distilled, "timm", out, caches(distilled))
    assert kept(out) == {*FILES, "config.json", "model.safetensors"}
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert np.abs(model(IMAGES).detach().numpy() - reported(distilled, IMAGES)).max() < 1e-6
    assert model.pretrained_cfg["label_names"] == ["with_mask", "without_mask"]
    facts = json.loads((out / "verification.json").read_text())
    assert facts["passed"]
    assert facts["pictures"] == 18  # 6 of val, 12 of test
    assert facts["checks"]["flips_from_files"] == {"found": 0, "allowed": 0}
    assert (out / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    card = (out / "README.md").read_text()
    assert "library_name: timm" in card
    assert "The logits are the mean of the class head's and the distillation head's" in card
    assert "| flips from files through timm.data.create_transform | 0 | 0 |" in card
    with pytest.raises(UserError, match="exists already"):
        export(distilled, "timm", out, [])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"), [("distilled", "DeiTForImageClassificationWithTeacher"), ("plain", "ViTForImageClassification")]
)
def test_transformers_loads_the_folder_offline(kind: str, name: str, request, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    run = request.getfixturevalue(kind)
    assert export(run, "hf", tmp_path / "out", caches(run))
    assert kept(tmp_path / "out") == {*FILES, "config.json", "preprocessor_config.json", "model.safetensors"}
    from transformers import AutoModelForImageClassification, ViTImageProcessor

    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == name
    assert model.config.id2label == {0: "with_mask", 1: "without_mask"}
    assert np.abs(model(IMAGES).logits.detach().numpy() - reported(run, IMAGES)).max() < 1e-5
    assert ViTImageProcessor.from_pretrained(tmp_path / "out").size["shortest_edge"] == 36  # 32 / 0.875
    # a process of its own, without the hub, and far from this project
    code = f"from transformers import pipeline; print(pipeline('image-classification', {str(tmp_path / 'out')!r})"
    Image.new("RGB", (50, 40), "red").save(tmp_path / "red.png")
    result = subprocess.run(
        [sys.executable, "-c", f"{code}('red.png')[0]['label'])"], cwd=tmp_path, capture_output=True, text=True,
        env={"HF_HUB_OFFLINE": "1", "PATH": "", "HOME": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert result.stdout.strip() in ("with_mask", "without_mask"), result.stderr


@pytest.mark.slow
def test_onnx_is_one_file_for_any_batch(distilled: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    assert export(distilled, "onnx", tmp_path / "out", caches(distilled))
    assert kept(tmp_path / "out") == {*FILES, "model.onnx", "preprocess.py", "preprocessing.json"}
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    for size in (1, 3):
        (logits,) = session.run(None, {"pixel_values": IMAGES[:size].numpy()})
        assert np.abs(logits - reported(distilled, IMAGES[:size])).max() < 1e-5


@pytest.mark.slow
def test_int8_is_smaller(distilled: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert export(distilled, "onnx-int8", tmp_path / "out", caches(distilled))
    assert kept(tmp_path / "out") == {*FILES, "model.onnx", "preprocess.py", "preprocessing.json"}
    facts = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert facts["megabytes"]["the export"] < 0.5 * facts["megabytes"]["ONNX in fp32"]
    assert set(facts["milliseconds_per_picture"]) == {"this project", "the export", "ONNX in fp32"}
    assert "largest_logit_difference" not in facts["checks"]


def test_an_export_that_decides_otherwise_is_not_kept(distilled: Path, tmp_path: Path, monkeypatch) -> None:
    def swapped(folder: Path, source: Source) -> None:
        source.classes.reverse()  # the labels of the folder
        write_timm(folder, source)
        source.classes.reverse()

    monkeypatch.setattr(exports, "write_timm", swapped)
    options = ["--to", "timm", "--out", str(tmp_path / "out"), "--cache-dir", str(distilled.parent / "cache")]
    result = CliRunner().invoke(app, ["export", str(distilled), *options])
    assert result.exit_code == 1
    assert "nothing was kept" in result.output
    assert list(tmp_path.iterdir()) == []


def test_half_a_thousandth_of_a_logit_is_too_much(distilled: Path, tmp_path: Path, monkeypatch) -> None:
    def shifted(self: Source):
        network = Source.network.fget(self)
        with torch.no_grad():
            network.head.bias += 4e-4  # of one head of two
        return network

    monkeypatch.setattr(Source, "plain_network", shifted)
    run = source_of(distilled)
    write_timm(tmp_path, run)
    # the run's own network was shifted, too: compare with a fresh one
    pictures = exports.pictures(distilled, load_run(distilled)[0], run.classes, caches(distilled))
    facts = exports.verify(source_of(distilled), exports.load_timm(tmp_path), *pictures, whole_precision=True)
    assert facts["largest_logit_difference"] == pytest.approx(2e-4, rel=1e-2)
    assert not facts["passed"]


def test_one_trained_head_of_two_is_what_other_libraries_give(distilled: Path) -> None:
    arguments = dict(load_run(distilled)[1].hparams)
    labels = {"_target_": "facemask.modeling.objectives.Labels", "class_head_only": True}
    source = Source(Classifier(**{**arguments, "objective": labels}).eval(), ["a", "b"], 32, 0.875)
    assert source.classifier.heads == ["head"]
    assert "class head" in source.head
    with torch.inference_mode():
        assert torch.equal(source.plain_network()(IMAGES), Reported(source.classifier)(IMAGES))


def fake(network) -> Source:
    """A source of any timm network; only what the writers read."""
    classifier = Classifier.__new__(Classifier)
    torch.nn.Module.__init__(classifier)
    classifier.backbone = network if isinstance(network, Backbone) else Backbone(network, (0.5,) * 3, (0.5,) * 3)
    classifier.heads, classifier.reported_head = ["head"], "head"
    return Source(classifier, ["a", "b"], 32, 0.875)


@pytest.mark.parametrize("part", [{"reg_tokens": 1}, {"global_pool": "avg"}, {"init_values": 1e-5}, {"qk_norm": True}])
def test_what_transformers_cannot_hold_is_refused_with_the_export_that_can(part: dict, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2, **part)
    source = fake(network)
    source.classifier._set_hparams({"model": {"name": "vit_tiny_patch16_224"}})
    with pytest.raises(UserError, match=r"cannot hold this VisionTransformer \(vit_tiny_patch16_224\): use --to timm"):
        write_hugging_face(tmp_path, source)
    assert list(tmp_path.iterdir()) == []


def test_a_cnn_before_the_blocks_goes_to_onnx_alone(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    arguments = {"name": "deit_tiny_distilled_patch16_224", "patch_embed": "efficientnet_lite0"}
    source = fake(build_backbone(**arguments, num_classes=2, img_size=64, depth=1))
    source.classifier._set_hparams({"model": arguments})
    for write in (write_hugging_face, write_timm):
        with pytest.raises(UserError, match="use --to onnx"):
            write(tmp_path, source)
    assert list(tmp_path.iterdir()) == []


def test_query_key_and_value_are_the_thirds_of_timms_matrix() -> None:
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=2)
    named = hugging_face_weights(network, "vit")
    whole = network.blocks[1].attn.qkv.weight
    assert torch.equal(named["vit.encoder.layer.1.attention.attention.key.weight"], whole[192:384])
    assert len(named) == len(network.state_dict()) + 2 * 4  # weight and bias of qkv become three, in two blocks


def test_the_view_of_the_onnx_folder_is_the_training_view(tmp_path: Path, monkeypatch) -> None:
    from facemask import onnx_input

    view = {"resize_short_side": 36, "crop": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    write_json(tmp_path / "preprocessing.json", view)
    monkeypatch.setattr(onnx_input, "__file__", str(tmp_path / "preprocess.py"))
    rng = np.random.default_rng(0)
    for shape in [(47, 61, 3), (61, 47, 4), (36, 39, 3), (20, 31, 4)]:
        picture = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
        turned = Image.Exif()
        turned[0x0112] = 6
        picture.save(tmp_path / "a.png", exif=turned)
        expected = centre_crop(resize_short(decode((tmp_path / "a.png").read_bytes()), 36), 32) / 255
        expected = (expected - view["mean"]) / view["std"]
        found = onnx_input.prepare(tmp_path / "a.png")
        assert found.shape == (1, 3, 32, 32)
        assert np.abs(found[0].transpose(1, 2, 0) - expected).max() < 1e-5


def test_mistakes_are_one_sentence(distilled: Path, tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(UserError, match="no finished run"):
        export(tmp_path, "timm", tmp_path / "new", [])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'facemask\[export\]'"):
        export(distilled, "onnx", tmp_path / "new", [])
    assert kept(tmp_path) == set()
