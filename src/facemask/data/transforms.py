"""Views of a picture: the evaluation view, and augmented views that are functions of (seed, epoch, path) alone.

Because nothing else enters, the same pixels come out with any number of workers, ranks or resumptions, two arms of
an ablation see the same pictures, and any view can be shown again.
"""

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from facemask.data.images import centre_crop


def hashed_rng(*key: object) -> np.random.Generator:
    """A generator whose stream depends on the key alone (BLAKE2b of the key's text)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def epoch_order(folds: np.ndarray, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Order of an epoch and the mixing partner of every row: two int64 arrays (N,), a function of its arguments alone.

    Rows are paired at random within their fold (N,), so that the teacher of a mixed view has seen neither picture;
    partners are mutual, as where a batch is mixed with its reverse, but for the odd row of a fold. In the order,
    partners stand eight places apart: one batch of one rank holds both when the global batch is a multiple of 16 and
    the ranks are 1, 2, 4 or 8, and then each view is made once.
    """
    rng = np.random.default_rng([seed, epoch])
    rows = rng.permutation(len(folds))
    partner = rows.copy()
    pairs, single = [], []
    for fold in np.unique(folds):
        members = rows[folds[rows] == fold]
        if len(members) % 2:
            partner[members[-1]] = members[0]
            single.append(members[-1])
        pairs.append(members[: len(members) // 2 * 2].reshape(-1, 2))
    paired = rng.permutation(np.concatenate(pairs))
    partner[paired[:, 0]], partner[paired[:, 1]] = paired[:, 1], paired[:, 0]
    whole = len(paired) // 8 * 8
    blocks = paired[:whole].reshape(-1, 8, 2).transpose(0, 2, 1).ravel()
    return np.concatenate([blocks, paired[whole:].T.ravel(), np.array(single, dtype=np.int64)]), partner


def degradation(p: float) -> Any:
    """Albumentations pipeline that lowers resolution, sharpness and JPEG quality at random, each with probability `p`.

    What a file was before it was resized (its size, its compression) shows in its pixels and may tell its class; a
    network that sees each picture at many qualities cannot rely on it.
    """
    import albumentations

    return albumentations.Compose(
        [
            albumentations.Downscale(scale_range=(0.25, 0.9), p=p),
            albumentations.GaussianBlur(blur_limit=0, sigma_limit=(0.3, 2.0), p=p),
            albumentations.ImageCompression(quality_range=(30, 95), p=p),
        ]
    )


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
        degrade: probability of each step of `degradation`, which follows the transform.
        counterfactual: share of views of pictures of class `bare` in which a cloth is painted on the face, if one is
            found (see `facemask.data.counterfactual`); over nose and mouth in half of them, and those become `masked`.
        bare, masked: the two classes.
        small_epochs, small_size: in so many first epochs views have this side instead (progressive resolution).
    """

    def __init__(
        self,
        seed: int,
        img_size: int,
        transform: Any | None = None,
        mix_prob: float = 0.0,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        degrade: float = 0.0,
        counterfactual: float = 0.0,
        bare: str = "without_mask",
        masked: str = "with_mask",
        small_epochs: int = 0,
        small_size: int = 64,
    ) -> None:
        self.seed = seed
        self.img_size = img_size
        self.transform = transform
        self.mix_prob = mix_prob
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha
        self.degradation = degradation(degrade) if degrade > 0 else None
        self.counterfactual = counterfactual
        self.bare, self.masked = bare, masked
        self.small_epochs = small_epochs
        self.small_size = small_size

    def view(self, pixels: np.ndarray, path: str, epoch: int) -> np.ndarray:
        """The augmented view of a picture: uint8 (H, W, 3) -> uint8 (img_size, img_size, 3)."""
        view = centre_crop(pixels, self.img_size) if self.transform is None else pixels
        rng = hashed_rng(self.seed, epoch, path)
        # One state for all: each transform draws from the same two streams in turn, so that transforms of one
        # sample are uncorrelated (Compose(seed=) would give all of them equal draws).
        draws = random.Random(int(rng.integers(2**63)))
        for pipeline in (self.transform, self.degradation):
            if pipeline is not None:
                pipeline.set_random_state(rng, draws)
                view = pipeline(image=view)["image"]
        return view

    def painting(self, path: str, epoch: int) -> tuple[bool, np.random.Generator] | None:
        """Whether a view of a `bare` picture is painted, and then: whether over nose and mouth, and a generator."""
        rng = hashed_rng(self.seed, epoch, path, "counterfactual")
        if rng.random() >= self.counterfactual:
            return None
        return bool(rng.random() < 0.5), rng

    def resize(self, view: np.ndarray, epoch: int) -> np.ndarray:
        """A view, mixed or not, at the size that an epoch is trained at."""
        if epoch >= self.small_epochs:
            return view
        return cv2.resize(view, (self.small_size, self.small_size), interpolation=cv2.INTER_AREA)

    def mix(self, path: str, epoch: int, partner: int) -> Mix | None:
        """Whether and how a view is mixed with `partner`, a row of the training split."""
        if self.mix_prob == 0 or (self.mixup_alpha == 0 and self.cutmix_alpha == 0):
            return None
        rng = hashed_rng(self.seed, epoch, path, "mix")
        if rng.random() >= self.mix_prob:
            return None
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
    return cv2.addWeighted(view, mix.lam, partner_view, 1 - mix.lam, 0.0)
