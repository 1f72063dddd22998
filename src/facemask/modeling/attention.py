"""Where a vision transformer looks: maps over its grid of patches, from its attention alone or with gradients."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from facemask.modeling.backbones import Backbone

TOKENS = {"head": 0, "head_dist": 1}  # where timm puts the token that each head reads


def rollout(attentions: Sequence[Tensor]) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020, "Quantifying attention flow in transformers").

    Args:
        attentions: of each block, first to last, rows adding up to 1: (B, heads, N, N).

    Returns:
        (B, N, N): how much of each output token comes from each input token. Half of a block's output is its input,
        by the skip connection; heads are averaged.
    """
    total = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    for attention in attentions:
        total = (attention.mean(dim=1) @ total + total) / 2
    return total


def gradient_rollout(attentions: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Gradient-weighted attention (Chefer et al. 2021, "Generic attention-model explainability", eq. 5 and 6).

    Args:
        attentions, gradients: of each block, first to last: (B, heads, N, N); gradients of the logit to be explained.

    Returns:
        (B, N, N): relevance of each input token for each output token, R + mean over heads of relu(gradient *
        attention) times R for each block in turn, from R = 1.
    """
    relevance = torch.eye(attentions[0].shape[-1]).to(attentions[0])
    for attention, gradient in zip(attentions, gradients, strict=True):
        relevance = relevance + (gradient * attention).clamp(min=0).mean(dim=1) @ relevance
    return relevance


def attention_maps(backbone: Backbone, pixels: Tensor, heads: Sequence[str]) -> dict[tuple[str, str], Tensor]:
    """Maps of both methods for the token that each head reads.

    Args:
        backbone: in evaluation mode.
        pixels: uint8 (B, 3, H, W).
        heads: some of "head", "head_dist".

    Returns:
        {("rollout" | "gradient", head): (B, rows, columns) over the grid of patches}; the gradient is of the logit that
        the head decides for. Empty for networks in which not all tokens attend to all (CNNs, windows). Where the head
        reads the mean of the patches, so does the map.
    """
    with torch.inference_mode(False), torch.enable_grad():
        return _attention_maps(backbone, pixels, heads)


def _attention_maps(backbone: Backbone, pixels: Tensor, heads: Sequence[str]) -> dict[tuple[str, str], Tensor]:
    network = backbone.network
    with _watched(network) as attentions:
        logits = backbone(pixels).logits
    if not hasattr(network, "num_prefix_tokens"):
        return {}
    rows, columns = network.patch_embed.grid_size
    prefix: int = network.num_prefix_tokens
    tokens = prefix + rows * columns
    if not attentions or any(attention.shape[-2:] != (tokens, tokens) for attention in attentions):
        return {}

    def of_token(relevance: Tensor, head: str) -> Tensor:
        patches = relevance[:, :, prefix:]
        chosen = patches[:, TOKENS[head]] if network.global_pool == "token" else patches[:, prefix:].mean(dim=1)
        return chosen.detach().reshape(-1, rows, columns)

    whole = rollout(attentions)
    maps = {("rollout", head): of_token(whole, head) for head in heads}
    for head in heads:
        decided = logits[head].max(dim=1).values.sum()
        gradients = torch.autograd.grad(decided, attentions, retain_graph=True)
        maps["gradient", head] = of_token(gradient_rollout(attentions, gradients), head)
    return maps


@contextmanager
def _watched(network: Any) -> Iterator[list[Tensor]]:
    """The attention matrices of the forward passes inside, with gradients even where all weights are frozen."""
    found: list[Tensor] = []

    def keep(_: Any, __: Any, attention: Tensor) -> Tensor:
        found.append(attention if attention.requires_grad else attention.requires_grad_())
        return attention

    modules = dict(network.named_modules())
    fused = [module for module in modules.values() if getattr(module, "fused_attn", False)]
    hooks = [modules[name].register_forward_hook(keep) for name in modules if name.endswith("attn_drop")]
    for module in fused:
        module.fused_attn = False  # the fused kernel never holds the matrix
    try:
        yield found
    finally:
        for module in fused:
            module.fused_attn = True
        for hook in hooks:
            hook.remove()
