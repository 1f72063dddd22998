"""Initialisation for small data: attention that starts out as a small convolution."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from facemask.errors import UserError


def sincos_positions(side: int, dim: int, temperature: float = 100.0) -> Tensor:
    """Two-dimensional sine-cosine positions (side * side, dim), as in MoCo v3 and the simple ViT of Beyer et al.
    (2022), with the low temperature that suits a small grid."""
    frequencies = 1 / temperature ** (torch.arange(dim // 4) / (dim // 4))
    row, column = torch.meshgrid(torch.arange(side).float(), torch.arange(side).float(), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)


def takes_structured_init(network: Any) -> bool:
    """Whether a network has what `structured_init` sets: a vision transformer with class-token positions."""
    return isinstance(network, VisionTransformer) and network.pos_embed is not None and not network.no_embed_class


@torch.no_grad()
def structured_init(network: Any) -> None:
    """Start a vision transformer where a convolutional network would.

    - Positions: half of `sincos_positions` for the patches.
    - Queries and keys (Zheng et al. 2024, "Structured initialization for attention in vision transformers"): each
      head attends to one neighbour of every patch, drawn from its 3 x 3 surroundings, by a low-rank factorisation
      of that shift in the basis of the positions.
    - Values and projection (Trockman & Kolter 2023, "Mimetic initialization of self-attention layers", equation 9):
      their product is 0.4 * noise - 0.4 * identity.

    Args:
        network: timm VisionTransformer with a square patch grid and class-token positions (`no_embed_class=False`).
            Random numbers come from torch's global generator and, for the neighbours, from a fixed seed.

    Raises:
        UserError: another kind of network.
    """
    if not takes_structured_init(network):
        raise UserError(
            f"model.init=structured needs a vision transformer with class-token positions, and "
            f"{type(network).__name__} is none: choose model.init=timm"
        )
    dim, prefix = network.embed_dim, network.num_prefix_tokens
    side = network.patch_embed.grid_size[0]
    network.pos_embed[0, prefix:] = 0.5 * sincos_positions(side, dim)
    positions = F.layer_norm(network.pos_embed[0, prefix:], (dim,))
    basis, mixing = torch.linalg.qr(torch.linalg.pinv(positions, rtol=1e-2))  # so that only N x N is decomposed
    neighbours = np.random.default_rng(0)
    for block in network.blocks:
        attention = block.attn
        width = attention.head_dim
        weight = attention.qkv.weight
        for head in range(attention.num_heads):
            shift = _shift(side, *neighbours.integers(-1, 2, size=2).tolist())
            scores = 6 * width**0.5 * mixing @ (shift - 1 / side**2) @ mixing.T
            left, values, right = torch.linalg.svd(scores)
            rank = min(width, len(values))
            first = head * width
            weight[first : first + rank] = (basis @ left[:, :rank] * values[:rank].sqrt()).T
            weight[dim + first : dim + first + rank] = (right[:rank] @ basis.T) * values[:rank, None].sqrt()
        product = 0.4 * torch.randn(dim, dim) / dim**0.5 - 0.4 * torch.eye(dim)
        left, values, right = torch.linalg.svd(product)
        weight[2 * dim :] = right * values[:, None].sqrt()
        attention.proj.weight.copy_(left * values.sqrt())


def _shift(side: int, down: int, right: int) -> Tensor:
    """(N, N) matrix that takes each patch of a grid to a neighbour, those at the border to the border."""
    rows, columns = np.divmod(np.arange(side * side), side)
    target = np.clip(rows + down, 0, side - 1) * side + np.clip(columns + right, 0, side - 1)
    return torch.eye(side * side)[torch.from_numpy(target)]
