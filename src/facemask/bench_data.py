"""Loading of training batches, ours against torchvision's, in turn: `facemask bench data`."""

import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import albumentations
import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from facemask.bench import asked, console, pairs, rates, show, spread, write_result
from facemask.config import composed
from facemask.data.datamodule import ImageData, to_tensor
from facemask.errors import UserError
from facemask.train import build_data

BATCH = 64
SIDE = 224
DRAWN = ["data=synthetic", "data.num_images=800"]
AUGMENTS = ("light", "vit", "deit")
# What is asked of loading: ours is at least so many times as fast.
NEEDED = {"torchvision": 3.0, "albumentations": 2.0}


def bench_data(root: Path | None, rounds: int, pictures: int, out: Path) -> Path:
    """Loading of training batches at 224 pixels by one core with everything cached, ours against torchvision's.

    The others are `ImageFolder` on the same pictures, (a) with torchvision's equivalent transforms, (b) with the same
    albumentations pipeline, uncached. All end in a collated batch of uint8 pixels; with mixup and CutMix the others
    mix within the batch as torchvision does, in float32.

    Args:
        root: one sub-folder per class; None: drawn faces.
        rounds: pairs per comparison.
        pictures: at most so many per round.
        out: parent of bench/<machine kind>/data.json.

    Returns: the JSON file.
    """
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    comparisons: list[dict[str, Any]] = []
    steps = {}
    for augment in AUGMENTS:
        data = training_data(root, augment)
        batches = min(pictures, len(data.rows("train"))) // BATCH
        if batches == 0:
            raise UserError(f"the training split has fewer than {BATCH} pictures: give a larger folder")
        ours = partial(_read, data.train_dataloader(), batches)
        for name, transform in (("torchvision", _torchvision(augment)), ("albumentations", _uncached(data))):
            times = pairs(ours, partial(_read, _image_folder(data, transform), batches), rounds)
            comparisons.append({"augment": augment, "against": name, **rates(times, batches * BATCH)})
        steps[augment] = _steps(data, min(pictures, len(data.rows("train"))))
    source = "a folder" if root else "drawn faces"
    shown = []
    for row in comparisons:
        per_s = f"{row['ours_per_s']:.0f}", f"{row['other_per_s']:.0f}"
        verdict = asked(row, NEEDED[row["against"]])
        shown.append([f"{row['augment']}, {row['against']}", *per_s, *spread(row, 1), verdict])
    columns = ["augment, ImageFolder and", "ours", "theirs", "ratio", "spread", "asked"]
    show(f"Training views of {source} at {SIDE} pixels, images/s of one core", columns, shown)
    for augment, took in steps.items():
        console.print(f"{augment}, ms a picture: " + ", ".join(f"{name} {ms:.3f}" for name, ms in took.items()))
    content = {
        "source": source,
        "median_size": [int(data.table[side].median()) for side in ("width", "height")],
        "pictures_per_round": batches * BATCH,
        "rounds": rounds,
        "comparisons": comparisons,
        "milliseconds_per_picture": steps,
    }
    return write_result(content, "data", out, rounds=rounds, pictures=pictures)


def training_data(root: Path | None, augment: str) -> ImageData:
    """The pictures of a bench, prepared, at 224 pixels. root None: drawn faces."""
    source = ["data=folder", f"data.root={root}", "data.on_bad_file=skip"] if root else DRAWN
    data = build_data(composed(*source, f"augment={augment}", f"model.img_size={SIDE}", f"data.batch_size={BATCH}"))
    data.prepare()
    return data


def _read(loader: DataLoader, batches: int) -> None:
    for _ in islice(loader, batches):
        pass


def _torchvision(augment: str) -> Callable[[Image.Image], Any]:
    """The transforms of conf/augment in torchvision's terms."""
    smallest = 0.35 if augment == "light" else 0.08
    steps: list[Any] = [v2.RandomResizedCrop(SIDE, (smallest, 1.0)), v2.RandomHorizontalFlip()]
    if augment == "light":
        steps += [v2.RandomApply([v2.ColorJitter(0.3, 0.3, 0.3)], 0.8)]
    if augment == "deit":
        steps += [v2.RandAugment(2, 9)]
    return v2.Compose([*steps, v2.PILToTensor(), *([v2.RandomErasing(0.25)] if augment == "deit" else [])])


def _uncached(data: ImageData) -> Callable[[Image.Image], torch.Tensor]:
    transform: Any = data.augmentation.transform
    return lambda image: to_tensor(transform(image=np.asarray(image))["image"])


def _image_folder(data: Any, transform: Callable[[Image.Image], Any]) -> DataLoader:
    """Training batches of the same pictures from torchvision's `ImageFolder`."""
    folder = ImageFolder(str(data.root), transform, allow_empty=True)
    wanted = set(data.table["path"].iloc[data.rows("train")])
    rows = [i for i, (path, _) in enumerate(folder.samples) if Path(path).relative_to(data.root).as_posix() in wanted]
    if data.augmentation.mix_prob == 0:
        return DataLoader(Subset(folder, rows), BATCH, shuffle=True, drop_last=True)
    classes = len(folder.classes)
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)])

    def collate(items: list[Any]) -> Any:
        pixels, labels = default_collate(items)
        return mix(pixels.float(), labels)

    return DataLoader(Subset(folder, rows), BATCH, shuffle=True, drop_last=True, collate_fn=collate)


def _steps(data: ImageData, count: int) -> dict[str, float]:
    """Milliseconds per picture of each step of a training view."""
    views, took = [data.pixels[row] for row in data.cache_rows[data.rows("train")[:count]]], {}
    transforms = data.augmentation.transform.transforms  # type: ignore[union-attr]
    named: list[Any] = [(type(step).__name__, albumentations.Compose([step])) for step in transforms]
    for name, step in [*named, ("tensor", None)]:
        start = time.perf_counter()
        views = [to_tensor(view) if step is None else step(image=view)["image"] for view in views]
        took[name] = 1000 * (time.perf_counter() - start) / count
    return took
