"""Lightning's Trainer on the hardware that is there."""

import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from facemask.errors import UserError
from facemask.runs.checkpoints import CheckpointIO

DEFAULT_THREADS = torch.get_num_threads()


def set_threads(threads: int | None) -> None:
    """Compute with so many threads (None: as many as torch takes by itself), in further ranks as well.

    The number of threads decides in which order sums are added up, and so is part of the platform on which a command
    gives the same bits. Linear algebra in NumPy and SciPy (a teacher's logistic regression) keeps to one.
    """
    torch.set_num_threads(threads or DEFAULT_THREADS)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)


def native_bf16(accelerator: str) -> bool:
    """Whether the hardware multiplies bf16 natively; elsewhere it is emulated and slower than fp32."""
    if accelerator in ("gpu", "cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if accelerator == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def auto_precision(accelerator: str) -> str:
    """bf16 where the hardware multiplies it natively, fp16 on other GPUs with tensor cores (Volta on), else fp32."""
    if native_bf16(accelerator):
        return "bf16-mixed"
    tensor_cores = accelerator in ("gpu", "cuda") and torch.cuda.get_device_capability() >= (7, 0)
    return "16-mixed" if tensor_cores else "32-true"


def choose(hardware: Mapping[str, Any], device: torch.device, activations: float) -> dict[str, bool]:
    """How a device is used: what `trainer.hardware` says, and where that is "auto" what suits the device.

    tf32: fp32 products of GPUs in TF32 while training. Never by itself: fp32 means fp32.
    channels_last: memory format of CNN teachers; always the faster one.
    pin_memory, prefetch: batches lie in pinned memory, and are copied while the step before computes: on GPUs.
    compile: torch.compile of the student: on GPUs with Triton; on a CPU it pays after some
        hundred steps (`facemask bench limit`).
    gradient_checkpointing: where the student's activations would fill more than half of a GPU.

    Args:
        activations: bytes, see `activation_bytes`.
    """
    gpu = device.type == "cuda"
    auto = {
        "tf32": False,
        "channels_last": True,
        "pin_memory": gpu,
        "prefetch": gpu,
        "compile": gpu
        and torch.cuda.get_device_capability(device) >= (7, 0)
        and importlib.util.find_spec("triton") is not None,
        "gradient_checkpointing": gpu and activations > torch.cuda.get_device_properties(device).total_memory / 2,
    }
    return {key: auto[key] if value == "auto" else value for key, value in hardware.items()}


def activation_bytes(network: nn.Module, images: int, precision: str) -> float:
    """What a transformer keeps of so many images for its backward pass: 34 bytes a token, channel and block in 16 bits
    with fused attention (Korthikanti et al. 2022, section 4.1); 0 for networks without blocks."""
    blocks, embed = getattr(network, "blocks", ()), getattr(network, "patch_embed", None)
    tokens = getattr(embed, "num_patches", 0) + getattr(network, "num_prefix_tokens", 0)
    width = getattr(network, "num_features", 0)
    return 34.0 * tokens * width * len(blocks) * images * (2 if precision.startswith("32") else 1)


def use_tf32(allowed: bool) -> None:
    """Whether GPUs may compute fp32 products in TF32."""
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision("high" if allowed else "highest")


class Prefetched:
    """Batches of a loader with their pixels on a device: copied on a stream of their own, one batch ahead."""

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.sampler = loader.sampler  # Lightning tells it the epoch

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        kind = torch.get_device_module(self.device)
        stream, waiting = kind.Stream(), None
        for batch in self.loader:
            with kind.stream(stream):
                pixels = batch["pixels"].to(self.device, non_blocking=True)
                copied = stream.record_event()
            if waiting is not None:
                yield self._ready(*waiting)
            waiting = {**batch, "pixels": pixels}, copied
        if waiting is not None:
            yield self._ready(*waiting)

    def _ready(self, batch: dict[str, Any], copied: Any) -> dict[str, Any]:
        computing = torch.get_device_module(self.device).current_stream()
        computing.wait_event(copied)
        if self.device.type == "cuda":
            batch["pixels"].record_stream(computing)  # its memory is not used again before
        return batch


def build_trainer(
    accelerator: str = "auto", precision: Any = "auto", hardware: Mapping[str, Any] | None = None, **arguments: Any
) -> pl.Trainer:
    """`pytorch_lightning.Trainer(**arguments)`, with precision "auto" resolved (`auto_precision`); `hardware` is left
    to `choose`. The loaders shard themselves, exactly, so Lightning's padding sampler is off, and
    checkpoints are those of `facemask.runs.checkpoints`.

    With deterministic=True torch refuses what has no deterministic kernel. On the CPU everything here has one. Of the
    list for CUDA (docs of `torch.use_deterministic_algorithms`) an image network may meet the backward passes of
    linear to bicubic `interpolate`, of `AdaptiveAvgPool2d`, `AdaptiveMaxPool2d` and `ReflectionPad2d`, and `NLLLoss`
    of maps; here pixels are resized for the teacher alone, without gradients.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu needs a CUDA device and none is visible: choose trainer=cpu")
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    use_tf32(False)  # fp32 means fp32, also in the convolutions of teachers
    if precision == "auto":
        precision = auto_precision(accelerator)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    plugins = [*(arguments.pop("plugins", None) or []), CheckpointIO()]
    return pl.Trainer(
        accelerator=accelerator, precision=precision, use_distributed_sampler=False, plugins=plugins, **arguments
    )
