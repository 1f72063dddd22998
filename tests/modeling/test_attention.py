"""Rollout by hand on two tokens, gradients against finite differences, and models in which one patch decides."""

from functools import partial

import pytest
import timm
import torch
from timm.layers import HybridEmbed

from facemask.modeling.attention import attention_maps, gradient_rollout, rollout
from facemask.modeling.backbones import Backbone, FeatureMap, build_backbone

VIT, DISTILLED = "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"


def backbone(name, img_size=48, **options):
    torch.manual_seed(0)
    return build_backbone(name, 2, img_size, depth=2, **options).eval()


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_rollout_of_two_blocks_by_hand():
    # heads average to [[.5, .5], [.2, .8]]; with the skip connection [[.75, .25], [.1, .9]]
    first = torch.tensor([[[[0.8, 0.2], [0.3, 0.7]], [[0.2, 0.8], [0.1, 0.9]]]])
    second = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])  # with it [[1, 0], [.25, .75]]
    torch.testing.assert_close(rollout([first]), torch.tensor([[[0.75, 0.25], [0.1, 0.9]]]))
    torch.testing.assert_close(rollout([first, second]), torch.tensor([[[0.75, 0.25], [0.2625, 0.7375]]]))


def test_gradient_rollout_of_two_blocks_by_hand():
    first = torch.tensor([[[[0.5, 0.5], [0.25, 0.75]]]])
    up = torch.tensor([[[[2.0, -4.0], [4.0, 0.0]]]])  # relu(gradient * attention) = [[1, 0], [1, 0]]
    second = torch.tensor([[[[0.5, 0.5], [0.0, 1.0]], [[0.5, 0.5], [0.0, 1.0]]]])
    down = torch.tensor([[[[0.0, 2.0], [0.0, 0.0]], [[0.0, -9.0], [0.0, 0.0]]]])  # mean of heads [[0, .5], [0, 0]]
    torch.testing.assert_close(gradient_rollout([first], [up]), torch.tensor([[[2.0, 0.0], [1.0, 1.0]]]))
    expected = torch.tensor([[[2.5, 0.5], [1.0, 1.0]]])
    torch.testing.assert_close(gradient_rollout([first, second], [up, down]), expected)


def forward(model, pixels, change=lambda block, attention: None):
    """Logits of every head, and the attention of every block; what `change(block, attention)` returns replaces it."""
    kept, hooks = [], []
    for number, block in enumerate(model.network.blocks):
        drop = block.attn.attn_drop
        hooks.append(drop.register_forward_hook(lambda _, __, attention, number=number: change(number, attention)))
        hooks.append(drop.register_forward_hook(lambda _, __, attention: kept.append(attention)))
    with torch.no_grad():
        logits = model(pixels).logits
    for hook in hooks:
        hook.remove()
    return logits, kept


def test_maps_are_what_the_formulas_give_with_gradients_by_finite_differences(pixels):
    model, pixels = backbone(DISTILLED, 32).double(), pixels[:1, :, :32, :32]
    logits, attentions = forward(model, pixels)
    places = torch.eye(3 * 6 * 6, dtype=torch.double).view(-1, 3, 6, 6)  # one element of the matrix in each picture
    for head, row in (("head", 0), ("head_dist", 1)):
        decided = logits[head][0].argmax()

        def nudged(block, step, head=head, decided=decided):
            def change(number, attention):
                return attention + step * places if number == block else None

            return forward(model, pixels.expand(len(places), -1, -1, -1), change)[0][head][:, decided]

        gradients = [((nudged(n, 1e-4) - nudged(n, -1e-4)) / 2e-4).view(1, 3, 6, 6) for n in (0, 1)]
        maps = attention_maps(model, pixels, [head])
        expected = gradient_rollout(attentions, gradients)[0, row, 2:].view(2, 2)
        torch.testing.assert_close(maps["gradient", head][0], expected, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(maps["rollout", head][0], rollout(attentions)[0, row, 2:].view(2, 2))


def test_the_map_of_a_head_that_reads_the_mean_of_the_patches_is_their_mean(pixels):
    model = backbone("vit_little_patch16_reg4_gap_256")
    whole = rollout(forward(model, pixels)[1])
    expected = whole[:, 4:, 4:].mean(dim=1).view(2, 3, 3)
    torch.testing.assert_close(attention_maps(model, pixels, ["head"])["rollout", "head"], expected)


@pytest.mark.parametrize("name", [VIT, DISTILLED, "vit_base_patch16_gap_224"])
def test_frozen_fused_and_pooled_networks_have_maps_and_stay_as_they_were(pixels, name):
    model = backbone(name).requires_grad_(False)
    for block in model.network.blocks:
        block.attn.fused_attn = True
    with torch.inference_mode():
        before = model(pixels).logits["head"]
        maps = attention_maps(model, pixels, ["head"])
        assert torch.equal(model(pixels).logits["head"], before)
    assert {key: tuple(found.shape) for key, found in maps.items()} == {
        ("rollout", "head"): (2, 3, 3),
        ("gradient", "head"): (2, 3, 3),
    }
    assert all((found >= 0).all() and found.max() > 0 for found in maps.values())
    assert all(block.attn.fused_attn and not block.attn.attn_drop._forward_hooks for block in model.network.blocks)


def test_a_hybrid_has_a_map_of_its_feature_map_and_a_cnn_has_none(pixels):
    cnn = timm.create_model("resnet10t", num_classes=0)
    network = timm.create_model(
        VIT, num_classes=2, depth=1, img_size=(96, 64), patch_size=1, embed_layer=partial(HybridEmbed, FeatureMap(cnn))
    )
    hybrid = Backbone(network, (0.5,) * 3, (0.5,) * 3).eval()
    assert attention_maps(hybrid, torch.zeros(1, 3, 96, 64), ["head"])["gradient", "head"].shape == (1, 3, 2)
    assert attention_maps(build_backbone("resnet10t", 2, 48).eval(), pixels, ["head"]) == {}
    windows = build_backbone("swin_tiny_patch4_window7_224", 2, 224).eval()
    assert attention_maps(windows, torch.zeros(1, 3, 224, 224, dtype=torch.uint8), ["head"]) == {}
