"""Runs on images that stay on the disk, and on other libraries' data."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kconv import datasets, training
from kconv.training import Config

TINY = Config(
    model="kdensenet_bc_l100",
    model_options={"blocks": 1, "growth_rate": 4, "bottleneck": 8, "dropout": 0.2},
    ktype="D6_4ch",
    image_size=8,
    batch_size=8,
    epochs=2,
    lr=0.003,
    checkpoint_steps=1,
    workers=2,
)


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg")
    return buffer.getvalue()


def write_tar(path: Path, *bad: int) -> Path:
    """30 training images and 6 for validation, of two classes."""
    with tarfile.open(path, "w") as tar:
        for number in range(36):
            part = "train" if number < 30 else "val"
            member = tarfile.TarInfo(f"{part}/n{number % 2}/{number}.png")
            data = b"no image" if number in bad else jpeg(number)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def quiet(line: str) -> None:
    pass


@pytest.mark.parametrize("framework", ["torch", pytest.param("keras", marks=pytest.mark.slow)])
def test_streamed_run_is_that_in_memory(framework: str, tmp_path: Path) -> None:
    """And goes on at the exact batch."""
    if framework == "keras":
        pytest.importorskip("grain")
    config = dataclasses.replace(
        TINY, framework=framework, dataset=str(write_tar(tmp_path / "a.tar")), augment=True
    )
    memory = training.train(
        dataclasses.replace(config, stream=False), tmp_path / "memory", log=quiet
    )
    lines: list[str] = []
    config = dataclasses.replace(config, stream=True)

    class Stop(training.Callback):
        def on_step_end(self, step: int, *figures: float) -> None:
            if step == 6:  # of four in an epoch
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        training.train(config, tmp_path / "run", callbacks=[Stop()], log=quiet)
    streamed = training.train(config, tmp_path / "run", resume=True, log=lines.append)
    assert any(line.startswith("images       are decoded while") for line in lines)
    for ours, theirs in zip(streamed.history, memory.history, strict=True):
        assert dataclasses.replace(ours, images_per_second=0) == dataclasses.replace(
            theirs, images_per_second=0
        )


@pytest.mark.parametrize("stream", [True, False])
def test_unreadable_image_is_an_error_or_counted(stream: bool, tmp_path: Path) -> None:
    config = dataclasses.replace(
        TINY,
        framework="torch",
        dataset=str(write_tar(tmp_path / "a.tar", 17)),
        stream=stream,
    )
    with pytest.raises(ValueError, match=r"a\.tar: train/n1/17\.png is not a readable image"):
        training.train(config, tmp_path / "run", log=quiet)
    lines: list[str] = []
    skipping = dataclasses.replace(config, on_bad_image="skip")
    result = training.train(skipping, tmp_path / "skip", log=lines.append)
    assert np.isfinite(result.history[-1].val_loss)
    told = [line for line in lines if line.startswith("bad images   1 left out")]
    assert told
    assert "17.png" in told[0]


def test_each_bad_image_is_counted_once(tmp_path: Path) -> None:
    """Those that are validated and tested on, too, also where they are a whole batch."""
    path = write_tar(tmp_path / "a.tar", 3, 4, 34, 35)
    config = dataclasses.replace(
        TINY, framework="torch", dataset=str(path), stream=True, on_bad_image="skip", workers=0
    )
    lines: list[str] = []
    # The six for validation are two batches, of which the second is all bad.
    result = training.train(
        dataclasses.replace(config, batch_size=4), tmp_path / "run", log=lines.append
    )
    assert all(np.isfinite(epoch.val_loss) for epoch in result.history)
    told = [line for line in lines if line.startswith("bad images")]
    # As there is no test/, the two are found bad again when tested on.
    assert len(told) == 1
    assert told[0].startswith("bad images   4 left out so far")
    assert any("(4 images)" in line for line in lines)


class Pairs:
    """A data set as torchvision's."""

    classes = ("even", "odd")

    def __init__(self, numbers: range) -> None:
        self.numbers = numbers
        self.targets = [number % 2 for number in numbers]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> tuple[Image.Image, int]:
        return Image.open(io.BytesIO(jpeg(self.numbers[place]))), self.targets[place]


def test_data_and_transforms_of_other_libraries(tmp_path: Path) -> None:
    import torch
    from torchvision.transforms import v2

    seen: list[Any] = []

    def mixing(images: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.append((images.shape, images.dtype, targets.shape))
        return images, targets

    config = dataclasses.replace(TINY, framework="torch", epochs=1)
    data = {"train": Pairs(range(30)), "test": Pairs(range(30, 36))}
    result = training.train(
        config,
        tmp_path / "run",
        data=data,
        transform=v2.Compose([v2.RandomHorizontalFlip(), v2.RandomErasing(p=0.5)]),
        batch_transform=mixing,
        log=quiet,
    )
    assert [shape for shape, _, _ in seen] == [(8, 8, 8, 3)] * 3 + [(3, 8, 8, 3)]
    assert seen[0][1:] == (np.float32, (8, 2))
    assert "even" in result.report
    mixed = training.train(
        config, tmp_path / "mixed", data=data, batch_transform=v2.CutMix(num_classes=2), log=quiet
    )
    assert np.isfinite(mixed.history[0].loss)
    assert torch.is_grad_enabled()
    for wrong, error in (([1, 2], "data is a list"), ({"train": 1, "test": 2}, "has no items")):
        with pytest.raises(TypeError, match=error):
            training.train(config, tmp_path / "wrong", data=wrong, log=quiet)


MANY = """
import sys
from pathlib import Path
from kconv import training
from kconv._memory import peak_memory
import kconv.torch
config = training.Config(
    framework="torch", model="kdensenet_bc_l100", model_options={"blocks": 1, "growth_rate": 4},
    ktype="D6_4ch", dataset=sys.argv[1], image_size=32, batch_size=64, epochs=1, stream=True,
    workers=2, checkpoint_steps=10**6, on_bad_image="skip")
before = peak_memory()
class Stop(training.Callback):
    def on_step_end(self, step, *figures):
        if step == 1:
            print("begun", flush=True)
        if step == 40:
            raise KeyboardInterrupt
lines = []
try:
    training.train(config, Path(sys.argv[2]), callbacks=[Stop()], log=print)
except KeyboardInterrupt:
    pass
print("grown", peak_memory() - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "folder"])
def test_memory_of_many_images_is_bounded(kind: str, tmp_path: Path) -> None:
    """200,000 images: their pixels would take 0.6 GB at 32x32, and 30 GB at 224x224."""
    count, sources = 200_000, [jpeg(number) for number in range(50)]
    path = tmp_path / ("images.tar" if kind == "tar" else "images")
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            for number in range(count):
                data = sources[number % 50]
                member = tarfile.TarInfo(f"n{number % 100:05}/{number:06}.jpg")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    else:
        first = tmp_path / "first"
        first.mkdir()
        for number in range(50):
            (first / f"{number}.jpg").write_bytes(sources[number])
        for label in range(100):
            (path / f"n{label:05}").mkdir(parents=True)
        for number in range(count):  # links, of which each file may have 65,000
            target = path / f"n{number % 100:05}/{number:06}.jpg"
            os.link(first / f"{number % 50}.jpg", target)
    run = subprocess.run(
        [sys.executable, "-c", MANY, str(path), str(tmp_path / "run")],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "begun" in run.stdout
    assert int(run.stdout.split()[-1]) < 1e9
    assert datasets.memory() > 1e9
