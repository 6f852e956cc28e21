"""Blocks of the original implementation: outputs, gradients and moving statistics."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kconv.torch import KPointwiseConv2d

BLOCKS = sorted((Path(__file__).parents[1] / "data" / "blocks").glob("*.npz"))
PARAMETERS = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def as_torch(array):
    """Images from NHWC to channels_last NCHW, kernels from HWIO to OIHW."""
    tensor = torch.from_numpy(array)
    if array.ndim != 4:
        return tensor
    return (
        tensor.permute(3, 2, 0, 1).contiguous()
        if array.shape[0] == 1
        else tensor.permute(0, 3, 1, 2)
    )


def arrays(data, kind):
    """The arrays "<kind>:<layer>/<weight>" by PyTorch's names."""
    found = {}
    for key in data:
        if key.startswith(kind):
            layer, weight = key.removeprefix(kind).split("/")
            found[f"{layer}.{PARAMETERS[weight]}"] = as_torch(data[key])
    return found


def assert_close(actual, expected):
    scale = expected.abs().max()
    torch.testing.assert_close(actual / scale, expected / scale, rtol=0, atol=1e-4)


@pytest.mark.parametrize("path", BLOCKS, ids=lambda path: path.stem)
def test_original_block(path):
    data = np.load(path)
    meta = json.loads(str(data["meta"]))
    block = KPointwiseConv2d(
        meta["cin"],
        meta["cout"],
        meta["kType"],
        activation=meta["activation"],
        use_bias=meta["use_bias"],
        has_batch_norm=meta["has_batch_norm"],
    )
    weights = arrays(data, "w:")
    missing, unexpected = block.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing)

    x = as_torch(data["x"]).requires_grad_()
    with torch.no_grad():
        assert_close(block.eval()(x), as_torch(data["y_infer"]))
    y = block.train()(x)
    assert_close(y.detach(), as_torch(data["y_train"]))
    y.backward(as_torch(data["gy"]))
    assert_close(x.grad, as_torch(data["dx"]))

    gradients = arrays(data, "g:")
    parameters = dict(block.named_parameters())
    assert gradients.keys() == parameters.keys()
    for name, gradient in gradients.items():
        assert_close(parameters[name].grad, gradient)
    for name, statistic in arrays(data, "after:").items():
        assert_close(block.get_buffer(name), statistic)


def test_there_are_blocks():
    assert len(BLOCKS) == 32
