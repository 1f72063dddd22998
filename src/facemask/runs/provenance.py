"""Where a run comes from: command, code, versions, hardware."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any


def collect() -> tuple[dict[str, Any], str]:
    """Provenance of this process, and the uncommitted changes of the code it runs ("" if there are none)."""
    import torch

    code = Path(__file__).resolve().parent
    commit = _git(code, "rev-parse", "HEAD").strip()
    diff = _git(code, "diff", "HEAD")
    untracked = _git(code, "ls-files", "--others", "--exclude-standard").split()
    provenance = {
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "git": {"commit": commit or None, "dirty": bool(diff or untracked), "untracked": untracked},
        "hardware": {
            "processor": _processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        },
        "platform": {"system": platform.platform(), "python": platform.python_version()},
        "versions": dict(sorted((dist.metadata["Name"], dist.version) for dist in importlib.metadata.distributions())),
    }
    return provenance, diff


def _git(folder: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout if result.returncode == 0 else ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    model = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    return f"{facts.get('model name', platform.processor())} ({model})"
