"""Training loops to compare ours with, each in a process of its own: `python -m facemask.bench_peers NAME SETTINGS`.

They train for ever and tell the time after every step; `facemask.bench_train` watches them and stops them. Each is
written as its own documentation and examples write it.
"""

import json
import os
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from facemask.parent import die_with_parent

TICKS = "FACEMASK_TICKS"  # environment variable: file descriptor that takes one line per step


def tick(**facts: Any) -> None:
    """Tell that a step is over; with `start`, that something else than steps came before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    os.write(int(os.environ[TICKS]), (json.dumps({"time": time.perf_counter(), **facts}) + "\n").encode())


def bare(settings: dict[str, Any]) -> None:
    """The limit of eager PyTorch: forward, backward and AdamW on one batch that lies in memory."""
    import timm
    from timm.layers import set_fused_attn

    set_fused_attn(torch.cuda.is_available())  # the faster choice, as in facemask.modeling.backbones
    device = _device()
    model = timm.create_model(settings["model"], num_classes=2, img_size=settings["side"]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    images = torch.randn(settings["batch"], 3, settings["side"], settings["side"], device=device)
    labels = torch.arange(settings["batch"], device=device) % 2
    while True:
        with _autocast(settings):
            loss = nn.functional.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        tick()


def timm_loop(settings: dict[str, Any]) -> None:
    """The loop of timm's train.py: its loader, optimizer factory and tasks.

    With settings["teacher"] its token distillation from a teacher that is asked at every step.
    """
    import timm
    from timm.optim import create_optimizer_v2
    from timm.task import ClassificationTask, TokenDistillationTask

    device = _device()
    model = timm.create_model(settings["model"], num_classes=2, img_size=settings["side"]).to(device)
    dataset: Any = timm.data.create_dataset("", settings["root"])
    wanted = set(settings["pictures"])
    dataset.reader.samples = [sample for sample in dataset.reader.samples if sample[0] in wanted]
    loader = timm.data.create_loader(
        dataset,
        input_size=(3, settings["side"], settings["side"]),
        batch_size=settings["batch"],
        is_training=True,
        num_workers=settings["workers"],
        persistent_workers=settings["workers"] > 0,
        device=device,
    )
    options: dict[str, Any] = (
        {"opt": "sgd", "momentum": 0.9} if settings["defaults"] else {"opt": "adamw", "weight_decay": 0.05}
    )
    optimizer = create_optimizer_v2(model, lr=1e-4, **options)
    if settings.get("teacher"):
        teacher = timm.create_model(settings["teacher"], num_classes=2)
        task: Any = TokenDistillationTask(model, teacher, device=device, verbose=False)
    else:
        task = ClassificationTask(model, device=device, verbose=False)
    task.train()
    while True:
        tick(start=True)
        for images, labels in loader:
            with _autocast(settings):
                loss = task(images, labels)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tick()


def hugging_face(settings: dict[str, Any]) -> None:
    """Hugging Face's Trainer as in its image classification example: image processor, torchvision's transforms."""
    import timm
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2
    from transformers import (
        Trainer,
        TrainerCallback,
        TrainingArguments,
        ViTConfig,
        ViTForImageClassification,
        ViTImageProcessor,
    )

    side = settings["side"]
    shape: Any = timm.create_model(settings["model"], num_classes=0, img_size=side)
    width = shape.embed_dim
    make_config: Any = ViTConfig  # whose signature leaves out what its base class takes
    config = make_config(
        hidden_size=width,
        num_hidden_layers=len(shape.blocks),
        num_attention_heads=shape.blocks[0].attn.num_heads,
        intermediate_size=4 * width,
        image_size=side,
        num_labels=2,
    )
    processor = ViTImageProcessor(size={"height": side, "width": side})
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(side),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(processor.image_mean, processor.image_std),
        ]
    )
    folder = ImageFolder(settings["root"], transform, allow_empty=True)
    wanted = set(settings["pictures"])
    kept = [sample for sample in folder.samples if sample[0] in wanted]
    labels = sorted({label for _, label in kept})  # a folder beside the classes counts as one
    folder.samples = [(path, labels.index(label)) for path, label in kept]

    def collate(items: list[Any]) -> dict[str, torch.Tensor]:
        images, targets = zip(*items, strict=True)
        return {"pixel_values": torch.stack(images), "labels": torch.tensor(targets)}

    class Ticker(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            tick(start=True)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            tick()

    ours: dict[str, Any] = {} if settings["defaults"] else {
        "per_device_train_batch_size": settings["batch"],
        "bf16": settings["precision"] == "bf16",
        "fp16": settings["precision"] == "fp16",
        "dataloader_num_workers": settings["workers"],
    }  # fmt: skip
    arguments = TrainingArguments(
        output_dir=settings["scratch"],
        max_steps=10**6,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        use_cpu=not torch.cuda.is_available(),
        **ours,
    )
    Trainer(ViTForImageClassification(config), arguments, collate, folder, callbacks=[Ticker()]).train()


def ticker() -> Any:
    """Lightning callback for `train.py +callbacks.tick._target_=facemask.bench_peers.ticker`."""
    import pytorch_lightning as pl

    whole = {"step": 0.0, "since": 0.0}

    def start(trainer: Any, *_: Any) -> None:
        whole["since"] = time.perf_counter()
        if trainer.is_global_zero:  # other ranks go at its pace, and have no descriptor
            tick(start=True)

    def step(trainer: Any, *_: Any) -> None:
        if not trainer.is_global_zero:
            return
        whole["step"] += time.perf_counter() - whole["since"]
        whole["since"] = time.perf_counter()
        parts = getattr(trainer.profiler, "recorded_durations", {})
        seconds = {"step": whole["step"], **{name: sum(durations) for name, durations in parts.items()}}
        tick(steps=trainer.global_step, seconds=seconds)

    return pl.callbacks.LambdaCallback(on_train_epoch_start=start, on_train_batch_end=step)


def clock(file: str) -> Any:
    """Lightning callback that writes [seconds since the first step, validation accuracy] of every epoch to a file."""
    import pytorch_lightning as pl

    begin, curve = [0.0], list[tuple[float, float]]()

    def start(*_: Any) -> None:
        begin[0] = time.perf_counter()

    def validated(trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            curve.append((time.perf_counter() - begin[0], float(trainer.callback_metrics["val/accuracy"])))
            Path(file).write_text(json.dumps(curve))

    return pl.callbacks.LambdaCallback(on_train_start=start, on_validation_end=validated)


def parts() -> Any:
    """Lightning's profiler, which takes the parts of our own step, too.

    For `train.py +trainer.profiler._target_=facemask.bench_peers.parts`.
    """
    from pytorch_lightning.profilers import SimpleProfiler

    from facemask.modeling.classifier import Classifier

    profiler = SimpleProfiler()

    def timed(name: str) -> None:
        method = getattr(Classifier, name)

        def wrapped(*arguments: Any, **options: Any) -> Any:
            with profiler.profile(name):
                return method(*arguments, **options)

        setattr(Classifier, name, wrapped)

    for name in ("on_before_batch_transfer", "_ask_teacher", "log_dict", "_add"):
        timed(name)
    return profiler


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _autocast(settings: dict[str, Any]) -> AbstractContextManager:
    kind = torch.float16 if settings["precision"] == "fp16" else torch.bfloat16
    return torch.autocast(_device().type, kind, enabled=settings["precision"] != "fp32")


if __name__ == "__main__":
    die_with_parent()
    loops = {"bare": bare, "timm": timm_loop, "huggingface": hugging_face}
    loops[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
