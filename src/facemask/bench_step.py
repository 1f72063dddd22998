"""A training step on a batch in memory, in two ways in turn, on a CPU: `facemask bench teacher|determinism|limit`."""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from omegaconf import DictConfig
from timm.layers import set_fused_attn
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from facemask.bench import console, pairs, ratio, show, spread, write_result
from facemask.config import as_plain, composed
from facemask.devices import auto_precision, native_bf16
from facemask.errors import UserError
from facemask.modeling.backbones import LITE0_MEAN, LITE0_STD
from facemask.modeling.classifier import Classifier
from facemask.modeling.saved_logits import SavedLogits
from facemask.modeling.teacher import Teacher

# A step on saved logits takes at most so many times as long as one without a teacher.
SAVED_AT_MOST = 1.03
LABELS = {"_target_": "facemask.modeling.objectives.Labels"}


def bench_teacher(rounds: int, side: int, batch: int, out: Path) -> Path:
    """Steps of a DeiT-Ti with a distillation token in turn: without a teacher, with saved logits, asking the teacher,
    and with feature distillation, which asks it at every step, too, and for its feature maps.

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
            turns = {"saved / no teacher": (plain, kept), "asked / saved": (kept, online)}
            if name == "efficientnet_lite0":
                options = f"teacher={name}", "model=deit_distilled", "distill=feature", f"model.img_size={side}"
                turns["features / no teacher"] = plain, _step(cfg, as_plain(composed(*options).distill), views, teacher)
            for what, pair in turns.items():
                comparisons.append({"teacher": name, "what": what, **ratio(pairs(*pair, rounds))})
    for row in comparisons:
        missed = row["what"] == "saved / no teacher" and row["ratio"] > SAVED_AT_MOST
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


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")


def bench_limit(rounds: int, side: int, batch: int, out: Path) -> Path:
    """How near an eager bf16 training step of a DeiT-Ti is to the processor's own rate, and what goes beyond it.

    Time in matrix products is torch.profiler's, their operations are torch.utils.flop_counter's, and the processor's
    own rate is that of one large product. In turn with the eager step: weights in bf16, cast once per step from fp32
    ones that the optimizer keeps (its activations between blocks are bf16, too, so results move by more than rounding),
    and torch.compile, where there is a C++ compiler. Returns the JSON file.

    Raises:
        UserError: the processor has no bf16 of its own.
    """
    if not native_bf16("cpu"):
        raise UserError("this processor has no bf16 of its own, so that there is no such limit to measure")
    images, labels = torch.randn(batch, 3, side, side), torch.arange(batch) % 2
    eager = _bare(_network(side), images, labels)
    eager()
    with FlopCounterMode(display=False) as counter:
        eager()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        eager()
    spent = {event.key: event.self_cpu_time_total / 1e6 for event in profiler.key_averages()}
    products = sum(spent.get(name, 0.0) for name in PRODUCTS)
    square = torch.randn(4096, 4096).bfloat16()
    own = 2 * 4096**3 / statistics.median(b for _, b in pairs(lambda: None, lambda: square @ square, 5))
    share = products / sum(spent.values())
    rows = [("bf16 weights", _bf16_weights(_network(side), images, labels))]
    seconds_to_compile = None
    if shutil.which("g++"):
        compiled, begin = _bare(torch.compile(_network(side)), images, labels), time.perf_counter()
        compiled()
        seconds_to_compile = time.perf_counter() - begin
        rows.append(("torch.compile", compiled))
    counted = counter.get_flop_counts()["Global"]
    operations = sum(flops for kind, flops in counted.items() if str(kind).replace(".", "::") in PRODUCTS)
    content = {
        "model": "deit_tiny_patch16_224",
        "products_share_of_step": share,
        "products_gflops_per_s": operations / products / 1e9,
        "own_gflops_per_s": own / 1e9,
        "most_that_the_rest_could_give": 1 / share,
        "seconds_to_compile": seconds_to_compile,
        "comparisons": [{"step": name, "against": "eager", **ratio(pairs(step, eager, rounds))} for name, step in rows],
    }
    console.print(
        f"matrix products take {share:.0%} of an eager step, at {content['products_gflops_per_s']:.0f} GFLOP/s; "
        f"a large one has {own / 1e9:.0f}: without all the rest a step would be {1 / share:.2f} times as fast"
    )
    cells = [[row["step"], *spread(row)] for row in content["comparisons"]]
    show(f"A step at {side} pixels, batch {batch}, times as fast as eager", ["", "ratio", "spread"], cells)
    return write_result(content, "limit", out, rounds=rounds, side=side, batch=batch)


def _network(side: int) -> nn.Module:
    set_fused_attn(False)  # the faster choice on CPUs, as in facemask.modeling.backbones
    return timm.create_model("deit_tiny_patch16_224", num_classes=2, img_size=side)


def _bare(network: Any, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(network.parameters(), 1e-4)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(network(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _bf16_weights(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    kept = [parameter.detach().clone() for parameter in network.parameters()]
    network.bfloat16()
    optimizer, half = torch.optim.AdamW(kept, 1e-4), images.bfloat16()

    def step() -> None:
        loss = nn.functional.cross_entropy(network(half).float(), labels)
        network.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter, of_bf16 in zip(kept, network.parameters(), strict=True):
                assert of_bf16.grad is not None
                parameter.grad = of_bf16.grad.float()
            optimizer.step()
            torch._foreach_copy_(list(network.parameters()), kept)

    return step


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
    dims = (teacher.map_channels, teacher.pooled_dim) if teacher is not None else None
    student = Classifier(as_plain(cfg.model), objective, as_plain(cfg.optim), ["a", "b"], 0, len(views["row"]), dims)
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
