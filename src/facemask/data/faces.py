"""Draws one face with or without a mask: geometry and paint only, no labels and no files.

Points of a head are given in head units: x to the right, y down, the origin in the middle of the face, the
crown at y = -1 and the chin at y = 1. `Pose` turns them into pixels. The head is treated as an ellipsoid, so
that yaw moves and foreshortens what lies on it.

Anything that may differ by a rounding between processors (exp, float sums in a library's fast path) is kept
out of the pixels: paint is blended in integers, light with +, *, / and sqrt.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]
Picture = NDArray[np.uint8]
Colour = tuple[float, float, float]
Place = Callable[[Points], Points]

# fmt: off
SKIN = ((246, 217, 196), (234, 192, 164), (214, 164, 130), (188, 134, 98), (150, 102, 72), (108, 72, 51), (74, 50, 38))
HAIR: dict[str, Colour] = {
    "black": (30, 26, 26), "dark brown": (60, 41, 30), "brown": (104, 70, 45), "auburn": (128, 62, 36),
    "blond": (201, 164, 104), "grey": (142, 140, 138), "white": (222, 219, 212), "dyed": (120, 60, 140),
}
CLOTH: dict[str, Colour] = {
    "light blue": (150, 198, 224), "white": (236, 238, 238), "black": (38, 38, 42), "grey": (134, 138, 144),
    "navy": (44, 58, 104), "pink": (236, 172, 188), "green": (96, 152, 112), "teal": (74, 160, 164),
    "red": (184, 54, 56), "beige": (214, 192, 160), "yellow": (226, 190, 84), "purple": (120, 84, 150),
}
CASTS = {
    "neutral": (1.0, 1.0, 1.0), "warm": (1.08, 1.0, 0.86), "cool": (0.9, 0.99, 1.1), "green": (0.95, 1.05, 0.93),
    "dim": (0.68, 0.68, 0.72), "bright": (1.2, 1.19, 1.16),
}
BACKGROUNDS = ("plain", "gradient", "shapes", "texture", "crowd")
HAIR_STYLES = ("bald", "short", "fringe", "receding", "long", "bob", "afro", "bun")
PATTERNS = ("plain", "stripes", "dots", "checks", "camouflage")
# Mask shape -> how far it reaches to the sides, as a share of the head's width.
MASK_REACH = {"surgical": 0.95, "ffp2": 0.9, "n95": 0.82, "cloth": 0.96, "valve": 0.86}
# State -> heights of a mask's edge: top at the nose and at the sides, bottom in the middle and at the sides.
MASK_EDGES = {
    "mask_worn": (0.10, 0.24, 1.08, 0.78),
    "mask_below_nose": (0.44, 0.36, 1.10, 0.84),
    "mask_under_chin": (0.86, 0.70, 1.26, 0.98),
}
# Lines on a mask: direction, where in its own square -1..1, ink and width.
_SEAM = (("down", 0.0, "dark", 0.035), ("down", 0.05, "bright", 0.02), ("across", 0.62, "dark", 0.02))
MASK_FOLDS = {
    "folded": (("across", -0.3, "dark", 0.03), ("across", 0.3, "dark", 0.03)),
    "surgical": (("across", -0.9, "bright", 0.03),
                 ("across", -0.35, "dark", 0.04), ("across", -0.28, "bright", 0.025),
                 ("across", 0.05, "dark", 0.04), ("across", 0.12, "bright", 0.025),
                 ("across", 0.45, "dark", 0.04), ("across", 0.52, "bright", 0.025)),
    "cloth": (("across", -0.9, "dark", 0.015), ("across", 0.9, "dark", 0.015), ("down", 0.0, "dark", 0.025)),
    "n95": (("across", 0.1, "dark", 0.03), ("across", -0.55, "bright", 0.04)),
    "ffp2": _SEAM,
    "valve": _SEAM,
}
# Closed shapes (or, for `lid` and `wings`, paths) in head units; `eye`, `lid` and `brow` round the eye's middle,
# the parts of a cup round the cup's. Those with sides are given for the right one.
SHAPES = {name: np.array(corners) for name, corners in {
    "neck": ((-0.36, 0.5), (0.36, 0.5), (0.37, 1.1), (0.5, 1.5), (-0.5, 1.5), (-0.37, 1.1)),
    "long": ((-0.85, -0.3), (-0.5, -1.02), (0.5, -1.02), (0.85, -0.3), (0.98, 0.7), (0.9, 1.55), (0, 1.3),
             (-0.9, 1.55), (-0.98, 0.7)),
    "bob": ((-0.86, -0.3), (-0.5, -1.0), (0.5, -1.0), (0.86, -0.3), (0.98, 0.5), (0.8, 0.88), (-0.8, 0.88),
            (-0.98, 0.5)),
    "peak": ((-0.72, -0.5), (0, -0.62), (0.72, -0.5), (0.6, -0.32), (0, -0.26), (-0.6, -0.32)),
    "band": ((-0.84, -0.5), (0, -0.62), (0.84, -0.5), (0.84, -0.26), (0, -0.38), (-0.84, -0.26)),
    "headscarf": ((0, -1.14), (0.62, -0.92), (0.94, -0.2), (0.9, 0.6), (0.72, 1.2), (0, 1.5), (-0.72, 1.2),
                  (-0.9, 0.6), (-0.94, -0.2), (-0.62, -0.92)),
    "eye": ((-0.15, 0.01), (-0.05, -0.075), (0.07, -0.07), (0.15, 0.0), (0.06, 0.055), (-0.06, 0.055)),
    "lid": ((-0.16, 0.0), (-0.06, -0.08), (0.07, -0.08), (0.16, -0.01)),
    "brow": ((-0.17, 0.0), (-0.05, -0.06), (0.1, -0.06), (0.19, 0.0), (0.1, -0.015), (-0.05, -0.005)),
    "ridge": ((0.02, -0.1), (0.13, 0.3), (0.02, 0.36)),
    "wings": ((-0.14, 0.27), (-0.13, 0.34), (-0.04, 0.37), (0.04, 0.37), (0.13, 0.34), (0.14, 0.27)),
    "teeth": ((-0.12, 0.555), (0.12, 0.555), (0.1, 0.59), (-0.1, 0.59)),
    "moustache": ((-0.27, 0.54), (-0.12, 0.42), (0, 0.44), (0.12, 0.42), (0.27, 0.54), (0, 0.49)),
    "goatee": ((-0.2, 0.72), (0, 0.69), (0.2, 0.72), (0.14, 1.0), (-0.14, 1.0)),
    "above beard": ((-0.5, 0.42), (-0.2, 0.44), (0, 0.42), (0.2, 0.44), (0.5, 0.42)),
    "cup": ((-0.31, -0.3), (0.31, -0.3), (0.24, 0.4), (-0.24, 0.4)),
    "cup shadow": ((0.1, -0.3), (0.31, -0.3), (0.24, 0.4), (0.08, 0.4)),
    "scarf tail": ((0.28, 1.35), (0.62, 1.35), (0.72, 2.4), (0.34, 2.4)),
    # Hands: elbow, wrist, palm, then root and tip of four fingers.
    "hand at mouth": ((1.5, 2.4), (0.95, 1.15), (0.52, 0.72), (0.52, 0.52), (-0.3, 0.44), (0.52, 0.64), (-0.38, 0.58),
                      (0.52, 0.77), (-0.34, 0.72), (0.52, 0.88), (-0.24, 0.86)),
    "hand at cheek": ((1.15, 2.6), (0.95, 1.3), (0.82, 0.86), (1.0, 0.78), (1.0, 0.3), (0.88, 0.78), (0.88, 0.12),
                      (0.75, 0.78), (0.76, 0.14), (0.64, 0.78), (0.64, 0.3)),
}.items()}
# fmt: on


class Style:
    """What a random face looks like, drawn without knowledge of its label: sides of 96..200 px in seven aspect ratios.

    `skin_tone` runs from 0 (the lightest) to 1; `light_angle` is in radians, 0 from the right, pi/2 from below; `yaw`
    (positive to the right of the picture), `pitch` and `roll` in radians; `scale` is half the head's height over the
    picture's short side; `head_width` half the head's width over half its height.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        def pick(options: Sequence[str], shares: Sequence[float] | Points | None = None) -> str:
            return str(rng.choice(options, p=shares))

        def between(low: float, high: float) -> float:
            return round(float(rng.uniform(low, high)), 4)

        def around_zero(deviation: float, limit: float) -> float:
            return round(float(np.clip(rng.normal(0, deviation), -limit, limit)), 4)

        long = int(rng.integers(120, 201))
        short = max(96, round(long * float(rng.choice([1, 1, 5 / 6, 4 / 5, 3 / 4, 2 / 3]))))
        self.width, self.height = (long, short) if rng.random() < 0.4 else (short, long)
        mask_shape = pick(list(MASK_REACH), [0.34, 0.16, 0.14, 0.26, 0.10])
        patterned = mask_shape == "cloth" and rng.random() < 0.6
        colours = [*CLOTH, "skin-like"]
        # Surgical blue, white and black are what people wear most; the rest share what is left.
        shares = np.array([{"light blue": 4.0, "white": 3.0, "black": 3.0}.get(name, 1.0) for name in colours])
        shares /= shares.sum()
        self.skin_tone = round(float(rng.random()), 4)
        self.light = pick(list(CASTS))
        self.light_angle = between(-math.pi, math.pi)
        self.light_strength = between(0.1, 0.55)
        self.yaw = around_zero(0.28, 0.6)
        self.pitch = between(-0.12, 0.12)
        self.roll = around_zero(0.10, 0.3)
        self.scale = between(0.36, 0.46)
        self.shift_x = between(-0.06, 0.06)
        self.shift_y = between(-0.05, 0.03)
        self.head_width = between(0.70, 0.80)
        self.jaw = between(0.02, 0.2)
        self.background = pick(BACKGROUNDS)
        self.hair = pick(HAIR_STYLES, [0.08, 0.2, 0.16, 0.08, 0.18, 0.14, 0.08, 0.08])
        self.hair_colour = pick(list(HAIR), [0.22, 0.22, 0.18, 0.08, 0.12, 0.09, 0.05, 0.04])
        self.hat = pick(["none", "cap", "beanie", "headscarf"], [0.7, 0.11, 0.11, 0.08])
        self.hat_colour = pick(list(CLOTH))
        self.beard = pick(["none", "stubble", "full", "moustache", "goatee"], [0.66, 0.1, 0.1, 0.07, 0.07])
        self.glasses = pick(["none", "round", "square", "dark"], [0.66, 0.14, 0.14, 0.06])
        self.expression = pick(["neutral", "smile", "open"], [0.5, 0.3, 0.2])
        self.clothes_colour = pick(colours, shares)
        self.clothes_pattern = pick(PATTERNS, [0.6, 0.15, 0.1, 0.1, 0.05])
        self.mask_shape = mask_shape
        self.mask_colour = pick(colours, shares)
        self.mask_pattern = pick(PATTERNS[1:]) if patterned else "plain"


# Colour -------------------------------------------------------------------------------------------


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """`a` with `share` (0..1) of `b` in it."""
    return (a[0] + (b[0] - a[0]) * share, a[1] + (b[1] - a[1]) * share, a[2] + (b[2] - a[2]) * share)


def shade(colour: Colour, factor: float) -> Colour:
    """`colour` times `factor`, kept within 0..255."""
    return (min(255, colour[0] * factor), min(255, colour[1] * factor), min(255, colour[2] * factor))


def skin_colour(tone: float) -> Colour:
    """The colour between the two anchors of `SKIN` that lie round `tone` (0..1)."""
    position = tone * (len(SKIN) - 1)
    below = min(int(position), len(SKIN) - 2)
    return mix(SKIN[below], SKIN[below + 1], position - below)


def cloth_colour(rng: np.random.Generator, base: Colour | None = None) -> Colour:
    """A shade of `base`, or of a random colour of `CLOTH`."""
    red, green, blue = base or CLOTH[str(rng.choice(list(CLOTH)))]
    red, green, blue = np.clip(np.array((red, green, blue)) + rng.uniform(-12, 12, 3), 8, 250).tolist()
    return red, green, blue


def muted(rng: np.random.Generator) -> Colour:
    """A random colour, not a garish one."""
    red, green, blue = rng.uniform(30, 230, 3)
    grey = (red + green + blue) / 3
    return mix((red, green, blue), (grey, grey, grey), 0.45)


# Geometry -----------------------------------------------------------------------------------------


def oval(x: float, y: float, rx: float, ry: float, count: int = 24) -> Points:
    """An ellipse as (count, 2) points."""
    angle = np.linspace(0, 2 * math.pi, count, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def moved(local: Points, x: float, y: float) -> Points:
    """Points shifted by x and y."""
    return local + np.array([x, y])


def smooth(corners: ArrayLike, steps: int = 5) -> Points:
    """A closed Catmull-Rom curve through `corners` (n, 2), as (n * steps, 2) points."""
    through = np.asarray(corners)
    t = (np.arange(steps) / steps)[None, :, None]
    a, b, c, d = (np.roll(through, -shift, 0)[:, None, :] for shift in (-1, 0, 1, 2))
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return curve.reshape(-1, 2)


class Pose:
    """Places points of the head of a `Style` in its picture. `size` is half the head's height in pixels."""

    def __init__(self, style: Style) -> None:
        self.x, self.y = style.width * (0.5 + style.shift_x), style.height * (0.46 + style.shift_y)
        self.size = style.scale * min(style.width, style.height)
        self.half_width, self.jaw, self.roll = style.head_width, style.jaw, style.roll
        self.sin, self.cos, self.nod = math.sin(style.yaw), math.cos(style.yaw), math.sin(style.pitch)
        self.near = -1 if style.yaw > 0 else 1  # the side of the head that faces the viewer

    def width_at(self, y: Points) -> Points:
        """Half the head's width at height `y`, in head units."""
        up = np.sqrt(np.maximum(0, 1 - np.minimum(y, 0) ** 2))
        low = np.clip(y, 0, 1)
        return self.half_width * up * np.sqrt(np.maximum(0, 1 - low * low * np.sqrt(low))) * (1 - self.jaw * low)

    def flat(self, local: Points, sway: float = 1.0) -> Points:
        """Pixels of points that do not turn with the head: outlines, hair, hats; `sway` is their share of its roll."""
        cos, sin = math.cos(sway * self.roll), math.sin(sway * self.roll)
        x, y = local[:, 0], local[:, 1]
        return np.stack([self.x + self.size * (x * cos - y * sin), self.y + self.size * (x * sin + y * cos)], axis=1)

    def on_head(self, local: Points, lift: float | Points = 0.0) -> Points:
        """Pixels of points that lie on the head, `lift` head units above it."""
        x, y = local[:, 0], local[:, 1]
        a = self.half_width
        depth = a * np.sqrt(np.maximum(0, 1 - (x / a) ** 2 - (y / 1.25) ** 2)) + lift
        return self.flat(np.stack([x * self.cos + depth * self.sin, y + (depth - 0.5 * a) * self.nod], axis=1))

    def outline(self, grow: float = 1.0) -> Points:
        """The head's outline in head units, (64, 2), clockwise from the right ear; the chin follows yaw."""
        angle = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        y = np.sin(angle)
        x = np.where(np.cos(angle) < 0, -1, 1) * self.width_at(y)
        low = np.maximum(0, y) ** 2
        return np.stack([x + 0.45 * self.half_width * self.sin * low, y + 0.3 * self.nod * low], axis=1) * grow


# Paint --------------------------------------------------------------------------------------------


def fixed(pixels: Points) -> NDArray[np.int32]:
    """Pixel coordinates in OpenCV's fixed point with four fractional bits."""
    return np.rint(pixels * 16).astype(np.int32)


def interpolate(below: Picture, above: Picture, stencil: Picture) -> Picture:
    """`above` over `below` by `stencil` (255: only `above`), rounded in integers."""
    weight = stencil[..., None].astype(np.uint16)
    return ((below * (255 - weight) + above * weight + 127) // 255).astype(np.uint8)


def swatch(colour: Colour) -> Picture:
    """A colour as a (1, 1, 3) picture."""
    return np.rint(np.array([[colour]])).astype(np.uint8)


class Canvas:
    """An RGB picture that remembers what hides the background and where mask material shows.

    `image` is (H, W, 3) uint8; `cover` (H, W) uint8 is 255 where something stands before the background;
    `region` (H, W) uint8 is 255 where mask material shows.
    """

    def __init__(self, image: Picture) -> None:
        self.image = image
        self.cover: Picture = np.zeros(image.shape[:2], np.uint8)
        self.region: Picture = np.zeros(image.shape[:2], np.uint8)

    def blend(self, layer: Picture, stencil: Picture) -> None:
        """Blend `layer` (a picture or a swatch) in by `stencil` (H, W) uint8, in integers."""
        left, top, width, height = cv2.boundingRect(stencil)
        box = (slice(top, top + height), slice(left, left + width))
        above = layer[box] if layer.shape[:2] == stencil.shape else layer
        self.image[box] = interpolate(self.image[box], above, stencil[box])


@dataclass(frozen=True)
class Pen:
    """Draws on a canvas in coordinates of its own: `place` turns them into pixels, widths are multiples of `unit`."""

    canvas: Canvas
    place: Place
    unit: float

    def pixels(self, shape: ArrayLike) -> NDArray[np.int32]:
        """Where points (n, 2) lie, as OpenCV takes them."""
        return fixed(self.place(np.asarray(shape, np.float64)))

    def layers(self, colour: Colour) -> tuple[tuple[Picture, Colour | int, int], ...]:
        """What an opaque shape changes, to what, with which edge."""
        canvas = self.canvas
        return (canvas.image, colour, cv2.LINE_AA), (canvas.cover, 255, cv2.LINE_AA), (canvas.region, 0, cv2.LINE_8)

    def fill(self, shape: ArrayLike, colour: Colour) -> None:
        """Fill a polygon opaquely."""
        corners = [self.pixels(shape)]
        for layer, ink, edge in self.layers(colour):
            cv2.fillPoly(layer, corners, ink, edge, 4)

    def line(self, path: ArrayLike, colour: Colour, width: float, closed: bool = False) -> None:
        """Draw a line opaquely."""
        corners, thickness = [self.pixels(path)], max(1, round(width * self.unit))
        for layer, ink, edge in self.layers(colour):
            cv2.polylines(layer, corners, closed, ink, thickness, edge, 4)

    def stencil(self, shape: ArrayLike, edge: int = cv2.LINE_AA) -> Picture:
        """A polygon as (H, W) uint8: 255 inside, 0 outside."""
        stencil = np.zeros(self.canvas.cover.shape, np.uint8)
        cv2.fillPoly(stencil, [self.pixels(shape)], 255, edge, 4)
        return stencil

    def tint(self, shape: ArrayLike, colour: Colour, alpha: float, soft: float = 0.0) -> None:
        """Blend a colour into a polygon with an edge `soft` wide; hides nothing."""
        outline, blur = self.place(np.asarray(shape, np.float64)), soft * self.unit
        margin = 2 + 3 * blur
        height, width = self.canvas.cover.shape
        left, top = np.maximum(0, np.floor(outline.min(axis=0) - margin)).astype(int)
        right, bottom = np.minimum((width, height), np.ceil(outline.max(axis=0) + margin)).astype(int)
        if left >= right or top >= bottom:
            return
        stencil = np.zeros((bottom - top, right - left), np.uint8)
        cv2.fillPoly(stencil, [fixed(outline - (left, top))], round(255 * alpha), cv2.LINE_AA, 4)
        if blur > 0.3:
            stencil = np.asarray(cv2.GaussianBlur(stencil, (0, 0), blur), np.uint8)
        below = self.canvas.image[top:bottom, left:right]
        below[...] = interpolate(below, swatch(colour), stencil)

    @contextmanager
    def sheet(self, shape: ArrayLike, colour: Colour) -> Iterator["Pen"]:
        """Fill a polygon. The pen it yields draws inside the polygon only."""
        layer = replace(self, canvas=Canvas(self.canvas.image.copy()))
        cv2.fillPoly(layer.canvas.image, [self.pixels(shape)], colour, cv2.LINE_AA, 4)
        yield layer
        stencil = self.stencil(shape)
        self.canvas.blend(layer.canvas.image, stencil)
        np.maximum(self.canvas.cover, stencil, out=self.canvas.cover)
        self.canvas.region[stencil > 127] = 0

    def pattern(self, pattern: str, colour: Colour, width: float, seed: int, span: Sequence[float] = (1, 1, 0)) -> None:
        """Draw a cloth pattern over the square -1..1; `span`: how far it is stretched in x and y and moved down."""
        rng = np.random.default_rng(seed)
        pen = replace(self, place=lambda uv: self.place(moved(uv * span[:2], 0, span[2])))
        other = shade(colour, 0.62) if sum(colour) / 3 > 120 else mix(colour, (255, 255, 255), 0.4)
        if pattern in ("stripes", "checks"):
            steep = pattern == "stripes" and rng.random() < 0.5
            for offset in np.linspace(-0.9, 0.9, 6):
                level = np.stack([np.linspace(-1, 1, 9), np.full(9, offset)], axis=1)
                if not steep:
                    pen.line(level, other, width)
                if pattern == "checks" or steep:
                    pen.line(level[:, ::-1], other, width)
        elif pattern == "dots":
            for u in np.linspace(-0.85, 0.85, 6):
                for v in np.linspace(-0.8, 0.8, 5):
                    pen.fill(oval(u + 0.08 * (v > 0), v, 0.075, 0.09, 8), other)
        elif pattern == "camouflage":
            for step in range(9):
                u, v = rng.uniform(-0.9, 0.9, 2)
                wobble = oval(u, v, 0.28, 0.2, 8) + rng.uniform(-0.08, 0.08, (8, 2))
                pen.fill(smooth(wobble, 3), other if step % 2 else shade(colour, 0.8))


# Background ---------------------------------------------------------------------------------------


def draw_background(style: Style, rng: np.random.Generator) -> Picture:
    """A plain, gradient, shapes, texture or crowd background as (H, W, 3) uint8."""
    height, width = style.height, style.width
    first, second = muted(rng), muted(rng)
    image = np.empty((height, width, 3), np.uint8)
    image[:] = np.rint(first)
    canvas = Canvas(image)
    if style.background == "gradient":
        angle = rng.uniform(0, 2 * math.pi)
        across = np.linspace(-0.5, 0.5, width)[None] * math.cos(angle)
        down = np.linspace(-0.5, 0.5, height)[:, None] * math.sin(angle)
        canvas.blend(swatch(second), np.rint(255 * np.clip(0.5 + across + down, 0, 1)).astype(np.uint8))
    elif style.background == "shapes":
        for _ in range(int(rng.integers(4, 9))):
            centre, radius = rng.uniform(0, 1, 2) * (width, height), rng.uniform(0.06, 0.25) * width
            corners = oval(0, 0, radius, radius * rng.uniform(0.5, 1.5), int(rng.choice([3, 4, 4, 24]))) + centre
            Pen(canvas, np.asarray, 1).fill(corners, mix(muted(rng), first, 0.3))
    elif style.background == "texture":
        cells = rng.integers(0, 256, (int(rng.integers(5, 20)), int(rng.integers(5, 20))), dtype=np.uint8)
        field = cv2.resize(cells, (width, height), interpolation=cv2.INTER_LINEAR)
        canvas.blend(swatch(second), np.asarray(field, np.uint8))
    elif style.background == "crowd":
        for _ in range(int(rng.integers(5, 10))):
            draw_bystander(canvas, rng)
        return np.asarray(cv2.GaussianBlur(image, (0, 0), 0.012 * width), np.uint8)
    return image


def draw_bystander(canvas: Canvas, rng: np.random.Generator) -> None:
    """A small figure; half of them wear a mask, whatever the face before them does."""
    height, width = canvas.cover.shape
    centre, r = np.array([rng.uniform(0, width), rng.uniform(0.05, 0.6) * height]), rng.uniform(0.06, 0.11) * width
    pen = Pen(canvas, lambda local: local * r + centre, r)
    skin, hair = skin_colour(rng.random()), HAIR[str(rng.choice(list(HAIR)))]
    pen.fill(oval(0, 3.6, 1.9, 2.5), cloth_colour(rng))
    pen.fill(oval(0, -0.2, 1.0, 1.15), hair)
    pen.fill(oval(0, 0.15, 0.8, 1.05), skin)
    if rng.random() < 0.5:
        pen.fill(oval(0, 0.65, 0.72, 0.5), cloth_colour(rng))


def draw_behind(canvas: Canvas, colour: Colour, pattern: str, area: float, rng: np.random.Generator) -> None:
    """Put objects of one colour behind the person until about `area` pixels of them show."""
    free = canvas.cover == 0
    smallest = 0.05 * area
    for _ in range(8):
        if area <= smallest or np.count_nonzero(free) < 20:
            return
        hit = draw_object_behind(canvas, colour, pattern, area, free, rng)
        area -= int(np.count_nonzero(hit))
        free &= ~hit


def draw_object_behind(
    canvas: Canvas, colour: Colour, pattern: str, area: float, free: NDArray[np.bool_], rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Draw one object of at most about `area` visible pixels. Returns (H, W): where it shows on `free`."""
    room = np.flatnonzero(free)
    y, x = divmod(int(room[int(rng.integers(room.size))]), free.shape[1])
    radius = math.sqrt(area * rng.uniform(0.3, 0.8))
    shape = oval(0, 0, 1.2, 1.2, int(rng.choice([4, 4, 6, 24])))
    turn, stretch = rng.uniform(0, math.pi), rng.uniform(0.6, 1.5)
    cos, sin = math.cos(turn), math.sin(turn)

    def place(uv: Points, shrink: float = 1.0) -> Points:
        across, down = uv[:, 0] * radius * stretch * shrink, uv[:, 1] * radius / stretch * shrink
        return np.stack([x + across * cos - down * sin, y + across * sin + down * cos], axis=1)

    shown = int(np.count_nonzero(free & (Pen(canvas, place, radius).stencil(shape, edge=cv2.LINE_8) > 0)))
    shrink = min(1.0, math.sqrt(area / max(1, shown)))
    pen = Pen(Canvas(canvas.image.copy()), partial(place, shrink=shrink), radius)
    with pen.sheet(shape, colour) as inside:
        inside.pattern(pattern, colour, 0.06, int(rng.integers(1 << 30)))
    replace(pen, unit=1).line(shape, shade(colour, 0.85), 1, closed=True)
    stencil = pen.stencil(shape)
    canvas.blend(pen.canvas.image, np.minimum(stencil, 255 - canvas.cover))
    return free & (stencil > 127)


# Mask ---------------------------------------------------------------------------------------------

_SPAN, _ONE = np.linspace(-1, 1, 9), np.ones(9)
# The edge of a mask's own square -1..1, (32, 2).
MASK_RING = np.concatenate(
    [np.stack(side, axis=1)[:-1] for side in ((_SPAN, -_ONE), (_ONE, _SPAN), (-_SPAN, _ONE), (-_ONE, -_SPAN))]
)


def mask_place(state: str, style: Style, pose: Pose) -> Place:
    """How a mask in the given state maps its own square -1..1 to pixels.

    Under the chin it is folded together; from an ear it hangs sideways, beside the jaw that faces the viewer.
    """

    def hang(uv: Points) -> Points:
        side = pose.near
        x = side * (0.9 * pose.half_width + 0.16) + uv[:, 0] * 0.22 - side * 0.06 * uv[:, 1]
        return pose.flat(np.stack([x, 0.86 + 0.38 * uv[:, 1] + 0.05 * side * uv[:, 0]], axis=1))

    if state == "mask_hanging_from_ear":
        return hang
    top, top_side, bottom, bottom_side = MASK_EDGES[state]
    if style.mask_shape in ("ffp2", "n95", "valve") and state == "mask_worn":
        top, bottom_side = top - 0.04, bottom_side + 0.04
    puff = 0.06 if state == "mask_worn" else 0.0

    def wear(uv: Points) -> Points:
        u, v = uv[:, 0], (uv[:, 1] + 1) / 2
        bend = u * u
        upper = top + (top_side - top) * np.abs(u) * (1.4 - 0.4 * np.abs(u))
        lower = bottom + (bottom_side - bottom) * bend
        at_side = top_side + v * (bottom_side - top_side)
        x = u * MASK_REACH[style.mask_shape] * pose.width_at(np.minimum(at_side, 0.9))
        return pose.on_head(np.stack([x, upper + v * (lower - upper)], axis=1), 0.05 + puff * (1 - bend))

    return wear


def strap_paths(state: str, style: Style, pose: Pose) -> list[Points]:
    """Pixels of ear loops, or for an N95 of straps round the head; for a hanging mask of the one loop that holds it."""
    corners = mask_place(state, style, pose)(np.array([(-1.0, -1), (1, -1), (1, 1), (-1, 1)]))
    if state == "mask_hanging_from_ear":
        ear = pose.flat(np.array([(pose.near * pose.half_width * pose.cos * 1.04, -0.1)]))
        return [np.concatenate([corners[:1], ear, corners[1:2]])]
    behind_head = style.mask_shape == "n95" and style.hat != "headscarf"
    out, high, low = (1.02, -0.3, 0.35) if behind_head else (1.0, -0.02, 0.25)
    paths = []
    for side, upper, lower in ((-1, 0, 3), (1, 1, 2)):
        x = side * pose.half_width * pose.cos
        ends = pose.flat(np.array([(x * out, high), (x * out, low)]))
        paths += [np.stack([corners[upper], ends[0]]), np.stack([corners[lower], ends[1]])]
    return paths


def mask_box(style: Style, states: Sequence[str]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom (pixels, half-open) of all that a mask with its straps may cover in these states."""
    pose = Pose(style)
    parts = [mask_place(state, style, pose)(MASK_RING) for state in states]
    parts += [path for state in states for path in strap_paths(state, style, pose)]
    reached, margin = np.concatenate(parts), 2 + 0.025 * pose.size
    left, top = np.maximum(0, np.floor(reached.min(axis=0) - margin)).astype(int).tolist()
    right, bottom = np.minimum((style.width, style.height), np.ceil(reached.max(axis=0) + margin)).astype(int).tolist()
    return left, top, right, bottom


class Portrait:
    """A person in front of a background, drawn part by part from the back to the front.

    `flat` draws in head units that do not turn with the head, `head` on the head's surface, `paper` in pixels.
    """

    def __init__(self, style: Style, rng: np.random.Generator) -> None:
        self.style, self.pose = style, Pose(style)
        self.skin = shade(skin_colour(style.skin_tone), rng.uniform(0.94, 1.05))
        self.hair = HAIR[style.hair_colour]
        cloth = CLOTH | {"skin-like": shade(self.skin, 0.97)}
        named = (style.clothes_colour, style.hat_colour, style.mask_colour)
        self.clothes, self.hat, self.material = (cloth_colour(rng, cloth[name]) for name in named)
        self.thing = cloth_colour(rng)
        self.thing_pattern = str(rng.choice(PATTERNS, p=[0.6, 0.2, 0.08, 0.08, 0.04]))
        self.side = int(rng.choice([-1, 1]))
        self.seeds = [int(seed) for seed in rng.integers(1 << 30, size=3)]
        self.canvas = Canvas(draw_background(style, rng))
        self.paper = Pen(self.canvas, np.asarray, self.pose.size)
        self.flat = replace(self.paper, place=self.pose.flat)
        self.head = self.lifted(0.0)

    def lifted(self, lift: float) -> Pen:
        """A pen `lift` head units above the head's surface."""
        return replace(self.paper, place=partial(self.pose.on_head, lift=lift))

    def body(self) -> None:
        """Neck, shoulders and clothes."""
        seed, clothes = self.seeds[0], self.clothes
        pen = replace(self.paper, place=partial(self.pose.flat, sway=0.35))
        pen.fill(smooth(SHAPES["neck"]), shade(self.skin, 0.86))
        dip = 1.28 + 0.25 * (seed % 3 == 0)
        collar = [(-0.44, 1.14), (-0.22, dip - 0.05), (0, dip), (0.22, dip - 0.05), (0.44, 1.14)]
        sides = [(1.2, 1.42), (1.55, 1.9), (1.62, 3.2), (-1.62, 3.2), (-1.55, 1.9), (-1.2, 1.42)]
        with pen.sheet(smooth(collar + sides), clothes) as inside:
            inside.pattern(self.style.clothes_pattern, clothes, 0.05, seed, (1.5, 0.9, 2.1))
        pen.line(collar, shade(clothes, 0.75), 0.05)
        pen.tint(oval(0.1 * self.style.yaw, 1.05, 0.42, 0.16), (20, 12, 10), 0.3, 0.07)

    def ear(self, side: int) -> None:
        x = side * self.pose.half_width * (self.pose.cos * 1.04)
        self.flat.fill(oval(x, 0.08, 0.11, 0.2), shade(self.skin, 0.93))
        self.flat.line(oval(x, 0.07, 0.055, 0.12), shade(self.skin, 0.72), 0.02, closed=True)

    def hair_back(self) -> None:
        """The hair behind the head, as far as a hat leaves it visible."""
        hair, hat, ink = self.style.hair, self.style.hat, shade(self.hair, 0.8)
        if hair in ("long", "bob") and hat != "headscarf":
            self.flat.fill(smooth(SHAPES[hair]), ink)
        elif hair == "afro" and hat == "none":
            curls = 1 + 0.02 * (np.arange(18) % 2)[:, None]
            self.flat.fill(smooth(oval(0, -0.4, 1.12, 1.0, 18) * curls), ink)
        elif hair == "bun" and hat == "none":
            self.flat.fill(oval(-0.4 * self.pose.sin, -1.2, 0.36, 0.32), ink)

    def hair_front(self) -> None:
        """The hair over the forehead and down the sides."""
        style, pose = self.style.hair, self.pose
        if style == "bald" or self.style.hat == "headscarf":
            return
        heights = {"fringe": (-0.3, 0.05), "bob": (-0.34, 0.1), "receding": (-0.8, -0.3), "afro": (-0.55, -0.1)}
        line, temple = heights.get(style, (-0.58, -0.12))
        crown = pose.outline(1.07)[33:64]
        top = pose.flat(crown[np.abs(crown[:, 0]) <= 0.9][crown[:, 1] < temple - 0.02])
        x = np.linspace(0.93, -0.93, 15)
        ripple = 0.05 * (np.arange(15) % 2) if style == "fringe" else np.zeros(15)
        part = 0.1 * (x - 0.35) if style in ("short", "long") else 0 * x
        edge = temple + (line - temple) * (1 - np.abs(x) ** 3) + ripple * (np.abs(x) < 0.8) + part * (np.abs(x) < 0.8)
        hairline = pose.on_head(np.stack([x * pose.width_at(edge), edge], axis=1))
        self.paper.fill(np.concatenate([top, hairline]), self.hair)
        for root in (-0.45, -0.15, 0.2, 0.5):
            strand = np.array([(root * 0.5, -1.03), (root * 0.8, -0.88), (root * 1.05, line - 0.08)])
            self.flat.line(moved(strand, 0.3 * pose.sin, 0), shade(self.hair, 1.25), 0.02)
        if style in ("long", "bob"):
            low = 1.25 if style == "long" else 0.78
            lock = np.array([(0.72, -0.5), (0.9, -0.1), (0.98, 0.5), (0.88, low), (0.78, 0.5), (0.74, 0.0)])
            for side in (-1, 1):
                self.flat.fill(smooth(lock * (side, 1)), shade(self.hair, 0.92))

    def headgear(self) -> None:
        """A cap, a beanie or a headscarf over the hair."""
        pose, flat, cloth, dark = self.pose, self.flat, self.hat, shade(self.hat, 0.78)
        crown = pose.outline(1.12)[33:64]
        if self.style.hat == "cap":
            flat.fill(crown[crown[:, 1] < -0.42], cloth)
            flat.fill(moved(smooth(SHAPES["peak"]), 0.35 * pose.sin, 0), dark)
        elif self.style.hat == "beanie":
            flat.fill(crown[crown[:, 1] < -0.38], cloth)
            flat.fill(SHAPES["band"], dark)
            for x in np.linspace(-0.7, 0.7, 9):
                flat.line([(x, -0.5), (x, -0.36)], cloth, 0.02)
        elif self.style.hat == "headscarf":
            inner = pose.outline(0.93) * (0.94, 1) + (0.1 * pose.sin, 0.05)
            stencil = flat.stencil(smooth(SHAPES["headscarf"]))
            np.maximum(self.canvas.cover, stencil, out=self.canvas.cover)
            cv2.fillPoly(stencil, [flat.pixels(inner)], 0, cv2.LINE_AA, 4)
            self.canvas.blend(swatch(cloth), stencil)
            for x in (-0.5, -0.15, 0.3):
                flat.line([(x, 1.12), (x * 0.6, 1.38)], dark, 0.03)
            flat.line(inner, dark, 0.03, closed=True)

    def features(self) -> None:
        """The head with cheeks, eyes, brows and nose."""
        skin, dark, head, raised = self.skin, shade(self.skin, 0.62), self.head, self.lifted(0.06)
        self.flat.fill(self.pose.outline(), skin)
        for side in (-1, 1):
            x, gaze = side * 0.31, side * 0.31 + 0.04 * self.style.yaw
            head.tint(oval(side * 0.4, 0.36, 0.16, 0.13), mix(skin, (220, 90, 80), 0.5), 0.35, 0.06)
            head.tint(oval(x, -0.04, 0.2, 0.13), dark, 0.3, 0.05)
            head.fill(moved(smooth(SHAPES["eye"] * (side, 1)), x, -0.03), (242, 240, 236))
            head.fill(oval(gaze, -0.03, 0.067, 0.07, 14), (70, 48, 34))
            head.fill(oval(gaze, -0.03, 0.034, 0.036, 10), (16, 13, 13))
            head.fill(oval(gaze + 0.025, -0.055, 0.016, 0.016, 8), (250, 250, 250))
            lashes = shade(self.hair, 0.6) if sum(self.hair) < 400 else dark
            head.line(moved(SHAPES["lid"] * (side, 1), x, -0.03), lashes, 0.03)
            head.fill(moved(smooth(SHAPES["brow"] * (side, 1.15)), x, -0.2), mix(self.hair, skin, 0.15))
        head.tint(SHAPES["ridge"], dark, 0.45, 0.025)
        self.lifted(0.08).tint(oval(-0.01, 0.14, 0.035, 0.17), (255, 244, 232), 0.35, 0.03)
        self.lifted(0.12).tint(oval(0, 0.29, 0.1, 0.07), mix(skin, (255, 235, 220), 0.3), 0.6, 0.02)
        raised.line(SHAPES["wings"], shade(skin, 0.68), 0.025)
        for side in (-1, 1):
            raised.fill(oval(side * 0.06, 0.345, 0.03, 0.016, 8), shade(skin, 0.4))

    def mouth(self) -> None:
        skin, head, lip = self.skin, self.head, mix(self.skin, (168, 62, 66), 0.5)
        gap = 0.07 if self.style.expression == "open" else 0.0
        right = (0.27, 0.52) if self.style.expression == "smile" else (0.22, 0.57)
        left = (-right[0], right[1])
        if gap:
            head.fill(oval(0, 0.58, 0.17, 0.075, 18), (60, 22, 24))
            head.fill(SHAPES["teeth"], (240, 236, 228))
        upper = [left, (-0.09, 0.51), (0, 0.525), (0.09, 0.51), right, (0, 0.575)]
        head.fill(smooth(upper, 4), shade(lip, 0.86))
        head.fill(smooth([left, (0, 0.575 + gap), right, (0.1, 0.645 + gap), (-0.1, 0.645 + gap)], 4), lip)
        if not gap:
            head.line([left, (-0.1, 0.572), (0, 0.58), (0.1, 0.572), right], shade(lip, 0.55), 0.02)
        head.tint(oval(0, 0.72, 0.12, 0.03), shade(skin, 0.6), 0.35, 0.03)

    def beard(self) -> None:
        beard = self.style.beard
        if beard in ("stubble", "full"):
            low, alpha = (1.04, 0.35) if beard == "stubble" else (1.12, 0.92)
            jaw = np.array([0.1, 0.35, 0.6, 0.8, 0.93, 0.99])
            side = np.stack([0.97 * self.pose.width_at(jaw), jaw], axis=1)
            ring = np.concatenate([side, [(0, low)], side[::-1] * (-1, 1), SHAPES["above beard"]])
            self.head.tint(ring, self.hair, alpha, 0.02)
        if beard == "full":
            self.head.tint(oval(0, 0.58, 0.3, 0.13), self.skin, 0.55, 0.02)
        if beard in ("moustache", "goatee", "full"):
            self.head.tint(smooth(SHAPES["moustache"]), self.hair, 0.92, 0.02)
        if beard == "goatee":
            self.head.tint(smooth(SHAPES["goatee"]), self.hair, 0.92, 0.02)

    def glasses(self) -> None:
        if self.style.glasses == "none":
            return
        frame, glass = (34, 30, 30), self.lifted(0.1)
        for side in (-1, 1):
            middle = np.array([side * 0.33, -0.01])
            lens = oval(side * 0.33, -0.01, 0.24, 0.2, 20)
            if self.style.glasses != "round":
                lens = middle + np.clip((lens - middle) * 1.25, (-0.24, -0.17), (0.24, 0.17))
            if self.style.glasses == "dark":
                glass.fill(lens, (30, 28, 34))
            else:
                glass.tint(lens, (235, 244, 250), 0.14)
            glass.line(lens, frame, 0.035, closed=True)
            arm = [(side * 0.57, -0.04), (side * 0.96 * self.pose.half_width, -0.02)]
            self.lifted(0.06).line(arm, frame, 0.03)
        self.lifted(0.12).line([(-0.1, -0.04), (0, -0.07), (0.1, -0.04)], frame, 0.035)

    def mask(self, state: str) -> None:
        """A mask with loops or straps; its material is marked in the canvas's region."""
        ink = (70, 70, 74) if self.style.mask_colour == "black" else (226, 228, 228)
        for path in strap_paths(state, self.style, self.pose):
            self.paper.line(path, ink, 0.025)
        pen = replace(self.paper, place=mask_place(state, self.style, self.pose))
        with pen.sheet(MASK_RING, self.material) as inside:
            inside.pattern(self.style.mask_pattern, self.material, 0.045, self.seeds[1])
            self.folds(inside, "folded" if state == "mask_under_chin" else self.style.mask_shape)
        pen.line(MASK_RING, shade(self.material, 0.78), 0.025, closed=True)
        self.canvas.region[pen.stencil(MASK_RING) > 127] = 255

    def folds(self, pen: Pen, shape: str) -> None:
        """Pleats, seams, wire and valve of a mask."""
        colour, span = self.material, np.linspace(-1, 1, 9)
        inks = {"dark": shade(colour, 0.84), "bright": mix(shade(colour, 1.12), (255, 255, 255), 0.12)}
        for direction, offset, ink, width in MASK_FOLDS[shape]:
            level = np.stack([span, np.full(9, offset)], axis=1)
            pen.line(level if direction == "across" else level[:, ::-1], inks[ink], width)
        if shape in ("ffp2", "n95", "valve"):
            pen.line([(-0.25, -0.84), (0, -0.9), (0.25, -0.84)], (168, 170, 174), 0.035)
        if shape == "valve":
            pen.fill(oval(0.42, 0.12, 0.2, 0.26), mix(colour, (150, 152, 156), 0.6))
            pen.line(oval(0.42, 0.12, 0.13, 0.17), shade(colour, 0.55), 0.02, closed=True)

    def finger(self, root: tuple[float, float], tip: tuple[float, float]) -> None:
        self.flat.line([root, tip], shade(self.skin, 0.68), 0.19)
        self.flat.line([root, tip], self.skin, 0.15)
        nail = oval(tip[0] * 0.93 + root[0] * 0.07, tip[1], 0.04, 0.04, 10)
        self.flat.fill(nail, mix(self.skin, (255, 225, 220), 0.5))

    def hand(self, at_mouth: bool) -> None:
        """A hand laid over the mouth, or against the cheek; the forearm leaves the picture downwards."""
        flat, skin, sleeve = self.flat, self.skin, self.clothes
        shape = SHAPES["hand at mouth" if at_mouth else "hand at cheek"] * (self.side, 1)
        hand: list[tuple[float, float]] = [tuple(point) for point in shape.tolist()]
        elbow, wrist, palm, *fingers = hand
        flat.line([elbow, wrist], shade(sleeve, 0.7), 0.46)
        flat.line([elbow, wrist], sleeve, 0.42)
        flat.line([wrist, palm], shade(skin, 0.7), 0.32)
        flat.line([wrist, palm], skin, 0.28)
        flat.fill(oval(*palm, 0.26, 0.25), skin)
        for root, tip in zip(fingers[::2], fingers[1::2], strict=True):
            self.finger(root, tip)

    def cup(self, at_mouth: bool) -> None:
        """A cup held before the mouth or beside the face."""
        flat, side, colour, edge = self.flat, self.side, self.thing, shade(self.thing, 0.6)
        x, y = side * 1.12, 0.9
        if at_mouth:
            x, y = 0.04 * side + 0.5 * self.pose.half_width * self.pose.sin, 0.74
        flat.line([(x + side * 0.9, 2.5), (x + side * 0.4, y + 0.2)], shade(self.clothes, 0.75), 0.36)
        body = moved(SHAPES["cup"], x, y)
        flat.fill(body, colour)
        flat.tint(moved(SHAPES["cup shadow"], x, y), (0, 0, 0), 0.16)
        flat.line(body, edge, 0.02, closed=True)
        flat.fill(oval(x, y - 0.3, 0.33, 0.085), mix(colour, (255, 255, 255), 0.35))
        flat.line(oval(x, y - 0.3, 0.33, 0.085), edge, 0.02, closed=True)
        for low in (0.0, 0.13, 0.26):
            self.finger((x + side * 0.34, y + low + 0.04), (x - side * 0.1, y + low))

    def scarf(self) -> None:
        """A scarf round the neck and over the chin, its upper edge below the mouth."""
        flat, colour, seed = self.flat, self.thing, self.seeds[2]
        top = 0.80 + 0.1 * (seed % 2)
        upper = [(-0.78, top - 0.02), (-0.3, top + 0.02), (0.3 * self.pose.sin, top + 0.05), (0.3, top + 0.02)]
        lower = [(0.78, top - 0.02), (0.92, 1.25), (0.5, 1.58), (0, 1.66), (-0.5, 1.58), (-0.92, 1.25)]
        with flat.sheet(smooth(upper + lower), colour) as inside:
            inside.pattern(self.thing_pattern, colour, 0.06, seed, (0.85, 0.42, 1.24))
        for low in (0.24, 0.45, 0.62):
            fold = [(-0.82, top + 0.7 * low), (0, top + low + 0.08), (0.82, top + 0.6 * low)]
            flat.line(fold, shade(colour, 0.72), 0.035)
        flat.fill(SHAPES["scarf tail"], shade(colour, 0.9))
        flat.line(SHAPES["scarf tail"], shade(colour, 0.65), 0.02, closed=True)

    def light(self) -> NDArray[np.float32]:
        """Brightness (H, W, 1): a Lambertian ellipsoid where the head is, a slope across the rest."""
        style, pose, strength = self.style, self.pose, self.style.light_strength
        to_x, to_y, to_z = math.cos(style.light_angle), math.sin(style.light_angle), 0.8
        x = (np.arange(style.width, dtype=np.float32) - pose.x)[None]
        y = (np.arange(style.height, dtype=np.float32) - pose.y)[:, None]
        cos, sin = math.cos(pose.roll), math.sin(pose.roll)
        across = (x * cos + y * sin) / (pose.size * pose.half_width * 1.2)
        down = (y * cos - x * sin) / (pose.size * 1.25)
        square = across * across + down * down
        depth = np.sqrt(np.maximum(0, 1 - square))
        head = 1 + strength * (across * to_x + down * to_y + depth * to_z - 0.62)
        slope = 1 + 0.35 * strength * (x * (to_x / style.width) + y * (to_y / style.height))
        weight = np.clip((1 - square) * 3, 0, 1) * (self.canvas.cover / np.float32(255))
        return (slope + (head - slope) * weight)[..., None].astype(np.float32)

    def balance(self, state: str, before_mouth: str, light: NDArray[np.float32], rng: np.random.Generator) -> None:
        """Put behind the person what the mask hides and what is missing of it (see `draw`)."""
        style, pattern = self.style, self.style.mask_pattern
        worn = replace(self.paper, place=mask_place("mask_worn", style, self.pose)).stencil(MASK_RING, edge=cv2.LINE_8)
        full, shown = int(np.count_nonzero(worn)), int(np.count_nonzero(self.canvas.region))
        hidden = shown if state in ("mask_worn", "mask_below_nose") else 0.5 * shown
        if before_mouth == "cup":
            hidden += 0.36 * self.pose.size**2
        # An object behind the person stands outside the head's shading: give it the brightness it had there.
        bright = float(light[worn > 0].mean()) if full else 1.0
        bearded = {"stubble": 0.2, "full": 0.55, "moustache": 0.06, "goatee": 0.1}.get(style.beard, 0.0)
        bare = self.skin if rng.random() < 0.6 else skin_colour(rng.random())
        cloth = self.material if rng.random() < 0.6 else cloth_colour(rng)
        for colour, texture, area in (
            # Either class gets objects of these colours first: one alone must not tell what it stands for.
            (bare, "plain", full * max(0, rng.uniform(-0.4, 0.9))),
            (cloth, pattern, full * max(0, rng.uniform(-0.4, 0.9))),
            (self.skin, "plain", hidden * (1 - bearded)),
            (self.hair, "plain", hidden * bearded),
            (self.material, pattern, full - shown),
        ):
            draw_behind(self.canvas, shade(colour, bright), texture, area, rng)


@dataclass(frozen=True)
class Drawing:
    """A drawn face: picture (H, W, 3) uint8, mask region (H, W) bool, pixels of nose tip and mouth (x, y)."""

    image: Picture
    mask_region: NDArray[np.bool_]
    nose: tuple[float, float]
    mouth: tuple[float, float]


def draw(style: Style, state: str, before_mouth: str, beside: str, rng: np.random.Generator) -> Drawing:
    """Draw `style` in a mask state.

    `before_mouth` (none, hand, cup) hides the mouth, `beside` (none, hand, cup, scarf) does not.

    The colours of a picture must not tell whether a mask is worn. So what a mask hides is put back elsewhere:
    as much skin (and beard) as the mask covers shows as an object behind the person, and as much mask colour
    as the state lacks against a worn mask likewise. Both classes also get objects of either colour at random.
    """
    face = Portrait(style, rng)
    near = face.pose.near
    face.hair_back()
    face.body()
    face.ear(-near)
    face.features()
    face.beard()
    face.mouth()
    face.ear(near)
    face.hair_front()
    face.headgear()
    if state != "no_mask":
        face.mask(state)
    face.glasses()
    if state == "mask_hanging_from_ear":
        face.side = -near
    if beside == "scarf":
        face.scarf()
    if "hand" in (before_mouth, beside):
        face.hand(before_mouth == "hand")
    if "cup" in (before_mouth, beside):
        face.cup(before_mouth == "cup")
    light = face.light()
    face.balance(state, before_mouth, light, rng)
    image = np.clip(face.canvas.image * (light * np.array(CASTS[style.light], np.float32)) + 0.5, 0, 255)
    nose, mouth = face.lifted(0.06).place(np.array([(0.0, 0.30), (0.0, 0.575)])).tolist()
    return Drawing(image.astype(np.uint8), face.canvas.region > 0, tuple(nose), tuple(mouth))
