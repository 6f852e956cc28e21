"""What becomes of a fused model in other people's hands is what would of the model as it was."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

from kconv.torch import fuse, report


class Block(nn.Module):
    def __init__(self, channels=6):
        super().__init__()
        self.expand = nn.Conv2d(channels, 12, 1, bias=False)
        self.dw = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.bn1, self.bn2, self.act = nn.BatchNorm2d(12), nn.BatchNorm2d(12), nn.ReLU6()
        self.project, self.bn3 = nn.Conv2d(12, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.act(self.bn2(self.dw(self.act(self.bn1(self.expand(x))))))
        return x + self.bn3(self.project(y))


class Net(nn.Module):
    """With what timm's models have around their blocks."""

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 6, 3, 2, 1), nn.Sequential(Block(), Block())
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 4)
        self.checkpointed = False

    def forward_features(self, x):
        x = self.stem(x)
        if self.checkpointed and not torch.jit.is_scripting():
            return checkpoint(self.blocks, x, use_reentrant=False)
        return self.blocks(x)

    def forward(self, x):
        return self.head(self.pool(self.forward_features(x)).flatten(1))


def net():
    torch.manual_seed(0)
    return Net().double()


def images(count=4):
    return torch.randn(count, 3, 12, 10, generator=torch.Generator().manual_seed(1)).double()


def steps(model, *, parameters=None, count=2):
    """Some steps of training; returns what a model that is evaluated gives then."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters() if parameters is None else parameters, 0.1)
    for _ in range(count):
        optimizer.zero_grad()
        F.cross_entropy(model(images()), torch.arange(4)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return evaluated(model), dict(model.state_dict())


def evaluated(model):
    with torch.no_grad():
        return model.eval()(images())


def another_head(model):
    evaluated(model)
    torch.manual_seed(2)
    model.head = nn.Sequential(nn.Linear(6, 5), nn.ReLU()).double()
    first = evaluated(model)
    model.head = nn.Identity()
    return first, evaluated(model)


def average_of_weights(model):
    average = AveragedModel(model)
    steps(model)
    average.update_parameters(model)
    update_bn([images(), images(3)], average)
    return evaluated(average)


def timms_average(model):
    ema = pytest.importorskip("timm").utils.ModelEmaV3(model, decay=0.5)
    steps(model)
    ema.update(model)
    return evaluated(ema.module)


def checkpointed_inside(model):
    model.checkpointed = True
    return steps(model)


def checkpointed_as_a_whole(model):
    y = checkpoint(model.train(), images(), use_reentrant=False)
    y.square().sum().backward()
    return [p.grad for p in model.parameters()], dict(model.named_buffers())


def partly_frozen(model):
    for frozen in (model.stem, model.blocks[0]):
        frozen.requires_grad_(False)
    before = steps(model, parameters=[p for p in model.parameters() if p.requires_grad])
    model.blocks[0].requires_grad_(True)
    return before, steps(model)


def pruned(model):
    evaluated(model)
    for block in model.blocks:
        prune.l1_unstructured(block.project, "weight", 0.5)
    masked = steps(model)
    for block in model.blocks:
        prune.remove(block.project, "weight")
    return masked, evaluated(model)


def quantized(model):
    # Both are deprecated, and what people have.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import get_default_qconfig, get_default_qconfig_mapping, prepare
        from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

        model = model.float().eval()
        x = images().float()
        prepared = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping(), (x,))
        prepared(x)
        model.qconfig = get_default_qconfig()
        return convert_fx(prepared)(x), prepare(model)(x)


def compiled(model):
    return steps(torch.compile(model, backend="eager")), steps(model)


def exported(model):
    """As a plain graph of PyTorch's operators."""
    program = torch.export.export(model.eval(), (images(),))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith("aten.") for name in called), called
    return program.module()(images())


def moved(model):
    x = images()
    results = [evaluated(model.to(memory_format=torch.channels_last))]
    x = x.contiguous(memory_format=torch.channels_last)
    results += [*steps(model), model(x)]
    return [*results, model.to("meta")(x.to("meta")).shape]


def methods(model):
    y = model.eval().forward_features(images())
    return y, model.head(model.pool(y).flatten(1))


def watched(model):
    seen = []
    evaluated(model)
    handles = [
        model.blocks[0].register_forward_hook(lambda m, x, y: seen.append(y)),
        model.blocks[1].dw.weight.register_hook(lambda grad: seen.append(grad)),
    ]
    first = steps(model)
    for handle in handles:
        handle.remove()
    return first, steps(model), seen


def with_accelerate(model):
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(3):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(images()).square().mean())
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return evaluated(accelerator.unwrap_model(prepared))


def synchronised(model):
    return evaluated(nn.SyncBatchNorm.convert_sync_batchnorm(model))


def functional(model):
    halves = {name: p / 2 for name, p in model.named_parameters()}
    return torch.func.functional_call(model.eval(), halves, (images(),)), evaluated(model)


def materialised(model):
    state = model.state_dict()
    model = model.to("meta").to_empty(device="cpu")
    model.load_state_dict(state)
    return steps(model)


USES = (
    *(another_head, average_of_weights, timms_average, checkpointed_inside),
    *(checkpointed_as_a_whole, partly_frozen, pruned, exported, moved, methods, watched),
    *(with_accelerate, synchronised, functional, materialised),
    *(pytest.param(use, marks=pytest.mark.slow) for use in (compiled, quantized)),
)


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_uses(use):
    model = fuse(net())
    assert len(report(model).changed) == 1
    theirs, ours = use(net()), use(model)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_onnx(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = fuse(net().float()).eval(), images().float()
    path = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = net().float().eval()(x)
    np.testing.assert_allclose(y, expected.numpy(), atol=1e-5)


def test_report_says_what_pytorch_computes_as_fast():
    model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    kept = report(fuse(model)).kept
    assert kept["3"] == "no chain can have this Linear here"
    assert kept["0"] == (
        "a Conv2d without groups is PyTorch's, which computes it as fast or faster here"
    )
