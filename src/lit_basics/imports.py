"""What a config may import: the libraries that training needs, and the user's own modules.

jsonargparse imports whatever a config names before it looks at the type, and calls functions as it calls classes. So
that a config of somebody else is safe to run, its names are limited, and so are the functions in the libraries. Only
names in the config count, not what the modules behind them import.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonargparse
from jsonargparse._common import parsing_settings
from jsonargparse._util import import_object

from lit_basics.errors import UserError

LIBRARIES = (
    "torch.nn",
    "torch.optim",
    "torch.utils.data",
    "torchvision.models",
    "torchvision.transforms",
    "torchvision.datasets",
    "torchmetrics",
    "lightning",
    "lit_basics",
)
"""What any config may name, and what lies in it."""
FUNCTIONS = ("torch.nn.functional", "torchvision.models", "torchvision.transforms", "torchmetrics.functional")
"""Where a config may name functions too: elsewhere some would import or unpickle what they are given."""
NEVER = ("*", "lightning.pytorch.cli", "torch.utils.data.datapipes", "torchvision.datasets.lsun")
"""A command line of its own within ours, and what unpickles files or bytes."""
FLAG = "--allow_import"


@contextmanager
def import_policy(allowed: Sequence[str]) -> Iterator[None]:
    """Limit what configs may name, in this process, for as long as this lasts.

    Args:
        allowed: Modules or packages that the user allows beside :data:`LIBRARIES`. The modules of the working
            directory are allowed where Python looks for modules there, as in ``python -m lit_basics``.

    Raises:
        UserError: If one of ``allowed`` cannot be the name of a module, or is jsonargparse itself.
    """
    names = ("import_path_verdicts", "import_paths_enforced")
    before = {name: parsing_settings[name] for name in names}
    try:
        try:
            jsonargparse.set_parsing_settings(
                import_path_denylist=[*NEVER], import_path_allowlist=[*LIBRARIES, "__main__", *own_modules(), *allowed]
            )
        except ValueError as error:
            wrong = next((name for name in allowed if repr(name) in str(error)), "jsonargparse")
            raise UserError(f"{FLAG} {wrong}: it must be the name of a module or package of yours") from error
        yield
    finally:
        parsing_settings.update(before)  # what else in this process uses jsonargparse keeps its settings


def own_modules() -> list[str]:
    """Return the modules of the working directory, where Python looks for modules there."""
    folder = Path.cwd()
    if not any(Path(entry).resolve() == folder for entry in sys.path):
        return []
    names = {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
    return sorted(name for name in names if name.isidentifier() and name != "jsonargparse" and _lies_in(name, folder))


def _lies_in(name: str, folder: Path) -> bool:
    """Return whether importing ``name`` gives what lies in ``folder``, not a module of Python's own."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return False
    if spec is None or not (spec.has_location or spec.submodule_search_locations):
        return False  # built into Python
    places = spec.submodule_search_locations or [spec.origin or ""]
    inside = [Path(place).resolve().parent == folder for place in places]
    return bool(inside) and all(inside)


def check_functions(config: Any, owner: str = "", key: str = "") -> None:
    """Refuse a function of a library where that is not one of :data:`FUNCTIONS`, before anything is called.

    The code itself may use any function as a default.

    Args:
        config: A parsed configuration, or a value in one.
        owner: The class whose argument this is.
        key: The argument's dotted key.

    Raises:
        UserError: If there is one.
    """
    if isinstance(config, (jsonargparse.Namespace, dict)):
        path = config.get("class_path")
        if isinstance(path, str) and "." in path:
            owner, key = path, key.removesuffix(".init_args")
            try:
                _check_function(import_object(path), path, key)
            except (ImportError, AttributeError) as error:
                if isinstance(config, jsonargparse.Namespace):
                    raise UserError(f"{key}: {path}: {error}") from error
        for name, value in (vars(config) if isinstance(config, jsonargparse.Namespace) else config).items():
            inner = key if name in ("init_args", "dict_kwargs") else f"{key}.{name}".strip(".")
            check_functions(value, owner, inner)
    elif isinstance(config, (list, tuple, set)):
        for value in config:
            check_functions(value, owner, key)
    elif inspect.isroutine(config) and not (owner and config is class_defaults(owner).get(key.rpartition(".")[2])):
        _check_function(config, f"{config.__module__}.{config.__qualname__}", key)


def class_defaults(class_path: str) -> dict[str, Any]:
    """Return the defaults of the arguments of a class, or of a function that makes an object."""
    target = import_object(class_path)
    parser = jsonargparse.ArgumentParser()
    add = parser.add_class_arguments if isinstance(target, type) else parser.add_function_arguments
    add(target, fail_untyped=False)
    return dict(vars(parser.get_defaults()))


def untyped_arguments(class_path: str) -> list[str]:
    """Return the arguments without a type that a class needs: jsonargparse gives them None where they are missing."""
    parameters = inspect.signature(import_object(class_path)).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [p.name for p in parameters if p.kind in kinds and p.default is p.empty and p.annotation is p.empty]


def _check_function(target: Any, path: str, key: str) -> None:
    if not inspect.isroutine(target):
        return
    module = getattr(target, "__module__", None) or "torch.nn"  # torch's built-in functions know no module
    if not _below(module, LIBRARIES):
        return  # the user's own
    if not (inspect.isfunction(target) and "." not in target.__qualname__ and _below(module, FUNCTIONS)):
        raise UserError(f"{key}: {path} is a function; of the libraries' a config may name only {', '.join(FUNCTIONS)}")


def _below(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
