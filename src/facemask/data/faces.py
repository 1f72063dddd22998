"""Draws one face with or without a mask: geometry and paint only, no labels and no files.

Points of a head are given in head units: x to the right, y down, the origin in the middle of the face, the
crown at y = -1 and the chin at y = 1. `Pose` turns them into pixels. The head is treated as an ellipsoid, so
that yaw moves and foreshortens what lies on it.

Anything that may differ by a rounding between processors (exp, float sums in a library's fast path) is kept
out of the pixels: paint is blended in integers, light with +, *, / and sqrt.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
Colour = tuple[float, float, float]
Place = Callable[[Points], Points]

SKIN = (
    (246, 217, 196),
    (234, 192, 164),
    (214, 164, 130),
    (188, 134, 98),
    (150, 102, 72),
    (108, 72, 51),
    (74, 50, 38),
)
HAIR = {
    "black": (30, 26, 26),
    "dark brown": (60, 41, 30),
    "brown": (104, 70, 45),
    "auburn": (128, 62, 36),
    "blond": (201, 164, 104),
    "grey": (142, 140, 138),
    "white": (222, 219, 212),
    "dyed": (120, 60, 140),
}
CLOTH = {
    "light blue": (150, 198, 224),
    "white": (236, 238, 238),
    "black": (38, 38, 42),
    "grey": (134, 138, 144),
    "navy": (44, 58, 104),
    "pink": (236, 172, 188),
    "green": (96, 152, 112),
    "teal": (74, 160, 164),
    "red": (184, 54, 56),
    "beige": (214, 192, 160),
    "yellow": (226, 190, 84),
    "purple": (120, 84, 150),
}
BACKGROUNDS = ("plain", "gradient", "shapes", "texture", "crowd")
HAIR_STYLES = ("bald", "short", "fringe", "receding", "long", "bob", "afro", "bun")
HATS = ("none", "cap", "beanie", "headscarf")
BEARDS = ("none", "stubble", "full", "moustache", "goatee")
GLASSES = ("none", "round", "square", "dark")
PATTERNS = ("plain", "stripes", "dots", "checks", "camouflage")
MASK_SHAPES = ("surgical", "ffp2", "n95", "cloth", "valve")


@dataclass(frozen=True)
class Style:
    """What a face looks like, drawn without knowledge of its label."""

    width: int
    height: int
    skin_tone: float  # 0 the lightest, 1 the darkest
    light: str
    light_angle: float  # radians, 0 from the right, pi/2 from below
    light_strength: float
    yaw: float  # radians, positive to the right of the picture
    pitch: float
    roll: float
    scale: float  # half the head's height over the picture's short side
    shift_x: float
    shift_y: float
    head_width: float  # half the head's width over half its height
    jaw: float
    background: str
    hair: str
    hair_colour: str
    hat: str
    hat_colour: str
    beard: str
    glasses: str
    expression: str
    clothes_colour: str
    clothes_pattern: str
    mask_shape: str
    mask_colour: str
    mask_pattern: str


def draw_style(rng: np.random.Generator) -> Style:
    """A random style. Sides lie in 96..200 px, in seven aspect ratios."""
    long_side = int(rng.integers(120, 201))
    short_side = max(96, round(long_side * float(rng.choice([1, 1, 5 / 6, 4 / 5, 3 / 4, 2 / 3]))))
    width, height = (long_side, short_side) if rng.random() < 0.4 else (short_side, long_side)
    shape = str(rng.choice(MASK_SHAPES, p=[0.34, 0.16, 0.14, 0.26, 0.10]))
    patterned = shape == "cloth" and rng.random() < 0.6
    colours = [*CLOTH, "skin-like"]
    # Surgical blue, white and black are what people wear most; the rest share what is left.
    weights = np.array([{"light blue": 4.0, "white": 3.0, "black": 3.0}.get(name, 1.0) for name in colours])
    weights /= weights.sum()
    return Style(
        width=width,
        height=height,
        skin_tone=round(float(rng.random()), 4),
        light=str(rng.choice(["neutral", "warm", "cool", "green", "dim", "bright"])),
        light_angle=round(float(rng.uniform(-math.pi, math.pi)), 4),
        light_strength=round(float(rng.uniform(0.1, 0.55)), 4),
        yaw=round(float(np.clip(rng.normal(0, 0.28), -0.6, 0.6)), 4),
        pitch=round(float(rng.uniform(-0.12, 0.12)), 4),
        roll=round(float(np.clip(rng.normal(0, 0.10), -0.3, 0.3)), 4),
        scale=round(float(rng.uniform(0.36, 0.46)), 4),
        shift_x=round(float(rng.uniform(-0.06, 0.06)), 4),
        shift_y=round(float(rng.uniform(-0.05, 0.03)), 4),
        head_width=round(float(rng.uniform(0.70, 0.80)), 4),
        jaw=round(float(rng.uniform(0.02, 0.2)), 4),
        background=str(rng.choice(BACKGROUNDS)),
        hair=str(rng.choice(HAIR_STYLES, p=[0.08, 0.2, 0.16, 0.08, 0.18, 0.14, 0.08, 0.08])),
        hair_colour=str(rng.choice(list(HAIR), p=[0.22, 0.22, 0.18, 0.08, 0.12, 0.09, 0.05, 0.04])),
        hat=str(rng.choice(HATS, p=[0.7, 0.11, 0.11, 0.08])),
        hat_colour=str(rng.choice(list(CLOTH))),
        beard=str(rng.choice(BEARDS, p=[0.66, 0.1, 0.1, 0.07, 0.07])),
        glasses=str(rng.choice(GLASSES, p=[0.66, 0.14, 0.14, 0.06])),
        expression=str(rng.choice(["neutral", "smile", "open"], p=[0.5, 0.3, 0.2])),
        clothes_colour=str(rng.choice(colours, p=weights)),
        clothes_pattern=str(rng.choice(PATTERNS, p=[0.6, 0.15, 0.1, 0.1, 0.05])),
        mask_shape=shape,
        mask_colour=str(rng.choice(colours, p=weights)),
        mask_pattern=str(rng.choice(PATTERNS[1:])) if patterned else "plain",
    )


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


def cloth_colour(name: str, skin: Colour, rng: np.random.Generator) -> Colour:
    """A shade of the named colour of `CLOTH`, or of the wearer's skin for `skin-like`."""
    jitter = rng.uniform(-12, 12, 3)
    base = shade(skin, 0.97) if name == "skin-like" else CLOTH[name]
    return tuple(float(np.clip(c + j, 8, 250)) for c, j in zip(base, jitter, strict=True))  # type: ignore[return-value]


# Geometry -----------------------------------------------------------------------------------------


def points(*pairs: tuple[float, float]) -> Points:
    """Pairs of x and y as an (n, 2) array."""
    return np.array(pairs, dtype=np.float64)


def moved(local: Points, x: float, y: float) -> Points:
    """Points shifted by x and y."""
    return local + np.array([x, y])


def oval(x: float, y: float, rx: float, ry: float, count: int = 24) -> Points:
    """An ellipse as (count, 2) points."""
    angle = np.linspace(0, 2 * math.pi, count, endpoint=False)
    return np.stack([x + rx * np.cos(angle), y + ry * np.sin(angle)], axis=1)


def smooth(corners: Points, steps: int = 5) -> Points:
    """A closed Catmull-Rom curve through `corners` (n, 2), as (n * steps, 2) points."""
    before, after, beyond = np.roll(corners, 1, 0), np.roll(corners, -1, 0), np.roll(corners, -2, 0)
    t = (np.arange(steps) / steps)[None, :, None]
    a, b, c, d = (p[:, None, :] for p in (before, corners, after, beyond))
    curve = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return curve.reshape(-1, 2)


@dataclass(frozen=True)
class Pose:
    """Places head points in the picture. `size` is half the head's height in pixels."""

    x: float
    y: float
    size: float
    half_width: float
    jaw: float
    yaw: float
    pitch: float
    roll: float

    def width_at(self, y: Points) -> Points:
        """Half the head's width at height `y`, in head units."""
        up = np.sqrt(np.maximum(0, 1 - np.minimum(y, 0) ** 2))
        low = np.clip(y, 0, 1)
        return self.half_width * up * np.sqrt(np.maximum(0, 1 - low * low * np.sqrt(low))) * (1 - self.jaw * low)

    def flat(self, local: Points) -> Points:
        """Pixels of points that do not turn with the head: outlines, hair, hats."""
        cos, sin = math.cos(self.roll), math.sin(self.roll)
        x, y = local[:, 0], local[:, 1]
        return np.stack([self.x + self.size * (x * cos - y * sin), self.y + self.size * (x * sin + y * cos)], axis=1)

    def __call__(self, local: Points, lift: float | Points = 0.0) -> Points:
        """Pixels of points that lie on the head, `lift` head units above it."""
        x, y = local[:, 0], local[:, 1]
        a = self.half_width
        depth = a * np.sqrt(np.maximum(0, 1 - (x / a) ** 2 - (y / 1.25) ** 2)) + lift
        turned = x * math.cos(self.yaw) + depth * math.sin(self.yaw)
        return self.flat(np.stack([turned, y + (depth - 0.5 * a) * math.sin(self.pitch)], axis=1))

    def outline(self, grow: float = 1.0) -> Points:
        """The head's outline in head units, (64, 2), clockwise from the right ear; the chin follows yaw."""
        angle = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        y = np.sin(angle)
        x = np.where(np.cos(angle) < 0, -1, 1) * self.width_at(y)
        chin = 0.45 * self.half_width * math.sin(self.yaw) * np.maximum(0, y) ** 2
        return np.stack([x + chin, y + 0.3 * math.sin(self.pitch) * np.maximum(0, y) ** 2], axis=1) * grow


# Paint --------------------------------------------------------------------------------------------


def fixed(pixels: Points) -> NDArray[np.int32]:
    """Pixel coordinates in OpenCV's fixed point with four fractional bits."""
    return np.rint(pixels * 16).astype(np.int32)


def swatch(colour: Colour) -> NDArray[np.uint8]:
    """A colour as a (1, 1, 3) picture."""
    return np.rint(np.array([[colour]])).astype(np.uint8)


def interpolate(below: NDArray[np.uint8], above: NDArray[np.uint8], stencil: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`above` over `below` by `stencil` (255: only `above`), rounded in integers."""
    weight = stencil[..., None].astype(np.uint16)
    return ((below * (255 - weight) + above * weight + 127) // 255).astype(np.uint8)


class Canvas:
    """An RGB picture that remembers what hides the background and where mask material shows.

    `image` is (H, W, 3) uint8; `cover` (H, W) uint8 is 255 where something stands before the background;
    `region` (H, W) uint8 is 255 where mask material shows.
    """

    def __init__(self, image: NDArray[np.uint8]) -> None:
        self.image = image
        self.cover: NDArray[np.uint8] = np.zeros(image.shape[:2], np.uint8)
        self.region: NDArray[np.uint8] = np.zeros(image.shape[:2], np.uint8)

    def fill(self, outline: Points, colour: Colour) -> None:
        """Fill a polygon (pixels) opaquely."""
        corners = [fixed(outline)]
        cv2.fillPoly(self.image, corners, colour, cv2.LINE_AA, 4)
        cv2.fillPoly(self.cover, corners, 255, cv2.LINE_AA, 4)
        cv2.fillPoly(self.region, corners, 0, cv2.LINE_8, 4)

    def line(self, path: Points, colour: Colour, width: float, closed: bool = False) -> None:
        """Draw a line (pixels) opaquely."""
        thickness = max(1, round(width))
        cv2.polylines(self.image, [fixed(path)], closed, colour, thickness, cv2.LINE_AA, 4)
        cv2.polylines(self.cover, [fixed(path)], closed, 255, thickness, cv2.LINE_AA, 4)
        cv2.polylines(self.region, [fixed(path)], closed, 0, thickness, cv2.LINE_8, 4)

    def tint(self, outline: Points, colour: Colour, alpha: float, soft: float = 0.0) -> None:
        """Blend a colour into a polygon (pixels) with an edge `soft` pixels wide; hides nothing."""
        margin = 2 + 3 * soft
        height, width = self.cover.shape
        left, top = np.maximum(0, np.floor(outline.min(axis=0) - margin)).astype(int)
        right, bottom = np.minimum((width, height), np.ceil(outline.max(axis=0) + margin)).astype(int)
        if left >= right or top >= bottom:
            return
        stencil = np.zeros((bottom - top, right - left), np.uint8)
        cv2.fillPoly(stencil, [fixed(outline - (left, top))], round(255 * alpha), cv2.LINE_AA, 4)
        if soft > 0.3:
            stencil = cv2.GaussianBlur(stencil, (0, 0), soft)
        below = self.image[top:bottom, left:right]
        below[...] = interpolate(below, swatch(colour), stencil)

    def blend(self, layer: NDArray[np.uint8], stencil: NDArray[np.uint8]) -> None:
        """Blend `layer` in by `stencil` (H, W) uint8, in integers."""
        rows, columns = np.flatnonzero(stencil.any(axis=1)), np.flatnonzero(stencil.any(axis=0))
        if not rows.size:
            return
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        above = layer[box] if layer.shape[:2] == stencil.shape else layer
        self.image[box] = interpolate(self.image[box], above, stencil[box])

    def sheet(self, outline: Points, colour: Colour, details: Callable[["Canvas"], None]) -> NDArray[np.uint8]:
        """Fill a polygon and draw `details` inside it only. Returns the polygon's stencil."""
        layer = Canvas(self.image.copy())
        cv2.fillPoly(layer.image, [fixed(outline)], colour, cv2.LINE_AA, 4)
        details(layer)
        stencil = np.zeros(self.cover.shape, np.uint8)
        cv2.fillPoly(stencil, [fixed(outline)], 255, cv2.LINE_AA, 4)
        self.blend(layer.image, stencil)
        np.maximum(self.cover, stencil, out=self.cover)
        self.region[stencil > 127] = 0
        return stencil


def draw_pattern(canvas: Canvas, pattern: str, colour: Colour, place: Place, unit: float, seed: int) -> None:
    """Draw a cloth pattern over the square -1..1 that `place` maps to pixels; `unit` is a pixel width."""
    rng = np.random.default_rng(seed)
    light = sum(colour) / 3
    other = shade(colour, 0.62) if light > 120 else mix(colour, (255, 255, 255), 0.4)
    if pattern in ("stripes", "checks"):
        steep = pattern == "stripes" and rng.random() < 0.5
        for offset in np.linspace(-0.9, 0.9, 6):
            span = np.linspace(-1, 1, 9)
            level = np.stack([span, np.full(9, offset)], axis=1)
            if not steep:
                canvas.line(place(level), other, unit)
            if pattern == "checks" or steep:
                canvas.line(place(level[:, ::-1]), other, unit)
    elif pattern == "dots":
        for u in np.linspace(-0.85, 0.85, 6):
            for v in np.linspace(-0.8, 0.8, 5):
                canvas.fill(place(oval(u + 0.08 * (v > 0), v, 0.075, 0.09, 8)), other)
    elif pattern == "camouflage":
        for step in range(9):
            u, v = rng.uniform(-0.9, 0.9, 2)
            wobble = oval(u, v, 0.28, 0.2, 8) + rng.uniform(-0.08, 0.08, (8, 2))
            canvas.fill(place(smooth(wobble, 3)), other if step % 2 else shade(colour, 0.8))


# Background ---------------------------------------------------------------------------------------


def draw_background(style: Style, rng: np.random.Generator) -> NDArray[np.uint8]:
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
            canvas.fill(corners, mix(muted(rng), first, 0.3))
    elif style.background == "texture":
        cells = rng.integers(0, 256, (int(rng.integers(5, 20)), int(rng.integers(5, 20))), dtype=np.uint8)
        field = cv2.resize(cells, (width, height), interpolation=cv2.INTER_LINEAR)
        canvas.blend(swatch(second), np.asarray(field, np.uint8))
    elif style.background == "crowd":
        for _ in range(int(rng.integers(5, 10))):
            draw_bystander(canvas, rng)
        return np.asarray(cv2.GaussianBlur(image, (0, 0), 0.012 * width), np.uint8)
    return image


def muted(rng: np.random.Generator) -> Colour:
    """A random colour, not a garish one."""
    red, green, blue = rng.uniform(30, 230, 3)
    grey = (red + green + blue) / 3
    return mix((red, green, blue), (grey, grey, grey), 0.45)


def draw_bystander(canvas: Canvas, rng: np.random.Generator) -> None:
    """A small figure; half of them wear a mask, whatever the face before them does."""
    height, width = canvas.cover.shape
    x, y, r = rng.uniform(0, width), rng.uniform(0.05, 0.6) * height, rng.uniform(0.06, 0.11) * width
    skin = skin_colour(rng.random())
    hair = HAIR[str(rng.choice(list(HAIR)))]
    canvas.fill(oval(x, y + 3.6 * r, 1.9 * r, 2.5 * r), cloth_colour(str(rng.choice(list(CLOTH))), skin, rng))
    canvas.fill(oval(x, y - 0.2 * r, 1.0 * r, 1.15 * r), hair)
    canvas.fill(oval(x, y + 0.15 * r, 0.8 * r, 1.05 * r), skin)
    if rng.random() < 0.5:
        canvas.fill(oval(x, y + 0.65 * r, 0.72 * r, 0.5 * r), cloth_colour(str(rng.choice(list(CLOTH))), skin, rng))


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
    canvas: Canvas,
    colour: Colour,
    pattern: str,
    area: float,
    free: NDArray[np.bool_],
    rng: np.random.Generator,
) -> NDArray[np.bool_]:
    """Draw one object of at most about `area` visible pixels. Returns (H, W): where it shows on `free`."""
    room = np.flatnonzero(free)
    y, x = divmod(int(room[int(rng.integers(room.size))]), free.shape[1])
    radius = math.sqrt(area * rng.uniform(0.3, 0.8))
    sides = int(rng.choice([4, 4, 6, 24]))
    turn, stretch = rng.uniform(0, math.pi), rng.uniform(0.6, 1.5)
    cos, sin = math.cos(turn), math.sin(turn)
    shrink = 1.0

    def place(uv: Points) -> Points:
        across, down = uv[:, 0] * radius * stretch * shrink, uv[:, 1] * radius / stretch * shrink
        return np.stack([x + across * cos - down * sin, y + across * sin + down * cos], axis=1)

    shape = oval(0, 0, 1.2, 1.2, sides)
    stencil = np.zeros(free.shape, np.uint8)
    cv2.fillPoly(stencil, [fixed(place(shape))], 255, cv2.LINE_8, 4)
    shown = int(np.count_nonzero(free & (stencil > 0)))
    shrink = min(1.0, math.sqrt(area / max(1, shown)))
    seed = int(rng.integers(1 << 30))
    layer = Canvas(canvas.image.copy())
    stencil = layer.sheet(
        place(shape), colour, lambda c: draw_pattern(c, pattern, colour, place, max(1, 0.06 * radius), seed)
    )
    layer.line(place(shape), shade(colour, 0.85), 1, closed=True)
    canvas.blend(layer.image, np.minimum(stencil, 255 - canvas.cover))
    return free & (stencil > 127)


# Person -------------------------------------------------------------------------------------------


def draw_body(canvas: Canvas, style: Style, pose: Pose, skin: Colour, cloth: Colour, seed: int) -> None:
    """Neck, shoulders and clothes."""
    body = Pose(pose.x, pose.y, pose.size, pose.half_width, 0, 0, 0, 0.35 * pose.roll)
    neck = smooth(points((-0.36, 0.5), (0.36, 0.5), (0.37, 1.1), (0.5, 1.5), (-0.5, 1.5), (-0.37, 1.1)))
    canvas.fill(body.flat(neck), shade(skin, 0.86))
    dip = 1.28 + 0.25 * (seed % 3 == 0)
    torso = smooth(
        points(
            (-0.44, 1.14), (-0.22, dip - 0.05), (0, dip), (0.22, dip - 0.05), (0.44, 1.14), (1.2, 1.42),
            (1.55, 1.9), (1.62, 3.2), (-1.62, 3.2), (-1.55, 1.9), (-1.2, 1.42),
        )
    )  # fmt: skip

    def place(uv: Points) -> Points:
        return body.flat(uv * (1.5, 0.9) + (0, 2.1))

    canvas.sheet(
        body.flat(torso),
        cloth,
        lambda c: draw_pattern(c, style.clothes_pattern, cloth, place, 0.05 * pose.size, seed),
    )
    collar = points((-0.44, 1.14), (-0.22, dip - 0.05), (0, dip), (0.22, dip - 0.05), (0.44, 1.14))
    canvas.line(body.flat(collar), shade(cloth, 0.75), 0.05 * pose.size)
    canvas.tint(body.flat(oval(0.1 * pose.yaw, 1.05, 0.42, 0.16)), (20, 12, 10), 0.3, 0.07 * pose.size)


def draw_ear(canvas: Canvas, pose: Pose, side: int, skin: Colour) -> None:
    x = side * pose.half_width * (math.cos(pose.yaw) * 1.04)
    canvas.fill(pose.flat(oval(x, 0.08, 0.11, 0.2)), shade(skin, 0.93))
    canvas.line(pose.flat(oval(x, 0.07, 0.055, 0.12)), shade(skin, 0.72), 0.02 * pose.size, closed=True)


def draw_hair_back(canvas: Canvas, style: Style, pose: Pose, hair: Colour) -> None:
    """The hair behind the head, as far as a hat leaves it visible."""
    dark = shade(hair, 0.8)
    if style.hat == "headscarf":
        return
    if style.hair == "long":
        long = points((-0.85, -0.3), (-0.5, -1.02), (0.5, -1.02), (0.85, -0.3), (0.98, 0.7),
            (0.9, 1.55), (0, 1.3), (-0.9, 1.55), (-0.98, 0.7))  # fmt: skip
        canvas.fill(pose.flat(smooth(long)), dark)
    elif style.hair == "bob":
        bob = points((-0.86, -0.3), (-0.5, -1.0), (0.5, -1.0), (0.86, -0.3), (0.98, 0.5),
            (0.8, 0.88), (-0.8, 0.88), (-0.98, 0.5))  # fmt: skip
        canvas.fill(pose.flat(smooth(bob)), dark)
    elif style.hair == "afro" and style.hat == "none":
        canvas.fill(pose.flat(smooth(oval(0, -0.4, 1.12, 1.0, 18) * (1 + 0.02 * (np.arange(18) % 2))[:, None])), dark)
    elif style.hair == "bun" and style.hat == "none":
        canvas.fill(pose.flat(oval(-0.4 * math.sin(pose.yaw), -1.2, 0.36, 0.32)), dark)


def draw_hair_front(canvas: Canvas, style: Style, pose: Pose, hair: Colour) -> None:
    """The hair over the forehead and down the sides."""
    if style.hair == "bald" or style.hat == "headscarf":
        return
    line, temple = {
        "fringe": (-0.3, 0.05),
        "bob": (-0.34, 0.1),
        "receding": (-0.8, -0.3),
        "afro": (-0.55, -0.1),
    }.get(style.hair, (-0.58, -0.12))
    crown = pose.outline(1.07)[33:64]
    top = pose.flat(crown[np.abs(crown[:, 0]) <= 0.9][crown[:, 1] < temple - 0.02])
    x = np.linspace(0.93, -0.93, 15)
    ripple = 0.05 * (np.arange(15) % 2) if style.hair == "fringe" else np.zeros(15)
    part = 0.1 * (x - 0.35) if style.hair in ("short", "long") else 0 * x
    edge = temple + (line - temple) * (1 - np.abs(x) ** 3) + ripple * (np.abs(x) < 0.8) + part * (np.abs(x) < 0.8)
    hairline = pose(np.stack([x * pose.width_at(edge), edge], axis=1))
    canvas.fill(np.concatenate([top, hairline]), hair)
    for start in (-0.45, -0.15, 0.2, 0.5):
        strand = points((start * 0.5, -1.03), (start * 0.8, -0.88), (start * 1.05, line - 0.08))
        canvas.line(pose.flat(moved(strand, 0.3 * math.sin(pose.yaw), 0)), shade(hair, 1.25), 0.02 * pose.size)
    if style.hair in ("long", "bob"):
        for side in (-1, 1):
            low = 1.25 if style.hair == "long" else 0.78
            lock = points((0.72, -0.5), (0.9, -0.1), (0.98, 0.5), (0.88, low), (0.78, 0.5), (0.74, 0.0)) * (
                side,
                1,
            )
            canvas.fill(pose.flat(smooth(lock)), shade(hair, 0.92))


def draw_hat(canvas: Canvas, style: Style, pose: Pose, cloth: Colour) -> None:
    """A cap, a beanie or a headscarf over the hair."""
    dark = shade(cloth, 0.78)
    crown = pose.outline(1.12)[33:64]
    lean = 0.35 * math.sin(pose.yaw)
    if style.hat == "cap":
        canvas.fill(pose.flat(crown[crown[:, 1] < -0.42]), cloth)
        peak = points((-0.72, -0.5), (0, -0.62), (0.72, -0.5), (0.6, -0.32), (0, -0.26), (-0.6, -0.32))
        canvas.fill(pose.flat(moved(smooth(peak), lean, 0)), dark)
    elif style.hat == "beanie":
        canvas.fill(pose.flat(crown[crown[:, 1] < -0.38]), cloth)
        band = points((-0.84, -0.5), (0, -0.62), (0.84, -0.5), (0.84, -0.26), (0, -0.38), (-0.84, -0.26))
        canvas.fill(pose.flat(band), dark)
        for x in np.linspace(-0.7, 0.7, 9):
            canvas.line(pose.flat(points((x, -0.5), (x, -0.36))), cloth, 0.02 * pose.size)
    elif style.hat == "headscarf":
        outer = points((0, -1.14), (0.62, -0.92), (0.94, -0.2), (0.9, 0.6), (0.72, 1.2), (0, 1.5),
            (-0.72, 1.2), (-0.9, 0.6), (-0.94, -0.2), (-0.62, -0.92))  # fmt: skip
        inner = pose.outline(0.93) * (0.94, 1) + (0.1 * math.sin(pose.yaw), 0.05)
        stencil = np.zeros(canvas.cover.shape, np.uint8)
        cv2.fillPoly(stencil, [fixed(pose.flat(smooth(outer)))], 255, cv2.LINE_AA, 4)
        np.maximum(canvas.cover, stencil, out=canvas.cover)
        cv2.fillPoly(stencil, [fixed(pose.flat(inner))], 0, cv2.LINE_AA, 4)
        canvas.blend(swatch(cloth), stencil)
        for x in (-0.5, -0.15, 0.3):
            canvas.line(pose.flat(points((x, 1.12), (x * 0.6, 1.38))), dark, 0.03 * pose.size)
        canvas.line(pose.flat(inner), dark, 0.03 * pose.size, closed=True)


def draw_features(canvas: Canvas, style: Style, pose: Pose, skin: Colour, hair: Colour) -> None:
    """Cheeks, nose, eyes, brows, mouth and beard."""
    size = pose.size
    dark = shade(skin, 0.62)
    for side in (-1, 1):
        canvas.tint(pose(oval(side * 0.4, 0.36, 0.16, 0.13)), mix(skin, (220, 90, 80), 0.5), 0.35, 0.06 * size)
        canvas.tint(pose(oval(side * 0.31, -0.04, 0.2, 0.13)), dark, 0.3, 0.05 * size)
        eye = points((-0.15, 0.01), (-0.05, -0.075), (0.07, -0.07), (0.15, 0.0), (0.06, 0.055), (-0.06, 0.055))
        eye = moved(smooth(eye * (side, 1)), side * 0.31, -0.03)
        canvas.fill(pose(eye), (242, 240, 236))
        gaze = side * 0.31 + 0.04 * pose.yaw
        canvas.fill(pose(oval(gaze, -0.03, 0.067, 0.07, 14)), mix((70, 48, 34), (96, 130, 150), style.shift_x > 0.06))
        canvas.fill(pose(oval(gaze, -0.03, 0.034, 0.036, 10)), (16, 13, 13))
        canvas.fill(pose(oval(gaze + 0.025, -0.055, 0.016, 0.016, 8)), (250, 250, 250))
        lid = points((-0.16, 0.0), (-0.06, -0.08), (0.07, -0.08), (0.16, -0.01)) * (side, 1) + (
            side * 0.31,
            -0.03,
        )
        canvas.line(pose(lid), shade(hair, 0.6) if sum(hair) < 400 else dark, 0.03 * size)
        brow = points((-0.17, 0.0), (-0.05, -0.06), (0.1, -0.06), (0.19, 0.0), (0.1, -0.015), (-0.05, -0.005))
        canvas.fill(pose(moved(smooth(brow * (side, 1.15)), side * 0.31, -0.2)), mix(hair, skin, 0.15))
    canvas.tint(pose(points((0.02, -0.1), (0.13, 0.3), (0.02, 0.36))), dark, 0.45, 0.025 * size)
    canvas.tint(pose(oval(-0.01, 0.14, 0.035, 0.17), 0.08), (255, 244, 232), 0.35, 0.03 * size)
    canvas.tint(pose(oval(0, 0.29, 0.1, 0.07), 0.12), mix(skin, (255, 235, 220), 0.3), 0.6, 0.02 * size)
    wings = points((-0.14, 0.27), (-0.13, 0.34), (-0.04, 0.37), (0.04, 0.37), (0.13, 0.34), (0.14, 0.27))
    canvas.line(pose(wings, 0.06), shade(skin, 0.68), 0.025 * size)
    for side in (-1, 1):
        canvas.fill(pose(oval(side * 0.06, 0.345, 0.03, 0.016, 8), 0.06), shade(skin, 0.4))
    draw_beard(canvas, style, pose, skin, hair)
    draw_mouth(canvas, style, pose, skin)


def draw_mouth(canvas: Canvas, style: Style, pose: Pose, skin: Colour) -> None:
    lip = mix(skin, (168, 62, 66), 0.5)
    lift = {"smile": -0.05, "neutral": 0.0, "open": 0.0}[style.expression]
    gap = 0.07 if style.expression == "open" else 0.0
    corner = (0.27 if style.expression == "smile" else 0.22, 0.57 + lift)
    upper = points((-corner[0], corner[1]), (-0.09, 0.51), (0, 0.525), (0.09, 0.51), corner, (0, 0.575))
    lower = points((-corner[0], corner[1]), (0, 0.575 + gap), corner, (0.1, 0.645 + gap), (-0.1, 0.645 + gap))
    if gap:
        canvas.fill(pose(oval(0, 0.58, 0.17, 0.075, 18)), (60, 22, 24))
        canvas.fill(pose(points((-0.12, 0.555), (0.12, 0.555), (0.1, 0.59), (-0.1, 0.59))), (240, 236, 228))
    canvas.fill(pose(smooth(upper, 4)), shade(lip, 0.86))
    canvas.fill(pose(smooth(lower, 4)), lip)
    if not gap:
        seam = points((-corner[0], corner[1]), (-0.1, 0.572), (0, 0.58), (0.1, 0.572), corner)
        canvas.line(pose(seam), shade(lip, 0.55), 0.02 * pose.size)
    canvas.tint(pose(oval(0, 0.72, 0.12, 0.03)), shade(skin, 0.6), 0.35, 0.03 * pose.size)


def draw_beard(canvas: Canvas, style: Style, pose: Pose, skin: Colour, hair: Colour) -> None:
    soft = 0.02 * pose.size
    if style.beard in ("stubble", "full"):
        jaw = np.array([0.1, 0.35, 0.6, 0.8, 0.93, 0.99])
        side = np.stack([0.97 * pose.width_at(jaw), jaw], axis=1)
        inner = points((-0.5, 0.42), (-0.2, 0.44), (0, 0.42), (0.2, 0.44), (0.5, 0.42))
        low = 1.04 if style.beard == "stubble" else 1.12
        ring = np.concatenate([side, points((0, low)), side[::-1] * (-1, 1), inner])
        canvas.tint(pose(ring), hair, 0.35 if style.beard == "stubble" else 0.92, soft)
        if style.beard == "full":
            canvas.tint(pose(oval(0, 0.58, 0.3, 0.13)), skin, 0.55, soft)
    if style.beard in ("moustache", "goatee", "full"):
        hairs = points((-0.27, 0.54), (-0.12, 0.42), (0, 0.44), (0.12, 0.42), (0.27, 0.54), (0, 0.49))
        canvas.tint(pose(smooth(hairs)), hair, 0.92, soft)
    if style.beard == "goatee":
        canvas.tint(
            pose(smooth(points((-0.2, 0.72), (0, 0.69), (0.2, 0.72), (0.14, 1.0), (-0.14, 1.0)))),
            hair,
            0.92,
            soft,
        )


def draw_glasses(canvas: Canvas, style: Style, pose: Pose) -> None:
    if style.glasses == "none":
        return
    frame = (34, 30, 30)
    for side in (-1, 1):
        lens = oval(side * 0.33, -0.01, 0.24, 0.2, 20)
        if style.glasses != "round":
            middle = np.array([side * 0.33, -0.01])
            lens = middle + np.clip((lens - middle) * 1.25, (-0.24, -0.17), (0.24, 0.17))
        if style.glasses == "dark":
            canvas.fill(pose(lens, 0.1), (30, 28, 34))
        else:
            canvas.tint(pose(lens, 0.1), (235, 244, 250), 0.14)
        canvas.line(pose(lens, 0.1), frame, 0.035 * pose.size, closed=True)
        arm = points((side * 0.57, -0.04), (side * 0.96 * pose.half_width, -0.02))
        canvas.line(pose(arm, 0.06), frame, 0.03 * pose.size)
    canvas.line(pose(points((-0.1, -0.04), (0, -0.07), (0.1, -0.04)), 0.12), frame, 0.035 * pose.size)


# Mask ---------------------------------------------------------------------------------------------

# State -> heights of a mask's edge in head units: top at the nose and at the sides, bottom in the middle and
# at the sides.
EDGES = {
    "mask_worn": (0.10, 0.24, 1.08, 0.78),
    "mask_below_nose": (0.44, 0.36, 1.10, 0.84),
    "mask_under_chin": (0.86, 0.70, 1.26, 0.98),
}


def mask_place(state: str, style: Style, pose: Pose) -> Place:
    """How a mask in the given state maps its own square -1..1 to pixels.

    Under the chin it is folded together; from an ear it hangs sideways, beside the jaw that faces the viewer.
    """
    if state == "mask_hanging_from_ear":
        side = -1 if pose.yaw > 0 else 1

        def hang(uv: Points) -> Points:
            x = side * (0.9 * pose.half_width + 0.16) + uv[:, 0] * 0.22 - side * 0.06 * uv[:, 1]
            return pose.flat(np.stack([x, 0.86 + 0.38 * uv[:, 1] + 0.05 * side * uv[:, 0]], axis=1))

        return hang
    top, top_side, bottom, bottom_side = EDGES[state]
    if style.mask_shape in ("ffp2", "n95", "valve") and state == "mask_worn":
        top, bottom_side = top - 0.04, bottom_side + 0.04
    puff = 0.06 if state == "mask_worn" else 0.0
    reach = {"surgical": 0.95, "ffp2": 0.9, "n95": 0.82, "valve": 0.86, "cloth": 0.96}[style.mask_shape]

    def wear(uv: Points) -> Points:
        u, v = uv[:, 0], (uv[:, 1] + 1) / 2
        bend = u * u
        upper = top + (top_side - top) * np.abs(u) * (1.4 - 0.4 * np.abs(u))
        lower = bottom + (bottom_side - bottom) * bend
        at_side = top_side + v * (bottom_side - top_side)
        bulge = 0.05 + puff * (1 - bend)
        x = u * reach * pose.width_at(np.minimum(at_side, 0.9))
        y = upper + v * (lower - upper)
        return pose(np.stack([x, y], axis=1), bulge)

    return wear


def mask_outline(place: Place) -> Points:
    """The mask's outline in pixels, (32, 2)."""
    span = np.linspace(-1, 1, 9)[:-1]
    one = np.ones(8)
    ring = [np.stack(pair, axis=1) for pair in ((span, -one), (one, span), (-span, one), (-one, -span))]
    return place(np.concatenate(ring))


def draw_mask(canvas: Canvas, state: str, style: Style, pose: Pose, colour: Colour, seed: int) -> None:
    """Draw a mask with loops or straps and mark its material in the canvas's region."""
    place = mask_place(state, style, pose)
    outline = mask_outline(place)
    size = pose.size
    draw_straps(canvas, state, style, pose, place)

    def details(layer: Canvas) -> None:
        draw_pattern(layer, style.mask_pattern, colour, place, 0.045 * size, seed)
        draw_mask_folds(layer, state, style, place, colour, size)

    stencil = canvas.sheet(outline, colour, details)
    canvas.line(outline, shade(colour, 0.78), 0.025 * size, closed=True)
    canvas.region[stencil > 127] = 255


def draw_mask_folds(canvas: Canvas, state: str, style: Style, place: Place, colour: Colour, size: float) -> None:
    """Pleats, seams, wire and valve."""
    dark, bright = shade(colour, 0.84), mix(shade(colour, 1.12), (255, 255, 255), 0.12)
    span = np.linspace(-1, 1, 9)

    def across(v: float, ink: Colour, width: float) -> None:
        canvas.line(place(np.stack([span, np.full(9, v)], axis=1)), ink, width * size)

    if state == "mask_under_chin":
        across(-0.3, dark, 0.03)
        across(0.3, dark, 0.03)
    elif style.mask_shape == "surgical":
        across(-0.9, bright, 0.03)
        for v in (-0.35, 0.05, 0.45):
            across(v, dark, 0.04)
            across(v + 0.07, bright, 0.025)
    elif style.mask_shape == "cloth":
        across(-0.9, dark, 0.015)
        across(0.9, dark, 0.015)
        canvas.line(place(np.stack([0 * span, span], axis=1)), dark, 0.025 * size)
    else:
        if style.mask_shape == "n95":
            across(0.1, dark, 0.03)
            across(-0.55, bright, 0.04)
        else:
            canvas.line(place(np.stack([0 * span, span], axis=1)), dark, 0.035 * size)
            canvas.line(place(np.stack([0 * span + 0.05, span], axis=1)), bright, 0.02 * size)
            across(0.62, dark, 0.02)
        canvas.line(place(points((-0.25, -0.84), (0, -0.9), (0.25, -0.84))), (168, 170, 174), 0.035 * size)
        if style.mask_shape == "valve":
            canvas.fill(place(oval(0.42, 0.12, 0.2, 0.26)), mix(colour, (150, 152, 156), 0.6))
            canvas.line(place(oval(0.42, 0.12, 0.13, 0.17)), shade(colour, 0.55), 0.02 * size, closed=True)


def draw_straps(canvas: Canvas, state: str, style: Style, pose: Pose, place: Place) -> None:
    """Ear loops, or for an N95 straps round the head; for a hanging mask the one loop that holds it."""
    ink = (70, 70, 74) if style.mask_colour == "black" else (226, 228, 228)
    width = 0.025 * pose.size
    corners = place(points((-1, -1), (1, -1), (1, 1), (-1, 1)))
    if state == "mask_hanging_from_ear":
        side = -1 if pose.yaw > 0 else 1
        ear = pose.flat(points((side * pose.half_width * math.cos(pose.yaw) * 1.04, -0.1)))
        canvas.line(np.concatenate([corners[:1], ear, corners[1:2]]), ink, width)
        return
    for side, upper, lower in ((-1, 0, 3), (1, 1, 2)):
        x = side * pose.half_width * math.cos(pose.yaw)
        if style.mask_shape == "n95" and style.hat != "headscarf":
            ends = pose.flat(points((x * 1.02, -0.3), (x * 1.02, 0.35)))
        else:
            ends = pose.flat(points((x, -0.02), (x, 0.25)))
        canvas.line(np.stack([corners[upper], ends[0]]), ink, width)
        canvas.line(np.stack([corners[lower], ends[1]]), ink, width)


# Things before or beside the face -----------------------------------------------------------------


def draw_finger(canvas: Canvas, pose: Pose, start: tuple[float, float], end: tuple[float, float], skin: Colour) -> None:
    path = pose.flat(points(start, end))
    canvas.line(path, shade(skin, 0.68), 0.19 * pose.size)
    canvas.line(path, skin, 0.15 * pose.size)
    canvas.fill(
        pose.flat(oval(end[0] * 0.93 + start[0] * 0.07, end[1], 0.04, 0.04, 10)),
        mix(skin, (255, 225, 220), 0.5),
    )


def draw_hand(canvas: Canvas, pose: Pose, side: int, at_mouth: bool, skin: Colour, sleeve: Colour) -> None:
    """A hand laid over the mouth, or against the cheek; the forearm leaves the picture downwards."""
    if at_mouth:
        palm, wrist, elbow = (side * 0.52, 0.72), (side * 0.95, 1.15), (side * 1.5, 2.4)
        tips = [((palm[0], y0), (-side * x1, y1)) for y0, x1, y1 in ((0.52, 0.3, 0.44),
            (0.64, 0.38, 0.58), (0.77, 0.34, 0.72), (0.88, 0.24, 0.86))]  # fmt: skip
    else:
        palm, wrist, elbow = (side * 0.82, 0.86), (side * 0.95, 1.3), (side * 1.15, 2.6)
        tips = [((side * x0, 0.78), (side * x1, y1)) for x0, x1, y1 in ((1.0, 1.0, 0.3),
            (0.88, 0.88, 0.12), (0.75, 0.76, 0.14), (0.64, 0.64, 0.3))]  # fmt: skip
    canvas.line(pose.flat(points(elbow, wrist)), shade(sleeve, 0.7), 0.46 * pose.size)
    canvas.line(pose.flat(points(elbow, wrist)), sleeve, 0.42 * pose.size)
    canvas.line(pose.flat(points(wrist, palm)), shade(skin, 0.7), 0.32 * pose.size)
    canvas.line(pose.flat(points(wrist, palm)), skin, 0.28 * pose.size)
    canvas.fill(pose.flat(oval(*palm, 0.26, 0.25)), skin)
    for start, end in tips:
        draw_finger(canvas, pose, start, end, skin)


def draw_cup(
    canvas: Canvas, pose: Pose, side: int, at_mouth: bool, skin: Colour, colour: Colour, sleeve: Colour
) -> None:
    """A cup held before the mouth or beside the face."""
    x, y = (0.04 * side, 0.74) if at_mouth else (side * 1.12, 0.9)
    if at_mouth:
        x += 0.5 * pose.half_width * math.sin(pose.yaw)
    arm = points((x + side * 0.9, 2.5), (x + side * 0.4, y + 0.2))
    canvas.line(pose.flat(arm), shade(sleeve, 0.75), 0.36 * pose.size)
    body = moved(points((-0.31, -0.3), (0.31, -0.3), (0.24, 0.4), (-0.24, 0.4)), x, y)
    canvas.fill(pose.flat(body), colour)
    canvas.tint(pose.flat(moved(points((0.1, -0.3), (0.31, -0.3), (0.24, 0.4), (0.08, 0.4)), x, y)), (0, 0, 0), 0.16)
    canvas.line(pose.flat(body), shade(colour, 0.6), 0.02 * pose.size, closed=True)
    canvas.fill(pose.flat(oval(x, y - 0.3, 0.33, 0.085)), mix(colour, (255, 255, 255), 0.35))
    canvas.line(pose.flat(oval(x, y - 0.3, 0.33, 0.085)), shade(colour, 0.6), 0.02 * pose.size, closed=True)
    for y0 in (0.0, 0.13, 0.26):
        draw_finger(canvas, pose, (x + side * 0.34, y + y0 + 0.04), (x - side * 0.1, y + y0), skin)


def draw_scarf(canvas: Canvas, pose: Pose, colour: Colour, pattern: str, seed: int) -> None:
    """A scarf round the neck and over the chin, its upper edge below the mouth."""
    top = 0.80 + 0.1 * (seed % 2)
    x = 0.3 * math.sin(pose.yaw)
    wrap = points((-0.78, top - 0.02), (-0.3, top + 0.02), (x, top + 0.05), (0.3, top + 0.02),
        (0.78, top - 0.02), (0.92, 1.25), (0.5, 1.58), (0, 1.66), (-0.5, 1.58), (-0.92, 1.25))  # fmt: skip

    def place(uv: Points) -> Points:
        return pose.flat(uv * (0.85, 0.42) + (0, 1.24))

    canvas.sheet(
        pose.flat(smooth(wrap)),
        colour,
        lambda c: draw_pattern(c, pattern, colour, place, 0.06 * pose.size, seed),
    )
    for low in (0.24, 0.45, 0.62):
        fold = points((-0.82, top + 0.7 * low), (0, top + low + 0.08), (0.82, top + 0.6 * low))
        canvas.line(pose.flat(fold), shade(colour, 0.72), 0.035 * pose.size)
    tail = points((0.28, 1.35), (0.62, 1.35), (0.72, 2.4), (0.34, 2.4))
    canvas.fill(pose.flat(tail), shade(colour, 0.9))
    canvas.line(pose.flat(tail), shade(colour, 0.65), 0.02 * pose.size, closed=True)


# Light --------------------------------------------------------------------------------------------

CASTS = {
    "neutral": (1.0, 1.0, 1.0),
    "warm": (1.08, 1.0, 0.86),
    "cool": (0.9, 0.99, 1.1),
    "green": (0.95, 1.05, 0.93),
    "dim": (0.68, 0.68, 0.72),
    "bright": (1.2, 1.19, 1.16),
}


def light_field(style: Style, pose: Pose, cover: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Brightness (H, W, 1): a Lambertian ellipsoid where the head is, a slope across the rest."""
    strength = style.light_strength
    to_x, to_y, to_z = math.cos(style.light_angle), math.sin(style.light_angle), 0.8
    x = (np.arange(style.width, dtype=np.float32) - np.float32(pose.x))[None]
    y = (np.arange(style.height, dtype=np.float32) - np.float32(pose.y))[:, None]
    cos, sin = math.cos(pose.roll), math.sin(pose.roll)
    across = (x * np.float32(cos) + y * np.float32(sin)) / np.float32(pose.size * pose.half_width * 1.2)
    down = (y * np.float32(cos) - x * np.float32(sin)) / np.float32(pose.size * 1.25)
    square = across * across + down * down
    depth = np.sqrt(np.maximum(0, 1 - square))
    head = 1 + np.float32(strength) * (
        across * np.float32(to_x) + down * np.float32(to_y) + depth * np.float32(to_z) - np.float32(0.62)
    )
    slope = 1 + np.float32(0.35 * strength) * (x * np.float32(to_x / style.width) + y * np.float32(to_y / style.height))
    weight = np.clip((1 - square) * 3, 0, 1) * (cover / np.float32(255))
    return (slope + (head - slope) * weight)[..., None].astype(np.float32)


def apply_light(image: NDArray[np.uint8], field: NDArray[np.float32], light: str) -> NDArray[np.uint8]:
    cast = np.array(CASTS[light], np.float32)
    return np.clip(image * (field * cast) + np.float32(0.5), 0, 255).astype(np.uint8)


# The whole picture --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """A drawn face: picture (H, W, 3) uint8, mask region (H, W) bool, pixels of nose tip and mouth (x, y)."""

    image: NDArray[np.uint8]
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
    short = min(style.width, style.height)
    pose = Pose(
        x=style.width * (0.5 + style.shift_x),
        y=style.height * (0.46 + style.shift_y),
        size=style.scale * short,
        half_width=style.head_width,
        jaw=style.jaw,
        yaw=style.yaw,
        pitch=style.pitch,
        roll=style.roll,
    )
    skin = shade(skin_colour(style.skin_tone), rng.uniform(0.94, 1.05))
    hair = HAIR[style.hair_colour]
    clothes, hat = (cloth_colour(name, skin, rng) for name in (style.clothes_colour, style.hat_colour))
    material = cloth_colour(style.mask_colour, skin, rng)
    thing = cloth_colour(str(rng.choice(list(CLOTH))), skin, rng)
    thing_pattern = str(rng.choice(PATTERNS, p=[0.6, 0.2, 0.08, 0.08, 0.04]))
    side = int(rng.choice([-1, 1]))
    seeds = [int(s) for s in rng.integers(1 << 30, size=3)]

    canvas = Canvas(draw_background(style, rng))
    draw_hair_back(canvas, style, pose, hair)
    draw_body(canvas, style, pose, skin, clothes, seeds[0])
    near = -1 if style.yaw > 0 else 1
    draw_ear(canvas, pose, -near, skin)
    canvas.fill(pose.flat(pose.outline()), skin)
    draw_features(canvas, style, pose, skin, hair)
    draw_ear(canvas, pose, near, skin)
    draw_hair_front(canvas, style, pose, hair)
    draw_hat(canvas, style, pose, hat)
    if state != "no_mask":
        draw_mask(canvas, state, style, pose, material, seeds[1])
    draw_glasses(canvas, style, pose)
    if state == "mask_hanging_from_ear":
        side = -near
    if beside == "scarf":
        draw_scarf(canvas, pose, thing, thing_pattern, seeds[2])
    if "hand" in (before_mouth, beside):
        draw_hand(canvas, pose, side, before_mouth == "hand", skin, clothes)
    if "cup" in (before_mouth, beside):
        draw_cup(canvas, pose, side, before_mouth == "cup", skin, thing, clothes)

    field = light_field(style, pose, canvas.cover)
    balance_colours(canvas, style, pose, state, before_mouth, skin, hair, material, field, rng)
    nose, mouth = (pose(points(p), 0.06)[0] for p in ((0.0, 0.30), (0.0, 0.575)))
    return Drawing(
        image=apply_light(canvas.image, field, style.light),
        mask_region=canvas.region > 0,
        nose=(float(nose[0]), float(nose[1])),
        mouth=(float(mouth[0]), float(mouth[1])),
    )


def balance_colours(
    canvas: Canvas,
    style: Style,
    pose: Pose,
    state: str,
    before_mouth: str,
    skin: Colour,
    hair: Colour,
    material: Colour,
    field: NDArray[np.float32],
    rng: np.random.Generator,
) -> None:
    """Put behind the person what the mask hides and what is missing of it (see `draw`)."""
    worn = np.zeros(canvas.cover.shape, np.uint8)
    cv2.fillPoly(worn, [fixed(mask_outline(mask_place("mask_worn", style, pose)))], 255, cv2.LINE_8, 4)
    full = int(np.count_nonzero(worn))
    shown = int(np.count_nonzero(canvas.region))
    hidden = shown if state in ("mask_worn", "mask_below_nose") else 0.5 * shown
    if before_mouth == "cup":
        hidden += 0.36 * pose.size**2
    # An object behind the person stands outside the head's shading: give it the brightness it had there.
    bright = float(field[worn > 0].mean()) if full else 1.0
    bearded = {"stubble": 0.2, "full": 0.55, "moustache": 0.06, "goatee": 0.1}.get(style.beard, 0.0)
    bare = skin if rng.random() < 0.6 else skin_colour(rng.random())
    cloth = material if rng.random() < 0.6 else cloth_colour(str(rng.choice(list(CLOTH))), skin, rng)
    for colour, pattern, area in (
        # Either class gets objects of these colours first: one alone must not tell what it stands for.
        (bare, "plain", full * max(0, rng.uniform(-0.4, 0.9))),
        (cloth, style.mask_pattern, full * max(0, rng.uniform(-0.4, 0.9))),
        (skin, "plain", hidden * (1 - bearded)),
        (hair, "plain", hidden * bearded),
        (material, style.mask_pattern, full - shown),
    ):
        draw_behind(canvas, shade(colour, bright), pattern, area, rng)
