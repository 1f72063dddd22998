import pytest
import torch
import torch.nn.functional as F
from numpy.random import default_rng

from facemask.errors import UserError
from facemask.modeling.backbones import build_backbone
from facemask.modeling.init import sincos_positions, structured_init


def build(name: str, img_size: int, seed: int = 0, depth: int = 2):
    torch.manual_seed(seed)
    return build_backbone(name, 2, img_size, depth=depth, init="structured").network


def test_sincos_positions_by_hand():
    # dim 8: frequencies 1 and 100^(-1/2) = 1/10, first of the column, then of the row; patch 5 of a 3 x 3 grid is
    # row 1, column 2.
    columns, rows = torch.tensor([2.0, 0.2]), torch.tensor([1.0, 0.1])
    expected = torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()])
    torch.testing.assert_close(sincos_positions(3, 8)[5], expected)
    assert sincos_positions(3, 8).shape == (9, 8)


@pytest.mark.parametrize(
    ("name", "img_size", "prefix"),
    [
        ("vit_tiny_patch16_224", 64, 1),
        ("deit_tiny_distilled_patch16_224", 64, 2),
        ("deit_tiny_distilled_patch16_224", 112, 2),
    ],
)
def test_every_head_attends_to_its_neighbour(name, img_size, prefix):
    network = build(name, img_size)
    side = img_size // 16
    assert network.pos_embed.shape[1] == prefix + side * side
    torch.testing.assert_close(network.pos_embed[0, prefix:], 0.5 * sincos_positions(side, 192))
    positions = F.layer_norm(network.pos_embed[0, prefix:], (192,))
    intended = default_rng(0)
    seen = set()
    for block in network.blocks:
        q, k, _ = block.attn.qkv(positions).chunk(3, dim=1)
        for head in range(3):
            part = slice(64 * head, 64 * head + 64)
            attention = (q[:, part] @ k[:, part].T / 8).softmax(dim=1)
            down, right = intended.integers(-1, 2, size=2).tolist()
            seen.add((down, right))
            for row in range(1, side - 1):
                for column in range(1, side - 1):
                    target = (row + down) * side + column + right
                    weights = attention[row * side + column]
                    assert weights.argmax() == target, (down, right, row, column)
                    assert weights[target] > 1.5 / side**2  # half as much again as uniform attention, at least
    assert len(seen) >= 4  # different heads look at different places


def test_value_and_projection_multiply_to_noise_minus_identity():
    network = build("vit_tiny_patch16_224", 64)
    for block in network.blocks:
        product = (block.attn.proj.weight @ block.attn.qkv.weight[2 * 192 :]).detach()
        # -0.4 on the diagonal; noise of standard deviation 0.4 / sqrt(192) = 0.0289 everywhere
        assert product.diagonal().mean().item() == pytest.approx(-0.4, abs=0.01)
        noise = product + 0.4 * torch.eye(192)
        assert noise.std().item() == pytest.approx(0.4 / 192**0.5, rel=0.03)
        assert noise.mean().abs() < 1e-3
    first, second = (block.attn.proj.weight @ block.attn.qkv.weight[384:] for block in network.blocks)
    assert not torch.allclose(first, second, atol=1e-2)


def test_deterministic_in_the_global_seed_alone():
    one, same, other = (build("vit_tiny_patch16_224", 64, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["blocks.0.attn.proj.weight"], other["blocks.0.attn.proj.weight"])
    # Neighbours have a seed of their own: the strongest directions of the queries are the same under every seed.
    assert torch.equal(one["blocks.0.attn.qkv.weight"][:4], other["blocks.0.attn.qkv.weight"][:4])
    # Every row can learn: none is zero, though a grid of 16 patches gives no 64 directions.
    assert (one["blocks.0.attn.qkv.weight"][:384].norm(dim=1) > 0).all()


@pytest.mark.parametrize(("name", "depth"), [("resnet10t", None), ("vit_base_patch16_reg4_gap_256", 1)])
def test_a_network_without_such_positions_keeps_timms_initialisation(name, depth):
    states = []
    for init in ("structured", "timm"):
        torch.manual_seed(0)
        backbone = build_backbone(name, 2, 64, init=init, depth=depth)
        states.append(backbone.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    with pytest.raises(UserError, match=r"model.init=structured needs a vision transformer .* model.init=timm"):
        structured_init(backbone.network)
