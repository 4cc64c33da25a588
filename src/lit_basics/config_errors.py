"""jsonargparse's messages, which can be a page long, in a line: the key, the value, the nearest valid name."""

import importlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import torch
import yaml

import lit_basics
from lit_basics.errors import nearest

NO_MODEL = (
    "what shall be trained? Name a recipe (lit_basics fit --config quickstart) or a model and data "
    "(--model lit_basics.LitLeNet5 --data SyntheticCIFAR10); lit_basics recipes lists the recipes"
)


def short_message(message: str, parser: jsonargparse.ArgumentParser, args: list[str]) -> str:
    """Return ``message``, an error of ``parser`` at ``args``, in a line or two."""
    if "arguments are required: model" in message:
        return NO_MODEL
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        word = match[1]
        if not word.startswith("--"):
            return f"{word!r} is not an option; a recipe is named by --config {word}"
        word = word.split("=")[0]
        return f"there is no option {word}{nearest(word, _options(parser))}"
    key = ".".join(re.findall(r'Parser key "([^"]+)"', message))
    if match := re.search(r"[Kk]ey ['\"]?([\w.+]+)['\"]? is not expected|No action for key \"([\w.+]+)\"", message):
        key = match[1] or match[2]
        options = [option.removeprefix("--") for option in _options(parser)]
        return f"there is no key {key}{_place(key, args)}{nearest(key, options)}"
    if match := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", message):
        key = f"{match[1]}.{match[2]}"
        options = [option.removeprefix("--") for option in _options(parser)]
        return f"there is no key {key}{_place(key, args)}{nearest(key, options)}"
    if match := re.search(r"(?:Option|Key|key) ['\"]([\w.]+)['\"] is not (?:accepted|expected)", message):
        class_path = _last_class_path(message[: message.index(match[0])], message)
        if not key:
            names = (
                "model",
                "data",
                "trainer",
                "seed_everything",
                "metrics_csv",
                "best_checkpoint",
                "last_checkpoint",
            )
            return f"there is no key {match[1]}{_place(match[1], args)}{nearest(match[1], names)}"
        key = f"{key}.{match[1]}"
        return f"there is no key {key}{_place(key, args)}{nearest(match[1], _parameters(class_path))}"
    if match := re.search(r"arguments are required: (.+)", message):
        return f"{_last_class_path(message, message) or key} needs {match[1].strip()}{_place(key, args)}"
    value = _value(message)
    name = re.search(
        r"(?:dot import path string|Problem with given class_path|Import): '?([\w.]+)|'([\w.]+)':\n.*import",
        message,
    )
    if key.rpartition(".")[2] in ("model", "data", "callbacks", "lr_scheduler", "logger") and re.fullmatch(
        r"[\w.]+", value
    ):
        return f"{key}: there is no class {value}{_place(key, args)}{nearest(value, _classes(key))}"
    if "dot import path" in message and not re.search(r"<class '(float|int|bool|str)'>", message):
        wanted = (name and (name[1] or name[2])) or value
        return f"{key}: there is no class {wanted}{_place(key, args)}{nearest(wanted, _classes(key))}"
    if match := re.search(r"(Multiple subclasses with name .+)", message):
        return f"{key}: {match[1]}"
    kinds = list(dict.fromkeys(re.findall(r"Expected an? <class '(\w+)'>", message)))
    if kinds:
        kinds = ["nothing (null)" if kind == "NoneType" else kind for kind in kinds]
        return f"{key} is {value}{_place(key, args)}; it must be {' or '.join(kinds)}"
    if match := re.search(r"Expected (one of .+|an? .+?)(?:\. Got|\n|$)", message):
        return f"{key} is {value}{_place(key, args)}; expected {match[1]}"
    return f"{key}: {message.strip().splitlines()[-1].strip()}" if key else message.strip().splitlines()[0]


def _value(message: str) -> str:
    found = re.findall(r"(?:Got|Given) value: (.+)", message)
    nested = re.findall(r"NestedArg\(key='[^']*', val='([^']*)'", message)
    value = nested[0] if nested else (found or ["wrong"])[0]
    value = re.sub(r"\. Got value.*", "", value).strip()
    return value if len(value) <= 80 else value[:77] + "..."


def _place(key: str, args: list[str]) -> str:
    """Return " (in FILE)" if the key is not typed but stands in a config file."""
    if any(word.startswith(f"--{key}") for word in args):
        return ""
    for before, word in zip(args, args[1:], strict=False):
        if before == "--config":
            content: Any = yaml.safe_load(Path(word).read_text())
            for part in key.split("."):
                if isinstance(content, dict):
                    content = content.get("init_args", content) if part not in content else content
                content = content.get(part, content.get(f"{part}+")) if isinstance(content, dict) else None
            if content is not None:
                return f" (in {word})"
    return ""


def _options(parser: jsonargparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings if option.startswith("--")]


def _last_class_path(before: str, message: str) -> str:
    found = re.findall(r"class_path '?=?'?([\w.]+)'", before) or re.findall(r"class_path='([\w.]+)'", message)
    after = re.findall(r"class_path='([\w.]+)'", message[len(before) :])
    return str((after[:1] if "optim" in "".join(after[:1]) else found[-1:] or [""])[0])


def _parameters(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    try:
        parameters = jsonargparse.ArgumentParser().add_class_arguments(
            getattr(importlib.import_module(module), name), fail_untyped=False
        )
    except (AttributeError, ImportError, ValueError, TypeError):
        return []
    return list(parameters)


def _classes(key: str) -> Iterable[str]:
    last = key.rpartition(".")[2]
    public = {name: getattr(lit_basics, name) for name in lit_basics.__all__}
    bases: dict[str, type] = {
        "model": pl.LightningModule,
        "data": pl.LightningDataModule,
        "callbacks": pl.Callback,
    }
    if last in bases:
        return [n for n, c in public.items() if isinstance(c, type) and issubclass(c, bases[last])]
    module = torch.optim.lr_scheduler if "scheduler" in last else torch.optim
    names = [n for n, c in vars(module).items() if isinstance(c, type) and not n.startswith("_")]
    return names if "optimizer" in last or "scheduler" in last or last in ("matrices", "rest") else []
