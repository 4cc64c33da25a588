"""A config imports and calls nothing but the libraries of training, and what the user allowed by hand.

Without :func:`import_policy` (a context that does nothing in its place) all hostile values below are
named in another message or run: ``made`` is there, ``hostile_module`` is imported. Without :func:`check_functions` the
last five are called.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from jsonargparse._common import parsing_settings

from lit_basics import UserError
from lit_basics.cli import main
from lit_basics.config import Config
from lit_basics.imports import import_policy

QUICK = ("--config", "quickstart", "--data.train_images", "100", "--data.test_images", "20")
ONCE = ("--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false")
NET = "from torch import nn\n\n\nclass Net(nn.Sequential):\n    def __init__(self):\n"
NET += "        super().__init__(nn.Flatten(), nn.Linear(3072, 10))\n"


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("made",)


def parsed(*words):
    config = Config([*QUICK, *words])
    config.build()
    return config


def called(target, **arguments):
    """A callback whose function is ``target``, or what calling it gives."""
    value = {"class_path": target, "init_args": arguments} if arguments else target
    return {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_fit_start": value}}


MKDIR = {"class_path": "os.mkdir", "init_args": {}}
HOSTILE = {
    # named straight away, and by a walk through an allowed package
    "a function": called("os.mkdir", path="made"),
    "a module of Python's": called("antigravity.geohash"),
    "a module that is not loaded": {"class_path": "hostile_module.Thing"},
    "eval": called("builtins.eval", source="__import__('os').mkdir('made')"),
    "through lightning": called("lightning.pytorch.trainer.trainer.os.mkdir", path="made"),
    "through lit_basics": called("lit_basics.config_errors.importlib.import_module", name="hostile_module"),
    "through torch.nn": called("torch.nn.modules.module.functools.partial", func="os.mkdir"),
    "torch.load": called("torch.load", f="bomb.ckpt", weights_only=False),
    "torch.load through an alias": called("lightning.fabric.utilities.cloud_io.torch.load", f="bomb.ckpt"),
    "torch.hub": called("torch.hub.load", repo_or_dir=".", model="hostile", source="local"),
    "an extension": called("torch.utils.cpp_extension.load_inline", name="x", cpp_sources=""),
    "a built-in of torch's": called("torch.nn.functional.torch.from_file", filename="made", shared=True, size=9),
    # allowed packages' own functions that call, import or unpickle
    "instantiate_class": called("lightning.pytorch.cli.instantiate_class", args=["made"], init=MKDIR),
    "a command line": called("lightning.pytorch.cli.LightningCLI", args=[]),
    "an unpickling function": called("lightning.fabric.utilities.cloud_io._load", path_or_url="bomb.ckpt"),
    "an unpickling method": called("lit_basics.LitLeNet5.load_from_checkpoint", checkpoint_path="bomb.ckpt"),
    "an unpickling data pipe": called("torch.utils.data.datapipes.iter.RoutedDecoder", datapipe=[]),
    "an unpickling data set": called("torchvision.datasets.LSUNClass", root="."),
    "a method, uncalled": called("lightning.pytorch.LightningModule.load_from_checkpoint"),
    "our own importing function": called("lit_basics.imports.class_defaults", class_path="hostile_module.Thing"),
    "our own command line": called("lit_basics.cli.main", args=["fit"]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_nothing_hostile_is_imported_or_called(name, tmp_path, monkeypatch, capsys):
    away = tmp_path / "away"
    away.mkdir()
    (away / "hostile_module.py").write_text("import os\nos.mkdir('made')\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(away)])
    torch.save({"state_dict": Bomb()}, "bomb.ckpt")
    (tmp_path / "my.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [HOSTILE[name]]}}))
    assert main(["fit", *QUICK, *ONCE, "--config", "my.yaml"]) == 2
    message = capsys.readouterr().err
    assert "trainer.callbacks" in message
    assert len(message) < 400
    assert "may name" in message or "may not name" in message
    assert not (tmp_path / "made").exists()
    assert "hostile_module" not in sys.modules
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "words",
    [
        (
            "--model.optimizer",
            "torch.optim.NAdam",
            "--model.lr_scheduler",
            "StepLR",
            "--model.lr_scheduler.step_size=1",
        ),
        ("--model=LitClassifier", "--model.net=torch.nn.Flatten", "--model.criterion=torch.nn.CrossEntropyLoss"),
        ("--model=LitClassifier", "--model.net=torchvision.models.resnet18", "--model.net.num_classes=10"),
        ("--data.transform", "torchvision.transforms.functional.hflip"),
        ("--trainer.callbacks=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/loss"),
        ("--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=."),
        ("--trainer.plugins=lightning.pytorch.plugins.io.AsyncCheckpointIO",),
        ("--trainer.max_time={days: 1}", "--trainer.devices=1"),
        ("--trainer.profiler=lightning.pytorch.profilers.SimpleProfiler",),
    ],
)
def test_the_libraries_are_allowed(words):
    before = dict(parsing_settings)
    config = parsed(*words)
    Config(["--config", _saved(config)]).build()  # as a resumed run does
    assert parsing_settings == before  # the process's own use of jsonargparse is as before


def _saved(config):
    Path("saved.yaml").write_text(config.to_yaml())
    return "saved.yaml"


WAYS = NET.replace("(self)", "(self, width: int = 4)").replace("3072, 10)", "3072, width)")
WAYS += """
    @classmethod
    def small(cls, width: int = 2) -> "Net":
        return cls(width)

class Outer:
    class Inner(Net):
        pass
"""


@pytest.mark.parametrize(("name", "width"), [("Net.small", 2), ("Outer.Inner", 4)])
def test_a_class_method_and_a_class_in_a_class_are_named_as_a_class_is(tmp_path, name, width):
    """As a program: jsonargparse looks at all subclasses, and fails at a nested one whose module has gone."""
    (tmp_path / "my_ways.py").write_text(WAYS)
    words = ["fit", *QUICK, "--model", "LitClassifier", "--model.net", f"my_ways.{name}"]
    both = f"[main({words} + more) for more in (['--print_config'], ['--model.net.widht', '3'])]"
    program = f"from lit_basics.cli import main\nassert {both} == [0, 2]"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "lit_basics: there is no key model.net.widht; did you mean 'model.net.width'?\n"
    net = yaml.safe_load(done.stdout)["model"]["init_args"]["net"]
    assert net == {"class_path": f"my_ways.{name}", "init_args": {"width": width}}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An installed package of the user's own: it lies on Python's path, not in the working directory."""
    (tmp_path / "site" / "my_package").mkdir(parents=True)
    (tmp_path / "site" / "my_package" / "__init__.py").write_text(NET)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    yield ("--model", "LitClassifier", "--model.net", "my_package.Net", "--data", "SyntheticCIFAR10")
    sys.modules.pop("my_package", None)


def test_a_package_of_the_users_own_is_allowed_by_hand(package, capsys):
    short = ("--data.train_images", "100", "--data.test_images", "20", *ONCE, "--run_dir", "run")
    assert main(["fit", *package, *short]) == 2
    assert "may not name my_package.Net; if you trust my_package, type --allow_import my_package" in (
        capsys.readouterr().err
    )
    assert "my_package" not in sys.modules
    assert main(["fit", "--allow_import", "my_package", *package, *short]) == 0
    capsys.readouterr()
    # what a config names is not trusted because a run has named it before
    for words in (["fit", "--resume", "run", "--trainer.max_epochs", "2"], ["test", "--run_dir", "run"]):
        assert main(words) == 2
        assert "--allow_import my_package" in capsys.readouterr().err
        assert main([*words, "--allow_import=my_package"]) == 0


def test_a_config_cannot_widen_the_list(package, tmp_path, capsys):
    (tmp_path / "my.yaml").write_text("allow_import: my_package\n")
    assert main(["fit", *package, "--config", "my.yaml"]) == 2
    assert "allow_import" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["jsonargparse", "a/b", "", "*"])
def test_what_cannot_be_allowed(name, capsys):
    assert main(["fit", *QUICK, "--allow_import", name]) == 2
    assert "--allow_import" in capsys.readouterr().err


def test_the_working_directory_counts_where_python_looks_there(tmp_path, monkeypatch):
    (tmp_path / "my_net.py").write_text(NET)
    (tmp_path / "os.py").write_text("raise AssertionError('not the module that Python means')\n")
    (tmp_path / "my_parts").mkdir()
    words = ("--model", "LitClassifier", "--model.net")
    with pytest.raises(UserError, match="python -m lit_basics finds those in the working directory"):
        parsed(*words, "my_net.Net")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert type(parsed(*words, "my_net.Net").model.net).__name__ == "Net"
    finally:
        sys.modules.pop("my_net", None)
    with pytest.raises(UserError, match=r"may not name os\.mkdir"):
        parsed("--trainer.callbacks", str([called("os.mkdir", path="made")]))
    with import_policy([]):
        verdicts = parsing_settings["import_path_verdicts"]
        assert verdicts["my_parts"]
        assert not verdicts["os"]
