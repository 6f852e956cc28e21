"""Keras's steps: what of the recipes is kconv's own there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest

from kconv import models
from kconv.training import Config
from kconv.training._keras import KerasTrainer

SPEC = models.create(
    "kdensenet_bc_l100",
    blocks=1,
    growth_rate=4,
    bottleneck=8,
    ktype="D6_4ch",
    classes=3,
    input_shape=(8, 8, 1),
)


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_decay_leaves_norms_and_biases_alone(optimizer: str) -> None:
    config = Config(optimizer=optimizer, weight_decay=0.5, clip_grad_norm=1, ema_decay=0.5)
    trainer = KerasTrainer(SPEC, config)
    weights = trainer.model.trainable_variables
    before = [np.array(keras.ops.convert_to_numpy(variable)) for variable in weights]
    trainer.model.optimizer.learning_rate = 0.1
    trainer.model.optimizer.apply([keras.ops.zeros(variable.shape) for variable in weights])
    for variable, old in zip(weights, before, strict=True):
        factor = 0.95 if old.ndim > 1 else 1.0
        found = keras.ops.convert_to_numpy(variable)
        np.testing.assert_allclose(found, old * factor, rtol=1e-5, err_msg=variable.path)


def test_precision() -> None:
    """Of bfloat16, weights and losses are float32 all the same, and the policy is as before."""
    trainer = KerasTrainer(SPEC, Config(precision="bfloat16", recompute=True))
    assert keras.config.dtype_policy().name == "float32"
    assert trainer.model.recompute
    assert {layer.compute_dtype for layer in trainer.model.layers[1:-1]} == {"bfloat16"}
    assert {variable.dtype for variable in trainer.model.trainable_variables} == {"float32"}
    images = np.random.default_rng(0).standard_normal((6, 8, 8, 1)).astype(np.float32)
    targets = np.eye(3, dtype=np.float32)[[0] * 6]
    losses = [
        trainer.train_step(images, targets, 0.05, scale=1.0, update=True, seed=0)[0]
        for _ in range(4)
    ]
    assert losses[-1] < losses[0]
    assert trainer.predict(images).dtype == np.float32


def test_figures_are_of_the_step_and_averages_go_in_and_out() -> None:
    """Keras's own metrics would go on from step to step."""
    trainer = KerasTrainer(SPEC, Config(ema_decay=0.5, optimizer="sgd", momentum=0.0))
    rng = np.random.default_rng(0)
    images = rng.standard_normal((6, 8, 8, 1)).astype(np.float32)
    easy, hard = np.eye(3, dtype=np.float32)[[0] * 6], np.eye(3, dtype=np.float32)[[1] * 6]
    kept = {"scale": 1.0, "update": True, "seed": 0}
    for _ in range(4):
        trainer.train_step(images, easy, 0.5, **kept)
    loss, accuracy = trainer.train_step(images, hard, 1e-9, **kept)
    assert accuracy == 0
    assert loss > 0.7
    state = trainer.state()
    names = [name for name in state if name.startswith("model/") and "kernel" in name]
    with trainer.averaged():
        averaged = trainer.state()
    changed = [name for name in names if (averaged[name] != state[name]).any()]
    assert changed
    for name, value in trainer.state().items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)


REPEATED = """
import keras, numpy as np
from kconv import models
from kconv.training import Config
from kconv.training._keras import KerasTrainer
spec = models.create("kdensenet_bc_l100", blocks=1, growth_rate=4, bottleneck=8, ktype="D6_4ch",
                     dropout=0.5, classes=3, input_shape=(8, 8, 1))
images = np.random.default_rng(0).standard_normal((6, 8, 8, 1)).astype(np.float32)
targets = np.eye(3, dtype=np.float32)[[0, 1, 2] * 2]

def losses(trainer, seeds):
    return [trainer.train_step(images, targets, 0.01, scale=1, update=True, seed=n)[0]
            for n in seeds]

first, second = (KerasTrainer(spec, Config(seed=5)) for _ in range(2))
whole = losses(first, range(4))
assert losses(second, range(2)) == whole[:2]
resumed = KerasTrainer(spec, Config(seed=5))
resumed.load_state({name: np.array(value) for name, value in second.state().items()})
assert losses(resumed, range(2, 4)) == whole[2:]
"""


def test_chance_is_fixed_on_pytorch_too() -> None:
    """Where Keras's dropout draws from PyTorch's own."""
    done = subprocess.run(
        [sys.executable, "-c", REPEATED],
        env={**os.environ, "KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


DEVICES = """
import os, sys
count, rank, size, address = int(sys.argv[1]), *map(int, sys.argv[2:4]), sys.argv[4]
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count // size}"
os.environ["KERAS_BACKEND"] = "jax"
import jax
if size > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, size, rank)
import keras, numpy as np
from kconv import models
from kconv.training import Config
from kconv.training._keras import KerasTrainer
assert (len(keras.distribution.list_devices("cpu")), jax.process_count()) == (count, size)
if count > 1:
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(auto_shard_dataset=False))
spec = models.create("kdensenet_bc_l100", blocks=1, growth_rate=4, bottleneck=8, ktype="D6_4ch",
                     classes=3, input_shape=(8, 8, 1))
trainer = KerasTrainer(spec, Config())
rng = np.random.default_rng(0)
for _ in range(3):
    images = rng.standard_normal((8, 8, 8, 1)).astype(np.float32)
    targets = np.eye(3, dtype=np.float32)[rng.integers(0, 3, 8)]
    mine = slice(rank * 8 // size, (rank + 1) * 8 // size)
    print(trainer.train_step(images[mine], targets[mine], 0.01, scale=1, update=True, seed=0)[0])
if size == 1:
    print(*trainer.predict(images).ravel())
"""


def losses(devices: int, processes: int = 1) -> list[list[float]]:
    """What each of some processes prints."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    started = []
    for rank in range(processes):
        arguments = (str(devices), str(rank), str(processes), address)
        command = [sys.executable, "-c", DEVICES, *arguments]
        started.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=-1
            )
        )
    printed = [process.communicate(timeout=900) for process in started]
    assert not any(process.returncode for process in started), printed
    # Gloo tells of its connections on the same output.
    return [
        [
            float(number)
            for line in text.splitlines()
            if "Gloo" not in line
            for number in line.split()
        ]
        for text, _ in printed
    ]


@pytest.mark.slow
def test_several_devices_and_processes_compute_what_one_device_does() -> None:
    """Keras's DataParallel on JAX: losses, and norms of the whole batch."""
    (one,) = losses(1)
    assert len(one) == 3 + 24
    (two,) = losses(2)
    np.testing.assert_allclose(two, one, rtol=1e-4)
    for of_a_process in losses(2, processes=2):
        np.testing.assert_allclose(of_a_process, one[:3], rtol=1e-4)
