import pytest
import timm
import torch
from torch import nn

from facemask.errors import UserError
from facemask.modeling.backbones import LITE0_MEAN, LITE0_STD, build_backbone
from facemask.modeling.init import sincos_positions
from facemask.modeling.objectives import Labels
from facemask.modeling.optim import parameter_groups
from facemask.modeling.weights import lite0_state_dict

VIT, DEIT, DISTILLED = "vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
IMAGENET_MEAN, IMAGENET_STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def pixels(count: int = 2, side: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def normalised(images: torch.Tensor) -> torch.Tensor:
    return (images / 255 - IMAGENET_MEAN.view(3, 1, 1)) / IMAGENET_STD.view(3, 1, 1)


def build(name: str, **more):
    torch.manual_seed(0)
    return build_backbone(name, 3, **{"img_size": 32, "depth": 2, **more})


def test_vit_and_deit_are_the_same_network():
    vit, deit = build(VIT, drop_path_rate=0.1), build(DEIT, drop_path_rate=0.1)
    ours, theirs = vit.state_dict(), deit.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)  # normalisation (mean, std) included
    for mode in (True, False):
        outputs = []
        for backbone in (vit, deit):
            torch.manual_seed(1)
            outputs.append(backbone.train(mode)(pixels()))
        assert torch.equal(outputs[0].logits["head"], outputs[1].logits["head"])
        assert torch.equal(outputs[0].patch_tokens, outputs[1].patch_tokens)


def test_vit_tiny_is_timms_full_network():
    # 12 blocks of width 192 at 224 px with 1000 classes: the published 5,717,416 parameters; the distillation token
    # adds itself, its position (2 x 192) and a head (192 x 1000 + 1000).
    counts = [
        sum(p.numel() for p in build_backbone(name, 1000, 224).network.parameters()) for name in (VIT, DEIT, DISTILLED)
    ]
    assert counts == [5_717_416, 5_717_416, 5_717_416 + 2 * 192 + 193_000]


@pytest.mark.parametrize("name", [VIT, DEIT])
def test_plain_outputs_are_timms(name):
    backbone = build(name).eval()
    outputs = backbone(pixels())
    network = backbone.network
    torch.testing.assert_close(outputs.logits["head"], network(normalised(pixels())))
    assert list(outputs.logits) == ["head"]
    assert not backbone.has_token
    tokens = network.forward_features(normalised(pixels()))
    torch.testing.assert_close(outputs.patch_tokens, tokens[:, 1:])
    torch.testing.assert_close(outputs.pooled, tokens[:, 0])
    assert outputs.taught is outputs.pooled


def test_distilled_outputs_are_timms():
    backbone = build(DISTILLED).eval()
    outputs = backbone(pixels())
    network = backbone.network
    head, head_dist = outputs.logits["head"], outputs.logits["head_dist"]
    assert not torch.allclose(head, head_dist)
    torch.testing.assert_close((head + head_dist) / 2, network(normalised(pixels())))
    network.set_distilled_training(True)
    both = backbone.train().network(normalised(pixels()))
    torch.testing.assert_close(head, both[0])
    torch.testing.assert_close(head_dist, both[1])
    tokens = network.forward_features(normalised(pixels()))
    torch.testing.assert_close(outputs.patch_tokens, tokens[:, 2:])
    torch.testing.assert_close(outputs.pooled, tokens[:, 0])
    torch.testing.assert_close(outputs.taught, tokens[:, 1])


def test_both_heads_apart_in_train_mode_too():
    backbone = build(DISTILLED)
    train, evaluated = backbone.train()(pixels()), backbone.eval()(pixels())
    for head in ("head", "head_dist"):
        torch.testing.assert_close(train.logits[head], evaluated.logits[head])


def test_a_cnn_is_a_student_too():
    backbone = build("resnet10t", depth=None).eval()
    outputs = backbone(pixels())
    torch.testing.assert_close(outputs.logits["head"], backbone.network(normalised(pixels())))
    assert outputs.patch_tokens is None
    assert outputs.pooled.shape == (2, 512)


def test_the_same_normalisation_for_all_arms_without_pretrained_weights():
    for name in (VIT, DEIT, DISTILLED, "resnet10t"):
        backbone = build(name, depth=None if name == "resnet10t" else 1)
        torch.testing.assert_close(backbone.mean.flatten(), 255 * IMAGENET_MEAN)
        torch.testing.assert_close(backbone.std.flatten(), 255 * IMAGENET_STD)
    assert timm.get_pretrained_cfg(VIT).mean == (0.5, 0.5, 0.5)  # the confound that is avoided


@pytest.mark.parametrize(("name", "heads"), [(VIT, 1), (DISTILLED, 2), ("resnet10t", 1)])
def test_freeze_backbone_leaves_the_heads_alone_trainable(name, heads):
    backbone = build(name, depth=None if name == "resnet10t" else 1, freeze_backbone=True)
    width = backbone.network.num_features
    trainable = sum(p.numel() for p in backbone.parameters() if p.requires_grad)
    assert trainable == heads * (width * 3 + 3)
    backbone(pixels())
    sum(logits.sum() for logits in backbone(pixels()).logits.values()).backward()
    assert {name for name, p in backbone.network.named_parameters() if p.grad is not None} == {
        name for name, p in backbone.network.named_parameters() if name.split(".")[0] in ("head", "head_dist", "fc")
    }


@pytest.mark.parametrize("name", [VIT, DEIT, DISTILLED])
def test_hybrid_cnn_is_frozen_and_imagenets(name):
    backbone = build(name, img_size=64, depth=1, patch_embed="efficientnet_lite0", drop_path_rate=0.1)
    network, cnn = backbone.network, backbone.network.patch_embed.backbone
    imagenet = {f"cnn.cnn.{key}": value for key, value in lite0_state_dict().items() if "classifier" not in key}
    assert cnn.state_dict().keys() == imagenet.keys()

    def is_imagenets() -> bool:
        return all(torch.equal(value, imagenet[key]) for key, value in cnn.state_dict().items())

    assert is_imagenets()
    torch.testing.assert_close(backbone.mean.flatten(), 255 * torch.tensor(LITE0_MEAN))
    torch.testing.assert_close(backbone.std.flatten(), 255 * torch.tensor(LITE0_STD))
    backbone.train()
    assert not any(module.training for module in cnn.modules())  # its batch statistics stay, too
    optimizer = torch.optim.AdamW(parameter_groups(backbone, Labels(), 1e-2, 0.05, 1.0))
    optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in cnn.parameters()}
    before = network.patch_embed.proj.weight.clone()
    outputs = backbone(pixels(side=64))
    assert outputs.patch_tokens.shape == (2, 4, 192)  # 64 px at stride 32: a 2 x 2 grid
    assert network.patch_embed.grid_size == (2, 2)
    sum(logits.square().sum() for logits in outputs.logits.values()).backward()
    optimizer.step()
    assert is_imagenets()
    assert all(p.grad is None and not p.requires_grad for p in cnn.parameters())
    assert not torch.equal(network.patch_embed.proj.weight, before)
    tokens = network.patch_embed.proj(cnn((pixels(side=64) - backbone.mean) / backbone.std)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(network.patch_embed((pixels(side=64) - backbone.mean) / backbone.std), tokens)


@pytest.mark.parametrize("name", [VIT, DISTILLED])
def test_conv_stem_is_four_convolutions_and_a_projection(name):
    network = build(name, img_size=64, depth=1, patch_embed="conv_stem", init="structured").network
    embed = network.patch_embed
    convolutions = [part for part in embed.modules() if isinstance(part, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in convolutions] == [
        (3, 24, (3, 3), (2, 2)),
        (24, 48, (3, 3), (2, 2)),
        (48, 96, (3, 3), (2, 2)),
        (96, 192, (3, 3), (2, 2)),
        (192, 192, (1, 1), (1, 1)),
    ]
    assert embed.grid_size == (4, 4)
    assert embed(torch.rand(2, 3, 64, 64)).shape == (2, 16, 192)
    positions = 0.5 * sincos_positions(4, 192)  # the structured start knows its grid
    torch.testing.assert_close(network.pos_embed[0, network.num_prefix_tokens :].detach(), positions)


def test_conv_stem_is_trained_whole_without_decay_of_its_norms():
    backbone = build(DISTILLED, img_size=64, depth=1, patch_embed="conv_stem").train()
    sum(logits.square().sum() for logits in backbone(pixels(side=64)).logits.values()).backward()
    stem = dict(backbone.network.patch_embed.named_parameters())
    assert len(stem) == 4 * 3 + 2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stem.values())
    decay = {
        id(p): group["weight_decay"]
        for group in parameter_groups(backbone, Labels(), 1e-2, 0.05, 1.0)
        for p in group["params"]
    }
    assert {name: decay[id(p)] for name, p in stem.items()} == {
        name: 0.05 if p.ndim > 1 else 0.0 for name, p in stem.items()
    }


def test_conv_stem_takes_small_pictures_in_the_epochs_that_have_them():
    backbone = build(VIT, img_size=96, depth=1, patch_embed="conv_stem", small_epochs=1)
    assert backbone(pixels(side=96)).patch_tokens.shape == (2, 36, 192)
    assert backbone(pixels(side=64)).patch_tokens.shape == (2, 16, 192)


def test_hybrid_cnn_stays_fp32_under_autocast():
    backbone = build(VIT, img_size=64, depth=1, patch_embed="efficientnet_lite0")
    cnn = backbone.network.patch_embed.backbone
    images = (pixels(side=64) - backbone.mean) / backbone.std
    plain = cnn(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = cnn(images)
    assert mixed.dtype == torch.float32
    assert torch.equal(plain, mixed)


def test_hybrid_cnn_can_be_trained():
    more = {"img_size": 64, "depth": 1, "patch_embed": "efficientnet_lite0", "freeze_patch_embed": False}
    backbone = build(VIT, **more).train()
    stem = backbone.network.patch_embed.backbone.cnn.conv_stem.weight
    assert torch.equal(stem, lite0_state_dict()["conv_stem.weight"])
    backbone(pixels(side=64)).logits["head"].square().sum().backward()
    assert stem.grad.abs().sum() > 0
    optimized = {id(p) for group in parameter_groups(backbone, Labels(), 1e-2, 0.05, 1.0) for p in group["params"]}
    assert optimized == {id(p) for p in backbone.parameters()}


@pytest.mark.parametrize("name", [VIT, DISTILLED])
def test_small_epochs_take_small_pictures_and_leave_the_full_size_alone(name):
    plain, growing = build(name, img_size=64), build(name, img_size=64, small_epochs=1)
    growing.load_state_dict(plain.state_dict())
    assert torch.equal(plain.eval()(pixels(side=64)).patch_tokens, growing.eval()(pixels(side=64)).patch_tokens)
    assert growing(pixels(side=32)).patch_tokens.shape == (2, 4, 192)
    with pytest.raises(AssertionError):
        plain(pixels(side=32))
    # The prefix tokens keep their positions; the grid's mean is kept by interpolation of a constant grid.
    prefix = growing.network.num_prefix_tokens
    with torch.no_grad():
        growing.network.pos_embed[:, prefix:] = 3.0
    grown = growing.network._pos_embed(torch.zeros(1, 2, 2, 192))
    torch.testing.assert_close(grown[:, prefix:], torch.full((1, 4, 192), 3.0))


def test_patch_dropout_leaves_out_patches_in_training_alone():
    backbone = build(DISTILLED, img_size=64, patch_drop_rate=0.5)
    assert backbone.train()(pixels(side=64)).patch_tokens.shape == (2, 8, 192)
    assert backbone.eval()(pixels(side=64)).patch_tokens.shape == (2, 16, 192)


def test_dropout_and_drop_path_are_passed_on():
    backbone = build(DISTILLED, drop_rate=0.3, drop_path_rate=0.2)
    assert backbone.network.head_drop.p == 0.3
    assert [block.drop_path1.drop_prob for block in backbone.network.blocks[1:]] == [pytest.approx(0.2)]
    assert isinstance(build(DISTILLED).network.head_drop, nn.Dropout)


@pytest.mark.parametrize(
    ("name", "more", "sentence"),
    [
        ("vit_tyni_patch16_224", {}, r"model.name=vit_tyni_patch16_224 cannot be built by timm \(Unknown model"),
        ("deit_tiny_patch16_224.nonsense", {}, r"Invalid pretrained tag.*near names: deit_tiny"),
        ("resnet10t", {"patch_embed": "efficientnet_lite0"}, r"model.name=resnet10t cannot be built"),
        ("resnet10t", {"depth": 2}, r"model.name=resnet10t cannot be built"),
    ],
)
def test_names_that_cannot_be_built(name, more, sentence):
    with pytest.raises(UserError, match=sentence):
        build(name, **{"depth": None, **more})
