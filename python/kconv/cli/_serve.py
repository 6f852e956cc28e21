"""``kconv predict``, ``kconv evaluate`` and ``kconv bench``: a trained network at work."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import kconv
from kconv import datasets
from kconv._machine import processor
from kconv._memory import peak_memory
from kconv._show import show
from kconv.datasets.files import is_archive, open_files
from kconv.evaluation import confusion_matrix, report_of
from kconv.runtime import FrozenNetwork, load

_AT_ONCE = 64
_BENCH_SECONDS = 2.0
"""For each number of images, and at least ``_BENCH_CALLS`` calls."""
_BENCH_CALLS = 20


def add(commands: Any) -> None:
    """Add the commands."""
    predict = commands.add_parser("predict", help="say what images show")
    predict.description = (
        "Say what images show. An image that cannot be read is reported and left out; the status "
        "is 2 if there is no other."
    )
    predict.set_defaults(run=_predict)
    _add_run(predict)
    predict.add_argument(
        "images",
        nargs="+",
        metavar="IMAGES",
        help="image files, folders, archives, or - for a list of them, one a line",
    )
    predict.add_argument("--top", type=int, default=1, metavar="N", help="labels for each image")
    predict.add_argument("--json", action="store_true", help="print JSON")
    evaluate = commands.add_parser("evaluate", help="test a network on a data set")
    evaluate.set_defaults(run=_evaluate)
    _add_run(evaluate)
    evaluate.add_argument(
        "--dataset",
        metavar="NAME|PATH",
        help="whose test images to take (default: what the network was trained on)",
    )
    evaluate.add_argument("--data-dir", metavar="DIR", help="as for kconv train")
    evaluate.add_argument("--test-images", type=int, metavar="N", help="as for kconv train")
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    bench = commands.add_parser("bench", help="latency, images/s and memory on this machine")
    bench.set_defaults(run=_bench)
    _add_run(bench)
    bench.add_argument(
        "--batch-size",
        type=int,
        nargs="+",
        default=[1, 16, 64],
        metavar="N",
        help="images in a call (default: 1 16 64)",
    )
    bench.add_argument("--json", action="store_true", help="print JSON")


def add_network(parser: argparse.ArgumentParser) -> None:
    """Add the argument that names a trained network."""
    parser.add_argument(
        "network",
        metavar="RUN",
        help="folder of a run or a saved network, or a name of `kconv models`",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    add_network(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="threads to use")


# predict

_File = tuple[str, bytes | Exception]
"""The name of an image file, and its contents or why there are none."""


def _predict(options: argparse.Namespace) -> int:
    if options.top < 1:
        raise ValueError(f"--top {options.top} must be at least 1")
    net = load(options.network, threads=options.threads)
    net.expect_probabilities()
    done = failed = 0
    progress = _Progress()
    for files in _some(_files(options.images)):
        images: list[Any] = []
        for name, data in files:
            try:
                if isinstance(data, Exception):
                    raise data
                images.append((name, net.read_image(data, name)))
            except (ValueError, OSError) as error:
                failed += 1
                progress.clear()
                print(f"kconv: left out: {' '.join(str(error).split())}", file=sys.stderr)
        for (name, _), outputs in zip(images, net.each([x for _, x in images]), strict=True):
            progress.clear()
            _show(name, net.ranked(outputs, options.top), options.json, first=not done)
            done += 1
        progress.show(done)
    progress.clear()
    if options.json:
        print("\n]" if done else "[]")
    if not done:
        counted = f"none of {failed} images can be read" if failed else "there are no images"
        raise ValueError(f"{counted} in {' '.join(options.images)}")
    return 0


def _show(name: str, ranked: list[tuple[str, float]], as_json: bool, *, first: bool) -> None:
    if as_json:
        labels = [{"label": label, "probability": round(p, 6)} for label, p in ranked]
        record = json.dumps({"image": name, "predictions": labels})
        print(("[\n  " if first else ",\n  ") + record, end="")
    else:
        show(f"{name}: {', '.join(f'{label} {p:.1%}' for label, p in ranked)}")


def _files(given: Iterable[str]) -> Iterator[_File]:
    """The image files that the arguments name."""
    for text in given:
        if text == "-":
            yield from _files(line.rstrip("\n") for line in sys.stdin if line.strip())
            continue
        path = Path(text)
        try:
            if path.is_dir() or (path.is_file() and is_archive(path.name)):
                with open_files(path) as files:
                    wanted = set(filter(_is_image, files.names))
                    unread: dict[str, str] = {}
                    for name, data in files.read(wanted, unread):
                        yield str(path / name), data
                    for name, wrong in unread.items():
                        yield str(path / name), ValueError(wrong)
            else:
                if path.exists() and not path.is_file():
                    raise ValueError(f"{path} is neither a file nor a folder")
                yield text, path.read_bytes()
        except (ValueError, OSError) as error:
            yield text, error


def _is_image(name: str) -> bool:
    hidden = "/." in f"/{name}" or name.startswith("__MACOSX/")
    return name.lower().endswith(datasets.IMAGE_SUFFIXES) and not hidden


def _some(files: Iterator[_File]) -> Iterator[list[_File]]:
    """As many at a time as are computed together."""
    some: list[_File] = []
    for one in files:
        some.append(one)
        if len(some) == _AT_ONCE:
            yield some
            some = []
    yield some


class _Progress:
    """How many images are done, on a terminal that does not show the results already."""

    def __init__(self) -> None:
        self._shows = sys.stderr.isatty() and not sys.stdout.isatty()

    def show(self, done: int) -> None:
        if self._shows:
            print(f"\r{done:,} images", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shows:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# evaluate


def _evaluate(options: argparse.Namespace) -> int:
    net = load(options.network, threads=options.threads)
    net.expect_probabilities()
    config = net.config
    source = config.dataset if options.dataset is None else options.dataset
    if source is None:
        raise ValueError("--dataset: the network does not say what it was trained on")
    if options.dataset is None and source not in datasets.names() and not Path(source).exists():
        raise ValueError(
            f"--dataset: the network was trained on {source!r}, which is neither a data set's name "
            "nor at that path"
        )
    if config.image.height != config.image.width:
        raise ValueError(f"the network reads images of {config.image.height}x{config.image.width}")
    data = datasets.load(
        source,
        image_size=config.image.height,
        interpolation=config.image.interpolation,
        test_images=options.test_images,
        train_images=len(config.class_names),  # which nobody looks at
        data_dir=options.data_dir,
    )
    if data.image_shape[-1] != config.image.channels:
        raise ValueError(
            f"{source} has images of {data.image_shape[-1]} channels, the network reads "
            f"{config.image.channels}"
        )
    if sorted(data.class_names) != sorted(config.class_names):
        odd = sorted(set(data.class_names) ^ set(config.class_names))
        raise ValueError(f"{source} has other classes than the network: {', '.join(odd[:5])} ...")
    labels = data.y_test
    if data.class_names != config.class_names:
        labels = np.array([config.class_names.index(name) for name in data.class_names])[labels]
    start = time.perf_counter()
    outputs = [
        net(data.x_test[first : first + _AT_ONCE]) for first in range(0, len(labels), _AT_ONCE)
    ]
    seconds = time.perf_counter() - start
    probabilities = np.concatenate(outputs)
    net.expect_finite(probabilities)
    found = probabilities.argmax(axis=1)
    of_truth = np.maximum(probabilities[np.arange(len(labels)), labels], 1e-7)
    confusion = confusion_matrix(labels, found, len(config.class_names))
    record = {
        "dataset": str(source),
        "images": len(labels),
        "accuracy": float((found == labels).mean()),
        "loss": float(-np.log(of_truth).mean()),
        "images_per_second": len(labels) / seconds,
    }
    if options.json:
        print(json.dumps({**record, "confusion": confusion.tolist()}, indent=2))
        return 0
    print(report_of(confusion, config.class_names))
    print(f"\ntest accuracy      {record['accuracy']:.4f} ({len(labels):,} images)")
    print(f"test loss          {record['loss']:.4f}")
    print(f"images/s           {record['images_per_second']:.0f}")
    return 0


# bench


def _bench(options: argparse.Namespace) -> int:
    net = load(options.network, threads=options.threads)
    image = net.config.image
    height, width = image.height or 224, image.width or 224
    if min(options.batch_size) < 1:
        raise ValueError(f"--batch-size {min(options.batch_size)} must be at least 1")
    records = []
    for count in options.batch_size:
        rng = np.random.default_rng(0)
        images = rng.integers(0, 256, (count, height, width, image.channels), np.uint8)
        records.append({"batch_size": count, **_timed(net, images)})
    machine = {
        "machine": processor(),
        "instruction_set": kconv.build_info()["isa"],
        "threads": kconv.get_num_threads(),
        "peak_memory_mb": peak_memory() / 1e6,
    }
    if options.json:
        print(json.dumps({"network": net.config.name, **machine, "calls": records}, indent=2))
        return 0
    print(f"{net.config.name}, {height}x{width}x{image.channels}, float32")
    print(
        f"{machine['machine']}, {machine['instruction_set']}, {machine['threads']} threads, "
        f"peak memory {machine['peak_memory_mb']:.0f} MB\n"
    )
    print("images   median ms      p99 ms    images/s")
    for row in records:
        print(
            f"{row['batch_size']:6d}  {row['median_ms']:10.2f}  {row['p99_ms']:10.2f}  "
            f"{row['images_per_second']:10.1f}"
        )
    return 0


def _timed(net: FrozenNetwork, images: Any) -> dict[str, float]:
    """Times of calls, the scaling of bytes included."""
    net(images)
    seconds: list[float] = []
    while len(seconds) < _BENCH_CALLS or sum(seconds) < _BENCH_SECONDS:
        start = time.perf_counter()
        net(images)
        seconds.append(time.perf_counter() - start)
    median = float(np.median(seconds))
    return {
        "calls": len(seconds),
        "best_ms": 1000 * min(seconds),
        "median_ms": 1000 * median,
        "p99_ms": 1000 * float(np.percentile(seconds, 99)),
        "images_per_second": len(images) / median,
    }
