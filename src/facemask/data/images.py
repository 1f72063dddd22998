"""Bytes of a picture file -> its header, or its pixels as 8-bit RGB; and the geometry of evaluation.

Colour profiles are ignored, as in torchvision and timm.
"""

import io
import re
import struct
import zlib
from typing import NamedTuple

import numpy as np

# The four plugins are imported by name: Image.open would otherwise import every format Pillow knows.
from PIL import GifImagePlugin, Image, ImageFile, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin  # noqa: F401

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
MAX_PIXELS = 64_000_000

# Our own limit, checked on the header before any pixel is decoded, replaces Pillow's, which would warn or
# raise below it. A half-read picture is a damaged picture, so Pillow must not fill the rest with grey.
Image.MAX_IMAGE_PIXELS = None
ImageFile.LOAD_TRUNCATED_IMAGES = False

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
_ORIENTATION = 0x0112
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's readers were seen to raise on damaged bytes. UnidentifiedImageError is an OSError.
_DAMAGE: tuple[type[Exception], ...] = (OSError, EOFError, SyntaxError, ValueError, TypeError, KeyError, IndexError)
_DAMAGE += (OverflowError, RuntimeError, AttributeError, struct.error, zlib.error)


class BadImage(Exception):
    """A file that gives no picture; `reason` says why in a few words, without the file's name."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Header(NamedTuple):
    """Size in pixels after the EXIF orientation, and the format by content: JPEG, PNG, WEBP or GIF."""

    width: int
    height: int
    format: str


def read_header(data: bytes) -> Header:
    """Size and format of a picture file, no pixel decoded. Raises BadImage for what is no picture."""
    image = _open(data)
    width, height = image.size
    if _orientation(image, data) in (5, 6, 7, 8):
        width, height = height, width
    # A JPEG with further views inside (many phones write them) is "MPO" to Pillow; its first view is a JPEG.
    return Header(width, height, "JPEG" if image.format == "MPO" else str(image.format))


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decode a JPEG, PNG, WEBP or GIF (first frame) to uint8 (H, W, 3) RGB, upright by its EXIF orientation.

    Transparency is flattened over white; CMYK follows Adobe's inverted convention, as in Pillow and browsers;
    of 16-bit samples the high byte is kept (v >> 8), for grey as for colour. Raises BadImage for what is no
    picture, is truncated or damaged, or has more than `max_pixels` by its header (then nothing is decoded).
    """
    image = _open(data)
    check_pixels(*image.size, max_pixels)
    try:
        turn = _TURN.get(_orientation(image, data))
        image.load()
        if image.format in ("JPEG", "MPO"):
            _check_jpeg(data)
        rgb = _to_rgb(image, data)
        return np.array(rgb.transpose(turn) if turn is not None else rgb)
    except _DAMAGE as error:
        raise BadImage(_reason(error)) from error


def from_pillow(image: Image.Image, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Pixels of a picture that is open in Pillow, as `decode` gives them for its file: uint8 (H, W, 3)."""
    check_pixels(*image.size, max_pixels)
    try:
        image = ImageOps.exif_transpose(image)
        return np.array(_flatten(_high_byte(image)))
    except _DAMAGE as error:
        raise BadImage(_reason(error)) from error


def check_pixels(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise BadImage if a picture of this size must not be decoded."""
    if width * height > max_pixels:
        raise BadImage(f"{width}x{height} is {width * height} pixels, more than data.max_pixels={max_pixels} allows")


def resize_short(img: np.ndarray, size: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Resize uint8 (H, W, 3) so that its short side is `size`; antialiased bicubic, aspect preserved.

    The long side is int(size * long / short), rounded down, as in torchvision's and timm's `Resize(size)`.
    Raises BadImage for a strip so thin that the result would have more than `max_pixels`.
    """
    height, width = img.shape[:2]
    short, long = min(height, width), max(height, width)
    new_long = int(size * long / short)
    if size * new_long > max_pixels:
        raise BadImage(
            f"{width}x{height} is too thin a strip: with short side {size} it would have {size * new_long} "
            f"pixels, more than data.max_pixels={max_pixels} allows"
        )
    new_size = (size, new_long) if width <= height else (new_long, size)
    return np.array(Image.fromarray(img).resize(new_size, Image.Resampling.BICUBIC))


def centre_crop(img: np.ndarray, size: int) -> np.ndarray:
    """Central size x size part of (H, W, C), the offsets rounded as in torchvision's `CenterCrop`.

    Offsets are round((side - size) / 2), halves to the even number. A side shorter than `size` is padded with
    black, the odd pixel after the picture.
    """
    missing = [max(size - side, 0) for side in img.shape[:2]]
    img = np.pad(img, [(m // 2, m - m // 2) for m in missing] + [(0, 0)])
    top, left = (round((side - size) / 2) for side in img.shape[:2])
    return np.ascontiguousarray(img[top : top + size, left : left + size])


def _check_jpeg(data: bytes) -> None:
    """Raise BadImage for a JPEG of which a part is garbled: Pillow hides what libjpeg says about it."""
    import simplejpeg

    try:
        simplejpeg.decode_jpeg(data, colorspace="GRAY", min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        # Not what else it may say: it reads fewer kinds of JPEG than Pillow.
        if re.match("Corrupt JPEG data|Premature end", str(error)):
            raise BadImage(_reason(error)) from error


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except _DAMAGE as error:
        raise BadImage(_reason(error)) from error
    if 0 in image.size:
        raise BadImage("no pixels by its header")
    return image


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation 1 to 8; a damaged EXIF block costs the orientation, not the picture."""
    try:
        # PngImageFile.getexif decodes the whole picture to look behind the pixels: read the chunk instead.
        exif = Image.Image.getexif(image)
        if image.format == "PNG" and not exif:
            exif.load(b"Exif\0\0" + _png_exif(data))
        return int(exif.get(_ORIENTATION, 1))
    except _DAMAGE:
        return 1


def _png_exif(data: bytes) -> bytes:
    at = 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"eXIf":
            return data[at + 8 : at + 8 + length]
        at += length + 12
    return b""


def _to_rgb(image: Image.Image, data: bytes) -> Image.Image:
    transparency = image.info.get("transparency")
    image = _high_byte(image)
    if image.format in ("PNG", None) and image.mode in ("L", "RGB") and transparency is not None:
        # tRNS names the transparent colour in the file's bit depth, Pillow compares it with 8-bit pixels.
        image.info["transparency"] = _to_8bit(transparency, depth=data[24])
    return _flatten(image)


def _high_byte(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: convert() would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image


def _flatten(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _to_8bit(value: int | tuple[int, ...], depth: int) -> int | tuple[int, ...]:
    if isinstance(value, tuple):
        return tuple(v >> 8 if depth == 16 else v for v in value)
    return value >> 8 if depth == 16 else value * 255 // (2**depth - 1)


def _reason(error: BaseException) -> str:
    text = str(error).lower()
    if "cannot identify" in text:
        return "not a JPEG, PNG, WEBP or GIF picture"
    if "truncat" in text or isinstance(error, EOFError):
        return "truncated"
    return f"damaged ({error})"
