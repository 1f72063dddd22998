"""A trial of a sweep as its own process sees it: it reports every epoch, and stops where it is pruned."""

import json
import math
import os
import warnings
from typing import Any

import pytorch_lightning as pl

from facemask.errors import UserError
from facemask.runs.storage import TRIAL, open_storage, patiently


class Report(pl.Callback):
    """Reports the monitored value after every validation, and stops training in all ranks where Optuna prunes.

    Args:
        storage: URL.
        study: name.
        number: of the trial.
        monitor: the logged value.
        pruner: the Optuna pruner's config.
    """

    def __init__(self, storage: str, study: str, number: int, monitor: str, pruner: dict[str, Any]) -> None:
        self.storage, self.study, self.number, self.monitor, self.pruner = storage, study, number, monitor, pruner
        self.pruned = False

    @classmethod
    def from_environment(cls) -> "list[Report]":
        """The callback, where this process is a trial that can be pruned."""
        return [cls(**json.loads(os.environ[TRIAL]))] if TRIAL in os.environ else []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        pruned = False
        if trainer.is_global_zero:
            if self.monitor not in trainer.callback_metrics:
                logged = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
                raise UserError(f"{self.monitor}, which pruning needs, is not logged in training: choose of {logged}")
            value = float(trainer.callback_metrics[self.monitor])
            if not math.isfinite(value):
                raise FloatingPointError(f"{self.monitor} is {value} after epoch {trainer.current_epoch + 1}")
            pruned = patiently(lambda: self._report(value, trainer.current_epoch + 1), "the storage of the sweep")
        self.pruned = trainer.strategy.broadcast(pruned)
        trainer.should_stop = trainer.should_stop or self.pruned

    def _report(self, value: float, step: int) -> bool:
        import optuna
        from hydra.utils import instantiate

        warnings.filterwarnings("ignore", ".*is already reported.*")  # a resumed epoch reports the same value again
        study = optuna.load_study(
            study_name=self.study,
            storage=open_storage(self.storage),
            sampler=optuna.samplers.RandomSampler(),
            pruner=instantiate(self.pruner),
        )
        trial = optuna.Trial(study, study.get_trials(deepcopy=False)[self.number]._trial_id)
        trial.report(value, step)
        return bool(trial.should_prune())  # of NumPy else, which a checkpoint cannot hold

    def state_dict(self) -> dict[str, bool]:
        return {"pruned": self.pruned}

    def load_state_dict(self, state_dict: dict[str, bool]) -> None:
        self.pruned = state_dict["pruned"]
