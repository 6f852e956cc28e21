"""Other processes: forked workers, spawned ones, and data-parallel training."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from kconv.torch import DepthwiseConv2d, PointwiseConv2d, fuse, pointwise_conv, report


def big_convolution():
    """Large enough for the thread pool."""
    torch.manual_seed(0)
    return pointwise_conv(torch.randn(8, 32, 64, 64), torch.randn(32, 8, 1, 1), groups=4)


class Convolved(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return big_convolution()[index]


def test_forked_workers_after_the_pool_has_started():
    expected = big_convolution()
    loader = DataLoader(Convolved(), 1, num_workers=2, multiprocessing_context="fork", timeout=60)
    for index, image in enumerate(loader):
        torch.testing.assert_close(image[0], expected[index])


HOGWILD = """
import torch
import torch.multiprocessing as mp
from kconv.torch import PointwiseConv2d


def train(layer):
    layer(torch.ones(2, 4, 8, 8)).sum().backward()
    with torch.no_grad():
        layer.weight -= layer.weight.grad


if __name__ == "__main__":
    layer = PointwiseConv2d(4, 6).share_memory()
    before = layer.weight.detach().clone()
    process = mp.get_context("spawn").Process(target=train, args=(layer,))
    process.start()
    process.join()
    torch.testing.assert_close(before - layer.weight, torch.full_like(before, 128.0))
    print(process.exitcode)
"""


def test_training_by_a_spawned_process_through_shared_memory(tmp_path):
    script = tmp_path / "hogwild.py"
    script.write_text(HOGWILD)
    command = [sys.executable, str(script)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.stdout == "0\n", result.stderr


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        PointwiseConv2d(3, 12, interleave=4, bias=False),
        nn.BatchNorm2d(12),
        nn.SiLU(),
        DepthwiseConv2d(12, 12, 3, padding=1),
        PointwiseConv2d(12, 6, groups=3),
    ).eval()  # batch norm frozen, as it sees its own process's images only


def images():
    return torch.randn(6, 3, 9, 9, generator=torch.Generator().manual_seed(2))


def data_parallel(rank, folder):
    # Imported later, it would keep the group, whose threads abort a process at its end.
    import torch.distributed.nn.functional

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    gradients = []
    for model in network(), fuse(network()):
        model = nn.parallel.DistributedDataParallel(model)
        model(images()[rank::2]).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    if rank == 0:
        torch.save(gradients, f"{folder}/gradients.pt")
    del model  # which holds the group, too
    torch.distributed.destroy_process_group()
    gc.collect()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_distributed_data_parallel(tmp_path):
    # Fresh processes: one that has gone backward before may not be forked.
    script = f"import runpy; runpy.run_path({__file__!r})['data_parallel']({{}}, {str(tmp_path)!r})"
    ranks = [subprocess.Popen([sys.executable, "-c", script.format(rank)]) for rank in range(2)]
    assert [rank.wait(120) for rank in ranks] == [0, 0]
    model = network()
    model(images()).square().mean().backward()
    assert report(fuse(network())).changed  # some of it is one operation
    for gradients in torch.load(tmp_path / "gradients.pt", weights_only=True):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)


THREADS = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset
import kconv

class Threads(Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        return kconv.get_num_threads()

if __name__ == "__main__":
    torch.set_num_threads(3)
    counts = [kconv.get_num_threads()]
    for method in ("fork", "spawn"):
        loader = DataLoader(Threads(), 1, num_workers=1, multiprocessing_context=method)
        counts += [int(count) for count in loader]
    torch.set_num_threads(2)
    counts.append(kconv.build_info()["threads"])
    kconv.set_num_threads(4)
    torch.set_num_threads(1)
    counts.append(kconv.get_num_threads())
    print(*counts)
"""


def test_threads_are_as_many_as_torchs(tmp_path):
    script = tmp_path / "threads.py"
    script.write_text(THREADS)
    for setting, expected in [(None, "3 1 1 2 4"), ("5", "5 5 5 5 4")]:
        env = {name: value for name, value in os.environ.items() if name != "KCONV_NUM_THREADS"}
        env |= {"KCONV_NUM_THREADS": setting} if setting else {}
        command = [sys.executable, str(script)]
        run = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
        assert run.stdout.strip() == expected, run.stderr


TEAM = """
import os
import time
from pathlib import Path
import torch
from kconv.torch import pointwise_conv

torch.set_num_threads(2)


def own_threads():
    pointwise_conv(torch.randn(8, 32, 64, 64), torch.randn(32, 8, 1, 1), groups=4)
    time.sleep(0.5)  # a thread names itself
    tasks = Path("/proc/self/task").iterdir()
    return sum((task / "comm").read_text().startswith("kconv-") for task in tasks)


print(own_threads(), flush=True)
if not os.fork():
    print(own_threads(), flush=True)
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch's threads are used on Linux")
@pytest.mark.parametrize(("setting", "own"), [("", 0), ("2", 0), ("3", 2)])
def test_work_is_done_by_the_threads_of_pytorch(setting: str, own: int) -> None:
    """Unless kconv has another number of threads, or was forked, where PyTorch's may not exist."""
    environment = {**os.environ, "KCONV_NUM_THREADS": setting}
    command = [sys.executable, "-c", TEAM]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert printed.stdout.split() == [str(own), str(own or 1)]
