"""What importing costs and needs, and what the wheel holds."""

import graphlib
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import lit_basics

ROOT = Path(__file__).parent.parent


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_importing_the_package_does_not_import_torch():
    done = run("import sys, lit_basics; print('torch' in sys.modules, 'lightning' in sys.modules)")
    assert done.stdout == "False False\n", done.stderr


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["recipes"]])
def test_light_commands_do_not_import_torch(words):
    code = f"import sys; from lit_basics.cli import main; main({words}); assert 'torch' not in sys.modules"
    assert run(code).returncode == 0


def test_every_public_name_imports_without_wandb_and_jsonargparse():
    code = (
        "import sys\n"
        "for name in ('wandb', 'jsonargparse', 'tensorboard'):\n"
        "    sys.modules[name] = None\n"
        "import lit_basics\n"
        "for name in lit_basics.__all__:\n"
        "    getattr(lit_basics, name)\n"
        "from lit_basics import *\n"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_public_names_are_documented_and_spelled_right():
    assert set(lit_basics.__all__) <= set(dir(lit_basics))
    for name in lit_basics.__all__:
        assert getattr(lit_basics, name).__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'LitLenet'"):
        _ = lit_basics.LitLenet
    assert lit_basics.__version__[0].isdigit()


def test_type_checkers_see_the_public_names(tmp_path):
    """Without the imports under ``TYPE_CHECKING`` each name is Any, and none can be subclassed under ``--strict``."""
    names = lit_basics.__all__
    program = [f"from lit_basics import {', '.join(names)}", "import lit_basics"]
    program += [f"reveal_type({name})" for name in names] + ["lit_basics.LitLenet"]
    (tmp_path / "typed.py").write_text("\n".join(program))
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", ROOT / ".mypy_cache", "typed.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    seen = [line for line in done.stdout.splitlines() if "Revealed type" in line]
    assert len(seen) == len(names), done.stdout
    assert not [line for line in seen if '"Any"' in line]
    assert 'has no attribute "LitLenet"' in done.stdout


def test_imports_run_one_way():
    """As CONTRIBUTING says: in no circle; nets, optim and data need neither each other nor the callbacks."""
    graph = {}
    for path in (ROOT / "src").rglob("lit_basics/**/*.py"):
        name = ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")
        # those at the top level; by a pattern, since ast.parse of Python 3.11 may fail after a deep recursion elsewhere
        graph[name] = set(re.findall(r"^from (lit_basics\.[\w.]+) import", path.read_text(), re.MULTILINE))
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    for name, imported in graph.items():
        room = name.split(".")[1:2]
        if room and room[0] in ("nets", "optim", "data"):
            assert {module.split(".")[1] for module in imported} <= {room[0], "errors", "files"}, name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built offline and in a folder of its own: setuptools leaves its ``build`` where it works."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", "dist", "."]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = (folder / "dist").glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_all_recipes(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    expected = {str(p.relative_to(source)) for p in source.rglob("lit_basics/**/*") if p.suffix in (".py", ".yaml")}
    assert expected | {"lit_basics/py.typed"} == names


def test_the_wheel_runs_quickstart_outside_the_checkout(wheel, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    # an environment of its own that sees the installed dependencies, but not this checkout
    environment = tmp_path / "environment"
    venv.create(environment, system_site_packages=False, with_pip=False)
    (packages,) = environment.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(packages)
    dependencies = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    words = ["--config", "quickstart", "--data.train_images", "200", "--trainer.max_epochs", "1"]
    command = [environment / "bin" / "python", "-m", "lit_basics", "fit", *words, "--run_dir", "run"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    where = [environment / "bin" / "python", "-c", "import lit_basics; print(lit_basics.__file__)"]
    assert str(packages) in subprocess.run(where, capture_output=True, text=True, cwd=tmp_path).stdout
    assert (tmp_path / "run" / "best.pth").is_file()
