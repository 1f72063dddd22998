"""The one exception that users are meant to see."""


class UserError(Exception):
    """A mistake its user can mend, told in one sentence that names the thing and the mend.

    Commands print the sentence without a traceback and exit with code 2.
    """
