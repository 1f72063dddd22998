"""The one exception that users are meant to see."""


class UserError(Exception):
    """A mistake its user can mend, told in one sentence that names the thing and the mend.

    Commands print the sentence without a traceback and exit with code 2.
    """

    def __init__(self, sentence: str) -> None:
        # torch raises what a loader's worker raised again with the worker's traceback as its text
        super().__init__(sentence.rsplit(f"{__name__}.UserError: ", 1)[-1].strip())
