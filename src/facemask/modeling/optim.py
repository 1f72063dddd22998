"""Optimizer groups, learning-rate schedule and weight averaging."""

import math
from collections.abc import Callable
from typing import Any

from pytorch_lightning.callbacks import WeightAveraging
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from facemask.modeling.backbones import Backbone


def parameter_groups(
    backbone: Backbone, extra: nn.Module, lr: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups with learning rates: no weight decay for biases, norms, tokens and positions (timm's
    `no_weight_decay` and all one-dimensional tensors), and lr * layer_decay ** (layers above) for every layer.

    Args:
        backbone: the student.
        extra: further trained modules (projections of the objective), at the full learning rate.
    """
    network = backbone.network
    keep = network.no_weight_decay() if hasattr(network, "no_weight_decay") else ()
    groups = param_groups_layer_decay(
        network, weight_decay=weight_decay, no_weight_decay_list=keep, layer_decay=layer_decay
    )
    weights = [p for p in extra.parameters() if p.requires_grad]
    groups.append({"lr_scale": 1.0, "weight_decay": weight_decay, "params": [p for p in weights if p.ndim > 1]})
    groups.append({"lr_scale": 1.0, "weight_decay": 0.0, "params": [p for p in weights if p.ndim <= 1]})
    return [
        {"params": group["params"], "weight_decay": group["weight_decay"], "lr": lr * group["lr_scale"]}
        for group in groups
        if group["params"]
    ]


def scaled_lr(lr: float, global_batch: int, lr_batch_size: int) -> float:
    """Linear scaling (Goyal et al. 2017): lr holds for lr_batch_size images per optimizer step."""
    return lr * global_batch / lr_batch_size


def warmup_cosine(
    optimizer: Optimizer, total_steps: int, warmup_fraction: float = 0.1, min_lr_ratio: float = 0.0
) -> LambdaLR:
    """Linear warm-up over a share of all steps, then half a cosine down to min_lr_ratio of the peak.

    Step t (from 0) of T with W = round(warmup_fraction * T): (t + 1) / W below W, then
    r + (1 - r) * (1 + cos(pi * (t - W) / (T - W))) / 2.
    """
    warmup = round(warmup_fraction * total_steps)

    def ratio(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return min_lr_ratio + (1 - min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2

    return LambdaLR(optimizer, ratio)


def ema_average(decay: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Exponential moving average with warm-up: decay_t = min(decay, (1 + t) / (10 + t)), as TensorFlow's
    ExponentialMovingAverage does with num_updates, so that a short run does not average its random start."""

    def average(averaged: Tensor, current: Tensor, num_averaged: Tensor) -> Tensor:
        step = float(num_averaged)
        kept = min(decay, (1 + step) / (10 + step))
        return averaged + (1 - kept) * (current - averaged)

    return average


class EMA(WeightAveraging):
    """Lightning callback: the average of the weights is validated, saved and reported in place of the weights."""

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__(avg_fn=ema_average(decay))
