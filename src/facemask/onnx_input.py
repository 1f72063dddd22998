"""Prepares a picture for the model.onnx beside this file; needs Pillow and NumPy alone.

`facemask export --to onnx` copies this file into the folder as preprocess.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def prepare(picture: Any) -> np.ndarray:
    """A file or an opened picture -> what the model's input `pixel_values` takes, float32 (1, 3, S, S)."""
    view = json.loads(Path(__file__).with_name("preprocessing.json").read_text(encoding="utf-8"))
    image = ImageOps.exif_transpose(picture if isinstance(picture, Image.Image) else Image.open(picture))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image, short, size = image.convert("RGB"), view["resize_short_side"], view["crop"]
    long = int(short * max(image.size) / min(image.size))
    image = image.resize((short, long) if image.width <= image.height else (long, short), Image.Resampling.BICUBIC)
    left, top = (round((side - size) / 2) for side in image.size)
    pixels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float32) / 255
    return ((pixels - np.float32(view["mean"])) / np.float32(view["std"])).transpose(2, 0, 1)[None]
