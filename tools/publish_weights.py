"""Make a trained network of the package from a run's folder, with its model card.

    python tools/publish_weights.py RUN keffnet_b0-cifar10 --dataset cifar10 --machine "..."

Kernels are kept as float16, which halves the file; the accuracy on the card is measured with what
the file then holds, by ``kconv.load``.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import subprocess
from pathlib import Path

import numpy as np

import kconv
from kconv import datasets, models, plots, training
from kconv._model_folder import expected_weights, read_config, write_config, write_weights
from kconv._published import FOLDER
from kconv.runtime import FrozenNetwork

PICTURES = Path(__file__).parents[1] / "docs/weights"
_AT_ONCE = 64


def main() -> None:
    """Write the folder and the picture, and say what the network comes to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("name", help="such as keffnet_b0-cifar10")
    parser.add_argument("--dataset", required=True, help="the known data set's name")
    parser.add_argument("--machine", required=True, help="where, when, and for how long")
    parser.add_argument("--notes", default="", help="a sentence on the images")
    parser.add_argument("--into", type=Path, default=FOLDER, help="where the folder is made")
    parser.add_argument("--pictures", type=Path, default=PICTURES, help="where its curves go")
    options = parser.parse_args()
    target = options.into / options.name
    target.mkdir(parents=True, exist_ok=True)
    net = kconv.load(options.run)
    config = training.load_config(options.run)
    names = expected_weights(net.graph)
    arrays = {
        names[key][0]: value.astype(np.float16) if value.ndim > 1 else value
        for key, value in net.weights.items()
    }
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError("a weight is beyond float16")
    write_weights(target, arrays)
    write_config(target, dataclasses.replace(net.config, dataset=options.dataset))
    published = kconv.load(target)
    accuracy, images = tested(published, config)
    metrics = {**read_config(target).metrics, "test_accuracy": accuracy}
    write_config(target, dataclasses.replace(net.config, dataset=options.dataset, metrics=metrics))
    with (options.run / "results.csv").open() as table:
        epochs = list(csv.DictReader(table))
    card = card_of(options, config, published, epochs, accuracy, images)
    (target / "README.md").write_text(card, encoding="utf-8")
    options.pictures.mkdir(exist_ok=True)
    plots.training_curves(
        [{key: float(value) for key, value in row.items() if value} for row in epochs],
        options.pictures / f"{options.name}.png",
        title=options.name,
        test_accuracy=accuracy,
    )
    print(f"{options.name}: {accuracy:.4f} of {images:,} test images")
    for path in sorted(target.iterdir()):
        print(f"  {path.name}: {path.stat().st_size:,} bytes")


def tested(net: FrozenNetwork, config: training.Config) -> tuple[float, int]:
    """Accuracy on the run's test images, and how many there are."""
    image = net.config.image
    data = datasets.load(
        config.dataset,
        image_size=image.height,
        interpolation=config.interpolation,
        test_images=config.test_images,
        train_images=len(net.class_names),  # which nobody looks at
        data_dir=config.data_dir,
    )
    found = [
        net(data.x_test[first : first + _AT_ONCE]).argmax(1)
        for first in range(0, len(data.x_test), _AT_ONCE)
    ]
    return float((np.concatenate(found) == data.y_test).mean()), len(data.x_test)


def commands_of(config: training.Config, dataset: str) -> list[str]:
    """The commands that train it again, those of the run that it starts from first."""
    run = Path(config.weights) if config.weights else None
    before = []
    if run is not None and run.is_dir():
        *before, last = commands_of(training.load_config(run), dataset)
        before.append(f"{last} --output {run.name}")
        config = dataclasses.replace(config, weights=run.name)
    return [*before, command_of(config, dataset)]


def command_of(config: training.Config, dataset: str) -> str:
    """The command that trains it again, from the files that the configuration names."""
    default = training.Config()
    given = dataclasses.replace(config, dataset=dataset, data_dir=None)
    words = ["kconv train"]
    for field in dataclasses.fields(training.Config):
        value = getattr(given, field.name)
        option = field.name.replace("_", "-")
        if value == getattr(default, field.name) or field.name == "model_options":
            continue
        words.append(f"--{'' if value is not False else 'no-'}{option}")
        words += [] if isinstance(value, bool) else [str(value)]
    words += [f"--model-option {name}={value}" for name, value in config.model_options.items()]
    return " ".join(words)


def published_figure(spec: models.Spec, dataset: str) -> str:
    """What the papers have of the same network on the same data set."""
    plain = dataset.replace("_", "-").upper().replace("CIFAR10", "CIFAR-10")
    rows = [
        row
        for row in models.paper_table()
        if row.dataset.upper() == plain
        and row.ktype == getattr(spec, "ktype", None)
        and row.counts.trainable == models.count(spec).trainable
    ]
    return "; ".join(
        f"{row.published_accuracy:.2%} ({row.model} {row.ktype}, {row.input}, {row.epochs} epochs)"
        for row in rows
    )


def card_of(
    options: argparse.Namespace,
    config: training.Config,
    net: FrozenNetwork,
    epochs: list[dict[str, str]],
    accuracy: float,
    images: int,
) -> str:
    """The model card."""
    spec = net.config.network
    assert isinstance(spec, models.Spec)
    counts, image = models.count(spec), net.config.image
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    theirs = published_figure(spec, options.dataset) or "no figure for this data set"
    curve = "\n".join(
        f"| {row['epoch']} | {float(row['learning_rate']):.6f} | {float(row['loss']):.4f} | "
        f"{float(row['accuracy']):.4f} | {float(row['val_loss']):.4f} | "
        f"{float(row['val_accuracy']):.4f} |"
        for row in epochs
    )
    options_of = {
        field.name: getattr(spec, field.name)
        for field in dataclasses.fields(spec)
        if field.name not in ("name", "input_shape", "classes")
    }
    commands = "; ".join(f"`{command}`" for command in commands_of(config, options.dataset))
    shown = ", ".join(f"{name}={value!r}" for name, value in options_of.items())
    return f"""# {options.name}

```pycon
>>> import kconv
>>> net = kconv.load("{options.name}")
>>> net
{net!r}
>>> net.class_names[:3]
{net.class_names[:3]!r}

```

<!-- --8<-- [start:card] -->
| | |
|---|---|
| network | {spec.name} ({shown}) |
| parameters | {counts.trainable:,} trainable, {counts.total:,} in all; kernels stored as float16 |
| multiply-accumulates | {counts.macs:,} an image |
| input | {image.height}x{image.width}x{image.channels}, `pixel * {image.scale} + {image.offset}` |
| trained on | {options.dataset}{f": {options.notes}" if options.notes else ""} |
| test accuracy | **{accuracy:.2%}** of {images:,} images |
| in the papers | {theirs} |
| commands | {commands} |
| seed | {config.seed} |
| machine | {options.machine} |
| kconv | {net.config.kconv_version}, commit {commit} |

The validation images are a tenth of the training images; the weights are those of the epoch with
the lowest validation loss, epoch {int(net.config.metrics["epoch"])}.

| epoch | learning rate | loss | accuracy | validation loss | validation accuracy |
|---|---|---|---|---|---|
{curve}
<!-- --8<-- [end:card] -->
"""


if __name__ == "__main__":
    main()
