"""The words of the command line, looked at before they are parsed."""

import os

from lit_basics.errors import UserError


def config_names(args: list[str]) -> list[str]:
    """Return what was given as ``--config``."""
    names = []
    for word, following in zip(args, [*args[1:], None], strict=True):
        if word in ("--config", "-c") and following is not None:
            names.append(following)
        elif word.startswith("--config="):
            names.append(word.removeprefix("--config="))
    return names


def option(args: list[str], name: str) -> str | None:
    """Return the value of a typed option, before the words are parsed."""
    value = None
    for i, word in enumerate(args):
        if word == name and i + 1 < len(args):
            value = args[i + 1]
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
    return value


def path_option(args: list[str], name: str) -> str | None:
    """Return a typed path, its ``~`` expanded: shells leave that of ``--name=~/path`` as it is.

    Raises:
        UserError: If it is empty, as a shell's variable that is not set.
    """
    value = option(args, name)
    if value == "":
        raise UserError(f"{name} needs a value")
    return value and os.path.expanduser(value)


def taken(args: list[str], name: str) -> tuple[list[str], list[str]]:
    """Return all values of a typed option, and the words without it.

    >>> taken(["--a", "1", "--b", "2", "--a=3"], "--a")
    (['1', '3'], ['--b', '2'])

    Raises:
        UserError: If a value is missing.
    """
    values, rest = [], []
    words = iter(args)
    for word in words:
        if word == name:
            values.append(next(words, ""))
        elif word.startswith(f"{name}="):
            values.append(word.partition("=")[2])
        else:
            rest.append(word)
    if "" in values:
        raise UserError(f"{name} needs a value")
    return values, rest
