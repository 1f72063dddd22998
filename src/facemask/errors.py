"""The one exception that users are meant to see, and the one of the system that they can mend."""

import errno

DISK_FULL = "the disk is full; make room and give the same command again"


class UserError(Exception):
    """A mistake its user can mend, told in one sentence that names the thing and the mend.

    Commands print the sentence without a traceback and exit with code 2.
    """

    def __init__(self, sentence: str) -> None:
        # torch raises what a loader's worker raised again with the worker's traceback as its text
        super().__init__(sentence.rsplit(f"{__name__}.UserError: ", 1)[-1].strip())


def is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
