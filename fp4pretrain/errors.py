"""The one exception for mistakes a user can fix.

The command line prints it as one line and exits with status 2; a traceback always means a bug of
ours.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user asked for: ``"key: what is wrong; how to cure it"``.

    ``shown``: whether this rank prints it; None leaves it to the main rank.
    """

    def __init__(self, line: str = "", *, shown: bool | None = None) -> None:
        super().__init__(line)
        self.shown = shown


class LocalError(UserError):
    """A UserError that one rank alone may meet, so that the rank that has it prints it."""

    def __init__(self, line: str = "", *, shown: bool | None = True) -> None:
        super().__init__(line, shown=shown)


def first_line(error: BaseException) -> str:
    """An exception's message for the middle of a line: the first line of it, or its class where it has
    none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
