"""jsonargparse's messages, which can be a page long, in a line: the key, the value, the nearest valid name.

Such a message is an indented tree: a key, for each type that its value may have the reason why it has not, and
further in the same for a key of that class. :func:`_read` takes the first branch to its end, and
:func:`short_message` says it in our words, one rule a kind of reason.
"""

import difflib
import importlib
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import torch
import yaml
from jsonargparse._util import import_object
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import lit_basics
from lit_basics.errors import nearest
from lit_basics.imports import FLAG, class_defaults, own_modules
from lit_basics.recipes import all_names
from lit_basics.words import config_names

NO_MODEL = (
    "which model? Type lit_basics fit --config quickstart, or name a model and data "
    "(--model lit_basics.LitLeNet5 --data SyntheticCIFAR10), or for test, validate and predict a run "
    "(--run_dir D); lit_basics recipes lists the recipes"
)

_COMMON = [
    "trainer.max_epochs",
    "model.optimizer",
    "model.optimizer.lr",
    "model.lr_scheduler",
    "data.batch_size",
    "data.val_size",
]
"""Keys of most models and data, whose last part alone is often typed."""

_NOISE = (
    "Does not validate against",
    "Subtypes:",
    "Errors:",
    "Given value type:",
    "Expected a path but",
    "Expected a <class 'NoneType'>",  # most keys may be null: not worth saying
    "Subclass types expect one of:",
    "a class path (str)",
    "a dict with",
)
"""Beginnings of lines that say nothing about what was wrong."""


@dataclass
class _Problem:
    """The first branch of a message."""

    key: str = ""
    """The dotted key, as one would type it."""
    class_path: str = ""
    """The class whose argument it is."""
    value: str = ""
    reasons: list[str] = field(default_factory=list)
    """Why the value is none of the types that it may have."""


def short_message(message: str, parser: jsonargparse.ArgumentParser, args: list[str]) -> str:
    """Return ``message``, an error of ``parser`` at ``args``, in our words."""
    problem = _read(message)
    key, reason = problem.key, problem.reasons[0] if problem.reasons else message.strip()
    place = _place(key, args)

    # Importing 'mine.Mine' is not allowed, denied by the '*' entry of the import path denylist
    match = re.search(r"Importing '([\w.]+)' is not allowed, denied by the '([\w.*]+)' entry", message)
    others = [kind for kind in _kinds(problem.reasons) if not kind.startswith("a class of")]
    if match and not (others and problem.value == match[1] and not list(_classes(key))):  # a number is likelier meant
        package = match[1].partition(".")[0]
        hint = (
            f"; if you trust {package}, type {FLAG} {package} (python -m lit_basics allows the modules in the working "
            "directory)"
        )
        theirs = match[2] != "*" or package in ("torch", "torchvision", "builtins")
        if not theirs and package not in sys.modules and find_spec(package) is None:
            close = nearest(package, own_modules()) or "; python -m lit_basics finds those in the working directory"
            return f"{key}: there is no module {package} for {match[1]}{place}{close}"
        return f"{key}: a config may not name {match[1]}{place}{'' if theirs else hint}"

    # the following arguments are required: model
    if match := re.search(r"arguments are required: (.+)", reason):
        if not key:
            return NO_MODEL
        return f"{key}: {problem.class_path} needs {match[1].strip()}{place}"

    # unrecognized arguments: --trainer.max_epoch 3
    if match := re.search(r"unrecognized arguments: (\S+)", reason):
        word = match[1].partition("=")[0]
        if word.startswith(("-", "–", "—")):  # some editors make a dash of two hyphens
            return f"there is no option {word}{_nearest_key(word.lstrip('-–—'), [*_keys(parser), FLAG[2:]], '--')}"
        if word in all_names() or word.endswith((".yaml", ".yml")):
            return f"{word!r} stands alone; did you mean '--config {word}'?"
        if Path(word, "config.yaml").is_file():
            return f"{word!r} stands alone; did you mean '--run_dir {word}'?"
        return f"{word!r} stands alone; a value follows its --KEY"

    # Group 'trainer' does not accept option 'max_epoch'
    if match := re.match(r"Group '([\w.]+)' does not accept option '([^']+)'", reason):
        key = f"{match[1]}.{match[2]}"
        return f"there is no key {key}{_place(key, args)}{_nearest_key(key, _keys(parser))}"

    # Option 'optimzer.class_path' is not accepted
    if match := re.match(r"Option '([^']+)' is not accepted", reason):
        if re.fullmatch(r"lightning\.(LightningModule|LightningDataModule|Callback)", problem.class_path):
            if match[1] == "class_path":
                return f"{key} holds more than class_path and init_args{place}"
            hint = f"write class_path and init_args, or --{key} CLASS first"
            return f"{key} holds {match[1]!r}, but no class{place}; {hint}"
        wrong = ".".join([*([key] if key else []), match[1].partition(".")[0]])
        keys = [f"{key}.{name}" for name in _parameters(problem.class_path)] if key else _keys(parser)
        return f"there is no key {wrong}{_place(wrong, args)}{_nearest_key(wrong, keys)}"

    # Multiple subclasses with name A. Give the full class path to avoid ambiguity: torch.A, lightning.A.
    if match := re.match(r"Multiple subclasses with name (\w+)\..*: (.+?)\.?$", reason):
        paths = [path for path in match[2].split(", ") if not path.startswith("lightning.pytorch.cli.")]
        return f"{key}: there are several classes {match[1]}{place}; write {' or '.join(paths)}"

    # Expected a dot import path string: Adm; for callbacks after: Expected a <class 'list'>
    if match := re.search(r"^Expected a dot import path string: ?(\S*)", "\n".join(problem.reasons), re.M):
        names = list(_classes(key))
        if names or match[0] == reason:  # else a number would do too, and is more likely meant
            return f"{key}: there is no class {match[1] or repr('')}{place}{nearest(match[1], names)}"

    # module 'torch.nn' has no attribute 'Linea'; it may come from inside a user's module too
    if match := re.match(r"module '([\w.]+)' has no attribute '(\w+)'", reason):
        wrong = f"{match[1]}.{match[2]}"
        if wrong in message.replace(reason, ""):
            return f"{key}: there is no class {wrong}{place}{nearest(match[2], _classes_of(match[1]))}"

    # Expected 'torch.nn.Linear' to be a subclass of <class 'Optimizer'>.
    # Import path does not correspond to a subclass of LightningModule
    if match := re.match(r"(?:Expected '([\w.]+)' to be|Import path .*) a subclass of .*?(\w+)\W*$", reason):
        return f"{key} is {match[1] or problem.value}{place}, which is not a subclass of {match[2]}"

    # No module named 'mine', of the class_path mine.Mine
    if (match := re.match(r"No module named '([\w.]+)'", reason)) and problem.class_path.startswith(match[1]):
        hint = "python -m lit_basics finds modules in the working directory"
        return f"{key}: there is no module {match[1]} for {problem.class_path}{place}; {hint}"

    # argument --run_dir: expected one argument
    if match := re.match(r"argument (?:\S*/)?(--\S+): expected", reason):
        return _without_value(match[1], args)

    # Expected a <class 'int'> or Expected a typing.Literal['tanh', 'relu']
    if kinds := _kinds(problem.reasons):
        value = problem.value if len(problem.value) <= 80 else problem.value[:77] + "..."
        value = {"": "empty", "None": "null"}.get(value, value)
        if "str" in kinds and value[0] in "[{" and not place:  # such as: run: 1
            return f"{key} is read as YAML, {value}; a --config file takes it as text, in quotes"
        return f"{key} is {value}{place}; it must be {' or '.join(kinds)}"

    # such as: invalid syntax (mine.py, line 3), of the class_path mine.Mine
    if key:
        return f"{key}{f' {problem.class_path}' if problem.class_path else ''}: {reason}{place}"
    files = f" (in {' or '.join(config_names(args))})" if config_names(args) else ""
    return f"{reason.splitlines()[0]}{files}"


def _read(message: str) -> _Problem:
    """Return the first branch of ``message``.

    >>> _read('''Parser key "data":
    ...   Does not validate against any of the Union subtypes
    ...   Subtypes: [<class 'LightningDataModule'>, <class 'NoneType'>]
    ...   Errors:
    ...     - Problem with given class_path 'lit_basics.SyntheticCIFAR10':
    ...         Parser key "batch_size":
    ...           Expected a <class 'int'>. Got value: big
    ...     - Expected a <class 'NoneType'>
    ...   Given value type: <class 'dict'>
    ...   Given value: {'class_path': 'SyntheticCIFAR10', 'init_args': {'batch_size': 'big'}}''')
    ... # doctest: +NORMALIZE_WHITESPACE
    _Problem(key='data.batch_size', class_path='lit_basics.SyntheticCIFAR10', value='big',
        reasons=["Expected a <class 'int'>"])
    """
    problem, keys, rest = _Problem(), [], ""
    for line in message.splitlines():
        line = line.strip().removeprefix("- ")
        if line.startswith("Type ") and "expects a function or a callable class: " in line:
            problem.class_path = ""  # it is the value's, see below
            line = line.partition("expects a function or a callable class: ")[2]
        key = re.match(r'Parser key "([^"]+)":', line)
        class_path = re.match(r"Problem with given class_path '([^']+)':", line)
        if (key or class_path) and problem.reasons:
            break  # the next branch
        if key:
            keys.append(key[1])
        elif class_path:
            problem.class_path = class_path[1]
        elif line.startswith("Given value: "):
            problem.value = problem.value or line.removeprefix("Given value: ").partition(". Got value: ")[0]
            rest += line
        elif line and not line.startswith(_NOISE):
            reason, _, value = line.partition(". Got value: ")
            problem.reasons.append(reason)
            problem.value = problem.value or value.partition(". Got value: ")[0]
            rest += value
    problem.key = ".".join(keys)
    if match := re.match(r"Namespace\(class_path='([\w.]+)'", problem.value):
        problem.value = match[1]
    if not problem.class_path and (match := re.search(r"class_path='([\w.]+)'", rest)):
        problem.class_path = match[1]
    return problem


def _kinds(reasons: list[str]) -> list[str]:
    kinds: list[str] = []
    for reason in reasons:
        if reason.startswith("Expected a dot import path"):
            continue  # beside a number: torch.optim's lr may be a tensor
        if match := re.match(r"Expected a <class '(?:[\w.]+\.)?(\w+)'>", reason):
            kinds.append({"Sequence": "a list such as [1, 2]"}.get(match[1], match[1]))
        elif match := re.match(r"Expected a typing\.Literal\[(.+)\]", reason):
            kinds.append(f"one of {match[1]}" if not kinds else match[1])
        elif match := re.match(
            r"(?:Not a valid subclass of|Expected an instantiatable class, but) (?:\w+\.)*(\w+)", reason
        ):
            kinds += [] if kinds else [f"a class of {match[1]}s, or class_path and init_args"]
        elif reason.startswith("Expected an import path or a subclass spec"):
            kinds.append("a class, or class_path and init_args")
        elif match := re.match(r"Expected (.+)", reason):
            kinds.append(match[1])
    return list(dict.fromkeys(kinds))


def _place(key: str, args: list[str]) -> str:
    """Return " (in FILE)" if the key is not typed but stands in a config file; the last file counts."""
    if not key or _is_typed(key, args):
        return ""
    parts = key.split(".")
    holding = [file for file in config_names(args) if _holds(yaml.safe_load(Path(file).read_text("utf-8")), parts)]
    return f" (in {holding[-1]})" if holding else ""


def _is_typed(key: str, args: list[str]) -> bool:
    """Return whether a key is an option of its own, or may be part of one's value, such as ``--data {...}``."""
    for word, following in zip(args, [*args[1:], ""], strict=True):
        name, equals, value = word.partition("=")
        name = name.rstrip("+").replace(".init_args", "")
        is_part = f"--{key}".startswith(f"{name}.") and (value if equals else following).startswith(("{", "["))
        if name == f"--{key}" or is_part:
            return True
    return False


def _without_value(option: str, args: list[str]) -> str:
    """Return what to say of an option without a value; jsonargparse names a class's by its first part, ``--data``."""
    for word, following in zip(args, [*args[1:], "-"], strict=True):
        if f"{word}.".startswith(f"{option}.") and "=" not in word and following.startswith("-"):
            is_number = re.match(r"-\.?\d", following)
            return f"{word} needs a value{f'; {following} is one after =: {word}={following}' if is_number else ''}"
    return f"{option} needs a value"


def _holds(content: Any, parts: list[str]) -> bool:
    if isinstance(content, list):
        return any(_holds(item, parts) for item in content)
    if not parts:
        return True
    if not isinstance(content, dict):
        return False
    first, *rest = parts
    return any(_holds(content[key], rest) for key in (first, f"{first}+") if key in content) or _holds(
        content.get("init_args"), parts
    )


def _keys(parser: jsonargparse.ArgumentParser) -> list[str]:
    options = [option for action in parser._actions for option in action.option_strings]
    keys = [option.removeprefix("--") for option in options if option.startswith("--")]
    return [*dict.fromkeys(key.partition(".")[0] for key in keys), *keys]


def _nearest_key(wrong: str, keys: list[str], prefix: str = "") -> str:
    """Return a suggestion for a key whose end, or beginning, may be missing.

    >>> _nearest_key("max_epoch", ["trainer.max_epochs", "trainer.max_steps"], "--")
    "; did you mean '--trainer.max_epochs'?"
    >>> _nearest_key("data.batchsize", ["data.batch_size", "data.seed"])
    "; did you mean 'data.batch_size'?"
    """
    parent, _, last = wrong.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == parent}
    others = [key for key in [*_COMMON, *keys] if key != wrong and key not in siblings.values()]
    ends = {key.rpartition(".")[2]: key for key in reversed(others)}
    close = [ends[last]] if last in ends else []
    close = close or [siblings[name] for name in difflib.get_close_matches(last, siblings, n=1)]
    close = close or difflib.get_close_matches(wrong, others, n=1, cutoff=0.8)
    close = close or [key for name, key in ends.items() if last in name.split("_") and key in _COMMON]
    if not parent:
        close = close or [ends[name] for name in difflib.get_close_matches(last, ends, n=1)]
    close = close or [key for name, key in (ends | siblings).items() if last in name.split("_")]
    return f"; did you mean '{prefix}{close[0]}'?" if close else nearest(last, siblings)


def _parameters(class_path: str) -> list[str]:
    try:
        kind, names = import_object(class_path), class_defaults(class_path)
    except (AttributeError, ImportError, ValueError, TypeError):
        return []
    # an optimizer gets its parameters, a scheduler its optimizer, not from the config
    given = ("params", "optimizer") if isinstance(kind, type) and issubclass(kind, (Optimizer, LRScheduler)) else ()
    return [name for name in names if name not in given]


def _classes(key: str) -> Iterable[str]:
    """Return the short names of the classes that ``key`` is likely to take."""
    last = key.rpartition(".")[2]
    bases: dict[str, type] = {
        "model": pl.LightningModule,
        "data": pl.LightningDataModule,
        "callbacks": pl.Callback,
        **dict.fromkeys(("optimizer", "matrices", "rest"), Optimizer),
    }
    if last in bases:
        ours = {name: getattr(lit_basics, name) for name in lit_basics.__all__}
        names = {**vars(pl.callbacks), **vars(torch.optim), **ours}
        return [n for n, c in names.items() if isinstance(c, type) and issubclass(c, bases[last])]
    homes: dict[str, tuple[str, ...]] = {
        "lr_scheduler": ("torch.optim.lr_scheduler",),
        "net": ("lit_basics.nets", "torch.nn"),
        "objective": ("lit_basics.nets", "torch.nn"),
        "criterion": ("torch.nn",),
        "logger": ("lightning.pytorch.loggers",),
        "transform": ("torchvision.transforms.v2",),
    }
    return [name for module in homes.get(last, ()) for name in _classes_of(module)]


def _classes_of(module: str) -> list[str]:
    """Return the names of the public classes in a module."""
    content = importlib.import_module(module)
    return [name for name in dir(content) if name[0] != "_" and isinstance(getattr(content, name), type)]
