"""Views of a picture: the evaluation view, and augmented views that are functions of (seed, epoch, path) alone.

Because nothing else enters, the same pixels come out with any number of workers, ranks or resumptions, two arms of
an ablation see the same pictures, and any view can be shown again.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from facemask.data.images import centre_crop


def hashed_rng(*key: object) -> np.random.Generator:
    """A generator whose stream depends on the key alone (BLAKE2b of the key's text)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


@dataclass(frozen=True)
class Mix:
    """How a view is mixed with its partner: `lam` of the pixels and of the target stay with the view itself.

    box: rows and columns (top, bottom, left, right) that come from the partner (CutMix), or None (mixup).
    """

    partner: int
    lam: float
    box: tuple[int, int, int, int] | None


class Augmentation:
    """Augmented views and their mixing partners.

    Args:
        seed: seed of all views; nothing else but epoch and path enters.
        img_size: side of a view in pixels.
        transform: albumentations `Compose`, or None for the evaluation view.
        mix_prob: share of views that are mixed.
        mixup_alpha: mixup's lambda comes from Beta(alpha, alpha) (Zhang et al. 2018); 0: no mixup.
        cutmix_alpha: the same for CutMix (Yun et al. 2019); with both above 0 a fair coin decides, as in DeiT.
    """

    def __init__(
        self,
        seed: int,
        img_size: int,
        transform: Any | None = None,
        mix_prob: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
    ) -> None:
        self.seed = seed
        self.img_size = img_size
        self.transform = transform
        self.mix_prob = mix_prob
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha

    def view(self, pixels: np.ndarray, path: str, epoch: int) -> np.ndarray:
        """The augmented view of a picture: uint8 (H, W, 3) -> uint8 (img_size, img_size, 3)."""
        if self.transform is None:
            return centre_crop(pixels, self.img_size)
        rng = hashed_rng(self.seed, epoch, path)
        # One state for the whole pipeline: each transform draws from the same two streams in turn, so that
        # transforms of one sample are uncorrelated (Compose(seed=) would give all of them equal draws).
        self.transform.set_random_state(rng, random.Random(int(rng.integers(2**63))))
        return self.transform(image=pixels)["image"]

    def mix(self, path: str, epoch: int, candidates: np.ndarray) -> Mix | None:
        """The partner (one of `candidates`, indices into the training split), lambda and box of a view."""
        if self.mix_prob == 0 or (self.mixup_alpha == 0 and self.cutmix_alpha == 0):
            return None
        rng = hashed_rng(self.seed, epoch, path, "mix")
        if rng.random() >= self.mix_prob:
            return None
        partner = int(candidates[rng.integers(len(candidates))])
        cutmix = self.cutmix_alpha > 0 and (self.mixup_alpha == 0 or rng.random() < 0.5)
        alpha = self.cutmix_alpha if cutmix else self.mixup_alpha
        lam = float(rng.beta(alpha, alpha))
        if not cutmix:
            return Mix(partner, lam, None)
        side = round(self.img_size * (1 - lam) ** 0.5)
        row, column = rng.integers(self.img_size, size=2)
        top, bottom = np.clip([row - side // 2, row - side // 2 + side], 0, self.img_size)
        left, right = np.clip([column - side // 2, column - side // 2 + side], 0, self.img_size)
        lam = 1 - float((bottom - top) * (right - left)) / self.img_size**2
        return Mix(partner, lam, (int(top), int(bottom), int(left), int(right)))


def apply_mix(view: np.ndarray, partner_view: np.ndarray, mix: Mix) -> np.ndarray:
    """Mix two uint8 views of equal shape (H, W, 3); the result is uint8, as student and teacher both see it."""
    if mix.box is not None:
        top, bottom, left, right = mix.box
        mixed = view.copy()
        mixed[top:bottom, left:right] = partner_view[top:bottom, left:right]
        return mixed
    blend = mix.lam * view.astype(np.float32) + (1 - mix.lam) * partner_view.astype(np.float32)
    return np.rint(blend).astype(np.uint8)
