"""The run folder: everything about one run, in files that are whole or absent.

config.yaml       the resolved config
provenance.json   command, commit, versions, hardware, seeds       diff.patch   uncommitted changes, if any
split.csv         path,label,split of every picture used
status.json       running, finished or failed; a running state whose process is gone is a killed run
checkpoints/      best.ckpt, last.ckpt; checkpoints.json holds their sha256
curves.csv        what was logged, by step
predictions.parquet, metrics.json, summary.json, report.html
"""

import hashlib
import json
import os
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from facemask.errors import UserError

# What may differ between the command that started a run and the one that resumes it.
RESUME_MAY_CHANGE = {"resume", "run_dir"}


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(scratch).chmod(0o644)
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunFolder:
    """One run's folder; made by `start`, continued by `resume`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def last_checkpoint(self) -> Path:
        return self.path / "checkpoints" / "last.ckpt"

    def status(self) -> dict[str, Any]:
        """Content of status.json; {} where there is none."""
        try:
            return json.loads((self.path / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def start(self, config: dict[str, Any], provenance: dict[str, Any], diff: str) -> None:
        """Make the folder and write what is known before training."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
        write_json(self.path / "provenance.json", provenance)
        if diff:
            write_text(self.path / "diff.patch", diff)
        self.set_status("running", id=hashlib.sha256(f"{self.path.absolute()}{_now()}".encode()).hexdigest()[:8])

    def resume(self, config: dict[str, Any]) -> None:
        """Check that the folder's run is the one of this config, and not still running.

        Raises:
            UserError: another config (names the differing keys), or a live process.
        """
        status = self.status()
        pid = status.get("pid")
        if status.get("state") == "running" and pid != os.getpid() and _alive(pid):
            raise UserError(f"the run in {self.path} is still running (process {pid}): wait for it or stop it")
        stored = yaml.safe_load((self.path / "config.yaml").read_text())
        differing = sorted(
            key for key in _flat(stored).keys() | _flat(config).keys()
            if _flat(stored).get(key) != _flat(config).get(key) and key.split(".")[0] not in RESUME_MAY_CHANGE
        )  # fmt: skip
        differing = [key for key in differing if str(_flat(stored).get(key, "")).find(str(stored["run_dir"])) < 0]
        if differing:
            raise UserError(
                f"{self.path} holds a run of another config ({', '.join(differing[:5])} differ): "
                "give the same options as then, or another run_dir"
            )
        if status.get("state") != "finished":
            self.set_status("running")

    def check_data(self, fingerprint: str) -> None:
        """Check that the pictures are those that the run started with.

        Raises:
            UserError: pictures, labels or splits have changed.
        """
        if json.loads((self.path / "provenance.json").read_text())["fingerprint"] != fingerprint:
            raise UserError(
                f"the pictures or their splits changed since {self.path} was started: choose another run_dir"
            )

    def set_status(self, state: str, **more: Any) -> None:
        status = {**self.status(), **more, "state": state, "pid": os.getpid(), state: _now()}
        write_json(self.path / "status.json", status)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _alive(pid: int | None) -> bool:
    if pid is None:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(config, dict):
        return {prefix[:-1]: config}
    return {key: value for name, part in config.items() for key, value in _flat(part, f"{prefix}{name}.").items()}
