"""Wrong and hostile configs, checkpoints and archives: a short message, nothing run, nothing written elsewhere.

An audit hook watches: without ``import_policy`` in ``Config`` it reports the import of ``antigravity``, with
``weights_only=False`` in ``checkpoint_files._load`` (and the checksum beside the file gone) the bombs' calls, and with
``tar.extractall`` in ``read_archive`` files outside the folder.
"""

import contextlib
import copy
import hashlib
import inspect
import io
import math
import os
import pickle
import random
import re
import resource
import signal
import sys
import tarfile
import traceback
import warnings
import zipfile
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml

from lit_basics.cli import main
from lit_basics.data import cifar10
from lit_basics.errors import UserError
from lit_basics.recipes import recipe_names, recipe_path

# what watches


class Watch:
    """Notes what must not happen: a canary imported or called, a process started, a file written or removed
    outside the root."""

    def __init__(self):
        self.root, self.seen = None, []

    def __call__(self, event, args):
        if self.root is None:
            return
        if event == "import" and args[0].partition(".")[0] in ("canary_module", "antigravity"):
            self.seen.append(f"import {args[0]}")
        elif event == "subprocess.Popen" and "json.dumps(sys.path)" in args[1][-1]:
            pass  # jsonargparse asks Python for its path, to find the types of a library without any
        elif event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
            self.seen.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[0], (str, bytes)) and _writes(args):
            self._check(event, args[0])
        elif event in ("os.mkdir", "os.rename", "os.link", "os.symlink"):
            self._check(event, args[0 if event == "os.mkdir" else 1])
        elif event in ("os.remove", "os.rmdir"):
            self._check(event, args[0], args[1])
        elif event == "os.truncate" and isinstance(args[0], (str, bytes)):
            self._check(event, args[0])

    def _check(self, event, path, folder=-1):
        folder = "" if folder == -1 else os.readlink(f"/proc/self/fd/{folder}")
        path = os.path.realpath(os.path.join(folder, os.fsdecode(path)))
        if path != self.root and not path.startswith((f"{self.root}/", "/dev/", "/proc/")):
            self.seen.append(f"{event} {path}")


def _writes(args):
    flags = args[2] if isinstance(args[2], int) else 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


WATCH = Watch()
_hooked = []


@pytest.fixture
def watch(tmp_path, monkeypatch):
    """The watch, over everything but the test's folder; a canary lies on Python's path, outside of it."""
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "away").mkdir()
    (tmp_path / "away" / "canary_module.py").write_text("class Net:\n    pass\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "away")])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(root)
    if not _hooked:
        sys.addaudithook(WATCH)
        _hooked.append(True)
    WATCH.root, WATCH.seen = os.path.realpath(root), []
    yield WATCH
    WATCH.root = None


def test_the_watch_sees_what_is_done_outside(watch, tmp_path):
    path, folder = os.fsencode(tmp_path / "file"), tmp_path / "folder"
    open(path, "w").close()
    os.truncate(path, 0)
    os.remove(path)
    folder.mkdir()
    handle = os.open(tmp_path, os.O_RDONLY)
    os.rmdir("folder", dir_fd=handle)
    os.close(handle)
    here = os.path.realpath(tmp_path)
    done = ["open", "os.truncate", "os.remove"], ["os.mkdir", "os.rmdir"]
    assert watch.seen == [
        f"{event} {here}/{name}" for name, events in zip(("file", "folder"), done, strict=True) for event in events
    ]
    Path("file").touch()
    Path("file").unlink()
    assert len(watch.seen) == 5


@contextlib.contextmanager
def limits(seconds):
    """A time for one input, and 4 GiB beyond what the process has: an input must not take the machine down."""

    def late(*args):
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 30), hard))
    signal.setitimer(signal.ITIMER_REAL, seconds, 1)  # again, where a library takes the first for something else
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def run(words):
    """Run a command; return its exit code, or its traceback, and its message."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(), limits(20):
        warnings.simplefilter("ignore")
        try:
            code = main(words)
        except BaseException:  # SystemExit too: main returns
            return traceback.format_exc(), err.getvalue()
    return code, err.getvalue()


# configs


def recipes():
    """Every recipe as plain values, on a little synthetic data."""
    whole = {}
    for name in recipe_names():
        recipe = yaml.safe_load(recipe_path(name).read_text())
        if "CIFAR10" in recipe.get("data", {}).get("class_path", ""):
            arguments = recipe["data"].get("init_args", {})
            small = {"train_images": 40, "test_images": 10, "batch_size": 8}
            recipe["data"] = {"class_path": "SyntheticCIFAR10", "init_args": {**arguments, **small}}
        whole[name] = recipe
    return whole


VALUES = [
    *(None, True, False, 0, 1, -1, -(10**18), 10**18, 10**400, 0.5, -0.5, 1e308, 1e-320, math.nan, math.inf, -math.inf),
    *(
        "",
        " ",
        "text",
        "a.b",
        "torch.nn",
        "../../x",
        "\0",
        "ü\u202e\U0001f600",
        "x" * 10_000,
        "1e400",
        "${x}",
        "{",
        "[1",
    ),
    *(
        [],
        [[]],
        [None],
        [1, 2],
        ["SGD"],
        {},
        {"a": {"b": []}},
        {"class_path": 3},
        {"class_path": "SGD", "init_args": 3},
    ),
    *({"class_path": None}, {"init_args": {"lr": 1}}, {"class_path": "torch.nn.ReLU"}, {1: 2}, {None: None}),
]
HOSTILE = [
    *("canary_module.Net", "os.system", "subprocess.Popen", "builtins.eval", "antigravity.geohash", "torch.load"),
    *("torch.hub.load", "lightning.pytorch.trainer.trainer.os.system", "lit_basics.config.importlib.import_module"),
    *("lit_basics.LitLeNet5.load_from_checkpoint", "lightning.pytorch.cli.LightningCLI", "lightning.pytorch.Trainer"),
    *(
        "torch.nn.functional.relu",
        "torch.utils.data.DataLoader",
        "lightning.pytorch.LightningModule",
        "lit_basics",
        ".",
    ),
    *(
        "jsonargparse.set_parsing_settings",
        "a..b",
        "torch.nn.",
        "canary_module",
        "__main__.x",
        "torch.nn.Linear.forward",
    ),
]
SETTINGS = sorted(inspect.signature(pl.Trainer).parameters)


def paths(value, path=()):
    """Yield the path of every value in a tree, the root's too."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths(inner, (*path, key))


def changed(tree, draw, new, where=lambda path: True):
    """Return the tree with one value, of those ``where`` it may be, made ``new(value)``."""
    tree = copy.deepcopy(tree)
    *parents, last = draw.choice([path for path in paths(tree) if path and where(path)])
    holder = tree
    for key in parents:
        holder = holder[key]
    holder[last] = new(holder[last])
    return tree


def text(tree):
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)


def drop_a_key(tree, draw):
    whole = copy.deepcopy(tree)
    *parents, last = draw.choice([path for path in paths(whole) if path])
    holder = whole
    for key in parents:
        holder = holder[key]
    del holder[last]
    return text(whole)


def another_value(tree, draw):
    return text(changed(tree, draw, lambda value: draw.choice(VALUES)))


def null(tree, draw):
    return text(changed(tree, draw, lambda value: None))


def huge_or_negative(tree, draw):
    return text(changed(tree, draw, lambda value: draw.choice([10**18, -(10**18), -1, 2**31, 2**63, -0.0, 1e308])))


def nan_or_infinite(tree, draw):
    return text(changed(tree, draw, lambda value: draw.choice([math.nan, math.inf, -math.inf])))


def list_for_a_scalar(tree, draw):
    return text(changed(tree, draw, lambda value: [value, value]))


def unknown_key(tree, draw):
    def put(value):
        name = draw.choice(["colour", "clas_path", "", "lr", "__class__", "a.b", "trainer", "ü", "__path__", "x" * 500])
        return {**value, name: draw.choice(VALUES)} if isinstance(value, dict) else {name: value}

    return text(changed(tree, draw, put))


def trainer_setting(tree, draw):
    tree = copy.deepcopy(tree)
    tree["trainer"][draw.choice(SETTINGS)] = draw.choice(VALUES)
    return text(tree)


def hostile_class(tree, draw):
    def swap(value):
        target = draw.choice(HOSTILE)
        return draw.choice([target, {"class_path": target, "init_args": draw.choice(VALUES)}, {"class_path": target}])

    if draw.random() < 0.5:
        return text(changed(tree, draw, lambda value: draw.choice(HOSTILE), lambda path: path[-1] == "class_path"))
    return text(changed(tree, draw, swap))


def hostile_callback(tree, draw):
    tree = copy.deepcopy(tree)
    target = draw.choice(HOSTILE)
    value = draw.choice([target, {"class_path": target, "init_args": {"command": "touch made", "path": "x"}}])
    callback = {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_fit_end": value}}
    tree["trainer"][draw.choice(["callbacks", "callbacks+", "plugins", "logger", "strategy", "profiler"])] = [callback]
    return text(tree)


def another_class(tree, draw):
    names = [
        "LitLeNet5",
        "SGD",
        "SyntheticCIFAR10",
        "GradientMonitor",
        "torch.nn.Linear",
        "LeNet5",
        "StepLR",
        "Quadratic",
    ]
    return text(changed(tree, draw, lambda value: draw.choice(names), lambda path: path[-1] == "class_path"))


def nested_garbage(tree, draw):
    def garbage(depth):
        if depth == 0:
            return draw.choice(VALUES)
        if draw.random() < 0.5:
            return [garbage(depth - 1) for _ in range(draw.randrange(3))]
        return {draw.choice(["class_path", "init_args", "a", "lr"]): garbage(depth - 1) for _ in range(2)}

    return text(changed(tree, draw, lambda value: garbage(4)))


def very_deep(tree, draw):
    depth = draw.choice([20, 100, 300, 800, 3000])
    opening, closing = draw.choice([("[", "]"), ("{a: ", "}"), ("{init_args: ", "}")])
    return text(tree) + f"{draw.choice(['extra', 'model', 'data'])}: " + opening * depth + "1" + closing * depth + "\n"


def binary(tree, draw):
    content = bytearray(text(tree).encode())
    for _ in range(draw.randrange(1, 30)):
        content[draw.randrange(len(content))] = draw.randrange(256)
    return bytes(content) if draw.random() < 0.8 else draw.randbytes(200)


def truncated(tree, draw):
    whole = text(tree)
    return whole[: draw.randrange(len(whole))]


def duplicate_keys(tree, draw):
    lines = text(tree).splitlines()
    place = draw.randrange(len(lines))
    return "\n".join([*lines[: place + 1], *lines[max(0, place - draw.randrange(3)) :]])


def aliases(tree, draw):
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    itself = draw.choice(["&m {a: *m}", "&m [*m]", "&m {class_path: LitLeNet5, init_args: *m}"])
    return draw.choice(
        [text(tree) + bomb, bomb + "model: *a39\n", text(tree) + f"model: {itself}\n", "&t {trainer: *t}"]
    )


def unicode(tree, draw):
    words = ["ｔrainer", "модель", "\u200b", "🙂", "a\u0301", "\u202egpj", "NaN", "ﬁ"]
    return text(changed(tree, draw, lambda value: draw.choice(words)))


def yaml_tag(tree, draw):
    tag = draw.choice(
        ["!!python/object/apply:os.system ['touch made']", "!!python/name:os.system", "!x y", "!!binary =="]
    )
    return text(tree) + f"{draw.choice(['model', 'data', 'extra'])}: {tag}\n"


MUTATORS = [
    *(drop_a_key, another_value, null, huge_or_negative, nan_or_infinite, list_for_a_scalar, unknown_key),
    *(trainer_setting, trainer_setting, trainer_setting, hostile_class, hostile_callback, another_class),
    *(nested_garbage, very_deep, binary, truncated, duplicate_keys, aliases, unicode, yaml_tag),
]


GUARDS = re.compile(
    r"\nlit_basics: (loss is \S+ at step 1 \(.+\)|.+ is not finite (after step 1|before the first step))\n"
    r"(no checkpoint was written before; the rows are in|the last good state is) .+\n"
)
"""All that it says."""


def fuzz_configs(count, watch, first=0):
    """Try ``count`` mutated configs; return the exit codes and what was wrong."""
    whole = recipes()
    codes, wrong = [], []
    for number in range(first, first + count):
        draw = random.Random(number)
        mutate = MUTATORS[number % len(MUTATORS)]
        name = draw.choice(sorted(whole))
        content = mutate(whole[name], draw)
        Path("my.yaml").write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "replace"))
        words = ["fit", "--config", "my.yaml", "--run_dir", f"run{number}", "--trainer.enable_progress_bar", "false"]
        code, message = run([*words, "--trainer.max_steps", "1", "--trainer.limit_val_batches", "1"])
        codes.append(code)
        what = f"{number} {mutate.__name__} of {name}"
        if code == 1 and GUARDS.fullmatch(message):  # a learning rate of nan is NonFiniteGuard's: its documented stop
            pass
        elif code not in (0, 2):
            wrong.append(f"{what}: {code}")
        elif code == 2 and not (message.startswith("lit_basics: ") and len(message) < 1000 and message.count("\n") < 4):
            wrong.append(f"{what}: the message is {message!r:.2000}")
        if watch.seen:
            wrong.append(f"{what}: {watch.seen}")
            watch.seen = []
    return codes, wrong


def test_mutated_configs(watch):
    codes, wrong = fuzz_configs(42, watch)
    assert not wrong, "\n".join(wrong)
    assert codes.count(0) >= 3
    assert codes.count(2) >= 20


@pytest.mark.slow
def test_a_thousand_mutated_configs(watch):
    codes, wrong = fuzz_configs(1000, watch, first=1000)
    print("\nexit codes:", {code: codes.count(code) for code in set(codes)})
    assert not wrong, f"{len(wrong)} of 1000\n" + "\n".join(wrong)
    assert codes.count(0) >= 100
    assert codes.count(2) >= 500


# checkpoints


class Bomb:
    """Makes a file when it is unpickled, by one of the many ways."""

    def __init__(self, way):
        self.way = way

    def __reduce__(self):
        return {
            "system": (os.system, ("touch made",)),
            "mkdir": (os.mkdir, ("made",)),
            "eval": (eval, ("__import__('os').mkdir('made')",)),
            "import": (__import__, ("canary_module",)),
            "open": (open, ("../made", "w")),
        }[self.way]


def hostile_checkpoint(kind, good, draw, path):
    """Write a checkpoint of this kind, from the bytes of a good one."""
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(good[: draw.randrange(1, len(good))])
    elif kind == "bit flips":
        content = bytearray(good)
        for _ in range(draw.randrange(1, 40)):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Bomb(draw.choice(WAYS))}, protocol=draw.randrange(6)))
    elif kind == "torch, old format":
        torch.save({"state_dict": Bomb(draw.choice(WAYS))}, path, _use_new_zipfile_serialization=False)
    elif kind == "torch":
        torch.save({**loaded(good), draw.choice(["state_dict", "x", "loops"]): Bomb(draw.choice(WAYS))}, path)
    elif kind == "archive with another pickle":
        with zipfile.ZipFile(io.BytesIO(good)) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                bomb = pickle.dumps(Bomb(draw.choice(WAYS)), protocol=2)
                new.writestr(name, bomb if name.endswith("data.pkl") else old.read(name))
    elif kind == "archive with paths":
        with zipfile.ZipFile(path, "w") as new:
            for name in ("../../made", "/tmp/made_by_a_checkpoint", "archive/data.pkl"):
                new.writestr(name, b"x")
    elif kind == "instantiator":
        hparams = {"_instantiator": "lightning.pytorch.cli.instantiate_module", "class_path": "canary_module.Net"}
        torch.save({**loaded(good), "hyper_parameters": hparams, "datamodule_hyper_parameters": hparams}, path)
    elif kind == "huge declared size":
        torch.save({"state_dict": {"net.0.weight": torch.empty(1).expand(1 << 60)}}, path)
    elif kind == "missing parts":
        whole = loaded(good)
        for key in draw.sample(sorted(whole), draw.randrange(1, 6)):
            del whole[key]
        torch.save(whole, path)
    elif kind == "wrong parts":
        torch.save({**loaded(good), draw.choice(sorted(loaded(good))): draw.choice(VALUES)}, path)
    elif kind == "newer":
        versions = {"pytorch-lightning_version": "99.0.0", "lit_basics_version": "99.0"}
        key = draw.choice(sorted(versions))
        torch.save({**loaded(good), key: versions[key]}, path)
    elif kind == "another model":
        state = {f"other.{name}": value for name, value in loaded(good)["state_dict"].items()}
        torch.save({**loaded(good), "state_dict": state}, path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "a link to itself":
        path.symlink_to(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "garbage":
        path.write_bytes(draw.randbytes(draw.randrange(1, 5000)))


WAYS = ["system", "mkdir", "eval", "import", "open"]
KINDS = [
    *("empty", "truncated", "bit flips", "pickle", "torch, old format", "torch", "archive with another pickle"),
    *("archive with paths", "instantiator", "huge declared size", "missing parts", "wrong parts", "newer"),
    *("another model", "folder", "a link to itself", "a device", "a pipe", "garbage"),
]


def loaded(content):
    return torch.load(io.BytesIO(content), weights_only=True)


def fuzz_checkpoints(count, watch):
    """Resume, start from and test with ``count`` hostile checkpoints; return the exit codes and what was wrong."""
    words = ["--config", "quickstart", "--data.train_images", "40", "--data.test_images", "10"]
    words += ["--trainer.enable_progress_bar", "false"]
    assert run(["fit", *words, "--trainer.max_epochs", "1", "--run_dir", "good"])[0] == 0
    good = Path("good/checkpoints/last.ckpt").read_bytes()
    codes, wrong = [], []
    for number in range(count):
        draw, kind = random.Random(number), KINDS[number % len(KINDS)]
        folder = Path(f"run{number}")
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "config.yaml").write_bytes(Path("good/config.yaml").read_bytes())
        path = folder / "checkpoints" / "last.ckpt"
        hostile_checkpoint(kind, good, draw, path)
        before = sorted(file.name for file in folder.rglob("*"))
        watch.seen = []
        command = [
            ["fit", "--resume", str(folder), "--trainer.max_epochs", "2"],
            ["test", *words, "--ckpt_path", str(path)],
            ["fit", *words, "--trainer.max_epochs", "2", "--ckpt_path", str(path), "--run_dir", f"new{number}"],
        ][number // len(KINDS) % 3]
        code, message = run(command)
        codes.append(code)
        what = f"{number} {kind}, {command[0]} {command[1]}"
        if code not in (0, 2):
            wrong.append(f"{what}: {code}")
        if code == 2 and not (message.startswith("lit_basics: ") and len(message) < 500 and message.count("\n") < 3):
            wrong.append(f"{what}: the message is {message!r:.2000}")
        if code == 2 and sorted(file.name for file in folder.rglob("*")) != before:
            wrong.append(f"{what}: the folder is changed")
        if kind not in ("bit flips", "missing parts", "wrong parts", "instantiator") and code != 2:
            wrong.append(f"{what}: was taken")
        if kind == "newer" and "newer" not in message:
            wrong.append(f"{what}: the message is {message!r}")
        if watch.seen or Path("made").exists():
            wrong.append(f"{what}: {watch.seen}")
    return codes, wrong


def test_hostile_checkpoints(watch):
    codes, wrong = fuzz_checkpoints(len(KINDS) + 3, watch)
    assert not wrong, "\n".join(wrong)
    assert codes.count(2) >= 15


@pytest.mark.slow
def test_two_hundred_hostile_checkpoints(watch):
    codes, wrong = fuzz_checkpoints(200, watch)
    assert not wrong, "\n".join(wrong)
    assert codes.count(2) >= 150


# archives


FAULTS = ("escape", "absolute", "symlink", "hard link", "device", "pipe", "bomb", "size", "twice", "bytes", "cut")


def hostile_archive(draw, path):
    """Write a tar archive of CIFAR-10's files, with a member or the bytes spoilt; return the kind of the fault."""
    kind = draw.choice(FAULTS)
    name = draw.choice(cifar10.FILES)
    with tarfile.open(path, draw.choice(["w:gz", "w:gz", "w"]) if kind != "bytes" else "w:gz") as tar:

        def add(name, content=b"", type=tarfile.REGTYPE, link=""):
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), type, link
            tar.addfile(info, io.BytesIO(content))

        record = bytes([1]) + bytes(3072)
        for each in cifar10.FILES:
            inside = f"cifar-10-batches-bin/{each}"
            spoilt = each == name
            if kind == "escape" and spoilt:
                add(f"../../{draw.choice([each, 'made'])}", record * cifar10.RECORDS)
            elif kind == "absolute" and spoilt:
                add(f"/tmp/lit_basics_made/{each}", record * cifar10.RECORDS)
            elif kind in ("symlink", "hard link") and spoilt:
                link = tarfile.SYMTYPE if kind == "symlink" else tarfile.LNKTYPE
                add(inside, type=link, link=draw.choice(["/etc/passwd", "../../../etc/passwd", inside, "."]))
            elif kind in ("device", "pipe") and spoilt:
                add(inside, type=tarfile.CHRTYPE if kind == "device" else tarfile.FIFOTYPE)
            elif kind == "bomb" and spoilt:
                bomb = pickle.dumps(Bomb(draw.choice(WAYS)), protocol=draw.randrange(6))
                add(inside, bomb.ljust(3073 * cifar10.RECORDS, b"\0"))
            elif kind == "size" and spoilt:
                add(inside, draw.randbytes(draw.randrange(5000)))
            else:
                add(inside, record * cifar10.RECORDS)
            if kind == "twice" and spoilt:
                add(inside, record * cifar10.RECORDS)
        add("cifar-10-batches-bin/evil.py", b"import os; os.mkdir('made')")
    content = bytearray(path.read_bytes())
    if kind == "bytes":
        for _ in range(20):
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    end = len(content) * 9 // 10  # what follows may be padding alone, without which nothing is missing
    path.write_bytes(content[: draw.randrange(end)] if kind == "cut" else content)
    return kind


def fuzz_archives(count, watch, monkeypatch):
    """Prepare the data from ``count`` hostile archives that have the right checksum.

    Returns:
        The kinds that were refused, and what was wrong.
    """
    monkeypatch.setattr(cifar10, "RECORDS", 20)
    wrong, refused = [], []
    for number in range(count):
        folder = Path(f"data{number}")
        folder.mkdir()
        archive = folder / cifar10.ARCHIVE
        kind = hostile_archive(random.Random(number), archive)
        monkeypatch.setattr(cifar10, "ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
        monkeypatch.setattr(cifar10, "ARCHIVE_SIZE", archive.stat().st_size)
        WATCH.root, watch.seen = os.path.realpath(folder), []
        try:
            with limits(20):
                cifar10.CIFAR10DataModule(str(folder), mirrors=[]).prepare_data()
        except UserError:
            refused.append(kind)
        except Exception:
            wrong.append(f"{number}: {traceback.format_exc()}")
        else:
            if kind not in ("escape", "absolute"):  # a folder's name is of no interest
                wrong.append(f"{number}: {kind} was taken")
        names = {file.name for file in folder.rglob("*") if not file.name.endswith(".lock")}
        if watch.seen or names - {cifar10.ARCHIVE, cifar10.CACHE}:
            wrong.append(f"{number}: {watch.seen} {names}")
    return refused, wrong


def test_hostile_archives(watch, monkeypatch):
    refused, wrong = fuzz_archives(22, watch, monkeypatch)
    assert not wrong, "\n".join(wrong)
    assert set(refused) >= set(FAULTS) - {"escape", "absolute"}


@pytest.mark.slow
def test_two_hundred_hostile_archives(watch, monkeypatch):
    refused, wrong = fuzz_archives(200, watch, monkeypatch)
    assert not wrong, "\n".join(wrong)
    assert set(refused) >= set(FAULTS) - {"escape", "absolute"}
