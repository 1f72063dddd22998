"""Where a run comes from: command, code, versions, hardware."""

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Variables of the environment that change numbers or the hardware that is seen.
NUMERIC = re.compile(r"(OMP|MKL|OPENBLAS|GOMP|KMP|ONEDNN|DNNL|ATEN|CUBLAS|CUDNN|CUDA|NVIDIA|NCCL|TORCH|PYTORCH)_\w+")
PLACES = ("FACEMASK_DATA", "FACEMASK_CACHE")


def collect(overrides: Sequence[str] = ()) -> tuple[dict[str, Any], str]:
    """Provenance of this process, and the uncommitted changes of the code it runs ("" if there are none).

    Args:
        overrides: Hydra's, of this job alone (`command` names all jobs of a multirun).
    """
    import torch

    software, diff = code_and_versions()
    script = Path(sys.argv[0]).resolve()  # a sweep starts it by its whole path
    shown = script.name if script.parent == Path(__file__).resolve().parents[3] else sys.argv[0]
    provenance = {
        "command": shlex.join([Path(sys.executable).name, shown, *sys.argv[1:]]),
        "overrides": list(overrides),
        "hardware": {
            "processor": _processor(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        },
        "environment": {
            **{name: value for name, value in sorted(os.environ.items()) if NUMERIC.fullmatch(name)},
            **{name: "set" for name in PLACES if name in os.environ},
        },
        **software,
    }
    return provenance, diff


def code_and_versions() -> tuple[dict[str, Any], str]:
    """The part of the provenance that needs no torch (git, platform, versions), and the uncommitted changes."""
    root = Path(__file__).resolve().parents[3]
    commit = _git(root, "rev-parse", "HEAD").strip()
    trees = _git(root, "rev-parse", "HEAD:src", "HEAD:conf", "HEAD:train.py").split()
    # records and what is made of them are no code: they are written after a run, and tell nothing about the next
    made = (":/!experiments", ":/!notebooks", ":/!README.md")
    diff = _git(root, "diff", "--binary", "HEAD", "--", ":/", *made)
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "--", "src", "conf", "*.py").splitlines()
    diff += "".join(_git(root, "diff", "--binary", "--no-index", "--", "/dev/null", name) for name in untracked)
    software = {
        # trees: hashes of the code alone, which a later commit of something else leaves as they are
        "git": {"commit": commit or None, "trees": trees, "dirty": bool(diff), "untracked": untracked},
        "platform": {"system": platform.platform(), "python": platform.python_version()},
        "versions": dict(sorted((dist.metadata["Name"], dist.version) for dist in importlib.metadata.distributions())),
    }
    return software, diff


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two provenances and can change the bits of a run."""
    hardware = ("processor", "capability", "torch_threads", "gpus")
    named = [key for key in hardware if before["hardware"][key] != now["hardware"][key]]
    if before["git"]["commit"] != now["git"]["commit"]:
        named.append("commit")
    versions = before["versions"], now["versions"]
    return named + sorted(name for name in versions[0] | versions[1] if versions[0].get(name) != versions[1].get(name))


def _git(folder: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return result.stdout if result.returncode in (0, 1) else ""  # 1: a diff that is not empty


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    model = f"family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"
    return f"{facts.get('model name', platform.processor())} ({model})"
