"""Processes that end with the one that started them, however that ends."""

import ctypes
import os
import signal
import sys

_PARENT = "FACEMASK_PARENT"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent() -> None:
    """Where the parent asked for it (`followed`): be killed when it ends, and ask the same of further ranks."""
    parent = os.environ.get(_PARENT)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it had ended before
        sys.exit(1)
    os.environ.update(followed())


def followed() -> dict[str, str]:
    """The environment variable for processes that must not outlive this one."""
    return {_PARENT: str(os.getpid())}
