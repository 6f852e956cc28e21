"""Fused segments beside the modules that they stand for."""

from __future__ import annotations

import copy
import gc
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kconv
from kconv._kconv import FusedProgram
from kconv.models import GraphBuilder, create
from kconv.torch import Network, build
from kconv.torch.layers import DropConnect

NETWORKS = [
    ("keffnet_b0", {"ktype": "D6_16ch", "skip_stride_cnt": 1}, 16),
    ("keffnet_s", {"ktype": "D6v3_4ch"}, 33),  # an odd size: other paddings
    ("keffnet_s", {"ktype": ["D6_16ch", "kT3_16ch"]}, 32),  # parallel paths
    ("keffnet_s", {"ktype": "conv"}, 32),
    ("keffnet_s", {"ktype": "grouped_interleaved"}, 32),
    ("keffnet_s", {"ktype": "D10"}, 32),
    ("keffnet_s", {"ktype": "D8"}, 32),  # folds halves
    ("kmobilenet", {"ktype": "kT3_16ch", "alpha": 0.5}, 32),
    ("kmobilenet_v3_large", {"ktype": "D6_16ch", "alpha": 0.5}, 32),
    ("kdensenet_bc_l100", {"ktype": "D6_12ch", "blocks": 2}, 16),
    ("kinception_v3", {"ktype": "D6v3_32ch"}, 75),
    ("efficientnet_b0", {"once": True}, 32),
]


def pair(name, options, size, dtype=torch.float64):
    """The same network fused and module by module, dropout off."""
    torch.manual_seed(0)
    steady = {} if "inception" in name else {"dropout": 0.0}
    spec = create(name, classes=5, input_shape=(size, size, 3), **steady, **options)
    fused, plain = build(spec).to(dtype), build(spec, fused=False).to(dtype)
    with torch.no_grad():
        for parameter in fused.parameters():  # new biases are zero
            parameter += 0.05 * torch.randn_like(parameter)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def seeded(model, x):
    """The output, with the same images dropped at every call."""
    torch.manual_seed(4)
    return model(x)


def step(model, x):
    """Loss, output and gradients."""
    model.zero_grad()
    y = seeded(model, x)
    loss = F.cross_entropy(y, torch.arange(len(x)) % 5)
    loss.backward()
    return loss.detach(), y.detach(), {n: p.grad for n, p in model.named_parameters()}


def assert_same_step(fused, plain, x, tolerance):
    """Outputs, gradients (beside the network's largest) and moving statistics."""
    (loss, y, grads), (loss_plain, y_plain, grads_plain) = step(fused, x), step(plain, x)
    torch.testing.assert_close(loss, loss_plain, rtol=tolerance, atol=0)
    torch.testing.assert_close(y, y_plain, rtol=tolerance, atol=tolerance)
    largest = max(grad.abs().max() for grad in grads_plain.values())
    for name, grad in grads_plain.items():
        bound = tolerance * 10 * max(grad.abs().max(), 1e-3 * largest)
        assert (grads[name] - grad).abs().max() <= bound, name
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[name], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "options", "size"), NETWORKS, ids=lambda value: str(value))
def test_training_and_inference(name, options, size):
    fused, plain = pair(name, options, size)
    assert fused._fused
    x = torch.randn(4, 3, size, size, dtype=torch.float64)
    assert_same_step(fused.train(), plain.train(), x, 1e-8)
    assert_same_step(fused.eval(), plain.eval(), x, 1e-8)  # gradients with frozen statistics
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x), rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(fused(x[:1]), plain(x[:1]), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_float32(memory_format):
    fused, plain = pair("keffnet_s", {"ktype": "D6_16ch"}, 32, torch.float32)
    x = torch.randn(4, 3, 32, 32).contiguous(memory_format=memory_format)
    loss, y, _ = step(fused, x)
    loss_plain, y_plain, _ = step(plain, x)
    torch.testing.assert_close(loss, loss_plain, rtol=1e-4, atol=0)
    torch.testing.assert_close(y.softmax(1), y_plain.softmax(1), rtol=0, atol=1e-4)


def block(activation="hard_swish"):
    """Channels to channels, with all that a segment knows, and the gradient by its input."""
    g = GraphBuilder("net", (None, None, 6))
    x = g.pointwise("expand", g.input, 12, "D6_4ch", activation=activation)
    x = g.depthwise_conv("dw", x, 5, strides=2, padding="same")
    x = g.activation("relu", g.batch_norm("bn", x), "relu")
    gate = g.reshape("gate", g.global_pool("pool", x))
    x = g.multiply("excite", x, g.activation("sigmoid", g.conv("se", gate, 12), "sigmoid"))
    x = g.dropout("drop", g.conv("project", x, 6, use_bias=True), 0.5, per_sample=True)
    return g.build(g.add("sum", [x, g.conv("skip", g.input, 6, strides=2)]))


@pytest.mark.parametrize("activation", ["relu", "relu6", "swish", "sigmoid", "hard_sigmoid", None])
def test_gradient_by_the_input(activation):
    torch.manual_seed(3)
    fused = Network(block(activation)).double()
    plain = Network(block(activation), fused=False).double()
    plain.load_state_dict(fused.state_dict())
    for size in ((7, 9), (8, 8), (1, 2)):
        x = torch.randn(3, 6, *size, dtype=torch.float64, requires_grad=True)
        grads = []
        for net in (fused, plain):
            y = seeded(net, x)
            grads += torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).cos()).sum(), x)
        # PyTorch's hard sigmoid has its sixth in float32.
        precision = {"rtol": 1e-6, "atol": 1e-7} if activation == "hard_sigmoid" else {}
        torch.testing.assert_close(*grads, **(precision or {"rtol": 1e-8, "atol": 1e-10}))


def test_statistics_do_not_cancel():
    """Far from zero, where sums of squares would lose the variance."""
    g = GraphBuilder("net", (None, None, 4))
    net = Network(g.build(g.batch_norm("bn", g.conv("conv", g.input, 4))))
    nn.init.eye_(net.conv.weight.data.view(4, 4))
    x = torch.randn(8, 4, 9, 9) + 1e4
    torch.testing.assert_close(
        net(x), F.batch_norm(x, None, None, training=True, eps=1e-3), rtol=1e-2, atol=1e-2
    )
    assert net._fused


def test_what_happens_between_the_modules_is_seen():
    """Hooks, other modules in a place, compilers: then the modules run one by one."""
    fused, plain = pair("keffnet_s", {"ktype": "D6_16ch"}, 32)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    seen = []
    hook = lambda module, args, y: seen.append(y.shape)  # noqa: E731
    for net in (fused, pickle.loads(pickle.dumps(fused))):
        net(x)
        handle = net.k_stem_bn.register_forward_hook(hook)
        net(x)
        handle.remove()
        net(x)
        assert seen == [(2, 32, 16, 16)]
        seen.clear()
    handle = nn.modules.module.register_module_forward_hook(hook)
    fused(x)
    handle.remove()
    assert len(seen) == len(fused._steps) + 1
    for net in (fused, plain):
        net.k_stem_activation = nn.Identity()
    torch.testing.assert_close(seeded(fused, x), seeded(plain, x))
    plain.load_state_dict(fused.state_dict())
    fused.k_stem_bn.eval()  # one norm frozen, the others not
    plain.k_stem_bn.eval()
    torch.testing.assert_close(seeded(fused, x), seeded(plain, x))
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.float()(x.float()).dtype == torch.bfloat16
    # Fused operations have no bfloat16, so its layers run one by one.
    narrow = [seeded(net.bfloat16(), x.bfloat16()) for net in (fused, plain)]
    assert narrow[0].dtype == torch.bfloat16
    torch.testing.assert_close(*narrow)


def test_copies_and_pickles_are_fused_too():
    fused, plain = pair("keffnet_s", {"ktype": "D6_16ch"}, 32)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.mul_(0.9)
        plain.load_state_dict(copied.state_dict())
        assert_same_step(copied, plain, x, 1e-8)


def test_inference_of_parameters_in_pieces():
    """One after the other they are the parameters, whatever their axes and strides."""
    net = Network(block()).eval()
    x = torch.randn(2, 6, 8, 8)
    segment = next(iter(net._fused.values()))
    program = segment.segment.program((8, 8), "OI")
    compiled = FusedProgram(program.integers)
    parameters = [getattr(net.get_submodule(layer), name) for layer, name in segment._parameters]
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters]).numpy()
    statistics = np.ones((2, compiled.norm_channels), np.float32)
    expected = compiled.infer(x.numpy(), flat, statistics)
    pieces = [np.asfortranarray(parameter.detach()) for parameter in parameters]
    pieces[0] = pieces[0].repeat(2, axis=0)[::2]  # every other value of its memory
    found = compiled.infer(x.numpy(), pieces, [statistics[:1], statistics[1]])
    np.testing.assert_array_equal(found, expected)
    # The same sizes with other values.
    pieces[-1] = pieces[-1] + 1
    assert not np.array_equal(compiled.infer(x.numpy(), pieces, [statistics]), expected)
    for wrong in (pieces[:-1], [*pieces, pieces[0]], [], flat[1:]):
        with pytest.raises(ValueError, match=rf"parameters has \d+ values, expected {len(flat)}"):
            compiled.infer(x.numpy(), wrong, statistics)
    for wrong, what in ((pieces[0].astype(float), "float64"), (3, "int")):
        with pytest.raises(TypeError, match=f"parameters is {what}, expected"):
            compiled.infer(x.numpy(), [wrong, *pieces[1:]], statistics)


def test_profilers_see_the_operation():
    net = Network(block())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        net(torch.randn(2, 6, 8, 8))
    assert "kconv::fused sum" in {event.key for event in profile.key_averages()}


def test_drop_connect_drops_whole_images():
    torch.manual_seed(0)
    net = Network(block())
    drop = next(module for module in net.modules() if isinstance(module, DropConnect))
    drop.rate = 1 - 1e-9
    x = torch.randn(4, 6, 8, 8)
    torch.testing.assert_close(net(x), net.skip(x))


def test_memory_returns():
    net = Network(block())
    x = torch.randn(2, 6, 128, 128)  # large enough for recycled memory
    net(x).sum().backward()
    gc.collect()
    used = kconv.memory_stats()["used"]
    y = net(x)
    assert kconv.memory_stats()["used"] > used
    y.sum().backward()
    gc.collect()
    assert kconv.memory_stats()["used"] == used
    assert kconv.release_memory() > 0
    assert kconv.memory_stats()["free"] == 0


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_gradients(training):
    torch.manual_seed(3)
    fused = Network(block()).double().train(training)
    plain = Network(block(), fused=False).double().train(training)
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(3, 6, 7, 9, dtype=torch.float64, requires_grad=True)
    results = []
    for net in (fused, plain):
        y = seeded(net, x)  # images dropped are dropped in both passes
        (grad,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        wanted = [x, *net.parameters()]
        results.append([grad, *torch.autograd.grad(grad.square().sum(), wanted)])
        results[-1] += net.state_dict().values()
    assert results[0][0].abs().max() > 0
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_input_that_changes_before_the_backward_pass():
    net = Network(block()).double().eval()
    x = torch.randn(2, 6, 4, 4, dtype=torch.float64)
    y, changed = net(x), net(x)
    expected = torch.autograd.grad(y.sum(), net.parameters())
    x += 1
    torch.testing.assert_close(torch.autograd.grad(changed.sum(), net.parameters()), expected)
    y = net(x)
    x += 1
    with pytest.raises(RuntimeError, match="fused=False"):
        torch.autograd.grad(y.sum(), list(net.parameters()), create_graph=True)


def test_functional_transforms():
    torch.manual_seed(3)
    nets = [Network(block(), fused=fused).double().eval() for fused in (True, False)]
    nets[1].load_state_dict(nets[0].state_dict())
    x, v = torch.randn(2, 2, 6, 4, 4, dtype=torch.float64)
    for transform in (
        lambda net: torch.autograd.functional.jvp(net, x, v)[1],
        lambda net: torch.autograd.functional.hvp(lambda x: net(x).sin().sum(), x, v)[1],
        lambda net: torch.autograd.functional.jacobian(net, x, vectorize=True),
        lambda net: torch.autograd.functional.hessian(
            lambda x: net(x[:1, :, :2, :2]).sin().sum(), x
        ),
        lambda net: torch.func.jvp(net, (x,), (v,))[1],
    ):
        torch.testing.assert_close(*map(transform, nets), rtol=1e-6, atol=1e-8)
