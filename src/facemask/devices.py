"""Lightning's Trainer on the hardware that is there."""

import os
from typing import Any

import pytorch_lightning as pl
import torch

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


def build_trainer(accelerator: str = "auto", precision: Any = "auto", **arguments: Any) -> pl.Trainer:
    """`pytorch_lightning.Trainer(**arguments)`, with precision "auto" resolved: bf16-mixed where the hardware has
    native bf16, else fp32. The loaders shard themselves, exactly, so Lightning's padding sampler is off, and
    checkpoints are those of `facemask.runs.checkpoints`.

    With deterministic=True torch refuses what has no deterministic kernel. On the CPU everything here has one. On CUDA
    the backward passes of bicubic and bilinear resizing, of adaptive and of reflection-padded pooling have none; here
    pixels are resized for the teacher alone, without gradients.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError("trainer.accelerator=gpu needs a CUDA device and none is visible: choose trainer=cpu")
    if accelerator == "auto":
        accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32, also in the convolutions of teachers
    if precision == "auto":
        precision = "bf16-mixed" if native_bf16(accelerator) else "32-true"
    plugins = [*(arguments.pop("plugins", None) or []), CheckpointIO()]
    return pl.Trainer(
        accelerator=accelerator, precision=precision, use_distributed_sampler=False, plugins=plugins, **arguments
    )
