"""The words of the command line, looked at before they are parsed."""

import os

from lit_basics.errors import UserError

CONFIG_FLAGS = ("--config", "-c")


def taken(args: list[str], *names: str) -> tuple[list[str], list[str]]:
    """Return all values of a typed option, and the words without it.

    >>> taken(["--a", "1", "--b", "2", "--a=3"], "--a")
    (['1', '3'], ['--b', '2'])

    Args:
        args: The words.
        names: The option, and other names of it.

    Raises:
        UserError: If a value is missing, or empty as a shell's variable that is not set.
    """
    values, rest, missing = [], [], False
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name in names:
            value = value if equals else next(words, "")
            missing |= not value or (not equals and value.startswith("--"))  # the next option
            values.append(value)
        else:
            rest.append(word)
    if missing:
        raise UserError(f"{names[0]} needs a value")
    return values, rest


def config_names(args: list[str]) -> list[str]:
    """Return what was given as ``--config``, its ``~`` expanded."""
    return [os.path.expanduser(name) for name in taken(args, *CONFIG_FLAGS)[0]]


def option(args: list[str], name: str) -> str | None:
    """Return the value of a typed option, the last of several."""
    return next(reversed(taken(args, name)[0]), None)


def path_option(args: list[str], name: str) -> str | None:
    """Return a typed path, its ``~`` expanded: shells leave that of ``--name=~/path`` as it is."""
    value = option(args, name)
    return value and os.path.expanduser(value)
