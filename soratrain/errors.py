"""Errors meant for people: each message says what was wrong, the value, and the mend, in one line."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. The command line prints it as one line and exits with code 2.

    Attributes:
        alike: whether every rank of a run raises it at the same place, so that the first alone says it.
    """

    alike = False


class ConfigError(UserError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class DataError(UserError):
    """Input data or a stored artefact that is missing, damaged or does not fit."""


class DivergedError(UserError):
    """The loss or the gradient is no longer a number."""


class StoreError(UserError):
    """A store of data that cannot be reached or read: the run stops, since no other sample would do better."""


class ChatError(UserError):
    """A server of language models that is not there, refuses a request, or gives no answer that can be used.

    Attributes:
        status: of its HTTP answer; None where none came.
        again: whether the same request may well succeed later.
        wait: seconds that the server asks to wait before, if it does.
    """

    def __init__(
        self, message: str, *, status: int | None = None, again: bool = False, wait: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.again, self.wait = status, again, wait


def on_all_ranks(error: UserError) -> UserError:
    """Return `error`, marked as one that every rank raises."""
    error.alike = True
    return error
