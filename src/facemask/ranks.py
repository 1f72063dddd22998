"""The processes (ranks) of one run: they train one config on the same pictures, and none goes on without the others."""

import datetime
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies.launchers import _SubprocessScriptLauncher

from facemask.config import is_main_process
from facemask.errors import UserError
from facemask.runs.folder import flat

# Seconds between two signs of life, and after how many a silent rank counts as lost. A rank that ended is noticed at
# once; the patience is for one whose machine or link is gone, which nothing else would tell in less than half an hour.
EVERY, PATIENCE = 1.0, 30.0
# What may differ between ranks: where each machine keeps things. So may what lies in the run folder.
OWN = ("run_dir", "cache_dir", "ledger", "data.cache_dir", "data.root")


class Ranks(pl.Callback):
    """Compares the ranks' jobs before the first step, and ends the run in all of them when one is lost.

    Args:
        config: plain, resolved.
        fingerprint: of the pictures and their splits.
        on_loss: called with error=SENTENCE before the process ends.
    """

    def __init__(self, config: dict[str, Any], fingerprint: str, on_loss: Callable[..., None] | None) -> None:
        job = {key: str(value) for key, value in flat(config).items() if key not in OWN}
        self.job = {key: value for key, value in job.items() if not value.startswith(str(config["run_dir"]))}
        self.job["the pictures or their splits"] = fingerprint
        self.on_loss = on_loss
        self.trainer: pl.Trainer | None = None
        self._ended, self._alone = threading.Event(), False
        self._watch: threading.Thread | None = None
        self._lost = threading.Lock()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Raises UserError in rank 0 (others exit with 2) where ranks have different jobs."""
        if trainer.world_size == 1 or self._watch is not None:
            return
        self.trainer = trainer
        jobs: list[Any] = [None] * trainer.world_size
        dist.all_gather_object(jobs, self.job)
        for rank, job in enumerate(jobs):
            if differing := sorted(key for key in jobs[0].keys() | job.keys() if jobs[0].get(key) != job.get(key)):
                if trainer.global_rank > 0:
                    sys.exit(2)
                raise UserError(
                    f"rank {rank} was started with another job than rank 0 ({', '.join(differing[:5])} differ): "
                    "start all ranks with the same command on the same pictures"
                )
        group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=PATIENCE))
        self._watch = threading.Thread(target=self._exchange_signs_of_life, args=(group,), daemon=True)
        self._watch.start()

    def _exchange_signs_of_life(self, group: dist.ProcessGroup) -> None:
        try:
            all_ended = torch.zeros(1)
            while not (all_ended or self._alone):
                all_ended.fill_(float(self._ended.wait(EVERY)))
                dist.all_reduce(all_ended, dist.ReduceOp.MIN, group)
        except RuntimeError:
            if not self._alone:
                self.end()

    def stop_watching(self, together: bool = True) -> None:
        """Wait until every rank has come here, for as long as it takes; or leave the others, which end then."""
        self._alone = not together
        self._ended.set()
        if self._watch is not None:
            self._watch.join()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.end_if_lost(exception)

    def end_if_lost(self, exception: BaseException) -> None:
        """End where an exception says that the link to another rank broke."""
        if self._watch is not None and (isinstance(exception, dist.DistError) or "gloo" in str(exception)):
            self.end()

    def tell(self, error: BaseException) -> None:
        """Print a mistake that only this rank can have found: before the first step all find the same."""
        if isinstance(error, UserError) and self._watch is not None and os.environ.get("LOCAL_RANK", "0") != "0":
            print(f"error in rank {dist.get_rank()}: {error}", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Say that a rank is lost and end this process, whatever its other threads wait for."""
        with self._lost:
            assert self.trainer is not None
            if not is_main_process():
                time.sleep(3)  # rank 0 tells it and ends us, if it is not the lost one
            sentence = (
                f"one of the {self.trainer.world_size} processes of this run ended or cannot be reached any more "
                f"(noticed by rank {self.trainer.global_rank}), so all end: the same command with resume=true goes on"
            )
            try:
                if self.trainer.local_rank <= 1:
                    print(f"error: {sentence}", file=sys.stderr, flush=True)
                if self.on_loss is not None:
                    self.on_loss(error=sentence)
                if isinstance(self.trainer.strategy.launcher, _SubprocessScriptLauncher):
                    self.trainer.strategy.launcher.kill(signal.SIGKILL)
            finally:  # also where a full disk takes no status, or nobody reads what is printed
                os._exit(1)


def join_submitit() -> None:
    """In a task of submitit's local executor: tell Lightning which rank it is. SLURM tells it by itself."""
    if "SUBMITIT_LOCAL_GLOBALID" in os.environ and int(os.environ["SUBMITIT_LOCAL_NTASKS"]) > 1:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
