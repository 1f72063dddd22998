from functools import partial
from math import cos, pi, sqrt

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from facemask.modeling.backbones import build_backbone
from facemask.modeling.objectives import FeatureDistillation, HardDistillation, Labels
from facemask.modeling.optim import EMA, ema_average, parameter_groups, scaled_lr, warmup_cosine

DISTILLED = "deit_tiny_distilled_patch16_224"


def groups_by_parameter(backbone, extra=None, **more):
    """{parameter name: (lr, weight decay)}; fails on a parameter that is in two groups or unknown."""
    extra = extra or Labels()
    options = {"lr": 1e-3, "weight_decay": 0.05, "layer_decay": 1.0, **more}
    names = {id(p): name for module in (backbone.network, extra) for name, p in module.named_parameters()}
    found = {}
    for group in parameter_groups(backbone, extra, **options):
        assert group["params"]
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = (group["lr"], group["weight_decay"])
    return found


def test_schedule_values_by_hand():
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=2.0)
    # T = 20, W = 4, floor 0.1: 2 * (t + 1) / 4 for t < 4, then 2 * (0.1 + 0.9 * (1 + cos(pi (t - 4) / 16)) / 2)
    schedule = warmup_cosine(optimizer, 20, warmup_fraction=0.2, min_lr_ratio=0.1)
    seen = []
    for _ in range(25):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert seen[8] == pytest.approx(2 * (0.1 + 0.9 * (1 + sqrt(0.5)) / 2))  # a quarter of the half cosine
    assert seen[12] == pytest.approx(2 * 0.55)  # its middle
    assert seen[19] == pytest.approx(2 * (0.1 + 0.9 * (1 + cos(15 * pi / 16)) / 2))
    assert seen[20:] == pytest.approx([0.2] * 5)  # a step too many does not start another cycle


def test_schedule_without_warm_up_and_of_one_step():
    for steps, expected in ((4, [1.0, (2 + sqrt(2)) / 4, 0.5, (2 - sqrt(2)) / 4]), (1, [1.0])):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = warmup_cosine(optimizer, steps, warmup_fraction=0.0)
        seen = []
        for _ in range(steps):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert seen == pytest.approx(expected)


def test_schedule_keeps_the_ratios_of_the_groups():
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 0.25}])
    warmup_cosine(optimizer, 10, warmup_fraction=0.2)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5, 0.125])


def test_linear_scaling():
    assert scaled_lr(5e-4, 256, 64) == pytest.approx(2e-3)
    assert scaled_lr(3e-3, 32, 512) == pytest.approx(1.875e-4)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", DISTILLED, "resnet10t"])
def test_every_trainable_parameter_is_in_exactly_one_group(name):
    backbone = build_backbone(name, 2, 32, depth=None if name == "resnet10t" else 2)
    found = groups_by_parameter(backbone)
    assert found.keys() == {key for key, p in backbone.network.named_parameters() if p.requires_grad}


def test_no_decay_for_biases_norms_tokens_and_positions():
    backbone = build_backbone(DISTILLED, 2, 32, depth=2)
    objective = FeatureDistillation(HardDistillation(0.5), 0.5)
    objective.build(192, [4], 6)
    found = groups_by_parameter(backbone, objective)
    shapes = {name: p.ndim for m in (backbone.network, objective) for name, p in m.named_parameters()}
    exempt = {name for name, (_, decay) in found.items() if decay == 0}
    assert exempt == {name for name, ndim in shapes.items() if ndim == 1} | {"cls_token", "dist_token", "pos_embed"}
    assert {decay for _, decay in found.values()} == {0.0, 0.05}
    assert found["map_projections.0.weight"] == (1e-3, 0.05)
    assert found["pooled_projection.bias"] == (1e-3, 0.0)
    assert found["blocks.1.mlp.fc1.weight"] == found["head_dist.weight"] == (1e-3, 0.05)


def test_layer_decay_by_hand():
    # Two blocks and the heads above them: heads 1, block 2 (and the last norm) 1/2, block 1 1/4, stem 1/8.
    backbone = build_backbone(DISTILLED, 2, 32, depth=2)
    objective = FeatureDistillation(HardDistillation(0.5), 0.5)
    objective.build(192, [4], 6)
    found = groups_by_parameter(backbone, objective, layer_decay=0.5)
    ratio = {"head": 1, "head_dist": 1, "map_projections": 1, "pooled_projection": 1, "norm": 1 / 2}
    ratio |= {"cls_token": 1 / 8, "dist_token": 1 / 8, "pos_embed": 1 / 8, "patch_embed": 1 / 8}
    for name, (lr, _) in found.items():
        parts = name.split(".")
        expected = {"0": 1 / 4, "1": 1 / 2}[parts[1]] if parts[0] == "blocks" else ratio[parts[0]]
        assert lr == pytest.approx(1e-3 * expected), name


def test_frozen_parameters_are_in_no_group(tmp_path):
    backbone = build_backbone(DISTILLED, 2, 32, depth=2, freeze_backbone=True)
    assert groups_by_parameter(backbone) == {
        "head.weight": (1e-3, 0.05),
        "head.bias": (1e-3, 0.0),
        "head_dist.weight": (1e-3, 0.05),
        "head_dist.bias": (1e-3, 0.0),
    }


def test_ema_warm_up_by_hand():
    average = ema_average(0.5)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    # Kept after t = 0, 1, 2, 5 updates: 1/10, 2/11, 3/12, 6/15; from t = 8 on (9/18) the decay itself.
    for step, kept in ((0, 1 / 10), (1, 2 / 11), (2, 3 / 12), (5, 6 / 15), (8, 0.5), (100, 0.5)):
        assert average(one, zero, torch.tensor(step)).item() == pytest.approx(kept)
        assert average(zero, one, torch.tensor(step)).item() == pytest.approx(1 - kept)


class Climb(pl.LightningModule):
    """One weight that every step raises by exactly 1."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.validated = []

    def training_step(self, batch, batch_idx):
        return -self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.weight.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def test_ema_is_validated_saved_and_left_in_the_model(tmp_path):
    module = Climb()
    loader = partial(DataLoader, torch.zeros(2, 1), batch_size=1)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[EMA(0.999)],
        default_root_dir=tmp_path,
    )
    trainer.fit(module, loader(), loader())
    # The weight is 1, 2, 3, 4 after the four steps; the first is taken as it is (no average yet), then
    # a <- k a + (1 - k) w with k = 2/11, 3/12, 4/13.
    second = 2 / 11 * 1 + 9 / 11 * 2
    third = 3 / 12 * second + 9 / 12 * 3
    fourth = 4 / 13 * third + 9 / 13 * 4
    assert module.validated == pytest.approx([second, second, fourth, fourth], abs=1e-6)
    assert module.weight.item() == pytest.approx(fourth, abs=1e-6)


def test_the_checkpoint_holds_the_average(tmp_path):
    module = Climb()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMA(0.999), pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)],
    )
    trainer.fit(module, DataLoader(torch.zeros(2, 1), batch_size=1))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["state_dict"]["weight"].item() == pytest.approx(2 / 11 * 1 + 9 / 11 * 2, abs=1e-6)
    assert saved["current_model_state"]["weight"].item() == 2.0
