"""Counterfactual views: a mask painted on an uncovered face, or the same cloth where it covers no mouth.

Where every class has photographers of its own, a network can tell the classes by the photographer. Here both halves of
a pair are the same photograph with the same paint in it, and what differs is whether nose and mouth are covered
(Kaushik et al. 2020, "Learning the difference that makes a difference with counterfactually-augmented data").
"""

import hashlib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock

from facemask.data.cache import writing
from facemask.data.faces import Picture, Points, cloth_colour, fixed, interpolate, smooth

log = logging.getLogger(__name__)

SIDE = 160  # pixels of a picture's long side where faces are looked for: those under a quarter of it are not found
VERSION = 1  # raised whenever other faces are found


def find_faces(pictures: Iterable[Picture]) -> np.ndarray:
    """The largest frontal face of each picture: float32 (N, 4), its left, top, width and height as shares of the
    picture's width and height, from forehead to chin; NaN where none is found.

    By scikit-image's cascade of local binary patterns (OpenCV's lbpcascade_frontalface, trained on other photographs).
    It is sure rather than thorough: turned and covered faces are missed.
    """
    from skimage.data import lbp_frontal_face_cascade_filename
    from skimage.feature import Cascade
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):  # its threads report in any order, and what they report is averaged in that order
        cascade = Cascade(lbp_frontal_face_cascade_filename())
        found = [_largest(cascade, picture) for picture in pictures]
    return np.array(found, dtype=np.float32).reshape(-1, 4)


def _largest(cascade: Any, picture: Picture) -> tuple[float, ...]:
    scale = SIDE / max(picture.shape[:2])
    small = cv2.resize(
        picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    )
    height, width = small.shape[:2]
    margin = SIDE // 8  # of tight crops, whose faces reach over the border
    framed = cv2.copyMakeBorder(small, margin, margin, margin, margin, cv2.BORDER_REPLICATE)
    faces = cascade.detect_multi_scale(framed, 1.1, 1, (SIDE // 4,) * 2, (SIDE + 2 * margin,) * 2)
    if not faces:
        return (np.nan,) * 4
    face = max(faces, key=lambda face: (face["width"], -face["r"], -face["c"]))
    return (face["c"] - margin) / width, (face["r"] - margin) / height, face["width"] / width, face["height"] / height


def kept_faces(pictures: Iterable[Picture], names: Sequence[str], cache_dir: Path) -> np.ndarray:
    """`find_faces` of pictures that have these names (digests), read from cache_dir if they were searched before."""
    digest = hashlib.sha256("\n".join([str(VERSION), *names]).encode()).hexdigest()[:32]
    file = cache_dir / "found_faces" / f"{digest}.npy"
    with writing(cache_dir):
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock"):
            if not file.exists():
                log.info("looking for faces in %d pictures", len(names))
                scratch = file.with_suffix(".part.npy")
                np.save(scratch, find_faces(pictures))
                scratch.replace(file)
            return np.load(file)


def paint(picture: Picture, face: np.ndarray, covering: bool, rng: np.random.Generator) -> Picture:
    """A picture with a cloth painted over nose and mouth of its face, or, where not covering, elsewhere.

    Args:
        picture: uint8 (H, W, 3).
        face: (4,), as `find_faces` gives it.
        covering: over nose and mouth; else over eyes and forehead, beside the face, or below the mouth.
        rng: of shape, place, colour, pattern and light.
    """
    height, width = picture.shape[:2]
    left, top, wide, high = face * np.array([width, height, width, height])
    half, cheek, corner = rng.uniform(0.36, 0.46), rng.uniform(0.52, 0.62), rng.uniform(0.74, 0.86)
    middle = np.array([0.5, 0.75]) + rng.normal(0, 0.02, 2) + (0 if covering else _elsewhere(rng))
    centre = middle * [wide, high] + [left, top]
    angle = np.deg2rad(rng.normal(0, 5))
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

    def place(points: Points) -> Points:
        """Pixels of points in units of the face, x from its middle and y from its top."""
        return (points - [0, 0.75]) @ turn * [wide, high] + centre

    stencil = np.zeros((height, width), np.uint8)
    outline = place(smooth(_outline(half, cheek, corner, rng), 8))
    cv2.fillPoly(stencil, [fixed(outline)], 255, cv2.LINE_AA, 4)
    if not stencil.any():
        return picture
    # Lit as the place is where it lies: by its brightness, and by how it changes over the face.
    grey = cv2.GaussianBlur(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32), (0, 0), max(1, 0.12 * wide))
    mean = max(float(grey[stencil > 0].mean()), 1.0)
    exposure = np.clip(mean / 150, 0.45, 1.15)
    x, y = (np.arange(width) - centre[0]) / wide, (np.arange(height)[:, None] - centre[1]) / high
    light = exposure * np.clip(grey / mean, 0.6, 1.4) ** rng.uniform(0.3, 1.0)
    light = light * np.clip(1 - rng.uniform(0.1, 0.35) * (x / half) ** 2, 0.5, 1)
    if rng.random() < 0.6:  # pleats
        light = light * (1 + rng.uniform(0, 0.06) * np.sin(y * rng.uniform(20, 60)))
    colours = [np.array(cloth_colour(rng) if rng.random() < 0.6 else rng.uniform(20, 245, 3)) for _ in range(2)]
    cloth = np.broadcast_to(colours[0], picture.shape)
    if rng.random() < 0.2:
        stripes = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / rng.uniform(0.05, 0.15)) > 0
        cloth = np.where(stripes[..., None], *colours)
    grain = cv2.GaussianBlur(rng.normal(0, 1, (height, width)), (0, 0), 0.7) * rng.uniform(2, 8)
    cloth = np.clip(cloth * light[..., None] + grain[..., None], 0, 255).astype(np.uint8)

    painted = picture
    if rng.random() < 0.5:
        shadow = cv2.GaussianBlur(stencil, (0, 0), max(0.6, 0.03 * wide)) * rng.uniform(0, 0.35)
        painted = interpolate(painted, np.zeros_like(picture), shadow.astype(np.uint8))
    if rng.random() < 0.7:
        straps = np.zeros((height, width), np.uint8)
        ends = np.array([[[0.97 * half, cheek + 0.02], [0.56, 0.42]], [[0.97 * half, corner], [0.56, 0.55]]])
        ends[:, 1, 1] += rng.normal(0, 0.03, 2)
        lines = [fixed(place(line * [side, 1])) for line in ends for side in (-1, 1)]
        cv2.polylines(straps, lines, False, 255, max(1, round(0.012 * wide * rng.uniform(0.6, 1.6))), cv2.LINE_AA, 4)
        strap = np.clip(1.05 * exposure * colours[0], 0, 255).astype(np.uint8)
        painted = interpolate(painted, np.broadcast_to(strap, picture.shape), straps)
    soft = cv2.GaussianBlur(stencil, (0, 0), max(0.4, 0.008 * wide * rng.uniform(0.5, 2)))
    return interpolate(painted, cloth, soft.astype(np.uint8))


def _outline(half: float, cheek: float, corner: float, rng: np.random.Generator) -> Points:
    """Corners of a mask in units of the face, from the nose's bridge over cheeks and jaw to the chin, (10, 2)."""
    bridge, chin, jaw = rng.uniform(0.48, 0.58), rng.uniform(0.95, 1.08), rng.uniform(0.22, 0.34)
    below = (corner + chin) / 2 + 0.05
    right = np.array([[half, cheek], [0.95 * half, corner], [jaw, below]])
    tops = np.array([[0.5 * half, (cheek + bridge) / 2]])
    mirror = np.array([-1, 1])
    return np.concatenate([[[0, bridge]], tops, right, [[0, chin]], right[::-1] * mirror, tops * mirror])


def _elsewhere(rng: np.random.Generator) -> np.ndarray:
    """How far, in units of the face, a mask is from where it covers."""
    where = rng.integers(4)
    if where == 0:  # over eyes and forehead
        return np.array([0, -rng.uniform(0.5, 0.62)])
    if where == 1:  # beside the face
        return np.array([rng.choice([-1, 1]) * rng.uniform(0.75, 1.0), 0])
    return np.array([0, rng.uniform(0.46, 0.6)])  # pulled below the mouth
