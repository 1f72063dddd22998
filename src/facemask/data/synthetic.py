"""The embedded data set: faces with and without masks, drawn by the project itself.

Every picture is a pure function of (seed, index, states): no file is read and nothing is downloaded. A
label's deciding evidence is mask material over mouth and nose: size, format, file size and the colours of a
picture carry (almost) no information about it; `tests/data/test_synthetic.py` holds them to that.

With two states, `with_mask` is a mask over mouth and nose; `without_mask` is no mask, or one worn under the
chin. A mask below the nose is neither, so it is left out there; with five states it is a class of its own.
"""

import hashlib
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from facemask.data.faces import draw, draw_style
from facemask.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

LABELS = {
    2: ("with_mask", "without_mask"),
    5: ("mask_below_nose", "mask_hanging_from_ear", "mask_under_chin", "mask_worn", "no_mask"),
}

# Of every 50 consecutive pictures of a class, how many show what: the state that is drawn, what hides the
# mouth, and what is beside the face.
Scene = tuple[str, str, str]
_BESIDE = (("none", 41), ("hand", 3), ("cup", 3), ("scarf", 3))
_BARE = [("hand", "none", 3), ("cup", "none", 3), ("none", "scarf", 3)]
SCENES: dict[str, list[tuple[Scene, int]]] = {
    "without_mask": [
        (("no_mask", "none", "none"), 38),
        *(((("no_mask", before, beside)), count) for before, beside, count in _BARE),
        (("mask_under_chin", "none", "none"), 3),
    ],
    "with_mask": [(("mask_worn", "none", beside), count) for beside, count in _BESIDE],
    "no_mask": [
        (("no_mask", "none", "none"), 41),
        *(((("no_mask", before, beside)), count) for before, beside, count in _BARE),
    ],
    "mask_worn": [(("mask_worn", "none", beside), count) for beside, count in _BESIDE],
    "mask_below_nose": [(("mask_below_nose", "none", beside), count) for beside, count in _BESIDE],
    # A scarf or a hand would hide the mask that makes these two.
    "mask_under_chin": [(("mask_under_chin", "none", "none"), 47), (("mask_under_chin", "none", "cup"), 3)],
    "mask_hanging_from_ear": [
        (("mask_hanging_from_ear", "none", "none"), 47),
        (("mask_hanging_from_ear", "none", "cup"), 3),
    ],
}

# Independent random streams of one picture.
_STYLE, _DRAWING, _ENCODING, _LABEL, _SCENE = range(5)


@dataclass(frozen=True)
class Encoding:
    """How a picture's file is made; drawn without knowledge of its label."""

    format: str  # JPEG or PNG, as Pillow names them
    jpeg_quality: int  # 0 for PNG
    blur: float  # standard deviation in pixels
    noise: float  # standard deviation in grey levels


@dataclass(frozen=True)
class Face:
    """One drawn picture.

    `pixels` is (H, W, 3) uint8 RGB before blur, noise and compression; `mask_region` (H, W) bool is True
    where mask material shows (straps are not counted); `attributes` say what was drawn, with the pixel
    positions `nose_x`, `nose_y`, `mouth_x`, `mouth_y`.
    """

    pixels: NDArray[np.uint8]
    label: str
    attributes: dict[str, str | float | int]
    mask_region: NDArray[np.bool_]
    seed: int
    index: int


@dataclass(frozen=True)
class SyntheticFile:
    """An encoded face and what is known of it."""

    path: str
    label: str
    content: bytes
    width: int
    height: int
    format: str
    attributes: dict[str, str | float | int]
    mask_region: NDArray[np.bool_]


def draw_face(seed: int, index: int, *, states: int = 2) -> Face:
    """Draw face number `index` of the data set with this seed.

    Every `states` consecutive indices from a multiple of `states` hold each label once, in random order;
    every 50 consecutive pictures of one label hold exactly the shares of hard negatives and distractors of
    `SCENES`. Size, pose, looks and file encoding are drawn before the label is known.

    Raises UserError for a number of states other than 2 or 5 and for a negative seed or index.
    """
    label = _label(seed, index, states)
    block = index // states
    scenes = [scene for scene, count in SCENES[label] for _ in range(count)]
    order = _rng(_SCENE, seed, block // 50, states, LABELS[states].index(label)).permutation(50)
    state, before_mouth, beside = scenes[order[block % 50]]
    style = draw_style(_rng(_STYLE, seed, index))
    drawing = draw(style, state, before_mouth, beside, _rng(_DRAWING, seed, index))
    hard_negative = before_mouth
    if label in ("without_mask", "no_mask") and beside == "scarf":
        hard_negative = "scarf"
    if label == "without_mask" and state == "mask_under_chin":
        hard_negative = "chin_mask"
    attributes = asdict(style) | {
        "state": state,
        "hard_negative": hard_negative,
        "distractor": beside if hard_negative != "scarf" else "none",
        "nose_x": round(drawing.nose[0], 2),
        "nose_y": round(drawing.nose[1], 2),
        "mouth_x": round(drawing.mouth[0], 2),
        "mouth_y": round(drawing.mouth[1], 2),
        "mask_pixels": int(np.count_nonzero(drawing.mask_region)),
    }
    encoding = asdict(draw_encoding(seed, index))
    del attributes["width"], attributes["height"], encoding["format"]
    return Face(drawing.image, label, attributes | encoding, drawing.mask_region, seed, index)


def draw_encoding(seed: int, index: int) -> Encoding:
    """The file format, compression, blur and noise of a picture, whatever its label."""
    rng = _rng(_ENCODING, seed, index)
    quality = int(rng.integers(40, 97))
    jpeg = rng.random() < 0.8
    return Encoding(
        format="JPEG" if jpeg else "PNG",
        jpeg_quality=quality if jpeg else 0,
        blur=round(float(max(0.0, rng.uniform(-0.4, 0.9))), 3),
        noise=round(float(rng.uniform(0.5, 7.0)), 3),
    )


def encode(face: Face) -> bytes:
    """The bytes of the picture's JPEG or PNG file, with blur and sensor noise."""
    encoding = draw_encoding(face.seed, face.index)
    rng = _rng(_ENCODING, face.seed, face.index, 1)
    pixels = np.asarray(face.pixels)
    if encoding.blur > 0.2:
        pixels = np.asarray(cv2.GaussianBlur(pixels, (0, 0), encoding.blur), np.uint8)
    noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(encoding.noise)
    noisy = np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)
    suffix, options = ".png", [cv2.IMWRITE_PNG_COMPRESSION, 2]
    if encoding.format == "JPEG":
        suffix, options = ".jpg", [cv2.IMWRITE_JPEG_QUALITY, encoding.jpeg_quality]
    _, content = cv2.imencode(suffix, cv2.cvtColor(noisy, cv2.COLOR_RGB2BGR), options)
    return content.tobytes()


def synthetic_bytes(seed: int, index: int, states: int = 2) -> bytes:
    """The encoded file of one face: the bytes that `synthetic_table` hashes and `write_folder` writes."""
    return encode(draw_face(seed, index, states=states))


def synthetic_path(seed: int, index: int, states: int = 2) -> str:
    """The file's path relative to the data root, for example `with_mask/000123.jpg`, without drawing it."""
    suffix = "jpg" if draw_encoding(seed, index).format == "JPEG" else "png"
    return f"{_label(seed, index, states)}/{index:06d}.{suffix}"


def synthetic_file(seed: int, states: int, index: int) -> SyntheticFile:
    """Draw and encode one face."""
    face = draw_face(seed, index, states=states)
    height, width = face.mask_region.shape
    return SyntheticFile(
        path=synthetic_path(seed, index, states),
        label=face.label,
        content=encode(face),
        width=width,
        height=height,
        format=draw_encoding(seed, index).format,
        attributes=face.attributes,
        mask_region=face.mask_region,
    )


def synthetic_files(n: int, seed: int = 0, *, states: int = 2, workers: int = 2) -> Iterator[SyntheticFile]:
    """Files 0..n-1 in order, drawn by `workers` processes (0: in this one; also for fewer than 200 files)."""
    _check(n, seed, states)
    make = partial(synthetic_file, seed, states)
    if workers < 1 or n < 200:
        yield from map(make, range(n))
        return
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=cv2.setNumThreads, initargs=(1,)) as pool:
        yield from pool.map(make, range(n), chunksize=32)


def synthetic_table(
    n: int,
    seed: int = 0,
    *,
    states: int = 2,
    workers: int = 2,
    on_file: Callable[[SyntheticFile], None] | None = None,
) -> "pd.DataFrame":
    """Draw n faces and list them: path, label, sha256, group, width, height, bytes, format, attr_*.

    Every picture is a group of its own; which split it is in is decided where it is used. `on_file` is called with
    each file in order, to show progress or to keep the bytes, so that nothing need be drawn twice.

    Raises UserError for n below the number of states, unknown states, and a negative seed.
    """
    import pandas as pd

    rows = []
    for file in synthetic_files(n, seed, states=states, workers=workers):
        if on_file is not None:
            on_file(file)
        rows.append(
            {
                "path": file.path,
                "label": file.label,
                "sha256": hashlib.sha256(file.content).hexdigest(),
                "group": file.path,
                "width": file.width,
                "height": file.height,
                "bytes": len(file.content),
                "format": file.format,
            }
            | {f"attr_{name}": value for name, value in file.attributes.items()}
        )
    return pd.DataFrame(rows)


def write_folder(root: Path, n: int, seed: int = 0, states: int = 2, *, workers: int = 2) -> None:
    """Write n faces as an ImageFolder tree: `root/<label>/<index>.jpg` and `root/attributes.csv`.

    The mask regions (PNG, 255 where mask material shows) go to the sibling folder `<root>_mask_regions`,
    because a folder inside `root`, even a hidden one, would be read as a class. `attributes.csv` holds
    `synthetic_table`.

    Raises UserError where one of the two folders exists and is not empty.
    """
    regions = root.with_name(root.name + "_mask_regions")
    for folder in (root, regions):
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty: name a new folder, or remove this one first.")

    def write(file: SyntheticFile) -> None:
        _, region = cv2.imencode(".png", file.mask_region.astype(np.uint8) * 255)
        for path, content in (
            (root / file.path, file.content),
            ((regions / file.path).with_suffix(".png"), region.tobytes()),
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    table = synthetic_table(n, seed, states=states, workers=workers, on_file=write)
    table.to_csv(root / "attributes.csv", index=False)


def _rng(stream: int, *key: int) -> np.random.Generator:
    return np.random.default_rng([stream, *key])


def _label(seed: int, index: int, states: int) -> str:
    _check(states, seed, states)
    if index < 0:
        raise UserError(f"index={index} must not be negative.")
    order = _rng(_LABEL, seed, index // states, states).permutation(states)
    return LABELS[states][order[index % states]]


def _check(n: int, seed: int, states: int) -> None:
    if states not in LABELS:
        raise UserError(f"states={states} is not possible: the synthetic faces have 2 or 5 states.")
    if n < states:
        raise UserError(f"n={n} is too few: {states} states need at least {states} faces.")
    if seed < 0:
        raise UserError(f"seed={seed} must not be negative.")
