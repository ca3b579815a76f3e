"""What the options of our environments must be."""

from __future__ import annotations

from numbers import Integral
from typing import Any

from batchproof.errors import BatchproofError


def check_whole(name: str, value: Any, most: int, hint: str = "") -> None:
    """Raise a `BatchproofError` unless ``value`` is a whole number from 1 to ``most``.

    Args:
        name: the option and its environment, as the message names them.
        value: what a user gave.
        most: the largest that is allowed.
        hint: what to do for more.
    """
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or not 1 <= value <= most:
        raise BatchproofError(
            f"{name} must be a whole number from 1 to {most}, got {value}"
            + (f": {hint}" if hint else "")
        )
