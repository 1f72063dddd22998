"""Embeddings of pictures by a CNN with ImageNet weights, for the search for near-duplicates."""

from collections.abc import Callable

import cv2
import numpy as np

SIDE = 160


def build_embedder() -> Callable[[list[np.ndarray]], np.ndarray]:
    """EfficientNet-Lite0 from its Python package: uint8 pictures (H, W, 3), squashed to 160 x 160 -> pooled features,
    float32 (N, 1280)."""
    import timm
    import torch

    from facemask.modeling.backbones import LITE0_MEAN, LITE0_STD
    from facemask.modeling.weights import lite0_state_dict

    network = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    network.load_state_dict(lite0_state_dict(), strict=False)  # all but the classifier
    network.eval().to(memory_format=torch.channels_last)
    mean, std = (255 * torch.tensor(values).view(1, 3, 1, 1) for values in (LITE0_MEAN, LITE0_STD))

    @torch.inference_mode()
    def embed(pictures: list[np.ndarray]) -> np.ndarray:
        small = [cv2.resize(rgb, (SIDE, SIDE), interpolation=cv2.INTER_AREA) for rgb in pictures]
        pixels = torch.from_numpy(np.stack(small).transpose(0, 3, 1, 2)).float()
        return network(((pixels - mean) / std).contiguous(memory_format=torch.channels_last)).numpy()

    return embed
