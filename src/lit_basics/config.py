"""From the words of the command line to objects: recipes, overlays and dotted overrides.

LightningCLI builds the parser; this adds the recipes' names, the options of a run, and short messages.
"""

import math
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import yaml
from jsonargparse.typing import Path as ArgumentPath
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning_utilities.core.rank_zero import rank_zero_only

import lit_basics
from lit_basics.config_errors import short_message
from lit_basics.config_files import check_size, named_configs
from lit_basics.errors import UserError, first_line, nearest, shortened
from lit_basics.imports import FLAG, check_functions, class_defaults, import_policy, untyped_arguments
from lit_basics.tracebacks import root_cause, where
from lit_basics.words import config_names, taken

RUN_KEYS = ("run_dir", "ckpt_path", "resume", "resume_reset")
"""Options of one run, which its config.yaml does not carry."""
PRINT = "--print_config"
UNSERIALIZABLE = "Unable to serialize instance"
"""How jsonargparse dumps what it cannot, such as a ``torch.device``."""


class _Dumper(yaml.SafeDumper):
    """Quotes text such as ``1e-4``: a number for jsonargparse, which reads again what it dumps, but not for PyYAML."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def dump_yaml(data: Any) -> str:
    """Return plain values as YAML."""
    return str(yaml.dump(data, Dumper=_Dumper, default_flow_style=False, allow_unicode=True, sort_keys=False))


jsonargparse.set_dumper("yaml", dump_yaml)  # of the process: jsonargparse dumps the arguments of classes by it too


class Config(LightningCLI):
    """A parsed configuration; :meth:`build` makes the objects of it."""

    optimizer_arguments: dict[str, Any]
    """What a resumed run gives its optimizer anew."""
    resumed: bool = False
    """Whether the run goes on where an earlier one stopped."""
    typed: list[str]
    """The keys of the typed options."""

    def __init__(self, args: list[str]) -> None:
        self.optimizer_arguments = {}
        self.typed = [word.partition("=")[0].removeprefix("--") for word in args if word.startswith("--")]
        # a config cannot widen the list: the flag is typed, and typed again for a resumed run
        self._allowed, args = taken(args, FLAG)
        for name in lit_basics.__all__:
            if name[0].isupper():
                getattr(lit_basics, name)  # imported classes are known by their short names
        super().__init__(
            pl.LightningModule,
            pl.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            seed_everything_default=0,
            save_config_callback=None,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
            run=False,
            args=args,
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the Trainer, the model and the data, which a module with loaders of its own does without."""
        # annotated float | int: jsonargparse would read 1, one batch, as 1.0, all of them
        limits = {f"limit_{stage}_batches": int | float | None for stage in ("train", "val", "test", "predict")}
        pl.Trainer.__init__.__annotations__.update(limits)
        parser.add_lightning_class_args(pl.Trainer, "trainer")
        parser.add_lightning_class_args(pl.LightningModule, "model", subclass_mode=True)
        parser.add_lightning_class_args(pl.LightningDataModule, "data", subclass_mode=True, required=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of a run, and the switches of what every run gets."""
        parser.add_argument("--run_dir", type=str | None, help="the run's directory")
        parser.add_argument("--resume", type=str | None, help="auto, or the run or checkpoint to go on with")
        parser.add_argument("--resume_reset", action="store_true", help="resume with other data, order or seed")
        parser.add_argument("--ckpt_path", type=str | None, help="the checkpoint to start from")
        for name, what in (
            ("metrics_csv", "write metrics.csv"),
            ("best_checkpoint", "keep checkpoints/best.ckpt and best.pth"),
            ("last_checkpoint", "keep checkpoints/last.ckpt"),
            ("non_finite_guard", "stop at a value that is NaN or infinite"),
        ):
            parser.add_argument(f"--{name}", type=bool, default=True, help=what)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the words; everything wrong with them becomes a short message."""
        printed = PRINT in args  # jsonargparse would print what is not complete yet
        args = [word for word in named_configs(args) if word != PRINT]
        with import_policy(self._allowed):
            try:
                self.config = parser.parse_args(args)
                check_functions(self.config)
                for name in ("run_dir", "resume", "resume_reset"):
                    # the run's directory is found before the configuration is read
                    if self.config[name] and name not in self.typed:
                        raise UserError(f"{name} is typed, never part of a config: --{name} {self.config[name]}")
                seed = self.config.seed_everything
                if type(seed) is int and not 0 <= seed < 2**32:
                    raise UserError(f"seed_everything is {seed}; it must be from 0 to {2**32 - 1}")
                check_trainer(self.config.trainer)
                for key, value in self.config.items():
                    if isinstance(value, float) and math.isnan(value):
                        raise UserError(f"{key.replace('.init_args', '')} is nan; it must be a number")
                written = written_keys(args, self.config)
                check_untyped(self.config, written)
                reset_unwritten(self.config, written, {})
                check_nulls(parser, self.config)
                if printed:
                    print(self.to_yaml(), end="")
                    raise SystemExit(0)
            except UserError:
                raise
            except RecursionError as error:
                raise UserError("the configuration is nested too deeply, or contains itself") from error
            except (jsonargparse.ArgumentError, TypeError, ValueError, OverflowError) as error:
                raise UserError(shortened(short_message(str(error), self.parser, args))) from error

    def instantiate_classes(self) -> None:
        """Leave this to :meth:`build`: the run's directory is decided in between."""

    def build(self, directory: Path | None = None) -> None:
        """Make ``model``, ``datamodule`` and the arguments of the Trainer.

        Args:
            directory: The run's, which keeps the files of its loggers.
        """
        try:
            with import_policy(self._allowed):
                resolved = self.config.clone()  # config.yaml is to hold what was asked for
                if directory is not None:
                    place_loggers(resolved.trainer.logger, directory)
                use_torchruns_processes(resolved.trainer)
                resolved.trainer.logger = without_missing(resolved.trainer.logger)
                objects = self.parser.instantiate(resolved)
        except (TypeError, ValueError, AttributeError, ImportError) as error:
            # where a key may be null, jsonargparse wraps what its class raised into a page of text
            cause = root_cause(error)
            if isinstance(cause, UserError):
                raise cause from None
            raise UserError(where(cause)) from error
        self.model: pl.LightningModule = objects["model"]
        self.datamodule: pl.LightningDataModule | None = objects.get("data")
        self.trainer_arguments: dict[str, Any] = dict(objects["trainer"])

    def check_data(self) -> None:
        """Refuse to train without data.

        Raises:
            UserError: If none is named, and the module has no training loader of its own.
        """
        if self.datamodule is None and not is_overridden("train_dataloader", self.model):
            name = type(self.model).__name__
            raise UserError(f"which data? {name} has none of its own: --data CLASS, such as --data SyntheticCIFAR10")

    def drop_repeated(self, saved: dict[str, Any]) -> None:
        """Take out callbacks and loggers that a ``+`` appends as the saved ones: the words of the run, given again.

        Args:
            saved: The run's configuration, as :meth:`to_dict` returned it.
        """
        trainer = self.to_dict()["trainer"]
        for key in ("callbacks", "logger"):
            known, now = (saved.get("trainer") or {}).get(key), trainer.get(key)
            if isinstance(known, list) and isinstance(now, list) and now[: len(known)] == known:
                entries = enumerate(self.config.trainer[key])
                self.config.trainer[key] = [entry for i, entry in entries if i < len(known) or now[i] not in known]

    def to_yaml(self) -> str:
        """Return the resolved configuration, itself valid for ``--config``, without the run's directory."""
        config = self.config.clone()
        for key in (*RUN_KEYS, "config"):
            config.pop(key, None)
        _make_plain(config)
        with import_policy(self._allowed), warnings.catch_warnings():
            warnings.filterwarnings("ignore", rf"\s*{UNSERIALIZABLE}")
            text = str(self.parser.dump(config, skip_unset=False))  # null may not be the default
        if UNSERIALIZABLE in text:
            text = dump_yaml(_serialized(yaml.safe_load(text), config))
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved configuration as plain values."""
        return dict(yaml.safe_load(self.to_yaml()))


def _make_plain(values: Any) -> None:
    """Make values such that YAML holds them, and that they read the same elsewhere and in another process."""
    if isinstance(values, (dict, jsonargparse.Namespace, list)):
        for name, value in list(enumerate(values) if isinstance(values, list) else values.items()):
            if isinstance(value, str) and type(value) is not str:  # a member of an enumeration too
                values[name] = str.__str__(value)
            elif isinstance(value, ArgumentPath):  # relative to where it was read
                values[name] = type(value)(value.absolute)
            elif isinstance(value, (set, frozenset)):
                values[name] = value = sorted(value, key=str)
            _make_plain(value)


def _serialized(content: Any, values: Any) -> Any:
    """Return a dumped config with the strings that jsonargparse did not dump, and without other such defaults.

    Args:
        content: The dumped config, or a part of it.
        values: What it was dumped from.
    """
    if isinstance(content, list) and isinstance(values, (list, tuple)):
        return [_serialized(part, value) for part, value in zip(content, values, strict=True)]
    if not (isinstance(content, dict) and isinstance(values, (dict, jsonargparse.Namespace))):
        return content
    kept = {}
    for name, part in content.items():
        value = values.get(name)
        if not (isinstance(part, str) and part.startswith(UNSERIALIZABLE)):
            kept[name] = _serialized(part, value)
        elif isinstance(value, str):  # where a function would do too
            kept[name] = value
    return kept


def written_keys(args: list[str], config: jsonargparse.Namespace) -> set[str]:
    """Return the dotted keys that a config file or a typed option gives, without ``init_args``.

    Args:
        args: The words of the command line.
        config: What they were parsed to.
    """
    keys: set[str] = set()

    def is_text(parts: list[str]) -> bool:
        value: Any = config
        for part in parts:
            if isinstance(value, jsonargparse.Namespace) and part not in vars(value):
                value = value.get("init_args")
            value = value.get(part) if isinstance(value, (jsonargparse.Namespace, dict)) else None
        return isinstance(value, (str, os.PathLike))

    def walk(value: Any, parts: list[str], folder: Path) -> None:
        parts = [part for part in parts if part not in ("init_args", "dict_kwargs", "")]
        keys.add(".".join(parts))
        if isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")) and (folder / value).is_file():
            if not is_text(parts):  # a file in the place of a class or of arguments, as jsonargparse has it
                walk_file(folder / value, parts)
        elif isinstance(value, dict):
            for name, inner in value.items():
                walk(inner, [*parts, *str(name).rstrip("+").split(".")], folder)

    def walk_file(path: Path, parts: list[str]) -> None:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        check_size(content, str(path))
        walk(content, parts, path.parent)

    for name in config_names(args):
        walk_file(Path(name), [])
    for word, following in zip(args, [*args[1:], ""], strict=True):
        if word.startswith("--"):
            key, equals, value = word.removeprefix("--").partition("=")
            try:
                # {"class_path": ..., "init_args": ...}, typed as it stands
                content = yaml.safe_load(value if equals else following)
            except (yaml.YAMLError, ValueError):  # ValueError of a date that is none
                content = None
            walk(content, key.rstrip("+").split("."), Path())
    return keys


def reset_unwritten(config: jsonargparse.Namespace, written: set[str], defaults: dict[str, Any], key: str = "") -> None:
    """Give each argument of a class that nobody wrote its default.

    When the class is changed, jsonargparse keeps every argument that the new class takes too, the defaults of
    the old class among them: AdamW in the place of SGD would have no weight decay.
    """
    for name, value in list(vars(config).items()):
        inner = f"{key}.{name}".removeprefix(".")
        default = defaults.get(name)
        if key and name in defaults and not any(k == inner or k.startswith(f"{inner}.") for k in written):
            config[name] = default
        elif isinstance(value, jsonargparse.Namespace) and "class_path" in value and "init_args" in value:
            inner_defaults = class_defaults(value.class_path)
            if isinstance(default, jsonargparse.Namespace) and default.class_path == value.class_path:
                inner_defaults = dict(vars(default.init_args))
            reset_unwritten(value.init_args, written, inner_defaults, inner)


def check_untyped(config: jsonargparse.Namespace, written: set[str]) -> None:
    """Refuse a model or data that lacks an argument without a type, for which jsonargparse takes None."""
    for key in ("model", "data"):
        entry = config.get(key)
        if isinstance(entry, jsonargparse.Namespace) and "class_path" in entry:
            missing = [name for name in untyped_arguments(entry.class_path) if f"{key}.{name}" not in written]
            if missing:
                raise UserError(f"{key}: {entry.class_path} needs {', '.join(missing)}")


def check_nulls(parser: jsonargparse.ArgumentParser, config: jsonargparse.Namespace) -> None:
    """Raise jsonargparse's error if a key is null that cannot be: in a file it takes null for "not given"."""
    jsonargparse.set_parsing_settings(unset_sentinel=True)  # something else stands for that
    try:
        parser.validate(config)
    finally:
        jsonargparse.set_parsing_settings(unset_sentinel=False)


def check_trainer(settings: Any) -> None:
    """Refuse, before anything is written, a Trainer that cannot be made on this machine.

    Raises:
        UserError: If the settings are no keys and values, or name no accelerator or strategy that there is by command.
    """
    if not isinstance(settings, jsonargparse.Namespace) or "accelerator" not in settings:
        raise UserError(f"trainer is {settings}; it must hold keys and values, such as max_epochs: 3")
    if "strategy" not in settings:
        raise UserError("trainer is null in a config, and given keys after it: leave it out of the config")
    accelerators = sorted(AcceleratorRegistry.available_accelerators())
    found = [name for name in accelerators if AcceleratorRegistry[name]["accelerator"].is_available()]
    # there children train, and this process would take the run for one that made no step
    spawns = r"ddp_(spawn|fork|notebook)\w*|start_method='(spawn|fork)\w*'"
    if children := re.search(spawns, str(settings.strategy)):
        raise UserError(f"trainer.strategy: {children[0]} is for a Trainer of your own; by command it is ddp")
    strategies = [name for name in StrategyRegistry.available_strategies() if not re.match(spawns, name)]
    for key, valid in (("accelerator", ["auto", "gpu", *accelerators]), ("strategy", ["auto", *strategies])):
        value = settings[key]
        if isinstance(value, str) and value not in valid:
            is_class = value.endswith(key.title())
            hint = f"; for a class: --trainer.{key}.class_path {value}" if is_class else nearest(value, valid)
            raise UserError(f"trainer.{key}: there is no {key} {value}{hint}")
    if isinstance(settings.devices, str) and not re.fullmatch(r"auto|-1|[0-9, ]+", settings.devices):
        raise UserError(f"trainer.devices is {settings.devices}; it must be auto, a number, or a list of numbers")
    for key in ("log_every_n_steps", "accumulate_grad_batches", "check_val_every_n_epoch", "val_check_interval"):
        if isinstance(settings[key], int) and settings[key] < 1:
            raise UserError(f"trainer.{key} is {settings[key]}; it must be at least 1")
    if (settings.gradient_clip_val or 0) < 0:
        raise UserError(f"trainer.gradient_clip_val is {settings.gradient_clip_val}; it must be 0 or more")
    if not isinstance(settings.accelerator, str):
        return
    wanted = {"auto": found, "gpu": ["cuda", "mps"]}.get(settings.accelerator, [settings.accelerator])
    if not set(wanted) & set(found):
        raise UserError(
            f"trainer.accelerator is {settings.accelerator}, but torch finds none on this machine; "
            f"it can be {' or '.join(found)}: --trainer.accelerator {found[0]}"
        )


def use_torchruns_processes(settings: jsonargparse.Namespace) -> None:
    """Train on the processes that torchrun started, where nothing else is said; each would train alone."""
    world_size, local = (int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if "TORCHELASTIC_RUN_ID" not in os.environ or world_size == 1:
        return
    if settings.devices == "auto":
        settings.devices, settings.num_nodes = local, world_size // local
    if settings.strategy == "auto":
        settings.strategy = "ddp"


def place_loggers(loggers: Any, directory: Path) -> None:
    """Keep the loggers' files in the run's directory, and let W&B go on in a run of a typed id."""
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if not isinstance(logger, jsonargparse.Namespace) or "init_args" not in logger:
            continue
        arguments = logger.init_args
        if "save_dir" in arguments and arguments.save_dir in (None, "."):
            arguments.save_dir = str(directory)
        # jsonargparse passes the defaults of wandb.init, which would undo the WandbLogger's own "allow"
        ways = ("resume", "resume_from", "fork_from")
        if "WANDB_RESUME" not in os.environ and all(arguments.get(way, "") is None for way in ways):
            arguments.resume = "allow"


def without_missing(loggers: Any) -> Any:
    """Return the configured loggers without those whose package is not installed; each is told of on stderr."""
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(Logger, "logger")
    kept = []
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        if isinstance(logger, jsonargparse.Namespace):
            try:
                wrapped = jsonargparse.Namespace(logger=logger)  # type: ignore[no-untyped-call]
                logger = parser.instantiate(wrapped).logger
            except Exception as error:  # any other is raised again, and told of, when all is made
                cause = root_cause(error)
                if isinstance(cause, ModuleNotFoundError):
                    name, reason = logger.class_path.rpartition(".")[2], first_line(cause)
                    rank_zero_only(print)(
                        f"lit_basics: {name} is left out, the run goes on without it: {reason}", file=sys.stderr
                    )
                    continue
        kept.append(logger)
    return kept if isinstance(loggers, list) else next(iter(kept), False)
