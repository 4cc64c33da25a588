"""The words of the command line, looked at before they are parsed."""


def config_names(args: list[str]) -> list[str]:
    """Return what was given as ``--config``."""
    names = [args[i + 1] for i, word in enumerate(args[:-1]) if word in ("--config", "-c")]
    return [*names, *(word.removeprefix("--config=") for word in args if word.startswith("--config="))]


def option(args: list[str], name: str) -> str | None:
    """Return the value of a typed option, before the words are parsed."""
    value = None
    for i, word in enumerate(args):
        if word == name and i + 1 < len(args):
            value = args[i + 1]
        elif word.startswith(f"{name}="):
            value = word.partition("=")[2]
    return value
