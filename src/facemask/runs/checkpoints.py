"""Checkpoints: whole or absent, checked before they are trusted, and enough to go on from as if nothing had happened.

A file is what `torch.save` writes, a ZIP archive, whose comment is the sha256 of all bytes before the digest. Reading
executes nothing (`weights_only`).
"""

import hashlib
import os
import struct
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import TorchCheckpointIO

from facemask.errors import UserError
from facemask.runs.folder import file_sha256
from facemask.runs.loggers import Curves

_MARK = b"sha256:"
_COMMENT = len(_MARK) + 64


def weights_sha256(state_dict: dict[str, torch.Tensor]) -> str:
    """sha256 of tensors: of names, types, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, value in sorted(state_dict.items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_checkpoint(path: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all, with its own sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.tmp")
    with scratch.open("w+b") as file:
        torch.save(checkpoint, file)
        file.seek(-2, os.SEEK_END)  # the archive ends with the length of its comment
        file.write(struct.pack("<H", _COMMENT))
        file.write(_MARK)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(digest.encode())
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def verify_checkpoint(path: Path) -> None:
    """Compare a checkpoint of this project with the sha256 that it carries.

    Raises:
        UserError: no such file, or not the bytes that were written.
    """
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist")
    content = path.read_bytes()
    whole, comment = content[:-64], content[-_COMMENT:]
    if not comment.startswith(_MARK) or hashlib.sha256(whole).hexdigest().encode() != comment[len(_MARK) :]:
        odd = f"the checkpoint {path} is damaged or was not written by this project (its own sha256 does not fit)"
        raise UserError(f"{odd}: restore it from a copy, or start the run again in another run_dir")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of this project as dictionaries, numbers and tensors on the CPU; nothing in it is executed.

    Raises:
        UserError: no such file, damaged, or it holds more than tensors and numbers.
    """
    verify_checkpoint(path)
    try:
        return torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # unpickling raises nearly anything
        odd = f"the checkpoint {path} holds something else than tensors and numbers ({type(error).__name__})"
        raise UserError(f"{odd}; it may be code, and none of it was run: take one that you trust") from error


def checkpoint_facts(path: Path) -> dict[str, str]:
    """sha256 of a checkpoint's file, and of its tensors, which is the same in two equal runs (the file holds times)."""
    return {"sha256": file_sha256(path), "weights_sha256": weights_sha256(read_checkpoint(path)["state_dict"])}


class CheckpointIO(TorchCheckpointIO):
    """Lightning plugin: reads and writes checkpoints with the functions above."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(Path(path))


class LastCheckpoint(pl.Callback):
    """Keeps last.ckpt, from which a killed run goes on with the same bits.

    It is written between two batches, when everything about the batches before is logged and no gradient is half
    accumulated: at the start of every epoch and at the end of training, and inside an epoch as often as asked for.
    Curves are written first, so that the file never lacks a row that a resumed run would not write again.

    Args:
        dirpath: the folder of last.ckpt.
        every_n_train_steps: also after every so many optimizer steps.
        every_minutes: also where the last one is so old. Neither changes any number of the run.
    """

    def __init__(
        self, dirpath: str, every_n_train_steps: int | None = None, every_minutes: float | None = None
    ) -> None:
        self.path = Path(dirpath) / "last.ckpt"
        self.every_n_train_steps = every_n_train_steps
        self.every_minutes = every_minutes
        self.ended = False
        self._saving = False
        self._step = 0
        self._time = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._step, self._time = trainer.global_step, time.monotonic()
        trainer.should_stop = trainer.should_stop or self.ended  # it may have ended before max_epochs
        loop = trainer.fit_loop.epoch_loop
        if loop.batch_progress.current.ready == 0:
            loop.restarting = False  # with max_steps Lightning takes the start of an epoch for its end

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step > self._step:
            self._save(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        validated = trainer.val_check_batch and batch_idx % trainer.val_check_batch == 0
        overfits = getattr(trainer, "overfit_batches", 0) > 0
        # Lightning cannot go on right after a validation inside an epoch; overfit_batches has no sampler to skip in.
        if batch_idx == 0 or batch_idx % trainer.accumulate_grad_batches or validated or overfits:
            return
        if trainer.global_step > self._step and self._is_due(trainer):
            self._save(trainer)

    def _is_due(self, trainer: pl.Trainer) -> bool:
        if self.every_n_train_steps is not None and trainer.global_step % self.every_n_train_steps == 0:
            return True
        late = self.every_minutes is not None and time.monotonic() - self._time >= 60 * self.every_minutes
        return trainer.strategy.broadcast(late) if self.every_minutes is not None else False

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.ended = True
        self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, Curves):
                logger.write()
        self._saving = True
        trainer.save_checkpoint(self.path, weights_only=False)
        self._saving = False
        self._step, self._time = trainer.global_step, time.monotonic()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Lightning has counted the epoch or batch that starts now as ready: here it has not begun."""
        if not self._saving:
            return
        epochs, batches = (checkpoint["loops"]["fit_loop"][key] for key in ("epoch_progress", _BATCHES))
        between_epochs = epochs["current"]["started"] == epochs["current"]["completed"]
        for kind in ("total", "current"):
            epochs[kind]["ready"] = epochs[kind]["started"]
            batches[kind]["ready"] = batches[kind]["completed"]
        batches["is_last_batch"] = False
        if between_epochs:
            batches["current"] = dict.fromkeys(batches["current"], 0)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Let ModelCheckpoint find its files where the run folder is now."""
        for state in checkpoint["callbacks"].values():
            if "best_model_path" in state:
                state["dirpath"] = os.path.realpath(self.path.parent)
                for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
                    state[key] = self._here(state[key])
                state["best_k_models"] = {self._here(path): score for path, score in state["best_k_models"].items()}

    def _here(self, path: str) -> str:
        return os.path.realpath(self.path.parent / Path(path).name) if path else path

    def state_dict(self) -> dict[str, bool]:
        return {"ended": self.ended}

    def load_state_dict(self, state_dict: dict[str, bool]) -> None:
        self.ended = state_dict["ended"]


_BATCHES = "epoch_loop.batch_progress"


def position(checkpoint: dict[str, Any]) -> tuple[int, int]:
    """(epoch, batches of it already trained on) of a checkpoint that `LastCheckpoint` wrote."""
    loop = checkpoint["loops"]["fit_loop"]
    return loop["epoch_progress"]["current"]["processed"], loop[_BATCHES]["current"]["completed"]
