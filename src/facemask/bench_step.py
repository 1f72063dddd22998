"""A training step on a batch in memory, in two ways in turn, on a CPU: `facemask bench teacher`, `... determinism`."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import DictConfig

from facemask.bench import console, pairs, ratio, show, spread, write_result
from facemask.config import as_plain, composed
from facemask.devices import auto_precision
from facemask.modeling.backbones import LITE0_MEAN, LITE0_STD
from facemask.modeling.classifier import Classifier
from facemask.modeling.saved_logits import SavedLogits
from facemask.modeling.teacher import Teacher

# A step on saved logits takes at most so many times as long as one without a teacher.
SAVED_AT_MOST = 1.03
LABELS = {"_target_": "facemask.modeling.objectives.Labels"}


def bench_teacher(rounds: int, side: int, batch: int, out: Path) -> Path:
    """Steps of a DeiT-Ti with a distillation token in turn: without a teacher, with saved logits, asking the teacher.

    A step is forward, backward and optimizer on a batch in memory, at the precision of training. Teachers have random
    weights, which take the time of any others. Returns the JSON file.
    """
    precision, shown = auto_precision("cpu"), []
    comparisons: list[dict[str, Any]] = []
    for name in ("efficientnet_lite0", "resnet_small"):
        cfg = composed(f"teacher={name}", "model=deit_distilled", "distill=soft", f"model.img_size={side}")
        views = _views(batch, side)
        teacher = Teacher([timm.create_model(cfg.teacher.name, num_classes=0)], 2, 1, side, LITE0_MEAN, LITE0_STD)
        with tempfile.TemporaryDirectory() as folder:
            saved = SavedLogits(Path(folder), {}, batch, 2)
            plain = _step(cfg, LABELS, views)
            online = _step(cfg, as_plain(cfg.distill), views, teacher)
            kept = _step(cfg, as_plain(cfg.distill), views, teacher, saved)
            for what, pair in (("saved / no teacher", (plain, kept)), ("asked / saved", (kept, online))):
                comparisons.append({"teacher": name, "what": what, **ratio(pairs(*pair, rounds))})
    for row in comparisons:
        missed = "no" in row["what"] and row["ratio"] > SAVED_AT_MOST
        shown.append([row["teacher"], row["what"], *spread(row, 3), "missed" if missed else ""])
    title = f"A step of {cfg.model.name} at {side} pixels, batch {batch}, {precision}; asked: at most {SAVED_AT_MOST}"
    show(title, ["teacher", "times as long", "ratio", "spread", ""], shown)
    content = {"precision": precision, "comparisons": comparisons}
    return write_result(content, "teacher", out, rounds=rounds, side=side, batch=batch)


def bench_determinism(rounds: int, side: int, batch: int, out: Path) -> Path:
    """A step of a DeiT-Ti as `trainer.deterministic=true` computes it against one without."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined] # as in build_trainer
    cfg = composed("model=deit", f"model.img_size={side}")
    step = _step(cfg, LABELS, _views(batch, side))

    def run(deterministic: bool) -> None:
        torch.use_deterministic_algorithms(deterministic)
        try:
            step()
        finally:
            torch.use_deterministic_algorithms(False)

    figures, precision = ratio(pairs(partial(run, False), partial(run, True), rounds)), auto_precision("cpu")
    shown, between = spread(figures, 3)
    text = f"a deterministic step takes {shown} times as long ({between})"
    console.print(f"{text}: {cfg.model.name}, {side} pixels, batch {batch}, {precision}")
    content = {"precision": precision, "deterministic / not": figures}
    return write_result(content, "determinism", out, rounds=rounds, side=side, batch=batch)


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
    optimizer, bf16 = torch.optim.AdamW(student.parameters(), 1e-4), auto_precision("cpu") == "bf16-mixed"

    def step() -> None:
        batch = student.on_before_batch_transfer(views, 0)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = student.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
