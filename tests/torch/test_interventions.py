"""Fused = layer by layer = PyTorch's own layers, after whatever is done to a network."""

from __future__ import annotations

import copy
import pickle
import types

import pytest
import torch
from torch import nn
from torch.nn.utils import fusion, parametrizations, prune
from torch.optim.swa_utils import AveragedModel

from kconv.models import GraphBuilder, Spec
from kconv.torch import ConvUnit, MBConv, PointwiseConv2d, build
from kconv.torch.native import make_native


class Small(Spec):
    """All that a fused operation knows, small; every layer has a short name."""

    def graph(self):
        g = GraphBuilder("small", (None, None, 3))
        x = g.conv("stem", g.zero_pad("pad", g.input, 3), 8, 3, 2, padding="valid")
        x = g.activation("stem_act", g.batch_norm("stem_bn", x), "relu")
        y = g.batch_norm("expand_bn", g.conv("expand", x, 12, groups=2))
        y = g.interleave("mix", g.activation("expand_act", y, "swish"), 3)
        y = g.batch_norm("dw_bn", g.depthwise_conv("dw", y, 3))
        y = g.activation("dw_act", y, "relu6")
        gate = g.conv("se", g.reshape("image", g.global_pool("squeeze", y)), 12, use_bias=True)
        y = g.multiply("excite", y, g.activation("gate", gate, "sigmoid"))
        y = g.batch_norm("project_bn", g.conv("project", y, 8))
        x = g.add("sum", [g.dropout("drop", y, 0.5, per_sample=True), x])
        x = g.activation("head_act", g.conv("head", x, 10, groups=2, use_bias=True), "hard_swish")
        return g.build(g.dense("probs", g.global_pool("mean", x), 5))


TAIL = {"head", "head_act", "mean"}
"""Without a fused convolution the others are no chain worth fusing."""


def small(**options):
    torch.manual_seed(0)
    model = build(Small(name="small", input_shape=(8, 8, 3)), **options).double()
    with torch.no_grad():
        for parameter in model.parameters():  # new biases are zero
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def images(*shape):
    torch.manual_seed(1)
    return torch.randn(*shape, dtype=torch.float64)


def outcome(model, x, training):
    """Output, gradients and state after a call, or the type of what it raises."""
    x = x.clone().requires_grad_()
    model.train(training) if training is not None else None
    model.zero_grad()
    torch.manual_seed(2)  # the same images dropped
    try:
        y = model(x)
        (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum().backward()
    except Exception as error:
        return type(error)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return y.detach(), x.grad, gradients, model.state_dict()


def assert_same(ours, theirs, what):
    if isinstance(theirs, type):
        # kconv's layers raise ValueError for wrong shapes where PyTorch's raise RuntimeError.
        errors = {RuntimeError, ValueError} if theirs is RuntimeError else {theirs}
        assert ours in errors, what
        return
    assert not isinstance(ours, type), (what, ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7, msg=lambda m: f"{what}: {m}")


def running_alone(model):
    """The names of what no fused operation stands for."""
    parts = [part for part in model._current_plan()._parts if part.fused is None]
    return {call.name for part in parts for call in part.calls} - {"probs"}


def assert_interventions(change, x=None, alone=(), modes=(True, False), before=True):
    """After a change all three forms of the network agree, in training and in inference.

    ``alone`` are the modules that then run by themselves.
    """
    x = images(3, 3, 8, 8) if x is None else x
    models = [small(), small(fused=False), small(kernels="torch")]
    for model in models:
        if before:  # so that there is something from before the change
            outcome(model, images(2, 3, 8, 8), True)
            outcome(model, images(2, 3, 8, 8), False)
        torch.manual_seed(3)
        change(model)
        if model is models[2] and any(isinstance(m, PointwiseConv2d) for m in model.modules()):
            make_native(model)
        model.double()
    for training in modes:
        fused, plain, native = [outcome(model, x, training) for model in models]
        assert_same(plain, native, f"layer by layer, training={training}")
        assert_same(fused, native, f"fused, training={training}")
        assert not isinstance(native, type) or fused is plain
    assert running_alone(models[0]) == set(alone)
    return models


def put(**modules):
    def change(model):
        for name, module in modules.items():
            setattr(model, name, module())

    return change


def set_(name, **attributes):
    def change(model):
        for attribute, value in attributes.items():
            setattr(model.get_submodule(name), attribute, value)

    return change


def own_forward(name):
    def change(model):
        module = model.get_submodule(name)
        old = module.forward
        module.forward = lambda *args: old(*args) * 3

    return change


def own_method(model):
    module = model.expand

    def forward(self, x):
        return type(self).forward(self, x).roll(1, 1)

    module.forward = types.MethodType(forward, module)


def take_back_own_forward(model):
    module = model.expand
    module.forward = module.forward  # as tools leave it that wrap a forward and unwrap it


def hook(name, kind, function, **options):
    def change(model):
        getattr(model.get_submodule(name), f"register_{kind}")(function, **options)

    return change


def own_call(model):
    model.stem_bn._call_impl = lambda x: nn.functional.batch_norm(x, None, None, training=True) + 1


def plain_weight(model):
    weight = model.head.weight.detach() * 2
    del model.head.weight
    model.head.weight = weight


def add_bias(name, channels):
    def change(model):
        model.get_submodule(name).bias = nn.Parameter(torch.arange(channels) / 7)

    return change


def no_bias(model):
    model.head.bias = None


def no_statistics(model):
    model.stem_bn.running_mean = model.stem_bn.running_var = None


def no_counts(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked = None


def no_affine(model):
    model.stem_bn.weight = model.stem_bn.bias = None


def no_gamma(model):
    model.stem_bn.weight = None


def share_norm(model):
    model.project_bn = model.stem_bn


def share_statistics(model):
    model.project_bn.running_mean = model.stem_bn.running_mean


def new_function(model):
    del model.stem_act
    model.stem_act = torch.tanh


def other_data(model):
    model.head.weight.data = torch.randn(10, 8, 1, 1)
    model.head.groups = 1


def swapped_data(model):
    """As many values in another shape."""
    model.expand.weight.data = model.expand.weight.data.reshape(6, 8, 1, 1)


def initialise_again(model):
    nn.Conv2d.__init__(model.head, 8, 10, 1, bias=False)


def fold(model):
    model.eval()
    model.project = fusion.fuse_conv_bn_eval(model.project, model.project_bn)
    model.project_bn = nn.Identity()


def freeze(model):
    for name in ("stem", "dw", "project_bn"):
        model.get_submodule(name).requires_grad_(False)


def assign(model):
    state = {name: 0.5 * value + 0.1 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def weight_norm(model):
    parametrizations.weight_norm(model.head)


def pruned(model):
    prune.random_unstructured(model.stem, "weight", 0.5)


def pruned_for_good(model):
    pruned(model)
    prune.remove(model.stem, "weight")


class LoRA(nn.Module):
    """As adapters are put round a layer."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(8, 2, 1, bias=False)
        self.up = nn.Conv2d(2, 10, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def conv(*args, **options):
    return lambda: nn.Conv2d(*args, **options)


def sequence(*modules):
    return lambda: nn.Sequential(*(make() for make in modules))


INTERVENTIONS = {
    "nothing": (lambda model: None, ()),
    # Attributes.
    "stride 1": (set_("stem", stride=(1, 1)), ()),
    "stride an int": (set_("stem", stride=1), ()),
    "stride 3": (set_("stem", stride=(3, 3)), set()),
    "two strides": (set_("stem", stride=(1, 2)), set()),
    "stride in the branch": (set_("dw", stride=(2, 2)), {"dw", "sum"}),  # the sum does not fit
    "padding": (set_("stem", padding=(1, 0)), {"pad"}),
    "padding in a list": (set_("stem", padding=[1, 0]), {"pad", "stem"}),
    "much padding": (set_("stem", padding=(3, 3)), {"pad", "stem"}),
    "padding same": (set_("stem", padding="same", stride=(1, 1)), {"pad"}),
    "padding in the branch": (set_("dw", padding=(2, 2)), ()),  # the sum does not fit
    "dilation": (set_("stem", dilation=(2, 2)), ()),
    "dilation of one pixel": (set_("head", dilation=(2, 2)), ()),
    "padding mode": (set_("stem", padding_mode="reflect"), {"pad", "stem"}),
    "groups": (set_("head", groups=1), TAIL),
    "bias": (add_bias("dw", 12), ()),
    "bias of the wrong size": (add_bias("dw", 11), {"dw", "sum"}),
    "no bias": (no_bias, ()),
    "interleave's step": (set_("mix", step=4), ()),
    "zero padding": (set_("pad", padding=(1, 2, 0, 1)), ()),
    "cropping": (set_("pad", padding=(-1, 1, 1, 2)), {"pad"}),
    "padding with ones": (set_("pad", value=1.0), {"pad"}),
    "eps": (set_("dw_bn", eps=0.5), ()),
    "momentum": (set_("dw_bn", momentum=0.5), ()),
    "cumulative momentum": (set_("dw_bn", momentum=None), ()),
    "relu6 of 4": (set_("dw_act", max_val=4.0), ()),
    "drop rate": (set_("drop", rate=0.1), ()),
    "no statistics": (no_statistics, ()),
    "statistics not tracked": (set_("stem_bn", track_running_stats=False), {"stem_bn"}),
    "batches not counted": (no_counts, ()),
    "no affine": (no_affine, {"stem_bn"}),
    "no gamma": (no_gamma, ()),
    "maximum": (set_("mean", function=torch.amax), {"mean"}),
    "mean of rows": (lambda model: model.mean.options.update(dim=(2,)), {"mean"}),
    # Exchanged modules.
    "5x5": (put(stem=conv(3, 8, 5, 2, bias=False)), ()),
    "5x3": (put(stem=conv(3, 8, (5, 3), 2, (2, 1))), {"pad"}),
    "reflecting": (put(stem=conv(3, 8, 3, padding=1, padding_mode="reflect")), {"pad", "stem"}),
    "dilated": (put(stem=conv(3, 8, 3, dilation=2)), ()),
    "wrong inputs": (put(head=conv(7, 10, 1)), TAIL),
    "wrong outputs": (put(stem=conv(3, 6, 3)), {"stem_bn"}),
    "transposed": (put(stem=lambda: nn.ConvTranspose2d(3, 8, 3)), {"pad", "stem"}),
    "group norm": (put(stem_bn=lambda: nn.GroupNorm(2, 8)), {"stem_bn"}),
    "group norm in the branch": (put(expand_bn=lambda: nn.GroupNorm(2, 12)), {"expand_bn", "sum"}),
    "instance norm": (put(stem_bn=lambda: nn.InstanceNorm2d(8, affine=True)), {"stem_bn"}),
    "identity": (put(stem_bn=nn.Identity, stem_act=nn.Identity), ()),
    "gelu": (put(stem_act=nn.GELU), ()),
    "other activations": (put(stem_act=nn.Hardswish, expand_act=nn.Hardsigmoid), ()),
    "in place": (put(stem_act=lambda: nn.ReLU(True), expand_act=lambda: nn.SiLU(True)), ()),
    "in place on a sum": (put(mix=lambda: nn.ReLU(True)), ()),
    "in place twice": (put(stem_bn=nn.Identity, stem_act=lambda: nn.ReLU(True)), ()),
    "hardtanh": (put(stem_act=lambda: nn.Hardtanh(0, 6), dw_act=lambda: nn.Hardtanh(0, 6.0)), ()),
    "drop": (put(drop=lambda: nn.Dropout2d(0.5)), {"drop", "sum"}),
    "no drop": (put(drop=nn.Identity), ()),
    "adaptive mean": (put(mean=sequence(lambda: nn.AdaptiveAvgPool2d(1), nn.Flatten)), ()),
    "adaptive maximum": (
        put(mean=sequence(lambda: nn.AdaptiveMaxPool2d(1), nn.Flatten)),
        {"mean.0", "mean"},
    ),
    "sequence": (
        put(stem=sequence(conv(3, 4, 1), lambda: nn.BatchNorm2d(4), nn.SiLU, conv(4, 8, 3))),
        {"pad"},
    ),
    "sequence with an unknown": (
        put(stem=sequence(conv(3, 4, 3), nn.Tanh, sequence(conv(4, 8, 1), nn.ReLU))),
        {"stem.1"},
    ),
    "interleaving": (
        put(expand=lambda: PointwiseConv2d(8, 12, groups=4, bias=False, interleave=6)),
        (),
    ),
    "adapter": (lambda model: setattr(model, "head", LoRA(model.head)), TAIL),
    "function": (new_function, {"stem_act"}),
    "folded": (fold, ()),
    "a norm twice": (share_norm, ()),
    "statistics twice": (share_statistics, ()),
    # Parameters.
    "other data": (other_data, ()),
    "as many values": (swapped_data, {"expand", "sum"}),
    "initialised again": (initialise_again, ()),
    "frozen parameters": (freeze, ()),
    "assigned state": (assign, ()),
    "weight norm": (weight_norm, TAIL),
    "pruned": (pruned, {"pad", "stem"}),
    "pruned for good": (pruned_for_good, ()),
    "plain weight": (plain_weight, TAIL),
    # Calls.
    "own forward": (own_forward("stem_bn"), {"stem_bn"}),
    "own forward in the branch": (own_forward("mix"), {"mix", "sum"}),
    "own forward of the sum": (own_forward("sum"), {"sum"}),
    "own method": (own_method, {"expand", "sum"}),
    "own forward taken back": (take_back_own_forward, ()),
    "own call": (own_call, {"stem_bn"}),
    "hook": (hook("stem_bn", "forward_hook", lambda m, args, y: 2 * y), {"stem_bn"}),
    "hook with kwargs": (
        hook("head", "forward_hook", lambda m, args, kw, y: y + 1, with_kwargs=True),
        TAIL,
    ),
    "hook before": (
        hook("stem_act", "forward_pre_hook", lambda m, args: (args[0] - 0.3,)),
        {"stem_act"},
    ),
    "hook on gradients": (
        hook("head", "full_backward_hook", lambda m, gx, gy: tuple(3 * g for g in gx)),
        TAIL,
    ),
    "hook on output gradients": (
        hook("head", "full_backward_pre_hook", lambda m, gy: tuple(3 * g for g in gy)),
        TAIL,
    ),
}


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_interventions(name):
    change, alone = INTERVENTIONS[name]
    assert_interventions(change, alone=alone)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_stems(channels):
    change = put(stem=conv(channels, 8, 3, 2, bias=False))
    assert_interventions(change, images(3, channels, 8, 8))
    assert_interventions(change, images(3, 3, 8, 8))  # the wrong number


INPUTS = {
    "one image": (1, 3, 8, 8),
    "no images": (0, 3, 8, 8),
    "no rows": (2, 3, 0, 8),
    "no channels": (2, 0, 8, 8),
    "one value a channel": (1, 3, 2, 2),
    "one value a channel, two images": (2, 3, 2, 2),
    "too small": (2, 3, 1, 1),
    "odd": (2, 3, 7, 5),
    "other channels": (2, 4, 8, 8),
    "without a batch": (3, 8, 8),
    "a vector": (2, 3),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name):
    assert_interventions(lambda model: None, images(*INPUTS[name]))


def test_no_images_leave_the_statistics():
    unit = ConvUnit(4, 6, 3)
    x = torch.randn(2, 4, 5, 5)
    unit(x)
    before = copy.deepcopy(unit.state_dict())
    x = torch.empty(0, 4, 5, 5, requires_grad=True)
    unit(x).sum().backward()
    assert unit.bn.num_batches_tracked == 2  # as nn.BatchNorm2d counts
    del before["bn.num_batches_tracked"]
    for name, value in before.items():
        assert torch.equal(unit.state_dict()[name], value)
    assert x.grad.shape == x.shape
    assert not unit.conv.weight.grad.any()
    block = MBConv(8, 8)
    block(torch.empty(0, 8, 5, 5)).sum().backward()
    assert not any(parameter.grad.any() for parameter in block.parameters())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ConvUnit(4, 6)(torch.randn(1, 4, 1, 1))


def test_some_norms_frozen():
    def change(model):
        model.train()
        model.dw_bn.eval()

    assert_interventions(change, modes=(None,))


def test_what_was_changed_back_is_fused_again():
    model = small()
    x = images(2, 3, 8, 8)
    assert running_alone(model) == set()
    handle = model.stem_bn.register_forward_hook(lambda module, args, y: y)
    model.mix.forward = lambda x: x
    model(x)
    assert running_alone(model) == {"stem_bn", "stem_act", "mix", "sum"}
    handle.remove()
    del model.mix.forward
    model(x)
    assert running_alone(model) == set()


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        (nn.SiLU, "forward"),
        (nn.Conv2d, "_conv_forward"),
        (nn.BatchNorm2d, "forward"),
        (nn.Module, "__call__"),
        (nn.functional, "batch_norm"),
        (nn.functional, "hardtanh"),
    ],
)
def test_patched_classes_and_functions(monkeypatch, owner, method):
    old = getattr(owner, method)

    def change(model):
        if getattr(owner, method) is old:
            monkeypatch.setattr(owner, method, lambda *args, **kw: old(*args, **kw) * 1.5)

    models = [small(), small(fused=False)]
    x = images(2, 3, 8, 8)
    outcome(models[0], x, True)
    outcome(models[1], x, True)
    before = outcome(models[0], x, False)
    for model in models:
        change(model)
    ours, theirs = [outcome(model, x, False) for model in models]
    assert_same(ours, theirs, method)
    assert (ours[0] - before[0]).abs().max() > 1e-3


def test_function_modes_see_the_functions():
    class Listener(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            heard.append(function)
            return function(*args, **(kwargs or {}))

    heard = []
    model = small().eval()
    x = images(2, 3, 8, 8)
    with Listener():
        model(x)
    assert nn.functional.batch_norm in heard
    with torch.device("cpu"):  # a mode as well
        torch.testing.assert_close(model(x), small(fused=False).eval()(x))


def test_unusual_tensors():
    models = [model.eval() for model in (small(), small(fused=False))]
    z = torch.complex(images(2, 3, 8, 8), images(2, 3, 8, 8) + 1)
    for x in (
        z.conj().imag,
        images(2, 8, 8, 3).permute(0, 3, 1, 2),
        images(2, 3, 16, 8)[:, :, ::2],
    ):
        torch.testing.assert_close(models[0](x), models[1](x))
    for dtype in (torch.bfloat16, torch.float16):
        y = models[0].to(dtype)(images(2, 3, 8, 8).to(dtype))
        assert y.dtype is dtype
        torch.testing.assert_close(y, models[1].to(dtype)(images(2, 3, 8, 8).to(dtype)))
    x = torch.empty(2, 3, 8, 8, device="meta")
    assert small().float().to("meta")(x).shape == (2, 5)


def test_other_parameters():
    model, plain = small().eval(), small(fused=False).eval()
    x = images(2, 3, 8, 8)
    state = {name: 0.9 * value for name, value in model.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(model, state, (x,)),
        torch.func.functional_call(plain, state, (x,)),
    )
    average, plain_average = AveragedModel(model), AveragedModel(plain)
    for one, other in ((average, model), (plain_average, plain)):
        one.update_parameters(other)
        with torch.no_grad():
            other.stem.weight.mul_(2)
        one.update_parameters(other)
    torch.testing.assert_close(average(x), plain_average(x))
    assert (average(x) - model(x)).abs().max() > 1e-3


def test_copies_follow_their_own_modules():
    model = small().eval()
    x = images(2, 3, 8, 8)
    y = model(x)
    shared = copy.copy(model)
    shared.__dict__ = {**model.__dict__, "_modules": dict(model._modules)}  # as replicas are made
    deep = copy.deepcopy(model)
    for other in (shared, deep):
        other.head = nn.Conv2d(8, 10, 3, padding=1).double()
        plain = small(fused=False).eval()
        plain.head = other.head
        torch.testing.assert_close(other(x), plain(x))
        torch.testing.assert_close(model(x), y)


def test_older_pickles():
    """Their state has the fused operations themselves, and no plan."""
    model = small().eval()
    x = images(2, 3, 8, 8)
    for fused in ({"input": object()}, {}):
        old = copy.copy(model)
        state = {**model.__dict__, "_fused": fused}
        del state["_plan"], state["_fuses"]
        old.__dict__ = {}
        old.__setstate__(state)
        assert bool(old._fused) is bool(fused)
        torch.testing.assert_close(old(x), model(x))
    assert pickle.loads(pickle.dumps(model))._fused
