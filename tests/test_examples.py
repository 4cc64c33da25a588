"""Every file under examples/ runs as a user runs it, in a copy of its folder."""

import csv
import importlib.util
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
README = EXAMPLES / "own_project" / "README.md"

COMMANDS = {
    ".": ["python own_data.py", "python plain_lightning_project.py"],
    "own_project": re.search(r"```bash\n(.+?)```", README.read_text(), re.DOTALL)[1].splitlines(),
}
"""What the tests below run, by folder."""
OWN_DATA, PLAIN_LIGHTNING = COMMANDS["."]


def run(command, folder):
    """Run a user's command, with this Python; return what it wrote to stdout."""
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


def column(path, name):
    with path.open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def not_run(examples):
    """Return the files of the examples that no command names and no other example imports."""
    files = [path for path in examples.rglob("*") if path.suffix in (".py", ".yaml", ".yml", ".ipynb", ".sh")]
    left = []
    for path in files:
        words = " ".join(COMMANDS.get(str(path.parent.relative_to(examples)), [])).split()
        neighbours = [other.read_text() for other in files if other.parent == path.parent and other != path]
        imported = rf"^(from|import) {path.stem}\b|class_path: {path.stem}\."
        is_module = path.suffix == ".py" and "__main__" not in path.read_text()
        if path.name not in words and not (
            is_module and any(re.search(imported, text, re.MULTILINE) for text in neighbours)
        ):
            left.append(str(path.relative_to(examples)))
    return left


def test_every_example_is_run():
    assert not_run(EXAMPLES) == []


@pytest.mark.parametrize("name", ["new.py", "own_project/new.yaml", "own_project/new.py", "deep/er/net.py"])
def test_an_example_that_is_not_run_is_found(tmp_path, name):
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    path = tmp_path / "examples" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    assert not_run(tmp_path / "examples") == [name]


def test_examples_stay_small():
    for path in EXAMPLES.rglob("*.py"):
        assert len(path.read_text().splitlines()) < 80, path


def test_own_data(tmp_path):
    printed = run(OWN_DATA, copy_of("own_data.py", tmp_path))
    assert float(re.search(r"^test/acc (\S+)$", printed, re.MULTILINE)[1]) >= 0.9


def test_plain_lightning_project(tmp_path):
    printed = run(PLAIN_LIGHTNING, copy_of("plain_lightning_project.py", tmp_path))
    best = float(re.search(r"best val/loss (\S+) in ", printed)[1])
    folder = tmp_path / "runs" / "regression"
    assert best == pytest.approx(min(column(folder / "csv" / "metrics.csv", "val/loss")), abs=1e-4)
    norms = column(folder / "csv" / "metrics.csv", "grad/norm")
    assert len(norms) == 200  # 10 epochs of 20 steps
    assert all(norm > 0 for norm in norms)
    weights = torch.load(folder / "best.pth", weights_only=True)  # the module has no net: all of it
    checkpoint = torch.load(folder / "best.ckpt", weights_only=True)["state_dict"]
    assert weights.keys() == checkpoint.keys()
    assert all(torch.equal(weights[name], checkpoint[name]) for name in weights)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The folder of own_project after the commands of its README, with what they printed."""
    folder = copy_of("own_project", tmp_path_factory.mktemp("examples"))
    return folder, [run(command, folder) for command in COMMANDS["own_project"]]


def copy_of(name, folder):
    source = EXAMPLES / name
    if source.is_dir():
        ignore = shutil.ignore_patterns("runs", "__pycache__")
        return Path(shutil.copytree(source, folder / name, ignore=ignore))
    shutil.copy(source, folder)
    return folder


@pytest.mark.parametrize("name", ["mine", "mixup"])
def test_both_subclasses_are_logged(project, name):
    run = project[0] / "runs" / name
    losses = column(run / "metrics.csv", "train/loss")
    assert column(run / "metrics.csv", "step")[-1] == 54
    assert len(losses) == 54  # 3 epochs of 18 steps
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert len(column(run / "metrics.csv", "train/loss_epoch")) == 3
    assert len(column(run / "metrics.csv", "val/acc")) == 3
    assert len(column(run / "metrics.csv", "grad/norm")) == 54


def test_the_subclass_decides_loss_and_optimizer(project):
    path = project[0] / "runs" / "mine" / "metrics.csv"
    assert set(column(path, "lr/weights")) == {0.003}
    assert len(column(path, "train/acc")) == 54
    # smoothed labels: no loss can fall below the entropy of (0.91, 9 × 0.01)
    assert min(column(path, "train/loss")) > -0.91 * math.log(0.91) - 9 * 0.01 * math.log(0.01)


def test_reload_says_the_classes(project):
    assert re.fullmatch(r"classes: \[(\d, ){7}\d\]\n", project[1][1])


@pytest.mark.parametrize(("name", "class_name", "width"), [("mine", "Mine", 16), ("mixup", "Mixup", 8)])
def test_reloaded_logits_are_those_of_the_checkpoint(project, monkeypatch, name, class_name, width):
    folder = project[0]
    monkeypatch.syspath_prepend(folder)
    net, mine = module(folder / "net.py"), module(folder / "mine.py")
    images = torch.rand(8, 3, 32, 32)
    best = folder / "runs" / name / "checkpoints" / "best.ckpt"
    module_ = getattr(mine, class_name).load_from_checkpoint(best, map_location="cpu").eval()
    assert module_.hparams["width"] == width

    def plain(state):
        small = net.SmallNet(width)
        small.load_state_dict(state)
        return small(images)

    with torch.no_grad():
        stored = torch.load(best, weights_only=True)["state_dict"]
        expected = plain({key.removeprefix("net."): value for key, value in stored.items()})
        assert torch.equal(module_(images), expected)
        weights = torch.load(folder / "runs" / name / "best.pth", weights_only=True)
        assert torch.equal(plain(weights), expected)


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded
