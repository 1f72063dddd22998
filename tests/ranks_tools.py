"""What the tests of several processes share."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# A network of one block on small pictures; three steps make an epoch.
SMALL = [
    "data.num_images=48",
    "data.batch_size=12",
    "model.img_size=32",
    "model.depth=1",
    "augment=light",
    "trainer.log_every_n_steps=1",
    "evaluate.resamples=100",
    "evaluate.batch_size=3",
    "logger=none",
]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def wait_for(there: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = 180) -> None:
    """Until something is there, which a process makes."""
    start = time.monotonic()
    while not there():
        assert process.poll() is None, log.read_text()[-5000:]
        assert time.monotonic() - start < seconds, log.read_text()[-5000:]
        time.sleep(0.05)
