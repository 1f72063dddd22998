import csv
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from facemask.data.images import (
    SUFFIXES,
    BadImage,
    Header,
    centre_crop,
    check_pixels,
    decode,
    read_header,
    resize_short,
)

RGB = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
GREY = RGB[:, :, 0]


def save(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def checksum(body: bytes) -> bytes:
    return struct.pack(">I", zlib.crc32(body))


def png(
    samples: np.ndarray, colour: int, *extra: tuple[bytes, bytes], late: tuple[bytes, bytes] | None = None
) -> bytes:
    """A PNG written by hand, since Pillow writes no 16-bit colour; samples (H, W, channels)."""
    height, width = samples.shape[:2]
    depth = 8 * samples.dtype.itemsize
    lines = b"".join(b"\0" + line.astype(samples.dtype.newbyteorder(">")).tobytes() for line in samples)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)), *extra]
    chunks += [(b"IDAT", zlib.compress(lines)), *([late] if late else []), (b"IEND", b"")]
    packed = [struct.pack(">I", len(body)) + kind + body + checksum(kind + body) for kind, body in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[..., 3:].astype(float) / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def test_suffixes() -> None:
    assert SUFFIXES == (".jpg", ".jpeg", ".png", ".webp", ".gif")


def test_rgb_is_exact_in_lossless_formats() -> None:
    for data, format_ in [
        (save(Image.fromarray(RGB), "PNG"), "PNG"),
        (save(Image.fromarray(RGB), "WEBP", lossless=True), "WEBP"),
    ]:
        pixels = decode(data)
        assert pixels.dtype == np.uint8
        assert pixels.flags.c_contiguous
        assert pixels.flags.writeable
        assert np.array_equal(pixels, RGB)
        assert read_header(data) == Header(30, 20, format_)


def test_jpeg_is_pillows() -> None:
    data = save(Image.fromarray(RGB), "JPEG", quality=90)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))
    assert read_header(data) == Header(30, 20, "JPEG")


def test_grey_and_one_bit() -> None:
    grey = np.repeat(GREY[..., None], 3, axis=2)
    assert np.array_equal(decode(save(Image.fromarray(GREY), "PNG")), grey)
    bits = GREY > 127
    expected = np.repeat(np.where(bits, 255, 0)[..., None], 3, axis=2)
    assert np.array_equal(decode(save(Image.fromarray(bits), "PNG")), expected)


def test_rgba_is_flattened_over_white() -> None:
    rgba = np.dstack([RGB, GREY])
    rgba[:5, :, 3] = 0
    rgba[5:10, :, 3] = 255
    pixels = decode(save(Image.fromarray(rgba), "PNG"))
    assert np.array_equal(pixels[:5], np.full((5, 30, 3), 255))
    assert np.array_equal(pixels[5:10], RGB[5:10])
    assert np.abs(pixels - over_white(rgba)).max() <= 1
    webp = save(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)
    assert np.array_equal(decode(webp), pixels)


def test_grey_with_alpha() -> None:
    pixels = decode(png(np.array([[[10, 255], [10, 0], [200, 102]]], dtype=np.uint8), colour=4))
    assert pixels[0].tolist() == [[10] * 3, [255] * 3, [233] * 3]  # 0.4 * 200 + 0.6 * 255


@pytest.mark.parametrize("transparency", [1, b"\xff\x00\x66"])
def test_palette_transparency_is_flattened_over_white(transparency: int | bytes) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "L")
    image = image.convert("P")
    image.putpalette([250, 0, 0, 0, 250, 0, 0, 0, 200])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = decode(save(image, "PNG", transparency=transparency))
    last = [0, 0, 200] if transparency == 1 else [153, 153, 233]  # alpha 0x66 = 0.4
    assert pixels[0].tolist() == [[250, 0, 0], [255, 255, 255], last]


def test_opaque_palette() -> None:
    image = Image.fromarray(RGB).quantize(64)
    assert np.array_equal(decode(save(image, "PNG")), np.asarray(image.convert("RGB")))
    assert np.array_equal(decode(save(image, "GIF")), np.asarray(image.convert("RGB")))


def test_gif_first_frame_and_transparency() -> None:
    red, blue = (Image.new("RGB", (4, 3), colour) for colour in ("red", "blue"))
    data = save(red, "GIF", save_all=True, append_images=[blue])
    assert read_header(data) == Header(4, 3, "GIF")
    assert np.unique(decode(data).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "L").convert("P")
    palette.putpalette([9, 9, 9, 50, 60, 70])
    assert decode(save(palette, "GIF", transparency=0))[0].tolist() == [[255] * 3, [50, 60, 70]]


def test_cmyk_with_and_without_adobe_marker() -> None:
    cmyk = np.zeros((16, 48, 4), dtype=np.uint8)
    cmyk[:, 16:32] = (255, 0, 0, 0)  # cyan
    cmyk[:, 32:] = (0, 0, 0, 255)  # black
    data = save(Image.fromarray(cmyk, "CMYK"), "JPEG", quality=100)
    assert b"Adobe" in data
    at = data.index(b"\xff\xee")
    without = data[:at] + data[at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0] :]
    for file in (data, without):
        pixels = decode(file).astype(int)
        for left, colour in [(0, (255, 255, 255)), (16, (0, 255, 255)), (32, (0, 0, 0))]:
            assert np.abs(pixels[:, left : left + 16] - colour).max() <= 3


def test_16_bit_keeps_the_high_byte() -> None:
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, axis=2)
    assert np.array_equal(decode(png(ramp[..., None], colour=0)), expected)
    colour = np.dstack([ramp, ramp[::-1], ramp.T])
    assert np.array_equal(decode(png(colour, colour=2)), colour >> 8)
    opaque = np.dstack([colour, np.full_like(ramp, 65535)])
    assert np.array_equal(decode(png(opaque, colour=6)), colour >> 8)
    eight = np.repeat(RGB.astype(np.uint16) * 257, 1, axis=2)  # 8 bits stretched to 16 come back exactly
    assert np.array_equal(decode(png(eight, colour=2)), RGB)


def test_transparent_colour_of_16_bit_files() -> None:
    grey = np.array([[[0x1234], [0xFFFF], [0x8000]]], dtype=np.uint16)
    data = png(grey, 0, (b"tRNS", struct.pack(">H", 0x1234)))
    assert decode(data)[0, :, 0].tolist() == [255, 255, 0x80]
    colour = np.array([[[0x1234, 0x2345, 0x3456], [1, 2, 3]]], dtype=np.uint16)
    data = png(colour, 2, (b"tRNS", struct.pack(">HHH", 0x1234, 0x2345, 0x3456)))
    assert decode(data)[0].tolist() == [[255, 255, 255], [0, 0, 0]]


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("format_", ["PNG", "WEBP", "JPEG"])
def test_exif_orientation(value: int, format_: str) -> None:
    options = {"lossless": True} if format_ == "WEBP" else {}
    data = save(Image.fromarray(RGB), format_, exif=orientation(value), **options)
    pixels = decode(data)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.array_equal(pixels, expected)
    assert read_header(data) == Header(*((20, 30) if value >= 5 else (30, 20)), format_)
    assert pixels.shape == ((30, 20, 3) if value >= 5 else (20, 30, 3))


def test_orientation_six_turns_clockwise() -> None:
    data = save(Image.fromarray(RGB), "PNG", exif=orientation(6))
    assert np.array_equal(decode(data), np.rot90(RGB, -1))


def test_orientation_after_the_pixels_of_a_png() -> None:
    data = png(RGB, 2, late=(b"eXIf", orientation(6).tobytes()[6:]))
    assert read_header(data) == Header(20, 30, "PNG")
    assert np.array_equal(decode(data), np.rot90(RGB, -1))


def test_senseless_orientation_is_ignored() -> None:
    for exif in (orientation(9), b"Exif\0\0garbage"):
        data = save(Image.fromarray(RGB), "JPEG", exif=exif)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow: corrupt EXIF data
            assert read_header(data) == Header(30, 20, "JPEG")
            assert decode(data).shape == (20, 30, 3)


def test_a_jpeg_with_several_views_is_a_jpeg() -> None:
    view = Image.fromarray(RGB)
    data = save(view, "MPO", save_all=True, append_images=[Image.new("RGB", (30, 20))])
    assert read_header(data) == Header(30, 20, "JPEG")
    assert np.array_equal(decode(data), decode(save(view, "JPEG")))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html>not found</html>", "not a JPEG, PNG, WEBP or GIF picture"),
        (save(Image.fromarray(RGB), "BMP"), "not a JPEG, PNG, WEBP or GIF picture"),
        (save(Image.fromarray(RGB), "JPEG")[:60], "truncated"),
    ],
)
def test_no_picture(data: bytes, reason: str) -> None:
    for read in (read_header, decode):
        with pytest.raises(BadImage) as caught:
            read(data)
        assert caught.value.reason == str(caught.value) == reason


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "GIF"])
def test_cut_files_are_refused(format_: str) -> None:
    data = save(Image.fromarray(RGB), format_)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(BadImage) as caught:
        decode(data[: len(data) * 2 // 3])
    assert caught.value.reason.startswith(("truncated", "damaged ("))


def test_cut_jpeg_has_a_readable_header() -> None:
    data = save(Image.fromarray(RGB), "JPEG", quality=95)
    data = data[: len(data) - 200]
    assert read_header(data) == Header(30, 20, "JPEG")
    with pytest.raises(BadImage, match=r"^truncated$"):
        decode(data)


def test_max_pixels_is_checked_on_the_header() -> None:
    data = save(Image.fromarray(RGB), "PNG")
    assert decode(data, max_pixels=600).shape == (20, 30, 3)
    sentence = "30x20 is 600 pixels, more than data.max_pixels=599 allows"
    with pytest.raises(BadImage, match=f"^{sentence}$"):
        decode(data, max_pixels=599)
    cut = data[: data.index(b"IDAT") + 8]  # would be called truncated if a pixel were decoded
    with pytest.raises(BadImage, match=f"^{sentence}$"):
        decode(cut, max_pixels=599)
    with pytest.raises(BadImage, match=r"^64000001x1 is 64000001 pixels, more than data.max_pixels=64000000 allows$"):
        check_pixels(64_000_001, 1)
    check_pixels(64_000_000, 1)


def test_pillows_own_limit_is_off() -> None:
    side = 14_000  # 196 M pixels: Pillow's own limits are 89 M (warning) and 179 M (error)
    chunk = zlib.compress(b"\0" * (side * (side // 8 + 1)), 1)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + checksum(kind + body)
        for kind, body in [(b"IHDR", header), (b"IDAT", chunk), (b"IEND", b"")]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_header(data) == Header(side, side, "PNG")
        with pytest.raises(BadImage, match="196000000 pixels"):
            decode(data)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_blocks": 4}])
def test_a_jpeg_garbled_in_the_middle_is_named(options: dict[str, object]) -> None:
    smooth = np.asarray(Image.fromarray(RGB).resize((300, 200), Image.Resampling.BICUBIC))
    data = save(Image.fromarray(smooth), "JPEG", quality=90, **options)
    assert decode(data).shape == (200, 300, 3)
    for seed in range(10):
        damaged = bytearray(data)
        middle = len(data) // 2
        damaged[middle : middle + 400] = np.random.default_rng(seed).bytes(400)
        with pytest.raises(BadImage, match=r"^(damaged \(|truncated$)"):
            decode(bytes(damaged))


def test_damaged_png_checksum_is_named() -> None:
    data = bytearray(save(Image.fromarray(RGB), "PNG"))
    data[data.index(b"IDAT") + 40] ^= 0xFF
    with pytest.raises(BadImage, match=r"^damaged \("):
        decode(bytes(data))


@pytest.mark.parametrize(
    ("height", "width", "size", "shape"),
    [
        (20, 30, 10, (10, 15)),
        (30, 20, 10, (15, 10)),
        (100, 167, 112, (112, 187)),  # 112 * 167 / 100 = 187.04
        (167, 100, 113, (188, 113)),  # 113 * 167 / 100 = 188.71, rounded down
        (7, 7, 9, (9, 9)),
        (1, 300, 4, (4, 1200)),
    ],
)
def test_resize_short_rounds_down(height: int, width: int, size: int, shape: tuple[int, int]) -> None:
    assert resize_short(np.zeros((height, width, 3), np.uint8), size).shape == (*shape, 3)


def test_resize_short_is_antialiased() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    small = resize_short(stripes, 16)
    assert np.abs(small[:, 2:-2].astype(int) - 127).max() <= 6  # without antialiasing: 0 or 255


def test_resize_short_refuses_thin_strips() -> None:
    strip = np.zeros((1, 5000, 3), np.uint8)
    with pytest.raises(BadImage, match=r"^5000x1 is too thin a strip: with short side 224 it would have 250880000 "):
        resize_short(strip, 224)
    assert resize_short(strip, 10, max_pixels=500_000).shape == (10, 50_000, 3)


def test_centre_crop_by_hand() -> None:
    line = np.arange(7, dtype=np.uint8)
    img = np.repeat((line[:, None] * 10 + line)[..., None], 3, axis=2)
    assert centre_crop(img, 3)[:, :, 0].tolist() == [[22, 23, 24], [32, 33, 34], [42, 43, 44]]
    assert centre_crop(img, 4)[0, 0, 0] == 22  # offset 1.5 rounds to the even 2
    assert centre_crop(img, 2)[0, 0, 0] == 22  # offset 2.5 rounds to the even 2
    padded = centre_crop(img[:2, :2], 5)[:, :, 0]
    assert padded.tolist() == [[0] * 5, [0, 0, 1, 0, 0], [0, 10, 11, 0, 0], [0] * 5, [0] * 5]


def test_geometry_is_torchvisions() -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    bicubic = pytest.importorskip("torchvision.transforms").InterpolationMode.BICUBIC
    rng = np.random.default_rng(1)
    for _ in range(60):
        height, width, size, crop = (int(n) for n in rng.integers(1, 80, 4))
        img = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        resized = functional.resize(Image.fromarray(img), size, bicubic, antialias=True)
        assert np.array_equal(resize_short(img, size), np.asarray(resized)), (height, width, size)
        cropped = functional.center_crop(Image.fromarray(img), crop)
        assert np.array_equal(centre_crop(img, crop), np.asarray(cropped)), (height, width, crop)


BAD = {
    "garbled_middle.jpg": "damaged (Corrupt JPEG data: 10 extraneous bytes before marker 0xd9)",
    "bomb_1bit_12000.png": "12000x12000 is 144000000 pixels, more than data.max_pixels=64000000 allows",
    "html_error_page.jpg": "not a JPEG, PNG, WEBP or GIF picture",
    "huge_header.png": "60000x60000 is 3600000000 pixels, more than data.max_pixels=64000000 allows",
    "text_named.jpg": "not a JPEG, PNG, WEBP or GIF picture",
    "truncated_half.jpg": "truncated",
    "truncated_header.jpg": "truncated",
    "zero_byte.jpg": "empty file",
}


def test_every_odd_file() -> None:
    if not os.environ.get("FACEMASK_DATA"):
        pytest.skip("FACEMASK_DATA is not set: no real pictures")
    folder = Path(os.environ["FACEMASK_DATA"]).parent / "facemask_bad_inputs"
    with (folder / "manifest.csv").open(newline="") as file:
        names = [row["path"] for row in csv.DictReader(file)]
    assert len(names) == 21
    assert set(BAD) < set(names)
    shapes = {}
    for name in names:
        data = (folder / name).read_bytes()
        if name in BAD:
            with pytest.raises(BadImage) as caught:
                decode(data)
            assert caught.value.reason == BAD[name], name
            continue
        pixels = decode(data)
        header = read_header(data)
        assert pixels.shape == (header.height, header.width, 3), name
        shapes[name] = pixels
        # Another decoder (OpenCV) as reference; it does not flatten transparency.
        flags = (
            cv2.IMREAD_UNCHANGED if name in ("palette_transparent.png", "rgba_transparent.png") else cv2.IMREAD_COLOR
        )
        reference = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
        rgb = reference[..., 2::-1] if reference.shape[2] == 3 else over_white(reference[..., [2, 1, 0, 3]])
        assert np.abs(pixels - rgb.astype(float)).max() <= 1, name
    assert len(shapes) == 13
    assert read_header((folder / "jpeg_named.png").read_bytes()).format == "JPEG"
    assert shapes["exif_orientation_6.jpg"].shape == (200, 115, 3)
    assert (shapes["rgba_transparent.png"][:50] == 255).all()


def test_text_chunks_do_not_matter() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "eXIf")
    assert np.array_equal(decode(save(Image.fromarray(RGB), "PNG", pnginfo=info)), RGB)
