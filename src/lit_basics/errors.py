"""The one exception that means "the user's input is wrong": a message, exit code 2 and no traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Wrong input; its message says what was wrong, where, and the nearest right thing."""


MANY = 30
"""More names than this are not listed in a message."""


def shortened(text: str, limit: int = 360) -> str:
    """Return a message, without its middle if it is longer than ``limit``: a value in it may be of any length.

    >>> shortened("abcdefghijklmnop", 11)
    'abc ... nop'
    """
    half = (limit - 5) // 2
    return text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a suggestion to append to a message: the closest of ``valid``, or all if they are few.

    >>> nearest("quikstart", ["blitz", "quickstart"])
    "; did you mean 'quickstart'?"
    >>> nearest("xyz", ["blitz", "quickstart"])
    '; choose from blitz, quickstart'
    """
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; choose from {', '.join(names)}" if 0 < len(names) <= MANY else ""


def printable(text: str) -> str:
    r"""Return a message in which codes that a terminal would obey are shown instead: a file may have brought them.

    >>> print(printable("archive/\x1b[2J"))
    archive/\x1b[2J
    """
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    r"""Return the first line of an exception's message, or its kind where it has none.

    >>> first_line(ValueError("no\nmore")), first_line(MemoryError())
    ('no', 'MemoryError')
    """
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
