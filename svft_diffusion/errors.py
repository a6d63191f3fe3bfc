"""The one exception that a user of the command line or the app is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: the message is one line that names the cause and the remedy.

    The command line prints it after ``error:`` and exits with code 2; the app shows it as a notice.
    Raise it before heavy work starts and before anything on disk is changed.
    """
