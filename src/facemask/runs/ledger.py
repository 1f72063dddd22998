"""The ledger of test openings: how often somebody has looked at the test split of a data set.

A test split says less each time it is looked at, so every look is written down: one JSON line per opening,
only ever appended. Evaluating the same run again is another opening and counts again: what wears a test split
out is looking, whichever model is looked at.
"""

import fcntl
import json
import os
from datetime import UTC, datetime
from pathlib import Path

from facemask.errors import UserError


def _count(content: bytes, fingerprint: str, split: str) -> int:
    count = 0
    for line in content.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # a line cut off by a crash; it can no longer be said whose it was
            continue
        count += isinstance(entry, dict) and (entry.get("fingerprint"), entry.get("split")) == (fingerprint, split)
    return count


def openings(ledger: Path, fingerprint: str, split: str = "test") -> int:
    """How often this split of the data with this fingerprint was opened; 0 where there is no ledger yet."""
    try:
        return _count(ledger.read_bytes(), fingerprint, split)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise UserError(f"the ledger {ledger} cannot be read ({error.strerror}); make it a readable file.") from error


def record_opening(ledger: Path, fingerprint: str, run_dir: Path | str, command: str, split: str = "test") -> int:
    """Append one opening; return how often this split has now been opened, this time included.

    Writers in several processes wait for each other (``flock``), so each gets a number of its own. A last
    line cut off by a crash is left as it is and not counted; the new entry starts on a line of its own.

    Raises:
        UserError: the ledger cannot be written. Nothing of the test split should be read then.
    """
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "fingerprint": fingerprint, "split": split}
    line = json.dumps({**entry, "run_dir": str(run_dir), "command": command}).encode() + b"\n"
    try:
        ledger.parent.mkdir(parents=True, exist_ok=True)
        with ledger.open("a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            content = file.read()
            pending = line if content.endswith(b"\n") or not content else b"\n" + line
            while pending:
                pending = pending[file.write(pending) :]
            os.fsync(file.fileno())
            return _count(content, fingerprint, split) + 1
    except OSError as error:
        raise UserError(f"the ledger {ledger} cannot be written ({error.strerror}); make it writable.") from error
