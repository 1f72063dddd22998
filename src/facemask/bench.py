"""Speed, as ratios of two things measured in turn on one machine: `facemask bench ...`."""

import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import albumentations
import cv2
import hydra.utils
import numpy as np
import timm
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Subset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from facemask.config import ROOT, as_plain
from facemask.data.datamodule import ImageData, to_tensor
from facemask.devices import native_bf16
from facemask.errors import UserError
from facemask.files import write_json
from facemask.modeling.backbones import LITE0_MEAN, LITE0_STD
from facemask.modeling.classifier import Classifier
from facemask.modeling.saved_logits import SavedLogits
from facemask.modeling.teacher import Teacher
from facemask.runs.provenance import collect

BATCH = 64
SIDE = 224
AUGMENTS = ("light", "vit", "deit")
LIBRARIES = {"torch", "torchvision", "timm", "albumentations", "opencv-python-headless", "pillow", "numpy", "facemask"}
LIBRARIES |= {"faiss-cpu", "imagehash", "pytorch-lightning", "transformers", "accelerate"}
# What is asked of loading: ours is at least so many times as fast.
NEEDED = {"torchvision": 3.0, "albumentations": 2.0}


def pairs(a: Callable[[], Any], b: Callable[[], Any], rounds: int) -> list[tuple[float, float]]:
    """Seconds of `a` and of `b`, taken in turn (A B A B ...), after one call of each that is not counted."""

    def seconds(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    a(), b()
    return [(seconds(a), seconds(b)) for _ in range(rounds)]


def ratio(times: Sequence[tuple[float, float]]) -> dict[str, float]:
    """How many times as fast A is as B: ratio of the medians, and lowest and highest ratio of single pairs."""
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    single = [second / first for first, second in times]
    return {"seconds": a, "other_seconds": b, "ratio": b / a, "lowest": min(single), "highest": max(single)}


def machine_kind(hardware: dict[str, Any]) -> str:
    """Name of a kind of machine, fit for a folder: processor, cores and GPUs."""
    processor = re.sub(r"\(.*?\)", "", hardware["processor"])
    parts = [processor, f"{hardware['cores']} cores", *hardware["gpus"]]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


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
    comparisons, steps = [], {}
    for augment in AUGMENTS:
        data = training_data(root, augment)
        batches = min(pictures, len(data.rows("train"))) // BATCH
        if batches == 0:
            raise UserError(f"the training split has fewer than {BATCH} pictures: give a larger folder")
        ours = partial(_read, data.train_dataloader(), batches)
        for name, transform in (("torchvision", _torchvision(augment)), ("albumentations", _uncached(data))):
            result = ratio(pairs(ours, partial(_read, _image_folder(data, transform), batches), rounds))
            rates = (batches * BATCH / result.pop("seconds"), batches * BATCH / result.pop("other_seconds"))
            comparisons.append(
                {"augment": augment, "against": name, "ours_per_s": rates[0], "other_per_s": rates[1], **result}
            )
        steps[augment] = _steps(data, min(pictures, len(data.rows("train"))))
    content = {
        "command": f"facemask bench data --rounds {rounds} --pictures {pictures}",
        "source": "a folder" if root else "drawn faces",
        "median_size": [int(data.table[side].median()) for side in ("width", "height")],
        "pictures_per_round": batches * BATCH,
        "rounds": rounds,
        "comparisons": comparisons,
        "milliseconds_per_picture": steps,
    }
    file = write_result(content, "data", out)
    _print(content)
    return file


def write_result(content: dict[str, Any], name: str, out: Path) -> Path:
    """Write figures, and on what they were measured, to out/bench/<machine kind>/<name>.json."""
    provenance, _ = collect()
    versions = {name: version for name, version in provenance["versions"].items() if name.lower() in LIBRARIES}
    measured_on = {
        "load_average": os.getloadavg()[0],
        "hardware": provenance["hardware"],
        "versions": versions,
        "git": provenance["git"]["commit"],
    }
    file = out / "bench" / machine_kind(provenance["hardware"]) / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, content | measured_on)
    return file


# A step on saved logits takes at most so many times as long as one without a teacher.
SAVED_AT_MOST = 1.03


def bench_teacher(rounds: int, side: int, batch: int, out: Path) -> Path:
    """Steps of a DeiT-Ti with a distillation token in turn: without a teacher, with saved logits, asking the teacher.

    A step is forward, backward and optimizer on a batch in memory, on this machine's CPU, at the precision of training.
    Teachers have random weights, which take the time of any others. Returns the JSON file.
    """
    content: dict[str, Any] = {
        "command": f"facemask bench teacher --rounds {rounds} --side {side} --batch {batch}",
        "precision": "bf16-mixed" if native_bf16("cpu") else "32-true",
        "comparisons": [],
    }
    for name in ("efficientnet_lite0", "resnet_small"):
        cfg = _config(f"teacher={name}", "model=deit_distilled", "distill=soft", f"model.img_size={side}")
        views = _views(batch, side)
        teacher = Teacher([timm.create_model(cfg.teacher.name, num_classes=0)], 2, 1, side, LITE0_MEAN, LITE0_STD)
        with tempfile.TemporaryDirectory() as folder:
            saved = SavedLogits(Path(folder), {}, batch, 2)
            plain = _step(cfg, {"_target_": "facemask.modeling.objectives.Labels"}, views)
            online = _step(cfg, as_plain(cfg.distill), views, teacher)
            kept = _step(cfg, as_plain(cfg.distill), views, teacher, saved)
            for what, pair in (("saved / no teacher", (plain, kept)), ("asked / saved", (kept, online))):
                content["comparisons"].append({"teacher": name, "what": what, **ratio(pairs(*pair, rounds))})
    table = Table(title=f"A step of {cfg.model.name} at {side} pixels, batch {batch}, {content['precision']}")
    for column in ("teacher", "times as long", "ratio", "spread", "asked"):
        table.add_column(column, no_wrap=True)
    for row in content["comparisons"]:
        asked = f"{SAVED_AT_MOST}{' missed' if row['ratio'] > SAVED_AT_MOST else ''}" if "no" in row["what"] else ""
        spread = f"{row['lowest']:.3f}-{row['highest']:.3f}"
        table.add_row(row["teacher"], row["what"], f"{row['ratio']:.3f}", spread, asked)
    Console(highlight=False).print(table)
    return write_result(content, "teacher", out)


def bench_determinism(rounds: int, side: int, batch: int, out: Path) -> Path:
    """A step of a DeiT-Ti as `trainer.deterministic=true` computes it against one without, in turn, on this CPU.

    Deterministic mode also fills newly allocated memory (torch.utils.deterministic.fill_uninitialized_memory).
    """
    cfg = _config("model=deit", f"model.img_size={side}")
    views = _views(batch, side)
    step = _step(cfg, {"_target_": "facemask.modeling.objectives.Labels"}, views)

    def run(deterministic: bool) -> None:
        torch.use_deterministic_algorithms(deterministic)
        try:
            step()
        finally:
            torch.use_deterministic_algorithms(False)

    figures = ratio(pairs(partial(run, False), partial(run, True), rounds))
    content = {
        "command": f"facemask bench determinism --rounds {rounds} --side {side} --batch {batch}",
        "precision": "bf16-mixed" if native_bf16("cpu") else "32-true",
        "deterministic / not": figures,
    }
    spread = f"{figures['lowest']:.3f}-{figures['highest']:.3f}"
    text = f"a deterministic step takes {figures['ratio']:.3f} times as long ({spread})"
    Console(highlight=False).print(f"{text}: {cfg.model.name}, {side} pixels, batch {batch}, {content['precision']}")
    return write_result(content, "determinism", out)


def _views(batch: int, side: int) -> dict[str, Any]:
    pixels = torch.randint(0, 256, (batch, 3, side, side), generator=torch.Generator().manual_seed(0)).byte()
    rows = torch.arange(batch)
    return {"pixels": pixels, "target": torch.eye(2)[rows % 2], "row": rows, "epoch": torch.zeros_like(rows)}


def _step(
    cfg: DictConfig,
    objective: dict[str, Any],
    views: dict[str, Any],
    teacher: Teacher | None = None,
    saved: SavedLogits | None = None,
) -> Callable[[], None]:
    student = Classifier(as_plain(cfg.model), objective, as_plain(cfg.optim), ["a", "b"], 0, len(views["row"]))
    student.log_dict = lambda *_, **__: None  # type: ignore[method-assign] # there is no trainer
    if teacher is not None:
        student.attach_teacher(teacher, torch.zeros(len(views["row"]), dtype=torch.long), saved)
    optimizer = torch.optim.AdamW(student.parameters(), 1e-4)

    def step() -> None:
        batch = student.on_before_batch_transfer(views, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=native_bf16("cpu")):
            loss = student.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _read(loader: DataLoader, batches: int) -> None:
    for _ in islice(loader, batches):
        pass


def training_data(root: Path | None, augment: str) -> ImageData:
    """The pictures of a bench, prepared, at 224 pixels. root None: drawn faces."""
    source = ["data=folder", f"data.root={root}"] if root else ["data=synthetic", "data.num_images=800"]
    overrides = [*source, f"augment={augment}", f"model.img_size={SIDE}", f"data.batch_size={BATCH}"]
    cfg = _config(*overrides, *(["data.on_bad_file=skip"] if root else []))
    augmentation = hydra.utils.instantiate(cfg.augment, _convert_="all")  # albumentations wants plain lists
    data: ImageData = hydra.utils.instantiate(cfg.data, _partial_=True)(augmentation=augmentation)
    data.prepare()
    return data


def _config(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", [*overrides])


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
    for name, step in [
        *((type(step).__name__, albumentations.Compose([step])) for step in transforms),
        ("tensor", None),
    ]:
        start = time.perf_counter()
        views = [to_tensor(view) if step is None else step(image=view)["image"] for view in views]
        took[name] = 1000 * (time.perf_counter() - start) / count
    return took


def _print(content: dict[str, Any]) -> None:
    table = Table(title=f"Training views of {content['source']} at {SIDE} pixels, images/s of one core")
    for column in ("augment", "ours", "ImageFolder and", "theirs", "ratio", "spread", "asked"):
        table.add_column(column, justify="left" if column in ("augment", "ImageFolder and") else "right", no_wrap=True)
    for row in content["comparisons"]:
        needed = NEEDED[row["against"]]
        met = "" if row["ratio"] >= needed else " missed"
        rates = f"{row['ours_per_s']:.0f}", row["against"], f"{row['other_per_s']:.0f}"
        spread = f"{row['lowest']:.1f}-{row['highest']:.1f}"
        table.add_row(row["augment"], *rates, f"{row['ratio']:.1f}", spread, f"{needed:.0f}{met}")
    console = Console(highlight=False)
    console.print(table)
    for augment, steps in content["milliseconds_per_picture"].items():
        console.print(f"{augment}, ms a picture: " + ", ".join(f"{name} {ms:.3f}" for name, ms in steps.items()))
