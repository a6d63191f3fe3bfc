"""The exceptions that a user of the command line or the app is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: the message is one line that names the cause and the remedy.

    The command line prints it after ``error:`` and exits with code 2; the app shows it as a notice.
    Raise it before heavy work starts and before anything on disk is changed.
    """


class Interrupted(KeyboardInterrupt):
    """Somebody asked the program to end, by Ctrl-C or in another way, and it ended in good order.

    Attributes:
        exit_code: what the command exits with: 128 and the signal's number, as shells count, or 0.
    """

    def __init__(self, exit_code: int) -> None:
        super().__init__("interrupted" if exit_code else "stopped")
        self.exit_code = exit_code
