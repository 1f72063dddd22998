"""The LightningModule: student, objective and optimizer in one place."""

from collections.abc import Callable
from typing import Any

import hydra.utils
import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from facemask.errors import UserError
from facemask.modeling.backbones import Backbone, Outputs
from facemask.modeling.objectives import Objective, TeacherOutputs
from facemask.modeling.optim import parameter_groups, scaled_lr
from facemask.modeling.saved_logits import SavedLogits, ask_in_groups
from facemask.modeling.teacher import Teacher

NO_LABEL = -1  # of a picture that only fills a batch of validation


class Classifier(pl.LightningModule):
    """A student and how it learns.

    The arguments are plain dictionaries, lists and numbers, and are kept in the checkpoint:
    `Classifier.load_from_checkpoint(path)` works alone.

    Args:
        model: config group model: the backbone's `_target_` and arguments.
        objective: config group distill.
        optim: config group optim.
        classes: class names in the order of the logits.
        seed: of the initialisation, and of drop path and dropout.
        global_batch: images of one optimizer step over all ranks, which the learning rate is scaled to.
        teacher_dims: (channels of each feature map, pooled width) of the teacher, or None without one.
    """

    def __init__(
        self,
        model: dict[str, Any],
        objective: dict[str, Any],
        optim: dict[str, Any],
        classes: list[str],
        seed: int,
        global_batch: int,
        teacher_dims: tuple[list[int], int] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(seed)
        self.backbone: Backbone = hydra.utils.instantiate(model, num_classes=len(classes))
        self.objective: Objective = hydra.utils.instantiate(objective, label_smoothing=optim["label_smoothing"])
        if self.objective.needs_token not in (None, self.backbone.has_token):
            raise UserError(
                f"{type(self.objective).__name__} needs a model {'with' if self.objective.needs_token else 'without'} "
                f"a distillation token, and {model.get('name')} is not one: choose another model= or distill="
            )
        if self.objective.needs_patches and not hasattr(self.backbone.network, "patch_embed"):
            raise UserError(f"{type(self.objective).__name__} teaches patch tokens, and {model.get('name')} has none")
        if teacher_dims is not None:
            self.objective.build(self.backbone.network.num_features, *teacher_dims)
        self._make_optimizer = hydra.utils.instantiate(optim["optimizer"])
        self._make_scheduler = hydra.utils.instantiate(optim["scheduler"])
        self.heads = self.objective.heads(self.backbone.has_token)
        if self.backbone.has_token and "head_dist" not in self.heads:
            self.backbone.network.head_dist.requires_grad_(False)  # nothing trains it
        if "head" not in self.heads:
            self.backbone.network.head.requires_grad_(False)
        self.reported_head = "mean" if len(self.heads) > 1 else self.heads[0]
        # In a tuple, so that the teacher is no part of the module: of its state, optimizer, EMA or train().
        self._teacher: tuple[Teacher | Callable[[], Teacher], ...] = ()
        self._saved: SavedLogits | None = None
        self._features: SavedLogits | None = None
        self._teacher_folds = torch.zeros(0, dtype=torch.long)
        watched = [*self.heads, "mean"] if len(self.heads) > 1 else self.heads
        self.val_accuracy: Any = nn.ModuleDict(
            {h: MulticlassAccuracy(len(classes), average="micro", ignore_index=NO_LABEL) for h in watched}
        )
        self.val_nll: Any = nn.ModuleDict({h: MeanMetric() for h in watched})
        # name -> (sum over the images of this epoch, images); in checkpoints, so that an epoch can be gone on with.
        self._sums: dict[str, Tensor] = {}

    def attach_teacher(
        self, teacher: Teacher | Callable[[], Teacher], folds: Tensor, saved: SavedLogits | None = None
    ) -> None:
        """Give the objective its teacher.

        Args:
            teacher: or what loads it, called when it is asked for the first time.
            folds: (N,) cross-fitting fold of every training picture; the teacher of that fold has not seen it.
            saved: where its logits are kept: it is asked for no others.
        """
        self._teacher = (teacher,)
        self._teacher_folds = folds
        self._saved = saved

    def save_features(self, saved: SavedLogits) -> None:
        """Train the heads on kept features of the frozen backbone: what they read (see `Outputs`), side by side."""
        self._features = saved

    def _load_teacher(self) -> Teacher:
        (teacher,) = self._teacher
        if not isinstance(teacher, Teacher):
            teacher = teacher().to(self.device)
            self._teacher = (teacher,)
        return teacher

    def head_logits(self, outputs: Outputs) -> dict[str, Tensor]:
        """float32 logits (B, C) of every trained head and, with two, of their mean (as timm's models give when
        evaluated)."""
        logits = {head: outputs.logits[head].float() for head in self.heads}
        if len(logits) > 1:
            logits["mean"] = torch.stack(list(logits.values())).mean(dim=0)
        return logits

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        """uint8 (B, 3, H, W) -> logits (B, C) by head."""
        return self.head_logits(self.backbone(pixels))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # The weights are in the checkpoint: reading it needs neither the hub nor the file that they started from.
        model = checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["model"]
        start = {key: value for key, value in {"pretrained": False, "checkpoint": None}.items() if key in model}
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY]["model"] = {**model, **start}
        of_ranks: dict[str, Any] = {name: self.all_gather(total) for name, total in self._sums.items()}
        checkpoint["epoch_sums"] = {name: total.reshape(-1, 2) for name, total in of_ranks.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        ranks = self._trainer.world_size if self._trainer else 1
        self._sums = {
            # another number of ranks than wrote it has equal shares of the sum
            name: of_ranks[self.global_rank] if len(of_ranks) == ranks else of_ranks.sum(dim=0) / ranks
            for name, of_ranks in checkpoint.get("epoch_sums", {}).items()
        }

    # -- training -----------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        for teacher in self._teacher:
            if isinstance(teacher, Teacher):
                teacher.to(self.device)

    def on_before_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        # Rows are read while they are on the CPU, so that nothing waits for the device. And a teacher is loaded before
        # the step is seeded: making its network draws random numbers.
        if self._features is not None and "row" in batch:
            features = self._features.read(int(batch["epoch"][0]), batch["row"].numpy())
            batch = batch if features is None else {**batch, "features": features}
        if not self.objective.needs_teacher or "row" not in batch:
            return batch
        if self._saved is not None:
            logits = self._saved.read(int(batch["epoch"][0]), batch["row"].numpy())
            if logits is not None:
                return {**batch, "teacher_logits": logits}
        self._load_teacher()
        return batch

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        # Drop path and dropout depend on (seed, step, rank) alone: no random state has to be stored to resume.
        step = self.current_epoch * int(self.trainer.num_training_batches) + batch_idx
        state = np.random.SeedSequence([self.hparams["seed"], step, self.global_rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(state[0]))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        teacher = self._ask_teacher(batch)
        outputs = self.backbone(batch["pixels"]) if self._features is None else self._probe(self._features, batch)
        losses = self.objective(outputs, batch["target"], teacher)
        size = len(batch["pixels"])
        steps = {f"train/{name}_step": loss for name, loss in losses.items()}
        self.log_dict(steps, on_step=True, on_epoch=False, sync_dist=True, batch_size=size)
        self._add({f"train/{name}_epoch": loss for name, loss in losses.items()}, size)
        if teacher is not None:
            self._watch_teacher(outputs, batch["target"], teacher)
        return losses["loss"]

    def _probe(self, saved: SavedLogits, batch: dict[str, Tensor]) -> Outputs:
        features = batch.get("features")
        if features is None:
            self.backbone.eval()
            with torch.no_grad():
                outputs = self.backbone(batch["pixels"])
            self.backbone.train()
            read = (outputs.pooled, outputs.taught) if self.backbone.has_token else (outputs.pooled,)
            features = torch.cat(read, dim=1).float()
            saved.write(int(batch["epoch"][0]), batch["row"].cpu().numpy(), features)
        pooled, taught = features.chunk(2, dim=1) if self.backbone.has_token else (features, features)
        return Outputs(self.backbone.head_logits(pooled, taught), None, pooled, taught)

    def _ask_teacher(self, batch: dict[str, Tensor]) -> TeacherOutputs | None:
        if not self.objective.needs_teacher:
            return None
        if "teacher_logits" in batch:
            return TeacherOutputs.of_logits(batch["teacher_logits"])
        rows = batch["row"].cpu()
        teacher, folds = self._load_teacher(), self._teacher_folds[rows]
        if not self.objective.needs_only_logits:
            return teacher(batch["pixels"], folds)
        logits = ask_in_groups(teacher, batch["pixels"], folds)
        if self._saved is not None:
            self._saved.write(int(batch["epoch"][0]), rows.numpy(), logits)
        return TeacherOutputs.of_logits(logits)

    def _watch_teacher(self, outputs: Outputs, target: Tensor, teacher: TeacherOutputs) -> None:
        decision = teacher.logits.argmax(dim=1)
        log_p = F.log_softmax(teacher.logits, dim=1)
        student = self.head_logits(outputs)[self.reported_head].argmax(dim=1)
        shares = {
            "teacher_label_disagreement": (decision != target.argmax(dim=1)).float().mean(),
            "teacher_entropy": -(log_p.exp() * log_p).sum(dim=1).mean(),
            "student_teacher_agreement": (student == decision).float().mean(),
        }
        self._add({f"train/{name}": value for name, value in shares.items()}, len(target))

    def _add(self, means: dict[str, Tensor], size: int) -> None:
        for name, mean in means.items():
            total = torch.stack([mean.detach().double() * size, torch.full_like(mean, size, dtype=torch.float64)])
            self._sums[name] = self._sums[name].to(total.device) + total if name in self._sums else total

    def on_train_epoch_end(self) -> None:
        for name, (total, images) in self._sums.items():
            self.log(name, total / images, sync_dist=True)
        self._sums = {}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        label, logits = batch["label"], self(batch["pixels"])
        counted = (label != NO_LABEL).float()
        for head, metric in self.val_accuracy.items():
            metric.update(logits[head], label)
            nll = F.cross_entropy(logits[head], label, reduction="none", ignore_index=NO_LABEL)
            self.val_nll[head].update(nll, counted)
            suffix = "" if head == self.reported_head else f"_{head}"
            self.log(f"val/accuracy{suffix}", metric, prog_bar=not suffix)
            self.log(f"val/nll{suffix}", self.val_nll[head], prog_bar=not suffix)

    def configure_optimizers(self) -> Any:
        optim = self.hparams["optim"]
        lr = scaled_lr(optim["lr"], self.hparams["global_batch"], optim["lr_batch_size"])
        groups = parameter_groups(self.backbone, self.objective, lr, optim["weight_decay"], optim["layer_decay"])
        optimizer = self._make_optimizer(groups)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = self._make_scheduler(optimizer, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
