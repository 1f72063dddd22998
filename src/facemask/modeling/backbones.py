"""Students: any timm backbone behind one interface that gives the logits of every head and the tokens.

In timm, vit_tiny_patch16_224 and deit_tiny_patch16_224 are the same network; DeiT is a recipe, and an optional
distillation token with a head of its own.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import HybridEmbed, resample_abs_pos_embed, resample_patch_embed, set_fused_attn
from timm.models.deit import VisionTransformerDistilled
from timm.models.levit import Stem16
from torch import Tensor, nn

from facemask.errors import UserError
from facemask.modeling.init import structured_init, takes_structured_init
from facemask.modeling.weights import hub_file, lite0_state_dict, read_state_dict

LITE0 = "tf_efficientnet_lite0"
LITE0_MEAN, LITE0_STD = (127 / 255,) * 3, (128 / 255,) * 3


@dataclass
class Outputs:
    """What one forward pass gives.

    logits: {"head": (B, C)} and, with a distillation token, "head_dist": (B, C).
    patch_tokens: (B, N, D) after the last norm, or None for a CNN.
    pooled: (B, D), what the class head reads; taught: (B, D), what the distillation head reads, where there is one,
    else pooled.
    """

    logits: dict[str, Tensor]
    patch_tokens: Tensor | None
    pooled: Tensor
    taught: Tensor


@dataclass
class LoadReport:
    """Names of the tensors that a checkpoint gave, gave in another size, or did not give."""

    source: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        def names(title: str, tensors: list[str]) -> str:
            shown = ", ".join(tensors[:6]) + (f", and {len(tensors) - 6} more" if len(tensors) > 6 else "")
            return f"{len(tensors)} {title}" + (f" ({shown})" if tensors and title != "loaded" else "")

        parts = [names("loaded", self.loaded), names("resized", self.resized), names("new", self.new)]
        return f"weights from {self.source}: " + "; ".join([*parts, names("unused", self.unused)])


class Backbone(nn.Module):
    """A timm model that takes uint8 pixels and returns `Outputs`.

    Args:
        network: timm model; one with `head_dist` has a distillation token.
        mean, std: normalisation of pixels / 255, per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network: Any = network
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1))
        heads = network.get_classifier()
        self.has_token = isinstance(network, VisionTransformerDistilled)
        if isinstance(heads, tuple) and not self.has_token:
            raise UserError(
                f"model.name: {type(network).__name__} has two heads of another kind than DeiT's: choose another model"
            )
        self.load_report: LoadReport | None = None

    def forward(self, pixels: Tensor) -> Outputs:
        """uint8 (B, 3, H, W) -> Outputs."""
        return self.from_normalised((pixels - self.mean) / self.std)

    def from_normalised(self, images: Tensor) -> Outputs:
        """float (B, 3, H, W), normalised -> Outputs."""
        network = self.network
        tokens = network.forward_features(images)
        if self.has_token:
            # timm's forward_head gives both logits only in train mode with set_distilled_training(True), and
            # their mean else; the two heads are needed apart in both modes.
            cls, dist = network.head_drop(tokens[:, 0]), network.head_drop(tokens[:, 1])
            return Outputs(self.head_logits(cls, dist), tokens[:, 2:], cls, dist)
        pooled = network.forward_head(tokens, pre_logits=True)
        patches = tokens[:, getattr(network, "num_prefix_tokens", 0) :] if tokens.ndim == 3 else None
        return Outputs(self.head_logits(pooled, pooled), patches, pooled, pooled)

    def head_logits(self, pooled: Tensor, taught: Tensor) -> dict[str, Tensor]:
        """Logits (B, C) of every head from what they read (see `Outputs`)."""
        if self.has_token:
            return {"head": self.network.head(pooled), "head_dist": self.network.head_dist(taught)}
        return {"head": self.network.get_classifier()(pooled)}

    def head_parameters(self) -> list[nn.Parameter]:
        heads = self.network.get_classifier()
        return [p for head in (heads if isinstance(heads, tuple) else (heads,)) for p in head.parameters()]


class FrozenCNN(nn.Module):
    """A CNN that stays as it is: evaluation mode, no gradients, fp32."""

    def __init__(self, cnn: nn.Module) -> None:
        super().__init__()
        self.cnn = cnn.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "FrozenCNN":
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return self.cnn(images.float())


class FeatureMap(nn.Module):
    """The last feature map (B, F, h, w) of a timm CNN."""

    def __init__(self, cnn: Any) -> None:
        super().__init__()
        self.cnn = cnn

    def forward(self, images: Tensor) -> Tensor:
        return self.cnn.forward_features(images)


def conv_stem(in_chans: int, embed_dim: int, **options: Any) -> HybridEmbed:
    """Patch embedding by four convolutions of stride 2 with batch normalisation (timm's `Stem16`, of LeViT, Graham et
    al. 2021) and a 1 x 1 projection, as in Xiao et al. 2021, "Early convolutions help transformers see better"; one
    token for 16 x 16 pixels, as with patches."""
    options["patch_size"] = 1
    return HybridEmbed(Stem16(in_chans, embed_dim, nn.GELU), in_chans=in_chans, embed_dim=embed_dim, **options)


def build_backbone(
    name: str,
    num_classes: int,
    img_size: int,
    *,
    pretrained: bool = False,
    checkpoint: str | None = None,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    patch_drop_rate: float = 0.0,
    small_epochs: int = 0,
    patch_embed: str = "linear",
    freeze_patch_embed: bool = True,
    freeze_backbone: bool = False,
    save_features: bool = False,
    depth: int | None = None,
    init: str = "timm",
    size: str | None = None,
) -> Backbone:
    """A student by its timm id.

    Args:
        name: any timm id.
        num_classes: outputs of every head.
        img_size: side of the input in pixels.
        pretrained: timm's weights of exactly this name, from the hub or its local cache.
        checkpoint: local .safetensors, .pth or .ckpt file to start from.
        drop_rate, drop_path_rate: dropout and stochastic depth.
        patch_drop_rate: share of patches left out in training (Li et al. 2023, FLIP).
        small_epochs: where above 0, pictures of any whole number of patches are taken, with interpolated positions.
        patch_embed: "linear"; "conv_stem" (see `conv_stem`, for patches of 16 pixels); or "efficientnet_lite0" for the
            hybrid (ViT paper, section 3.1): the CNN's feature map, one token per position, takes the place of the
            linear patch embedding.
        freeze_patch_embed: keep the hybrid's CNN as ImageNet left it; a conv_stem is always trained.
        freeze_backbone: train the heads alone.
        depth: number of blocks, where other than the named model's.
        init: "timm" (truncated normal) or "structured" (see `facemask.modeling.init`; where weights are loaded, and
            for networks that are no plain vision transformers, timm's).
        size: read by conf/model alone; save_features: by `facemask.train` alone.

    Raises:
        UserError: unknown name, weights that cannot be had or do not fit.
    """
    options: dict[str, Any] = {"num_classes": num_classes, "drop_rate": drop_rate, "drop_path_rate": drop_path_rate}
    if depth is not None:
        options["depth"] = depth
    if patch_drop_rate:
        options["patch_drop_rate"] = patch_drop_rate
    if patch_embed == "efficientnet_lite0":
        cnn = timm.create_model(LITE0, num_classes=0)
        cnn.load_state_dict(lite0_state_dict(), strict=False)
        features = FeatureMap(cnn)
        embed = FrozenCNN(features) if freeze_patch_embed else features
        options |= {"embed_layer": partial(HybridEmbed, embed), "patch_size": 1}
    if patch_embed == "conv_stem":
        options["embed_layer"] = conv_stem
    # The fused kernel's bf16 backward pass is slow on CPUs: plain matrix products train 1.2 to 1.6 times faster there.
    set_fused_attn(torch.cuda.is_available())
    try:
        try:
            sizes: dict[str, Any] = {"img_size": img_size, **({"dynamic_img_size": True} if small_epochs else {})}
            network: Any = timm.create_model(name, pretrained=False, **sizes, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
            network = timm.create_model(name, pretrained=False, **options)  # a CNN takes any size
    except (RuntimeError, TypeError, ValueError) as error:
        near = ", ".join(timm.list_models(f"*{name.split('.')[0][:12]}*")[:5])
        raise UserError(f"model.name={name} cannot be built by timm ({error}); near names: {near or 'none'}") from error

    if patch_drop_rate:
        network.patch_drop.num_prefix_tokens = network.num_prefix_tokens  # timm would drop the distillation token, too

    if init == "structured" and not pretrained and not checkpoint and takes_structured_init(network):
        structured_init(network)
    mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if patch_embed == "efficientnet_lite0":
        mean, std = LITE0_MEAN, LITE0_STD  # the CNN's weights demand theirs
    elif pretrained or checkpoint:  # published weights demand theirs, from the hub or from a file
        mean, std = network.pretrained_cfg["mean"], network.pretrained_cfg["std"]
    backbone = Backbone(network, tuple(mean), tuple(std))
    if pretrained or checkpoint:
        file = Path(checkpoint) if checkpoint else hub_file(name)
        state = read_state_dict(file)
        for statistic in ("mean", "std"):  # this project's checkpoints bring the normalisation they were trained with
            if f"backbone.{statistic}" in state:
                getattr(backbone, statistic).copy_(state.pop(f"backbone.{statistic}"))
        backbone.load_report = load_weights(network, state, str(file if checkpoint else name))
    if freeze_backbone:
        backbone.requires_grad_(False)
        for parameter in backbone.head_parameters():
            parameter.requires_grad_(True)
    return backbone


def load_weights(network: Any, state: dict[str, Tensor], source: str) -> LoadReport:
    """Load what fits, adapt what can be adapted, and say so.

    - Heads with another number of classes are left new.
    - The position grid is interpolated with the network's own number of prefix tokens (timm's
      `resample_abs_pos_embed`), patch filters to another patch size with `resample_patch_embed`.
    - Plain into distilled: the distillation token and its position start as copies of the class token's, its head
      as a copy of the class head where that fits. Distilled into plain: the distillation token is dropped.

    Raises:
        UserError: the checkpoint is of another network or size.
    """
    state = dict(state)
    own: dict[str, Tensor] = network.state_dict()
    report = LoadReport(source)
    copied: set[str] = set()
    if "dist_token" in own and "dist_token" not in state and {"cls_token", "pos_embed"} <= state.keys():
        state["dist_token"] = state["cls_token"].clone()
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], state["pos_embed"]], dim=1)
        for part in ("weight", "bias"):
            if f"head.{part}" in state:
                state[f"head_dist.{part}"] = state[f"head.{part}"].clone()
        copied = {"dist_token", "head_dist.weight", "head_dist.bias"}
    elif "dist_token" in state and "dist_token" not in own:
        state.pop("dist_token")
        state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], state["pos_embed"][:, 2:]], dim=1)
        report.unused += ["dist_token", *[key for key in state if key.startswith("head_dist.")]]
        state = {key: value for key, value in state.items() if not key.startswith("head_dist.")}

    heads = {key for key in own if key.split(".")[0] in ("head", "head_dist", "classifier", "fc")}
    loadable: dict[str, Tensor] = {}
    for key, tensor in own.items():
        if key not in state:
            report.new.append(key)
            continue
        value = state.pop(key)
        if value.shape != tensor.shape:
            if key in heads:
                report.new.append(key)
                continue
            value = _resized(key, value, tensor, network, source)
            report.resized.append(key)
        elif key in copied:
            report.resized.append(f"{key} (from the class token)")
        else:
            report.loaded.append(key)
        loadable[key] = value
    report.unused += sorted(state)
    if len(loadable) < len(own) / 2:
        raise UserError(
            f"{source} is of another network: only {len(loadable)} of {len(own)} tensors of this model are in it; "
            "choose the model.name it was made with"
        )
    network.load_state_dict(loadable, strict=False)
    return report


def _resized(key: str, value: Tensor, target: Tensor, network: Any, source: str) -> Tensor:
    same_width = value.ndim == target.ndim and value.shape[-1] == target.shape[-1]
    if key == "pos_embed" and same_width:
        prefix = 0 if network.no_embed_class else network.num_prefix_tokens
        side = math.isqrt(value.shape[1] - prefix)
        if side * side == value.shape[1] - prefix:
            grid = list(network.patch_embed.grid_size)
            return resample_abs_pos_embed(value, new_size=grid, old_size=[side, side], num_prefix_tokens=prefix)
    if key == "patch_embed.proj.weight" and value.shape[:2] == target.shape[:2]:
        return resample_patch_embed(value, list(target.shape[-2:]))
    raise UserError(
        f"{source} is of another size: {key} has shape {tuple(value.shape)} and the model's is {tuple(target.shape)}; "
        "choose the model.size or model.name it was made with"
    )
