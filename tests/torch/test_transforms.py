"""What PyTorch does to functions and models: compiling, exporting, tracing, transforming."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from kconv.torch import (
    DepthwiseConv2d,
    InterleaveChannels,
    KPointwiseConv2d,
    PointwiseConv2d,
    depthwise_conv,
    interleave,
    pointwise_conv,
)

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


def pointwise(x, weight, bias):
    return pointwise_conv(x, weight, bias, groups=2, interleave=2)


def own_pointwise(x, weight, bias):
    return F.conv2d(x, weight, bias, groups=2)[:, [0, 2, 1, 3]]


def depthwise(x, weight, bias):
    return depthwise_conv(x, weight, bias, stride=2, padding=((1, 1), (0, 1)))


def own_depthwise(x, weight, bias):
    return F.conv2d(F.pad(x, (0, 1, 1, 1)), weight, bias, 2, groups=x.shape[1])


class Case:
    """A function, PyTorch's own, arguments, and the registered operator with its arguments."""

    def __init__(self, function, own, weight_shape, options):
        generator = torch.Generator().manual_seed(0)
        shapes = (2, 6, 3, 4), weight_shape, weight_shape[:1]
        self.args = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
        self.leaves = [arg.clone().requires_grad_() for arg in self.args]
        self.name = function.__name__ + "_conv"
        self.function, self.own = function, own
        self.op = getattr(torch.ops.kconv, self.name).default
        self.op_args = options

    def through_op(self, *args):
        return self.op(*args, *self.op_args)


CASES = [
    Case(pointwise, own_pointwise, (4, 3, 1, 1), (2, 2)),
    Case(depthwise, own_depthwise, (6, 1, 3, 3), (2, (1, 1, 0, 1))),
]
for_each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
for_each_way = pytest.mark.parametrize("way", ["function", "through_op"])


def scalar(function):
    return lambda *args: function(*args).sin().sum()


@for_each_case
@pytest.mark.parametrize("format_", [torch.contiguous_format, torch.channels_last])
def test_opcheck(case, format_):
    x = case.leaves[0].detach().contiguous(memory_format=format_).requires_grad_()
    results = torch.library.opcheck(case.op, (x, *case.leaves[1:], *case.op_args))
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_of_the_gradients():
    ops = torch.ops.kconv
    (x, w, _), (_, k, _) = CASES[0].leaves, CASES[1].leaves
    y = torch.randn(2, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    z = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    for op, args in [
        (ops.pointwise_conv_grad_input, (y, w, 2, 2)),
        (ops.pointwise_conv_grad_weight, (x, y, 2, 2)),
        (ops.depthwise_conv_grad_input, (z, k, (3, 4), 2, (1, 1, 0, 1))),
        (ops.depthwise_conv_grad_weight, (x, z, 3, 2, (1, 1, 0, 1))),
        (ops.interleave, (x, 4)),
        (ops.deinterleave, (x, 4)),
    ]:
        torch.library.opcheck(op.default, args)


@for_each_case
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(case, dynamic):
    torch.compiler.reset()
    compiled = torch.compile(case.function, fullgraph=True, dynamic=dynamic)
    for format_ in torch.contiguous_format, torch.channels_last:
        x = case.leaves[0].detach().contiguous(memory_format=format_).requires_grad_()
        args = [x, *case.leaves[1:]]
        y, expected = compiled(*args), case.own(*args)
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous(memory_format=format_)
        gradients = [torch.autograd.grad(result.sin().sum(), args) for result in (y, expected)]
        torch.testing.assert_close(*gradients)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            PointwiseConv2d(6, 12, groups=3, interleave=4),
            DepthwiseConv2d(12, 12, 3, stride=2, padding=1),
            nn.SiLU(),
            InterleaveChannels(5),
            KPointwiseConv2d(12, 8, "D6v3_4ch", activation="relu"),
        )

    def forward(self, x):
        return self.layers(x).mean((2, 3))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def kernels_of(module):
    return {node.target.name() for node in module.graph.nodes if "kconv" in str(node.target)}


def test_compiled_model_trains(net):
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 6, 9, 7)
    for model in net.train(), compiled.train():
        model(x).square().sum().backward()
    for ours, theirs in zip(compiled.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strict", [False, True])
def test_export(net, strict):
    x = torch.randn(3, 6, 9, 7)
    shapes = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(net, (x,), dynamic_shapes=shapes, strict=strict)
    assert {"kconv::pointwise_conv", "kconv::depthwise_conv"} <= kernels_of(program.graph_module)
    other = torch.randn(5, 6, 9, 7)
    torch.testing.assert_close(program.module()(other), net(other))


@for_each_case
@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_make_fx_keeps_the_kernels(case, mode):
    def step(*args):
        leaves = [arg.detach().requires_grad_() for arg in args]
        return torch.autograd.grad(scalar(case.function)(*leaves), leaves)

    traced = make_fx(step, tracing_mode=mode)(*case.args)
    names = {f"kconv::{case.name}{suffix}" for suffix in ("", "_grad_input", "_grad_weight")}
    assert names <= kernels_of(traced)
    leaves = case.leaves
    expected = torch.autograd.grad(scalar(case.own)(*leaves), leaves)
    torch.testing.assert_close(traced(*case.args), expected)
    traced = make_fx(torch.func.grad(scalar(case.function)))(*case.args)
    assert f"kconv::{case.name}_grad_input" in kernels_of(traced)


@for_each_case
@for_each_way
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, args: torch.func.grad(scalar(f), (0, 1, 2))(*args),
        lambda f, args: torch.func.jvp(f, tuple(args), tuple(args)),
        lambda f, args: torch.func.hessian(scalar(f), (0, 1))(*args),
        lambda f, args: torch.func.jacrev(torch.func.grad(scalar(f), 1), 0)(*args),
        lambda f, args: torch.func.jacfwd(torch.func.jacfwd(scalar(f), 1), 0)(*args),
        lambda f, args: torch.func.jvp(torch.func.grad(scalar(f), 1), tuple(args), tuple(args)),
        lambda f, args: torch.func.functionalize(f)(*args),
    ],
    ids="grad jvp hessian jacrev-grad jacfwd-jacfwd jvp-grad functionalize".split(),
)
def test_transforms(case, way, transform):
    actual = transform(getattr(case, way), case.args)
    torch.testing.assert_close(actual, transform(case.own, case.args))


@for_each_case
@for_each_way
@pytest.mark.parametrize("mapped", list(itertools.product((0, None), repeat=3))[:-1])
def test_vmap(case, way, mapped):
    args = [
        arg if dim is None else torch.stack([arg, arg + 1, 2 * arg])
        for arg, dim in zip(case.args, mapped, strict=True)
    ]
    functions = [getattr(case, way), case.own]
    torch.testing.assert_close(*[torch.vmap(f, mapped)(*args) for f in functions])
    gradients = [torch.func.grad(scalar(f), (0, 1, 2)) for f in functions]
    torch.testing.assert_close(*[torch.vmap(g, mapped)(*args) for g in gradients])


@for_each_case
def test_nested_vmap(case):
    x, weight, bias = case.args
    args = x.repeat(2, 3, 1, 1, 1, 1), torch.stack([weight, weight + 1, 2 * weight]), bias

    def nested(f):
        return torch.vmap(torch.vmap(f, (0, 0, None)), (0, None, None))(*args)

    torch.testing.assert_close(nested(case.function), nested(case.own))


def test_vmap_of_interleave():
    x = torch.randn(3, 2, 5, 2, 2)
    expected = torch.stack([interleave(image, 2) for image in x])
    assert torch.equal(torch.vmap(lambda image: interleave(image, 2))(x), expected)


@for_each_case
def test_autograd_outside_and_no_grad_inside(case):
    def outside(f):
        leaves = case.leaves
        gradients = torch.func.grad(scalar(f), (0, 1, 2))(*leaves)
        return torch.autograd.grad(sum(g.cos().sum() for g in gradients), leaves)

    def inside(f):
        def loss(*args):
            with torch.no_grad():
                constant = f(*args)
            return (f(*args) * constant).sum()

        return torch.func.jacrev(torch.func.grad(loss, 1), 0)(*case.args)

    torch.testing.assert_close(outside(case.function), outside(case.own))
    torch.testing.assert_close(inside(case.function), inside(case.own))


@for_each_case
@for_each_way
@pytest.mark.parametrize("which", range(3))
def test_forward_mode_is_never_silently_zero(case, way, which):
    def tangent(f):
        args = list(case.args)
        args[which] = forward_ad.make_dual(args[which], args[which] + 1)
        return forward_ad.unpack_dual(f(*args)).tangent

    with forward_ad.dual_level():
        torch.testing.assert_close(tangent(getattr(case, way)), tangent(case.own))
        assert forward_ad.unpack_dual(case.function(*case.args)).tangent is None


@for_each_case
@for_each_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(case, way, dtype):
    f = getattr(case, way)
    args = [arg.float().requires_grad_() for arg in case.args]
    with torch.autocast("cpu", dtype):
        y, expected = f(*args), case.own(*args)
        assert y.dtype is expected.dtype is dtype
        assert f(*case.args).dtype is torch.float64  # as everywhere under autocast
        assert torch.func.grad(scalar(f))(*(arg.detach() for arg in args)).dtype is torch.float32
        assert torch.compile(f, backend="aot_eager")(*args).dtype is dtype
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(y.float().sum(), args)
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


@for_each_case
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(case, reentrant):
    y = checkpoint(case.function, *case.leaves, use_reentrant=reentrant)
    expected = torch.autograd.grad(case.own(*case.leaves).sin().sum(), case.leaves)
    case.leaves[0].grad = None
    y.sin().sum().backward()
    for leaf, gradient in zip(case.leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)
        leaf.grad = None


def test_jit_trace(net, tmp_path):
    x = torch.randn(2, 6, 9, 7)
    traced = torch.jit.trace(net, x)
    torch.jit.save(traced, tmp_path / "net.pt")
    other = torch.randn(3, 6, 9, 7)
    for model in traced, torch.jit.load(tmp_path / "net.pt"):
        torch.testing.assert_close(model(other), net(other))
    assert "kconv::depthwise_conv" in str(traced.inlined_graph)


@for_each_case
def test_jit_trace_of_functions(case):
    traced = torch.jit.trace(case.function, tuple(case.args))
    torch.testing.assert_close(traced(*case.leaves), case.own(*case.leaves))


def test_batched_gradients(net):
    x = torch.randn(2, 6, 9, 7, requires_grad=True)
    y = net(x)
    grads = torch.randn(3, *y.shape)
    (batched,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
    for grad, result in zip(grads, batched, strict=True):
        torch.testing.assert_close(torch.autograd.grad(y, x, grad, retain_graph=True)[0], result)


def test_dispatch_modes_see_the_operators():
    class Listener(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            heard.append(func.name())
            return func(*args, **(kwargs or {}))

    heard: list[str] = []
    with Listener():
        pointwise(*CASES[0].args)
    assert heard == ["kconv::pointwise_conv"]
    with FlopCounterMode(display=False):
        depthwise(*CASES[1].args)


def test_fake_tensors_are_checked():
    with torch.device("meta"):
        x, weight = torch.empty(1, 5, 2, 2), torch.empty(4, 3, 1, 1)
    with pytest.raises(ValueError, match="6 channels"):
        torch.ops.kconv.pointwise_conv(x, weight, None, 2)
    with pytest.raises(ValueError, match="4 channels"):
        torch.ops.kconv.depthwise_conv(x, torch.empty(4, 1, 3, 3, device="meta"), None, 1, [0] * 4)
