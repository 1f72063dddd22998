"""Files and folders that are whole or absent: written beside their place, then renamed."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from facemask.errors import UserError

MOST_YAML = 1_000_000  # characters


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(scratch).chmod(0o644)  # mkstemp's 0600 would hide the file from colleagues
        Path(scratch).replace(path)
    except BaseException:
        Path(scratch).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, line ends as they are, whole or not at all."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Any) -> None:
    """Write JSON whole or not at all."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_yaml(file: Path) -> Any:
    """Content of a YAML file that anybody may have written: no tags, and no aliases, which make millions of few.

    Raises:
        UserError: it cannot be read.
    """
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        if len(text) <= MOST_YAML and not any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            return yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): give a complete folder") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{file} is not readable YAML (cut off or edited by hand?)") from error
    raise UserError(f"{file} is longer than {MOST_YAML:,} characters or has aliases (*name), which are never written")


def build_folder(folder: Path, build: Callable[[Path], None], sound: Callable[[Path], object] = Path.exists) -> None:
    """Have `build` fill a folder unless it is `sound` already; of several processes one builds and the others wait."""
    from filelock import FileLock

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if sound(folder):
            return
        # Under the lock these belong to nobody: a damaged folder, and what a killed process left.
        for leftover in [folder, *folder.parent.glob(f"{folder.name}.*.part")]:
            shutil.rmtree(leftover, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
        try:
            build(scratch)
            scratch.chmod(0o755)  # mkdtemp's 0700 would hide the folder from colleagues
            scratch.replace(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
