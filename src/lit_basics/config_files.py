"""The files of ``--config``: found by path or by a recipe's name, and read; no larger than a config is."""

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lit_basics.errors import UserError, first_line
from lit_basics.recipes import all_names, recipe_path
from lit_basics.words import CONFIG_FLAGS

MANY_VALUES = 10_000
MAX_DEPTH = 50
"""How large a config may be, its aliases written out."""


def named_configs(args: list[str]) -> list[str]:
    """Return ``args`` with each ``--config NAME`` replaced by the recipe's path, each path checked.

    Raises:
        UserError: If a recipe or a file does not exist or is not YAML text with keys.
    """
    words: list[str] = []
    for word in args:
        name, equals, value = word.partition("=")
        if words and words[-1] in CONFIG_FLAGS:
            word = str(config_path(word))
        elif equals and name in CONFIG_FLAGS:
            word = f"{name}={config_path(value)}"
        words.append(word)
    return words


def config_path(name: str) -> Path:
    """Return the file that ``--config name`` means: a path, or the name of a recipe or an overlay.

    Raises:
        UserError: If there is no such file or recipe, or it is not a YAML mapping.
    """
    if not name:
        raise UserError("--config needs a value")
    path = Path(os.path.expanduser(name))
    is_path = path.suffix or os.sep in name or (path.exists() and name not in all_names())
    if not is_path:
        path = recipe_path(name)
    elif not path.is_file():
        other = "is a pipe or a device; save it to a file first" if path.exists() else "does not exist"
        what = "is a folder" if path.is_dir() else other
        close = difflib.get_close_matches(name, [str(file) for file in path.parent.glob("*.y*ml")], n=1)
        close = close or difflib.get_close_matches(path.stem, all_names(), n=1)
        raise UserError(f"--config {name}: the file {what}{f'; did you mean {close[0]!r}?' if close else ''}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        plain = type(error) is ValueError  # of a date that is none, or an integer of thousands of digits
        reason = getattr(error, "problem", None) or (first_line(error) if plain else type(error).__name__)
        raise UserError(f"--config {name}: not a YAML text file{where} ({reason})") from error
    check_size(content, f"--config {name}")
    if not isinstance(content, dict):
        what = "is empty" if content is None else f"holds a {type(content).__name__}, not keys and values"
        raise UserError(f"--config {name}: the file {what}")
    return path


def read_config(path: Path) -> dict[str, Any]:
    """Return what a run's ``config.yaml`` holds."""
    return dict(yaml.safe_load(config_path(str(path)).read_text(encoding="utf-8")))


def check_size(content: Any, name: str) -> None:
    """Refuse the content of a file that is too large with its aliases written out."""
    if sum(1 for _ in zip(_values(content), range(MANY_VALUES + 1), strict=False)) > MANY_VALUES:
        raise UserError(f"{name}: the file holds more than {MANY_VALUES} values, or one that contains itself")


def _values(content: Any, depth: int = 0) -> Iterator[None]:
    """Yield once for each value, as often as an alias repeats it; a few lines of YAML can stand for millions."""
    yield
    if depth > MAX_DEPTH:
        raise UserError(f"a config is nested more than {MAX_DEPTH} deep, or contains itself")
    for inner in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _values(inner, depth + 1)
