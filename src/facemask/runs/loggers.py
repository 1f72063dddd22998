"""What is written down while a run trains: the curves of the run folder, counts, and Weights & Biases."""

import csv
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytorch_lightning as pl
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only

from facemask.files import write_text
from facemask.runs.metrics import losses
from facemask.runs.predictions import logits


class Curves(Logger):
    """curves.csv: one row per logged step, columns epoch, step and every logged value.

    A resumed run drops the rows after its checkpoint's step and goes on from there.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: dict[int, dict[str, Any]] = {}
        self._epoch_ended = False

    @property
    def name(self) -> str:
        return "curves"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the config is in the run folder."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.rows.setdefault(step, {"step": step}).update(metrics)
        self._epoch_ended |= any(name.startswith("val/") or name.endswith("_epoch") for name in metrics)

    @rank_zero_only
    def continue_from(self, step: int) -> None:
        """Read the rows before a step back, digit for digit."""
        if self.path.exists():
            with self.path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) < step]
            self.rows = {int(row["step"]): {name: value for name, value in row.items() if value} for row in kept}

    @rank_zero_only
    def save(self) -> None:
        """Write the file where an epoch has ended since; Lightning calls this after every logged step."""
        if self._epoch_ended:
            self.write()

    @rank_zero_only
    def write(self) -> None:
        """Write the file."""
        self._epoch_ended = False
        if not self.rows:
            return
        names = sorted({name for row in self.rows.values() for name in row} - {"epoch", "step"})
        text = io.StringIO()
        writer = csv.DictWriter(text, ["epoch", "step", *names], restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for _, row in sorted(self.rows.items()))
        write_text(self.path, text.getvalue())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.write()


class Counter(pl.Callback):
    """Counts what training really did: images, steps, seconds (validation included) and the mean loss; the counts
    are in every checkpoint, so that a resumed run adds to them."""

    def __init__(self) -> None:
        self.counts: dict[str, float] = {"images": 0, "batches": 0, "loss": 0.0, "seconds": 0.0}
        self._since = time.monotonic()

    def state_dict(self) -> dict[str, float]:
        seconds = self.counts["seconds"] + time.monotonic() - self._since
        return {**self.counts, "loss": float(self.counts["loss"]), "seconds": seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.counts = dict(state_dict)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.counts["images"] += len(batch["pixels"]) * trainer.world_size
        self.counts["batches"] += 1
        # A tensor until the end: reading it here would make every step wait for the device.
        # Lightning has divided it by the number of batches that share an optimizer step.
        loss = outputs["loss"].detach() * trainer.accumulate_grad_batches
        self.counts["loss"] = self.counts["loss"] + loss

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.counts = self.state_dict()
        self._since = time.monotonic()


class WandbLogger(pl.loggers.WandbLogger):
    """Lightning's W&B logger with an explicit mode (no account or prompt is ever needed) and the final results.

    Args:
        mode: "offline", "online" or "disabled".
        log_images: whether pictures may leave this machine.
        arguments: of `pytorch_lightning.loggers.WandbLogger` and `wandb.init`.
    """

    def __init__(self, mode: str, log_images: bool, **arguments: Any) -> None:
        # not offline=: with it Lightning sets WANDB_MODE, and further ranks and jobs would compose another config
        super().__init__(mode=mode, **arguments)
        self._wandb_init.pop("anonymous", None)  # Lightning passes it, and W&B warns of it
        self.log_images = log_images

    @rank_zero_only
    def mark_pruned(self) -> None:
        """Say in tags and summary that a sweep ended the run early; then finish it."""
        import wandb

        self.experiment.tags = (*(self.experiment.tags or ()), "pruned")
        self.experiment.summary["pruned"] = True
        wandb.finish()

    @rank_zero_only
    def log_results(
        self, metrics: dict[str, Any], frame: pd.DataFrame, classes: list[str], head: str, pictures: Any
    ) -> None:
        """Metrics of every split and head to the run's summary, a confusion matrix of the last split, and the worst
        errors as a table (with pictures only where they may leave the machine); then finish the run."""
        import wandb

        run = self.experiment
        for split, heads in metrics.items():
            for name, entries in heads.items():
                for metric, entry in entries.items():
                    if isinstance(entry, dict) and "value" in entry:
                        run.summary[f"{split}/{name}/{metric}"] = entry["value"]
        for split in metrics:
            rows = frame[frame["split"] == split]
            label = np.searchsorted(classes, rows["label"].to_numpy().astype(str))
            decision = logits(rows, head, classes)
            plot = wandb.plot.confusion_matrix(
                y_true=label.tolist(), preds=decision.argmax(axis=1).tolist(), class_names=classes
            )
            run.log({f"{split}/confusion_matrix": plot})
            loss = losses(decision, label)
            table = wandb.Table(columns=["id", "label", "decision", "loss", *(["picture"] if self.log_images else [])])
            for row in np.argsort(-loss)[:12]:
                path = rows["id"].iloc[row]
                picture = [wandb.Image(pictures(path))] if self.log_images else []
                table.add_data(path, classes[label[row]], classes[decision[row].argmax()], loss[row], *picture)
            run.log({f"{split}/worst_errors": table})
        wandb.finish()
