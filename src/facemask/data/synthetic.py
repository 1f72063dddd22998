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
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from facemask.data.faces import Style, draw
from facemask.data.faces import mask_box as box_of_masks
from facemask.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

LABELS = {
    2: ("with_mask", "without_mask"),
    5: ("mask_below_nose", "mask_hanging_from_ear", "mask_under_chin", "mask_worn", "no_mask"),
}

# Of every 50 consecutive pictures of a class, how many show what: the state that is drawn, what hides the
# mouth, and what is beside the face. A scarf or a hand would hide a mask under the chin or on an ear.
Scene = tuple[str, str, str]
_BARE = [(("no_mask", "hand", "none"), 3), (("no_mask", "cup", "none"), 3), (("no_mask", "none", "scarf"), 3)]
_WORN, _BELOW_NOSE = (
    [((state, "none", beside), count) for beside, count in (("none", 41), ("hand", 3), ("cup", 3), ("scarf", 3))]
    for state in ("mask_worn", "mask_below_nose")
)
_UNDER_CHIN, _HANGING = (
    [((state, "none", "none"), 47), ((state, "none", "cup"), 3)]
    for state in ("mask_under_chin", "mask_hanging_from_ear")
)
SCENES: dict[str, list[tuple[Scene, int]]] = {
    "with_mask": _WORN,
    "without_mask": [(("no_mask", "none", "none"), 38), *_BARE, (("mask_under_chin", "none", "none"), 3)],
    "no_mask": [(("no_mask", "none", "none"), 41), *_BARE],
    "mask_worn": _WORN,
    "mask_below_nose": _BELOW_NOSE,
    "mask_under_chin": _UNDER_CHIN,
    "mask_hanging_from_ear": _HANGING,
}

# Independent random streams of one picture.
_STYLE, _DRAWING, _ENCODING, _LABEL, _SCENE = range(5)


class Encoding:
    """How a picture's file is made; drawn without knowledge of its label.

    `format` is JPEG or PNG, as Pillow names them; `jpeg_quality` is 0 for PNG; `blur` and `noise` are standard
    deviations in pixels and in grey levels.
    """

    def __init__(self, seed: int, index: int) -> None:
        rng = _rng(_ENCODING, seed, index)
        quality = int(rng.integers(40, 97))
        self.format = "JPEG" if rng.random() < 0.8 else "PNG"
        self.jpeg_quality = quality if self.format == "JPEG" else 0
        self.blur = round(float(max(0.0, rng.uniform(-0.4, 0.9))), 3)
        self.noise = round(float(rng.uniform(0.5, 7.0)), 3)

    def encode(self, pixels: NDArray[np.uint8], rng: np.random.Generator) -> bytes:
        """The bytes of the file of `pixels` (H, W, 3), RGB, with blur and sensor noise."""
        if self.blur > 0.2:
            pixels = np.asarray(cv2.GaussianBlur(pixels, (0, 0), self.blur), np.uint8)
        noise = rng.standard_normal(pixels.shape, dtype=np.float32) * np.float32(self.noise)
        noisy = np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)
        suffix, options = ".png", [cv2.IMWRITE_PNG_COMPRESSION, 2]
        if self.format == "JPEG":
            suffix, options = ".jpg", [cv2.IMWRITE_JPEG_QUALITY, self.jpeg_quality]
        return cv2.imencode(suffix, cv2.cvtColor(noisy, cv2.COLOR_RGB2BGR), options)[1].tobytes()


@dataclass(frozen=True)
class Face:
    """One drawn picture as a file, and what is known of it.

    `path` is relative to the data root; `content` are the file's bytes; `mask_region` (H, W) bool is True where
    mask material shows (straps are not counted); `attributes` say what was drawn, with the pixel positions
    `nose_x`, `nose_y`, `mouth_x`, `mouth_y`.
    """

    path: str
    label: str
    content: bytes
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
    style, encoding = Style(_rng(_STYLE, seed, index)), Encoding(seed, index)
    drawing = draw(style, state, before_mouth, beside, _rng(_DRAWING, seed, index))
    hard_negative = before_mouth
    if label in ("without_mask", "no_mask") and beside == "scarf":
        hard_negative = "scarf"
    if label == "without_mask" and state == "mask_under_chin":
        hard_negative = "chin_mask"
    attributes = vars(style) | {
        "state": state,
        "hard_negative": hard_negative,
        "distractor": beside if hard_negative != "scarf" else "none",
        "nose_x": round(drawing.nose[0], 2),
        "nose_y": round(drawing.nose[1], 2),
        "mouth_x": round(drawing.mouth[0], 2),
        "mouth_y": round(drawing.mouth[1], 2),
        "mask_pixels": int(np.count_nonzero(drawing.mask_region)),
    }
    attributes |= vars(encoding)
    del attributes["width"], attributes["height"], attributes["format"]
    content = encoding.encode(drawing.image, _rng(_ENCODING, seed, index, 1))
    path = synthetic_path(seed, index, states)
    return Face(path, label, content, encoding.format, attributes, drawing.mask_region)


def synthetic_bytes(seed: int, index: int, states: int = 2) -> bytes:
    """The encoded file of one face: the bytes that `synthetic_table` hashes and `write_folder` writes."""
    return draw_face(seed, index, states=states).content


def synthetic_path(seed: int, index: int, states: int = 2) -> str:
    """The file's path relative to the data root, for example `with_mask/000123.jpg`, without drawing it."""
    suffix = "jpg" if Encoding(seed, index).format == "JPEG" else "png"
    return f"{_label(seed, index, states)}/{index:06d}.{suffix}"


def mask_box(seed: int, index: int, *, states: int = 2) -> tuple[int, int, int, int]:
    """Where a mask is, or would be: left, top, right, bottom in pixels, half-open, without drawing the face.

    The box holds all that a mask with its loops or straps may cover on this head in any state that the set
    has. It follows from the looks alone, so that a picture covered there shows neither a mask nor its label.
    """
    _label(seed, index, states)
    worn = {scene[0] for label in LABELS[states] for scene, _ in SCENES[label]} - {"no_mask"}
    return box_of_masks(Style(_rng(_STYLE, seed, index)), sorted(worn))


def synthetic_files(n: int, seed: int = 0, *, states: int = 2, workers: int = 2) -> Iterator[Face]:
    """Files 0..n-1 in order, drawn by `workers` processes (0: in this one; also for fewer than 200 files)."""
    _check(n, seed, states)
    make = partial(draw_face, seed, states=states)
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
    on_file: Callable[[Face], None] | None = None,
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
        height, width = file.mask_region.shape
        facts: dict[str, str | float | int] = {
            "path": file.path,
            "label": file.label,
            "sha256": hashlib.sha256(file.content).hexdigest(),
        }
        facts |= {"group": file.path, "width": width, "height": height, "bytes": len(file.content)}
        attributes = {f"attr_{name}": value for name, value in file.attributes.items()}
        rows.append(facts | {"format": file.format} | attributes)
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

    def write(file: Face) -> None:
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
