"""The run folder: everything about one run, in files that are whole or absent.

provenance.json   command, commit, versions, hardware, seeds       diff.patch   uncommitted changes, if any
split.csv         path,label,split of every picture used
status.json       running, finished or failed; a running state without a process that holds .lock is a killed run
config.yaml       the resolved config; the last of the files of the start: without it there is nothing to resume
checkpoints/      best.ckpt, last.ckpt; checkpoints.json holds the sha256 of each file and of its tensors
curves.csv        what was logged, by step
predictions.parquet, metrics.json, summary.json, report.html
"""

import fcntl
import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import yaml

from facemask.errors import UserError
from facemask.files import write_json, write_text

# What may differ between the command that started a run and the one that resumes it.
_PLACES = ("trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.strategy")
RESUME_MAY_CHANGE = ("resume", "run_dir", *_PLACES)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunFolder:
    """One run's folder; made by `start`, continued by `resume`, and written by one process at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: TextIO | None = None

    @property
    def last_checkpoint(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    def status(self) -> dict[str, Any]:
        """Content of status.json; {} where there is none."""
        try:
            return json.loads((self.path / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    @property
    def locked(self) -> bool:
        """Whether this process may write the folder."""
        return self._lock is not None

    def lock(self) -> None:
        """Take the folder for this process, for as long as it lives, however it ends.

        The system keeps the lock (a number of a process could be another's by now), and for this process alone: loader
        workers that outlive it for a moment do not hold it.

        Raises:
            UserError: another process has it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        file = (self.path / ".lock").open("w")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            raise UserError(
                f"the run in {self.path} is still running (process {self.status().get('pid', 'unknown')}): "
                "wait for it or stop it"
            ) from error
        self._lock = file

    def release(self) -> None:
        """Give the folder back; one that nothing was written to is removed."""
        if self._lock is None:
            return
        if [file.name for file in self.path.iterdir()] == [".lock"]:
            (self.path / ".lock").unlink()
            for folder in (self.path, self.path.parent):
                try:
                    folder.rmdir()
                except OSError:
                    break
        self._lock.close()
        self._lock = None

    def start(self, config: dict[str, Any], provenance: dict[str, Any], diff: str) -> None:
        """Write what is known before training."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(self.path / "provenance.json", provenance)
        if diff:
            write_text(self.path / "diff.patch", diff)
        self.set_status("running", id=hashlib.sha256(f"{self.path.absolute()}{_now()}".encode()).hexdigest()[:8])
        write_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    def resume(self, config: dict[str, Any]) -> None:
        """Check that the folder's run is the one of this config.

        Raises:
            UserError: another config (names the differing keys).
        """
        stored = yaml.safe_load((self.path / "config.yaml").read_text())
        differing = sorted(
            key for key in flat(stored).keys() | flat(config).keys()
            if flat(stored).get(key) != flat(config).get(key) and not key.startswith(RESUME_MAY_CHANGE)
        )  # fmt: skip
        differing = [key for key in differing if str(flat(stored).get(key, "")).find(str(stored["run_dir"])) < 0]
        if differing:
            raise UserError(
                f"{self.path} holds a run of another config ({', '.join(differing[:5])} differ): "
                "give the same options as then, or another run_dir"
            )
        for scratch in [*self.path.glob(".*.*"), *self.path.glob("checkpoints/*.tmp")]:
            scratch.unlink()  # a file that was being written when the process was killed
        if self.status().get("state") != "finished":
            self.set_status("running")

    def provenance(self) -> dict[str, Any]:
        """Content of provenance.json."""
        return json.loads((self.path / "provenance.json").read_text())

    def check_data(self, fingerprint: str) -> None:
        """Check that the pictures are those that the run started with.

        Raises:
            UserError: pictures, labels or splits have changed.
        """
        if self.provenance()["fingerprint"] != fingerprint:
            raise UserError(
                f"the pictures or their splits changed since {self.path} was started: choose another run_dir"
            )

    def set_status(self, state: str, **more: Any) -> None:
        status = {**self.status(), **more, "state": state, "pid": os.getpid(), state: _now()}
        write_json(self.path / "status.json", status)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of nested dictionaries."""
    if not isinstance(config, dict):
        return {prefix[:-1]: config}
    return {key: value for name, part in config.items() for key, value in flat(part, f"{prefix}{name}.").items()}
