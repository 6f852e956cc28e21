"""Several processes that train one network: as one would, and what happens when one is lost."""

from __future__ import annotations

import datetime
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from kconv import training
from kconv.training import run
from kconv.training.ranks import PeerError, Ranks, agree, joined

TINY = [
    *("--framework", "torch", "--model", "kdensenet_bc_l100", "--ktype", "D6_4ch"),
    *("--model-option", "blocks=1", "--model-option", "growth_rate=4"),
    *("--model-option", "bottleneck=8", "--image-size", "8", "--train-images", "45"),
    *("--test-images", "20", "--batch-size", "12"),
]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(rank: int, port: int, *arguments: str, prefix: tuple[str, ...] = (), **env: str):
    """One of two processes, as torchrun starts them."""
    env = {
        **os.environ,
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        **env,
    }
    return subprocess.Popen(
        [*prefix, sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def both(*arguments: str) -> list[tuple[int, str, str]]:
    """Two processes of the same arguments: their status, output and errors."""
    port = free_port()
    processes = [start(rank, port, *arguments) for rank in range(2)]
    outputs = [process.communicate(timeout=300) for process in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, outputs, strict=True)]


def test_alone_there_is_nobody_to_wait_for() -> None:
    ranks = Ranks()
    assert ranks.sum(np.arange(3)).tolist() == [0, 1, 2]
    assert ranks.all_of("x") == ["x"]
    assert ranks.first_of("x") == "x"


def test_keras_trains_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="'keras' trains in one process"), joined("keras"):
        pass


def test_processes_agree_on_a_name_beside_keys_of_lost_ones() -> None:
    """Also where the first one asks before the others have replaced what the lost ones left."""
    import torch.distributed as dist

    store, names = dist.HashStore(), []
    for late in (0, 2, 0):  # three generations, whose keys stay
        found: dict[int, str] = {}

        def join(rank: int, late: int = late, found: dict[int, str] = found) -> None:
            time.sleep(0.2 * (rank == late))
            found[rank] = agree(store, rank, 3)

        threads = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert sorted(found) == [0, 1, 2]
        names.append(set(found.values()))
    assert [len(name) for name in names] == [1, 1, 1]
    assert len(set.union(*names)) == 3
    store.set_timeout(datetime.timedelta(seconds=0.3))
    with pytest.raises(PeerError, match="process 1 of 3 has not started"):
        agree(store, 0, 3)  # of the others only what the last generation left is there


GRADIENTS = """
import numpy as np, torch
from kconv import models
from kconv.training import Config
from kconv.training._loop import _check_same
from kconv.training._torch import TorchTrainer
from kconv.training.ranks import PeerError, Ranks, agree, joined

spec = models.create("kdensenet_bc_l100", blocks=1, growth_rate=4, bottleneck=8, ktype="D6_4ch",
                     classes=3, input_shape=(8, 8, 1))
rng = np.random.default_rng(0)
images = rng.standard_normal((7, 8, 8, 1)).astype(np.float32)
targets = rng.dirichlet([1, 1, 1], 7).astype(np.float32)

def gradients(ranks, frozen, sync_bn):
    config = Config(framework="torch", optimizer="sgd", sync_bn=sync_bn)
    trainer = TorchTrainer(spec, config, ranks)
    if sync_bn and ranks.size == 1:  # the same layers as the synchronised network's
        trainer.model._fuses = False
    if frozen:
        trainer.model.train = lambda mode=True: torch.nn.Module.train(trainer.model, False)
    found = {}
    trainer._update = lambda rate: found.update(
        (name, p.grad.clone()) for name, p in trainer.parameters.items())
    mine = slice(ranks.rank, None, ranks.size)
    scale = len(images[mine]) * ranks.size / len(images)
    trainer.train_step(images[mine], targets[mine], 0.1, scale=scale, update=True, seed=0)
    return found, dict(trainer.model.named_buffers())

torch.distributed.init_process_group("gloo")  # as Ray Train does
with joined("torch") as ranks:
    for frozen, sync_bn in ((True, False), (False, True)):
        shared, theirs = gradients(ranks, frozen, sync_bn)
        joint, ours = gradients(Ranks(), frozen, sync_bn)
        for name, gradient in joint.items():
            largest = gradient.abs().max().clamp(min=0.05)
            error = ((shared[name] - gradient).abs().max() / largest).item()
            assert error < (1e-6 if frozen else 1e-5), (name, error, frozen)
        for name, buffer in ours.items() if sync_bn else ():
            torch.testing.assert_close(theirs[name], buffer, rtol=1e-4, atol=1e-6)
    assert ranks.sum(np.array([ranks.rank + 1.0])) == 3
    _check_same({"test images": 5}, ranks, "data")
    try:
        _check_same({"test images": 5 + ranks.rank}, ranks, "data")
        raise AssertionError
    except ValueError as error:
        assert (ranks.rank, str(error)) == (0, "process 1 has test images=6, the first one "
                                               "test images=5: all need the same data")
    except SystemExit as error:
        assert (ranks.rank, error.code) == (1, 2)
    assert ranks.threads >= 1
torch.distributed.destroy_process_group()  # which is the caller's
print("equal")
"""


def test_gradients_are_those_of_the_joint_batch() -> None:
    """Of 4 and 3 images: with frozen norms, and with synchronised ones."""
    for status, output, errors in both("-c", GRADIENTS):
        assert (status, output) == (0, "equal\n"), errors


def test_other_options_are_one_line() -> None:
    port = free_port()
    options = ("-m", "kconv", "train", *TINY, "--epochs")
    processes = [start(rank, port, *options, str(3 + rank)) for rank in range(2)]
    (out0, err0), (out1, err1) = (process.communicate(timeout=120) for process in processes)
    assert [process.returncode for process in processes] == [2, 2]
    expected = (
        "kconv: error: process 1 has epochs=4, the first one epochs=3: all need the same options\n"
    )
    assert err0.endswith(expected)
    assert (out0, out1, err1.count("error")) == ("", "", 0)


@pytest.mark.slow
def test_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = ("-m", "kconv", "train", *TINY)
    (status, shown, errors), (other, hidden, _) = both(*command, "--output", str(output))
    assert (status, other, hidden) == (0, 0, ""), errors
    assert "processes    2" in shown
    # Each image of an epoch was seen once, by one of them.
    meta, _ = run.read_checkpoint(output / "last.npz")
    assert len(meta["history"]) == 2
    assert "41 training, 4 validation and 20 test images" in shown
    assert "(20 images)" in shown
    assert (output / "report.txt").exists()
    # One process, as torchrun starts it anew after a machine went.
    alone = subprocess.run(
        [sys.executable, *command, "--output", str(output), "--epochs", "3"],
        capture_output=True,
        text=True,
        env={**os.environ, "TORCHELASTIC_MAX_RESTARTS": "3"},
    )
    assert alone.returncode == 0, alone.stderr
    assert "goes on      after 2 epochs and 0 steps" in alone.stdout
    (status, shown, errors), (other, hidden, _) = both(
        *("-m", "kconv", "train", "--resume", str(output), "--epochs", "4")
    )
    assert (status, other, hidden) == (0, 0, ""), errors
    assert "goes on      after 3 epochs and 0 steps" in shown
    meta, _ = run.read_checkpoint(output / "last.npz")
    assert [epoch["epoch"] for epoch in meta["history"]] == [1, 2, 3, 4]
    assert all(np.isfinite(epoch["val_loss"]) for epoch in meta["history"])


LEFT = """
import sys
from pathlib import Path
import kconv.cli
status = kconv.cli.main(sys.argv[1:])
names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
print("threads", *names)
sys.exit(status)
"""


@pytest.mark.slow
def test_no_thread_of_the_connections_is_left(tmp_path: Path) -> None:
    """One that is there when the interpreter ends aborts the process now and then."""
    if not Path("/proc/self/task").is_dir():
        pytest.skip("no list of threads here")
    for status, shown, errors in both("-c", LEFT, "train", *TINY, "--output", str(tmp_path / "a")):
        assert status == 0, errors
        assert shown.splitlines()[-1].startswith("threads ")
        assert "gloo" not in shown.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_lost_process_is_one_line_and_a_whole_checkpoint(lost: int, tmp_path: Path) -> None:
    output, port = tmp_path / "run", free_port()
    options = ("-m", "kconv", "train", *TINY, "--epochs", "100000", "--output", str(output))
    processes = [start(rank, port, *options) for rank in range(2)]
    deadline = time.monotonic() + 120
    while not (output / "results.csv").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    processes[lost].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    left = processes[1 - lost]
    _, errors = left.communicate(timeout=30)
    assert time.monotonic() - begin < 30
    assert left.returncode == 1, errors
    lines = [line for line in errors.splitlines() if line.startswith("kconv: error")]
    assert len(lines) == 1, errors
    assert f"process {1 - lost} of 2 has lost another one" in lines[0]
    processes[lost].communicate()
    meta, state = run.read_checkpoint(output / "last.npz")
    assert meta["history"]
    assert all(np.isfinite(array).all() for array in state.values())
    assert training.load_config(output).epochs == 100000


@pytest.mark.slow
def test_full_disk_of_the_first_is_its_error(tmp_path: Path) -> None:
    """A limit on the size of its files stands for the full disk."""
    if shutil.which("prlimit") is None:
        pytest.skip("prlimit is not installed")
    port = free_port()
    options = ("-m", "kconv", "train", *TINY, "--output", str(tmp_path / "run"))
    processes = [
        start(rank, port, *options, prefix=("prlimit", "--fsize=2000") if not rank else ())
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 1], errors
    told = [[line for line in text.splitlines() if "kconv: error" in line] for text in errors]
    assert [len(lines) for lines in told] == [1, 1]
    assert "cannot write" in told[0][0]
    assert "last.npz" in told[0][0]
    assert "has lost another one" in told[1][0]


@pytest.mark.slow
def test_torchrun_starts_it_and_starts_it_again(tmp_path: Path) -> None:
    """Whose restart of lost processes goes on with the run."""
    output = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("--max-restarts", "1", "-m", "kconv", "train", *TINY, "--epochs", "25"),
        *("--output", str(output)),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as torchrun:
        deadline = time.monotonic() + 120
        while not (output / "results.csv").exists():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text()
        os.kill(int(children.split()[-1]), signal.SIGKILL)
        shown, _ = torchrun.communicate(timeout=300)
    assert torchrun.returncode == 0, shown
    assert shown.count("model        kdensenet_bc_l100") == 2
    meta, _ = run.read_checkpoint(output / "last.npz")
    assert [epoch["epoch"] for epoch in meta["history"]] == list(range(1, 26))
    assert load_file(output / "model.safetensors")


@pytest.mark.slow
def test_two_machines_of_an_address_each(tmp_path: Path) -> None:
    """Two network namespaces that one cable connects."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"kconv{os.getpid()}{which}" for which in "ab"]
    cables = [f"kc{os.getpid() % 10**6}{which}" for which in "ab"]
    made = subprocess.run(["ip", "netns", "add", names[0]], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    try:
        steps = [f"ip netns add {names[1]}"]
        steps += [f"ip link add {cables[0]} type veth peer name {cables[1]}"]
        for number, (name, cable) in enumerate(zip(names, cables, strict=True), start=1):
            steps += [
                f"ip link set {cable} netns {name}",
                f"ip -n {name} addr add 10.77.0.{number}/24 dev {cable}",
                f"ip -n {name} link set {cable} up",
                f"ip -n {name} link set lo up",
            ]
        for step in steps:
            done = subprocess.run(step.split(), capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"no network namespaces here: {step}: {done.stderr.strip()}")
        processes = []
        for rank, (name, cable) in enumerate(zip(names, cables, strict=True)):
            options = ("-m", "kconv", "train", *TINY, "--output", str(tmp_path / f"run{rank}"))
            env = {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": cable}
            env |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
            prefix = ("ip", "netns", "exec", name)
            processes.append(start(rank, 29511, *options, prefix=prefix, **env))
        outputs = [process.communicate(timeout=200) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outputs
        assert (tmp_path / "run0/report.txt").exists()
        assert not (tmp_path / "run1").exists()  # only the first writes
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)
