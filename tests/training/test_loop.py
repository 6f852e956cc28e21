"""The training loop: the same in both frameworks, exactly resumable, safe against interruption."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import kconv
from kconv import augment, datasets, models, training
from kconv._files import remove_leftovers, replacing
from kconv.runtime import FrozenNetwork
from kconv.training import Config, _loop, _start, run

TINY = Config(
    model="kdensenet_bc_l100",
    model_options={"blocks": 1, "growth_rate": 4, "bottleneck": 8, "dropout": 0.1},
    ktype="D6_4ch",
    train_images=40,
    test_images=20,
    image_size=8,
    batch_size=12,
    lr=0.003,
)
both = pytest.mark.parametrize("framework", training.FRAMEWORKS)


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module", params=training.FRAMEWORKS)
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Path, training.Result]:
    """A whole run of two epochs."""
    config = dataclasses.replace(TINY, framework=request.param)
    output = tmp_path_factory.mktemp("run") / "new" / "folder"
    return config, output, training.train(config, output, log=quiet)


# The parts


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("epochs", 0),
        ("batch_size", -1),
        ("image_size", 0),
        ("seed", -1),
        ("lr", 0.0),
        ("lr", float("inf")),
        ("lr", float("nan")),
        ("framework", "theano"),
        ("lr_schedule", "cosinus"),
        ("optimizer", "adam"),
        ("gradient_accumulation", 0),
        ("early_stopping", 0),
        ("ema_decay", 1.0),
        ("label_smoothing", -0.1),
        ("weight_decay", float("inf")),
        ("warmup_epochs", -1.0),
        ("clip_grad_norm", 0.0),
        ("teacher_weight", 1.5),
        ("workers", -1),
        ("class_weights", "uneven"),
        ("on_bad_image", "ignore"),
    ],
)
def test_config_names_the_bad_value(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option}.*{value}"):
        Config(**{option: value})


@pytest.mark.parametrize(("size", "skipped"), [(32, 3), (64, 3), (65, -1), (224, -1)])
def test_strides_are_skipped_for_small_images(size: int, skipped: int) -> None:
    images, labels = np.zeros((1, size, 8, 3), np.uint8), np.zeros(1, np.int64)
    data = datasets.Dataset("zeros", ("a", "b"), images, labels, images, labels)
    assert Config().spec(data).skip_stride_cnt == skipped
    assert Config(skip_strides=1).spec(data).skip_stride_cnt == 1
    assert Config(model="mobilenet").spec(data).input_shape == (size, 8, 3)


def test_batch_larger_than_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batch_size=64.*has 40 training images"):
        training.train(dataclasses.replace(TINY, batch_size=64), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_step_beyond_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = TINY.spec(datasets.load("fashion_mnist_mini", image_size=8, train_images=10))
    results = 0
    for layer in spec.graph().layers:
        if {"kernel", "depthwise_kernel"} & layer.weights().keys() and len(layer.shape) == 3:
            results += 12 * np.prod(layer.shape)
    least = 4 * (results + 3 * models.count(spec).trainable)
    monkeypatch.setattr(datasets, "memory", lambda: least - 1)
    with pytest.raises(ValueError, match=r"batch_size=12: a step of kdensenet.* at 8x8 takes"):
        _start.check_step(TINY, spec)
    monkeypatch.setattr(datasets, "memory", lambda: least)
    _start.check_step(TINY, spec)


def test_config_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"config is a dict, expected a kconv\.training\.Config"):
        training.train({"epochs": 1}, tmp_path / "run")  # type: ignore[arg-type]


def test_option_that_the_model_lacks_is_refused(tmp_path: Path) -> None:
    config = Config(model="efficientnet_b0", ktype="D6_16ch", train_images=40)
    with pytest.raises(TypeError, match="efficientnet_b0 has no option 'ktype'"):
        training.train(config, tmp_path)


# The optimizer and the batch norms


def test_torch_rmsprop_is_keras_rmsprop() -> None:
    import keras
    import torch

    from kconv.training._torch import RMSprop

    rng = np.random.default_rng(0)
    start = rng.standard_normal(5).astype(np.float32)
    ours = torch.nn.Parameter(torch.tensor(start))
    ours_optimizer = RMSprop([ours], lr=0.01)
    theirs = keras.Variable(start)
    theirs_optimizer = keras.optimizers.RMSprop(0.01, rho=0.9, epsilon=1e-7)
    for _ in range(10):
        # Gradients near the root of epsilon, where its place matters.
        gradient = (rng.standard_normal(5) * 10.0 ** rng.integers(-5, 0, 5)).astype(np.float32)
        ours.grad = torch.tensor(gradient)
        ours_optimizer.step()
        theirs_optimizer.apply([keras.ops.convert_to_tensor(gradient)], [theirs])
    expected = keras.ops.convert_to_numpy(theirs)
    np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-5)


@both
def test_recalibration_forgets_and_averages(framework: str) -> None:
    config = dataclasses.replace(TINY, framework=framework)
    data = datasets.load("fashion_mnist_mini", image_size=8, test_images=20)
    trainer = _loop._make_trainer(config, config.spec(data))
    rng = np.random.default_rng(0)
    batches = rng.standard_normal((3, 16, 8, 8, 1)).astype(np.float32)

    def statistics() -> dict[str, np.ndarray]:
        endings = ("running_mean", "running_var", "moving_mean", "moving_variance")
        return {k: v for k, v in trainer.state().items() if k.endswith(endings)}

    single = []
    for batch in batches:
        trainer.recalibrate([batch])
        single.append(statistics())
    trainer.recalibrate(batches)
    together = statistics()
    # Only the first batch norm: what reaches the others passes random dropout.
    for name in list(together)[:2]:
        mean = np.mean([s[name] for s in single], axis=0)
        scale = np.abs(mean).max()
        np.testing.assert_allclose(together[name], mean, atol=0.02 * scale, rtol=0.02)
        assert scale > 1e-3


# Whole runs


def test_run_writes_everything(finished: tuple[Config, Path, training.Result]) -> None:
    _config, output, result = finished
    names = {"model.safetensors", "config.json", "config.toml", "last.npz", "results.csv"}
    names |= {"report.txt", "curves.png", "confusion.png"}
    assert {path.name for path in output.iterdir()} == names
    assert result.best_model == output / "model.safetensors"
    with (output / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2]
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([0.003, 0.0045])
    assert all(np.isfinite(float(value)) for row in rows for value in row.values())
    assert [dataclasses.asdict(e) for e in result.history] == [
        {key: float(value) for key, value in row.items()} for row in rows
    ]
    assert (output / "report.txt").read_text().startswith("test accuracy 0.")
    assert "Ankle boot" in result.report
    assert Image.open(output / "curves.png").size == (1500, 450)
    assert Image.open(output / "confusion.png").size == (750, 750)
    known = json.loads((output / "config.json").read_text())
    assert known["architecture"] == "kdensenet_bc_l100"
    assert known["label_names"][0] == "T-shirt/top"
    assert known["spec"]["growth_rate"] == 4
    assert known["image"] == {
        "height": 8,
        "width": 8,
        "channels": 1,
        "interpolation": "bilinear",
        "scale": 1 / 64,
        "offset": -2,
    }
    best = min(rows, key=lambda row: float(row["val_loss"]))
    assert known["metrics"] == {
        "epoch": int(best["epoch"]),
        "val_loss": float(best["val_loss"]),
        "val_accuracy": float(best["val_accuracy"]),
        "test_accuracy": result.test_accuracy,
    }
    assert known["kconv_version"] == kconv.__version__


def test_best_model_gives_the_reported_accuracy(
    finished: tuple[Config, Path, training.Result],
) -> None:
    """By the framework's own computation, and by NumPy alone."""
    config, output, result = finished
    data = datasets.load("fashion_mnist_mini", image_size=8, test_images=20)
    images = augment.scale(data.x_test)
    if config.framework == "keras":
        from kconv.keras import build

        model = build(config.spec(data), fused=False)
        kconv.load_weights(model, output)
        found = model.predict(images, verbose=0)
    else:
        import torch

        from kconv.torch import build

        network = build(config.spec(data), kernels="torch")
        network.load_state_dict(load_file(output / "model.safetensors"))
        with torch.no_grad():
            logits = network.eval()(torch.tensor(images).permute(0, 3, 1, 2))
        found = logits.softmax(1).numpy()
    net = kconv.load(output)
    np.testing.assert_allclose(net(data.x_test), found, atol=1e-5)
    assert net.class_names == data.class_names
    accuracy = (found.argmax(1) == data.y_test).mean()
    assert accuracy == pytest.approx(result.test_accuracy)


def test_run_of_an_older_kconv_goes_on(
    finished: tuple[Config, Path, training.Result], tmp_path: Path
) -> None:
    """Which had its best state in a file of the framework's, and no configuration."""
    config, output, result = finished
    (tmp_path / "last.npz").write_bytes((output / "last.npz").read_bytes())
    (tmp_path / "history.csv").touch()
    data = datasets.load("fashion_mnist_mini", image_size=8, test_images=20)
    if config.framework == "keras":
        from kconv.keras import build

        model = build(config.spec(data))
        kconv.load_weights(model, output)
        model.save(tmp_path / "best.keras")
    else:
        import torch

        torch.save(load_file(output / "model.safetensors"), tmp_path / "best.pt")
    with pytest.raises(ValueError, match=r"kconv train --resume .* writes it"):
        kconv.load(tmp_path)
    resumed = training.train(config, tmp_path, resume=True, log=quiet)
    assert resumed.test_accuracy == result.test_accuracy
    np.testing.assert_array_equal(
        kconv.load(tmp_path)(data.x_test), kconv.load(output)(data.x_test)
    )


def test_weights_to_start_from(
    finished: tuple[Config, Path, training.Result], tmp_path: Path
) -> None:
    """Those of the other framework's run, with a new classifier as there are fewer classes."""
    config, output, _ = finished
    rng = np.random.default_rng(0)
    for label in "ab":
        (folder := tmp_path / "data" / label).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 256, (8, 8), np.uint8)
            Image.fromarray(pixels).convert("RGB").save(folder / f"{number}.png")
    other = {"keras": "torch", "torch": "keras"}[config.framework]
    tuned = dataclasses.replace(
        config, framework=other, epochs=1, lr=1e-9, weights=str(output), recalibrate_bn=False
    )
    lines: list[str] = []
    training.train(tuned, tmp_path / "same", log=lines.append)
    assert f"weights      {output}" in lines
    old, new = (load_file(folder / "model.safetensors") for folder in (output, tmp_path / "same"))
    name = "softmax.weight"
    np.testing.assert_allclose(new[name], old[name], atol=1e-6)

    two = dataclasses.replace(tuned, dataset=str(tmp_path / "data"), image_size=8, batch_size=8)
    with pytest.raises(ValueError, match=r"first_conv.*\(8, 3, 3, 3\)|conv.*in the model"):
        training.train(two, tmp_path / "colours", log=quiet)  # as those images have three channels
    assert not (tmp_path / "colours").exists()


def test_resumed_run_equals_uninterrupted(
    finished: tuple[Config, Path, training.Result],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, output, result = finished
    batches_done = []
    scale = augment.scale

    def interrupting(images: np.ndarray) -> np.ndarray:
        batches_done.append(len(images))
        history = run.read_checkpoint(tmp_path / "last.npz")[0]["history"]
        if len(history) == 1 and len(batches_done) % 2:
            raise KeyboardInterrupt
        return scale(images)

    with monkeypatch.context() as patch:
        patch.setattr(augment, "scale", interrupting)
        with pytest.raises(KeyboardInterrupt):
            training.train(config, tmp_path, log=quiet)
    resumed = training.train(training.load_config(tmp_path), tmp_path, resume=True, log=quiet)

    for ours, theirs in zip(resumed.history, result.history, strict=True):
        assert dataclasses.replace(ours, images_per_second=0) == dataclasses.replace(
            theirs, images_per_second=0
        )
    with np.load(tmp_path / "last.npz") as ours, np.load(output / "last.npz") as theirs:
        assert ours.files == theirs.files
        for name in set(ours.files) - {"meta"}:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert resumed.test_accuracy == result.test_accuracy


def test_options_of_a_run_that_goes_on(
    finished: tuple[Config, Path, training.Result], tmp_path: Path
) -> None:
    """What it started from must not change, and need not be there; its options are written anew."""
    config, output, _ = finished
    start = tmp_path / "start"
    start.mkdir()
    for name in ("model.safetensors", "config.json"):
        (start / name).write_bytes((output / name).read_bytes())
    tuned = dataclasses.replace(config, epochs=1, weights=str(start))
    training.train(tuned, tmp_path / "run", log=quiet)
    (start / "config.json").unlink()
    with pytest.raises(ValueError, match=r"run with weights='.*', which cannot go on with weights"):
        training.train(
            dataclasses.replace(tuned, weights=str(output)),
            tmp_path / "run",
            resume=True,
            log=quiet,
        )
    longer = dataclasses.replace(tuned, epochs=2)
    result = training.train(longer, tmp_path / "run", resume=True, log=quiet)
    assert len(result.history) == 2
    written = training.config_from(training.read_toml(tmp_path / "run/config.toml"))
    assert written == longer == training.load_config(tmp_path / "run")


def test_batches_beyond_the_images_of_recalibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_loop, "RECALIBRATION_IMAGES", 5)
    config = dataclasses.replace(TINY, framework="torch", epochs=1, train_images=41)
    lines: list[str] = []
    result = training.train(config, tmp_path, log=lines.append)
    assert np.isfinite(result.history[0].val_loss)
    # Of 41, four are for validation, and three batches of twelve leave one.
    assert "last batch   1 images of each epoch are too few for one" in lines


def test_finished_run_can_be_extended(
    finished: tuple[Config, Path, training.Result], tmp_path: Path
) -> None:
    config, output, result = finished
    (tmp_path / "last.npz").write_bytes((output / "last.npz").read_bytes())
    longer = dataclasses.replace(config, epochs=3)
    extended = training.train(longer, tmp_path, resume=True, log=quiet)
    assert extended.history[:2] == result.history
    assert len(extended.history) == 3


def test_validation_folder_and_names_beyond_ascii(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the terminal has few letters, the run still ends, and its report has all of them."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 9), ("valid", 3)):
        for label in ("\u65e5\u672c", "cat"):
            (folder := tmp_path / "data" / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    config = dataclasses.replace(
        TINY, dataset=str(tmp_path / "data"), framework="torch", epochs=1, batch_size=6
    )
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", ascii_only)
    training.train(config, tmp_path / "run")
    shown = ascii_only.buffer.getvalue().decode()  # type: ignore[attr-defined]
    assert "18 training, 6 validation and 6 test images" in shown
    assert "test images  are the validation images" in shown
    assert "\\u65e5\\u672c" in shown
    assert "\u65e5\u672c" in (tmp_path / "run/report.txt").read_text(encoding="utf-8")


@both
def test_augmented_run_with_constant_rate(framework: str, tmp_path: Path) -> None:
    config = dataclasses.replace(
        TINY,
        framework=framework,
        augment=True,
        lr_schedule="constant",
        epochs=1,
        recalibrate_bn=False,
    )
    lines: list[str] = []
    result = training.train(config, tmp_path, log=lines.append)
    assert np.isfinite(result.history[0].loss)
    assert not any("moving statistics" in line for line in lines)


# What goes wrong


def test_checkpoint_of_another_model_is_refused(
    finished: tuple[Config, Path, training.Result], tmp_path: Path
) -> None:
    config, output, _ = finished
    other = dataclasses.replace(config, model="keffnet_b0")
    with pytest.raises(ValueError, match="model='kdensenet_bc_l100', which cannot go on with"):
        training.train(other, output, resume=True, log=quiet)

    with np.load(output / "last.npz") as arrays:
        state = dict(arrays)
    meta = json.loads(str(state["meta"]))
    meta["config"]["model_options"]["growth_rate"] = 8
    state["meta"] = np.array(json.dumps(meta))
    np.savez(tmp_path / "last.npz", **state)
    with pytest.raises(ValueError, match=r"the checkpoint is of another model: its .* has shape"):
        training.train(training.load_config(tmp_path), tmp_path, resume=True, log=quiet)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"text"])
def test_damaged_checkpoint_is_refused(
    finished: tuple[Config, Path, training.Result],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
) -> None:
    whole = (finished[1] / "last.npz").read_bytes()
    (tmp_path / "last.npz").write_bytes(damage(whole))
    with pytest.raises(ValueError, match=r"last\.npz is not a checkpoint, or is damaged"):
        training.load_config(tmp_path)


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run to resume: it has no last\.npz"):
        training.load_config(tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("h5")])
def test_failed_write_leaves_the_old_file(tmp_path: Path, error: Exception) -> None:
    target = tmp_path / "best.pt"
    target.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with (
        pytest.raises(OSError, match=r"cannot write .*best\.pt"),
        replacing(target) as new,
    ):
        fail(new)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


@both
def test_full_disk_is_one_error_and_keeps_the_files(framework: str, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    import resource

    config = dataclasses.replace(TINY, framework=framework, epochs=1)
    training.train(config, tmp_path, log=quiet)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*(model|last|config)\."):
            training.train(dataclasses.replace(config, epochs=2), tmp_path, resume=True, log=quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# The run's folder


def test_a_new_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: training.reserve(TINY, tmp_path), range(16)))
    names = {f"kdensenet_bc_l100-fashion_mnist_mini-{number}" for number in range(1, 17)}
    assert {folder.name for folder in folders} == names
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot make the folder"):
        training.reserve(TINY, tmp_path / "file")


HOLDING = """
import sys, time
from pathlib import Path
from kconv.training import run
with run.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(120)
"""


def test_a_folder_in_use_is_refused_until_its_run_is_killed(tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-c", HOLDING, str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        (output / ".last.1.partial.npz").touch()
        with pytest.raises(ValueError, match="run is in use by another run"):
            training.train(TINY, output, log=quiet)
        assert (output / ".last.1.partial.npz").exists()
        other.kill()
    with run.held(output):
        assert not (output / ".last.1.partial.npz").exists()


def test_a_folder_with_a_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "last.npz").touch()
    with pytest.raises(ValueError, match=r"holds a run: continue it with --resume"):
        training.train(TINY, tmp_path, log=quiet)


def test_a_run_that_does_not_begin_leaves_no_folder(tmp_path: Path) -> None:
    wrong = dataclasses.replace(TINY, batch_size=64)
    for output in (tmp_path / "run", training.reserve(TINY, tmp_path)):
        with pytest.raises(ValueError, match="batch_size=64"):
            training.train(wrong, output, log=quiet)
        assert not output.exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="batch_size=64"):
        training.train(wrong, tmp_path / "mine", log=quiet)
    assert (tmp_path / "mine").exists()


def test_only_leftovers_are_removed(tmp_path: Path) -> None:
    kept = ["last.npz", ".lock", ".hidden.2024.txt", "a.1.partial.npz"]
    for name in (*kept, ".last.123.partial.npz", ".best.7.partial.keras", ".report.9.partial"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


# Recipes


class StopAt(training.Callback):
    """Interrupts a run after a step."""

    def __init__(self, step: int) -> None:
        self.step, self.epochs = step, 0

    def on_step_end(self, step: int, loss: float, accuracy: float, learning_rate: float) -> None:
        if step == self.step:
            raise KeyboardInterrupt

    def on_epoch_end(self, epoch: training.Epoch) -> None:
        self.epochs += 1


def test_recipe_goes_on_at_the_exact_batch(
    finished: tuple[Config, Path, training.Result], tmp_path: Path
) -> None:
    """With all that has a state of its own, from a checkpoint within the second epoch."""
    config, output, _ = finished
    recipe = dataclasses.replace(
        config,
        train_images=45,
        optimizer="adamw",
        lr_schedule="one-cycle",
        weight_decay=0.05,
        label_smoothing=0.1,
        ema_decay=0.5,
        clip_grad_norm=1.0,
        class_weights="balanced",
        gradient_accumulation=2 if config.framework == "torch" else 1,
        augment=True,
        teacher=str(output),
        checkpoint_steps=2,
    )
    whole = training.train(recipe, tmp_path / "whole", log=quiet)
    stop = StopAt(7)  # of four in an epoch, the last of five images
    with pytest.raises(KeyboardInterrupt):
        training.train(recipe, tmp_path / "run", callbacks=[stop], log=quiet)
    assert stop.epochs == 1
    meta, _ = run.read_checkpoint(tmp_path / "run/last.npz")
    assert (meta["steps"], meta["sums"][2], len(meta["history"])) == (2, 24, 1)
    resumed = training.train(recipe, tmp_path / "run", resume=True, log=quiet)
    for ours, theirs in zip(resumed.history, whole.history, strict=True):
        assert dataclasses.replace(ours, images_per_second=0) == dataclasses.replace(
            theirs, images_per_second=0
        )
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("run", "whole")]
    for name, value in weights[1].items():
        np.testing.assert_array_equal(weights[0][name].numpy(), value.numpy(), err_msg=name)


def test_class_weights_count_as_told() -> None:
    labels = np.array([0, 0, 0, 1])
    balanced = _start.class_weights(Config(class_weights="balanced"), labels, 3)
    np.testing.assert_allclose(balanced, [4 / 9, 4 / 3, 4 / 3])
    with pytest.raises(ValueError, match="class_weights has 2 numbers for 3 classes"):
        _start.class_weights(Config(class_weights=(1, 2)), labels, 3)


def test_early_stopping_and_what_it_is_told(tmp_path: Path) -> None:
    """A rate so high that nothing is learnt: the first epoch stays the best, or the second."""
    config = dataclasses.replace(
        TINY, framework="torch", epochs=20, lr=1e4, lr_schedule="constant", early_stopping=1
    )
    lines: list[str] = []
    result = training.train(config, tmp_path, log=lines.append)
    losses = [epoch.val_loss for epoch in result.history]
    assert len(losses) < 20
    assert losses[-1] >= min(losses[:-1])
    assert any("early stop" in line for line in lines)
    extended = training.train(
        dataclasses.replace(config, early_stopping=None, epochs=len(losses) + 1),
        tmp_path,
        resume=True,
        log=quiet,
    )
    assert len(extended.history) == len(losses) + 1


def test_compressed_network_starts_from_the_plain_one(tmp_path: Path) -> None:
    plain = dataclasses.replace(
        TINY, framework="torch", model="kdensenet_bc_l100", ktype="conv", epochs=1
    )
    training.train(plain, tmp_path / "plain", log=quiet)
    lines: list[str] = []
    config = dataclasses.replace(
        plain, ktype="D6_4ch", compress_from=str(tmp_path / "plain"), lr=1e-12, recalibrate_bn=False
    )
    training.train(config, tmp_path / "small", log=lines.append)
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "small"))
    shapes = {name: value.shape for name, value in old.items() if "num_batches" not in name}
    same = [name for name, value in new.items() if shapes.get(name) == value.shape]
    told = next(line for line in lines if line.startswith("weights"))
    assert told.split()[1] == str(len(same))
    kernels = [name for name in same if new[name].ndim == 4]
    assert kernels
    for name in kernels:
        np.testing.assert_allclose(new[name], old[name], atol=1e-6, err_msg=name)
    assert any(name not in old for name in new)


def test_teacher_of_other_images_is_refused(
    finished: tuple[Config, Path, training.Result], tmp_path: Path
) -> None:
    config, output, _ = finished
    other = dataclasses.replace(config, image_size=10, teacher=str(output))
    with pytest.raises(ValueError, match=r"takes images of 8x8x1, the data's are 10x10x1"):
        training.train(other, tmp_path / "run", log=quiet)


def test_teacher_without_probabilities_is_refused(
    finished: tuple[Config, Path, training.Result], tmp_path: Path
) -> None:
    config, output, _ = finished
    net = kconv.load(output)
    layers = net.graph.layers
    last = dataclasses.replace(layers[-1], activation=None)
    graph = models.Graph("logits", (*layers[:-1], last), last.name)
    changed = dataclasses.replace(net.config, network=graph)
    FrozenNetwork(changed, net.weights).save(tmp_path / "logits")
    other = dataclasses.replace(config, teacher=str(tmp_path / "logits"))
    with pytest.raises(ValueError, match="logits' ends in no softmax"):
        training.train(other, tmp_path / "run", log=quiet)


def test_diverged_training_ends_in_one_line(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, framework="torch", lr=1e30, optimizer="sgd", epochs=3)
    with pytest.raises(FloatingPointError, match=r"loss of epoch 1 is nan: the training has div"):
        training.train(config, tmp_path, log=quiet)
    assert not (tmp_path / "config.json").exists()
