"""The data path: ratio 4, and how CIFAR-10 comes from its cache.

Usage: python benchmarks/data.py [--rounds 5] [--quick]

The archive is made up: random images, in the real one's form and size.
"""

import hashlib
import io
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import begin, end, figure, in_turns, now, ratios
from PIL import Image
from torchvision import transforms

from lit_basics import ArrayLoader, CIFAR10DataModule, EpochOrder
from lit_basics.data import cifar10
from lit_basics.data.images import Normalize

HERE = Path(__file__).parent
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


def augmentation(images: int, rounds: int) -> None:
    """Crop, flip and normalise, by image: our loader's batches ÷ torchvision's transforms over PIL images."""
    x = torch.randint(0, 256, (images, 3, 32, 32), dtype=torch.uint8)
    y = torch.zeros(images, dtype=torch.int64)
    arrays = x.permute(0, 2, 3, 1).contiguous().numpy()
    normalise = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    flip = transforms.RandomHorizontalFlip()

    def pil(*steps: object) -> float:
        transform = transforms.Compose([*steps, *normalise])
        begun = now()
        for array in arrays[: images // 10]:
            transform(Image.fromarray(array))
        return (now() - begun) / (images // 10)

    def ours(batch: int, **augment: int | bool) -> float:
        order = EpochOrder(images, batch, shuffle=True)
        loader = ArrayLoader(x, y, order, normalize=Normalize(MEAN, STD, 3), **augment)
        begun = now()
        for _ in loader:
            pass
        return (now() - begun) / images

    crop = transforms.RandomCrop(32, padding=4, padding_mode="reflect")
    variants = {
        "PIL, crop and flip": lambda: pil(crop, flip),
        "PIL, crop filled with black": lambda: pil(transforms.RandomCrop(32, padding=4), flip),
        "batches of 64, crop and flip": lambda: ours(64, crop=4, flip=True),
        "batches of 512, crop and flip": lambda: ours(512, crop=4, flip=True),
        "PIL, normalise only": lambda: pil(),
        "batches of 64, normalise only": lambda: ours(64),
    }
    times = in_turns(variants, rounds)
    for name, values in times.items():
        figure(name, [1e6 * value for value in values], unit=" µs an image")
    for batch in (64, 512):
        ours_name = f"batches of {batch}, crop and flip"
        figure(f"4. crop, flip, normalise: {ours_name} ÷ PIL", ratios(times, ours_name, "PIL, crop and flip"), 1 / 20)
    black = ratios(times, "batches of 64, crop and flip", "PIL, crop filled with black")
    figure("4. the same ÷ PIL with the cheaper crop, filled with black", black, 1 / 20)


CHILD = """
import sys
import lit_basics, torch
from common import now
for name in lit_basics.__all__:
    getattr(lit_basics, name)
def memory():
    with open("/proc/self/status") as file:
        return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.startswith(("VmRSS", "VmHWM"))}
torch.set_num_threads(1)
before, begun = memory()["VmRSS"], now()
data = lit_basics.CIFAR10DataModule(sys.argv[1], batch_size=64)
data.prepare_data()
data.setup("fit")
next(iter(data.train_dataloader()))
seconds = now() - begun
print(seconds, memory()["VmHWM"] - before)
"""


def cache(rounds: int) -> None:
    """The seconds from the cache to the first batch, and the most memory in between, each time in a new process."""
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / cifar10.ARCHIVE
        draw = np.random.default_rng(0)
        with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
            for name in cifar10.FILES:
                records = draw.integers(0, 256, (cifar10.RECORDS, 1 + 3072), np.uint8)
                records[:, 0] %= len(cifar10.CIFAR10DataModule.classes)
                info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                info.size = records.nbytes
                tar.addfile(info, io.BytesIO(records.tobytes()))
        content = archive.read_bytes()
        cifar10.ARCHIVE_SHA256, cifar10.ARCHIVE_SIZE = hashlib.sha256(content).hexdigest(), len(content)
        CIFAR10DataModule(folder).prepare_data()
        archive.unlink()
        seconds, memory = [], []
        for _ in range(rounds):
            command = [sys.executable, "-c", CHILD, folder]
            done = subprocess.run(command, cwd=HERE, check=True, capture_output=True, text=True)
            values = [float(word) for word in done.stdout.split()]
            seconds.append(values[0])
            memory.append(values[1] / (60_000 * 3072))
    figure("CIFAR-10 from the cache to the first batch", seconds, 1.0, " s")
    figure("peak memory of that ÷ raw images", memory, 1.1)


def main() -> None:
    """Print the figures."""
    options = begin(__doc__)
    augmentation(1000 if options.quick else 20_000, options.rounds)
    cache(options.rounds)
    end()


if __name__ == "__main__":
    main()
