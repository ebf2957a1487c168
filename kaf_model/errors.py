"""The errors that a person is meant to read."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake in the input that a message, not a traceback, should answer.

    The message is one line: what came, what was wanted, and what to do next.
    """


class VolumeError(UserError):
    """A volume that cannot be read, or does not lie on the grid it should lie on."""
