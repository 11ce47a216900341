"""How passes leave alone what they do not know completely: `need` says why, and `DeclinedError` ends the attempt."""

from __future__ import annotations

__all__ = ["DeclinedError", "need"]


class DeclinedError(Exception):
    """Something stays as it is; the message says why, in a line."""


def need(holds: bool, why: str) -> None:
    """Decline unless something holds.

    Raises
    ------
    DeclinedError
        With ``why``.
    """
    if not holds:
        raise DeclinedError(why)
