"""The one exception that means "the user's input is wrong": a message, exit code 2 and no traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input; its message says what was wrong, where, and the nearest right thing."""


MANY = 30
"""More names than this are not listed in a message."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a suggestion to append to a message: the closest of ``valid``, or all if they are few.

    >>> nearest("quikstart", ["blitz", "quickstart"])
    "; did you mean 'quickstart'?"
    >>> nearest("xyz", ["blitz", "quickstart"])
    '; there is blitz, quickstart'
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is {', '.join(names)}" if 0 < len(names) <= MANY else ""
