"""Fused forwards that read what is in no module, or do what a trace does not show."""

from __future__ import annotations

import collections
import copy
import pickle
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from kconv.torch import fuse, report, restore
from kconv.torch.layers import DropConnect

FLAGS = {"scale": 1.0}
SCALE = 1.0
CALLS = 0
SETTINGS = types.ModuleType("settings")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1, groups=2), nn.BatchNorm2d(4)
        self.dw = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.setup()

    def setup(self):
        pass

    def first(self, x):
        return F.relu6(self.bn(self.conv(x)))

    def after(self, x):
        return x

    def forward(self, x):
        return self.dw(self.after(self.first(x)))


def images():
    return torch.randn(2, 4, 5, 7, generator=torch.Generator().manual_seed(1)).double()


def outcome(model):
    model.zero_grad()
    torch.manual_seed(2)
    y = model(images())
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return y.detach(), gradients, {name: x.clone() for name, x in model.named_buffers()}


def assert_alike(cls, change=None):
    """Before and after a change, of what is outside and of the models alike."""
    torch.manual_seed(0)
    model = nn.Sequential(Block(), cls(), Block()).double()
    ours = nn.Sequential(Block(), cls(), Block()).double()
    ours.load_state_dict(model.state_dict())
    assert report(fuse(ours)).changed
    for step in range(2 if change else 1):
        if step:
            for one in (model, ours):
                change(one)
        for training in (True, False):
            theirs = outcome(model.train(training))
            torch.testing.assert_close(outcome(ours.train(training)), theirs)


class Global(Block):
    def after(self, x):
        return x * FLAGS["scale"] * SCALE * SETTINGS.scale


class Closed(Block):
    box = {"scale": 1.0}  # noqa: RUF012

    def after(self, x, box=box):
        return x * sum(value for value in box.values())


class OfTheClass(Block):
    options = {"of": {"scale": 1.0}}  # noqa: RUF012

    @property
    def scale(self):
        return self.options["of"]["scale"]

    def after(self, x):
        return x * self.scale


class Holding(Block):
    def setup(self):
        self.tensor, self.array = torch.ones(2), np.ones(2)
        self.config = types.SimpleNamespace(inner=types.SimpleNamespace(scale=1.0))

    def after(self, x):
        return x * self.config.inner.scale * float(self.array[0]) * self.tensor[0].item()


CHANGES = {
    "global": (Global, lambda m, patch: patch.setattr(f"{__name__}.SCALE", 3.0)),
    "in a global": (Global, lambda m, patch: patch.setitem(FLAGS, "scale", 3.0)),
    "of a module": (Global, lambda m, patch: patch.setattr(SETTINGS, "scale", 3.0)),
    "default": (Closed, lambda m, patch: patch.setattr(Closed, "after", tripled)),
    "in a default": (Closed, lambda m, patch: patch.setitem(Closed.box, "scale", 3.0)),
    "in the class": (
        OfTheClass,
        lambda m, patch: patch.setitem(OfTheClass.options["of"], "scale", 3.0),
    ),
}


def tripled(self, x):
    return 3 * x


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_read_outside(name, monkeypatch):
    monkeypatch.setattr(SETTINGS, "scale", 1.0, raising=False)
    cls, change = CHANGES[name]
    assert_alike(cls, lambda model: change(model, monkeypatch))


def in_all(attribute, change):
    return lambda model: change(getattr(model[1], attribute))


@pytest.mark.parametrize(
    "change",
    [
        in_all("tensor", lambda tensor: tensor.data.fill_(3)),
        in_all("array", lambda array: array.fill(3)),
        in_all("config", lambda config: setattr(config.inner, "scale", 3)),
    ],
    ids=["tensor", "array", "object"],
)
def test_what_is_read_in_an_attribute(change):
    assert_alike(Holding, change)


# Modes, and gradients of one's own.


class WithoutGradients(Block):
    def first(self, x):
        with torch.no_grad():
            return super().first(x)


class Frozen(Block):
    forward = torch.no_grad()(Block.forward)


class Inference(Block):
    def first(self, x):
        with torch.inference_mode():
            y = super().first(x)
        return y.clone()


class Negative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Reversed(Block):
    def after(self, x):
        return Negative.apply(x)


class Checkpointed(Block):
    def forward(self, x):
        return self.dw(checkpoint(self.first, x, use_reentrant=True))


class Partly(Block):
    """What has a chain runs where its module's forward cannot be followed."""

    def setup(self):
        self.inner = Block()


class InnerWithoutGradients(Partly):
    def after(self, x):
        with torch.no_grad():
            y = self.inner(x)
        return x + y


class InnerCheckpointed(Partly):
    """Moving statistics move once more in the backward pass."""

    def after(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


class InTwoPlaces(Partly):
    def setup(self):
        super().setup()
        self.ones = nn.ModuleList([self.inner, nn.Sequential(self.inner, Block())])

    def after(self, x):
        x = x if x.sum() > 0 else 2 * x
        return self.ones[1](self.ones[0](self.inner(x)))


class Drawing(Block):
    """The random numbers of a chain, and of what stands between its calls."""

    def setup(self):
        self.drop, self.dropout = DropConnect(0.5), nn.Dropout(0.5)

    def after(self, x):
        y = self.bn(self.dw(x))
        x = self.dropout(x.sin())
        return self.dw(x) + self.drop(y)


@torch.jit.script
def doubled(x: torch.Tensor):
    return 2 * x


class Scripted(Block):
    def setup(self):
        self.functions = [doubled]

    def after(self, x):
        return self.functions[0](x)


class Typed(Block):
    def after(self, x):
        return 2 * x if type(x) is torch.Tensor else x


class Asking(Block):
    def after(self, x):
        return x.tensors if hasattr(x, "tensors") else 2 * x


class Sized(Block):
    """Asks what sizes are, as code does that is compiled, too."""

    def after(self, x):
        height, width = x.size()[-2:]
        x = F.interpolate(x[:, :, ::2], x.shape[-2:])
        assert not torch.is_tensor(height)
        assert isinstance(x.shape, tuple)
        rounded = height / 2
        rounded = rounded.ceil() if isinstance(rounded, torch.Tensor) else rounded // 1
        y = F.pad(x, (0, width % 2, 0, 1 if isinstance(rounded, float) else 0))
        return y + 1 if isinstance(y.chunk(2, 1)[0], torch.Tensor) else y


class Pair(nn.Module):
    def forward(self, x):
        print(end="")
        return x, 2 * x


class Several(Block):
    """Calls what may return several tensors, as far as the code shows."""

    def setup(self):
        self.pair = Pair()

    def after(self, x):
        y = self.pair(x)
        return y[1] if isinstance(y, tuple) else y


class Popping(nn.Module):
    def forward(self, xs):
        print(end="")
        return xs.pop() + xs.pop()


class Listing(Block):
    """Passes a list to what changes it."""

    def setup(self):
        self.popping = Popping()

    def after(self, x):
        return self.popping([x, 2 * x])


class Clamping(Block):
    """Changes weights on the way."""

    def after(self, x):
        self.dw.weight.data.mul_(0.5)
        return x


class Aliased(Block):
    """Changes what it has read through another tensor."""

    def after(self, x):
        gate = F.relu6(x + 3)
        x.detach().sub_(1)
        return x * gate / 6


class Twice(Block):
    """Reads what is between an activation's operations."""

    def after(self, x):
        y = x * F.relu6(x + 3)
        return y / 6 + torch.tanh(y)


class Numbered(Block):
    """Has a mode that is no bool."""

    def train(self, mode=True):
        super().train(mode)
        self.bn.training = int(mode)
        return self


BLOCKS = (
    *(WithoutGradients, Inference, Reversed, Checkpointed, Scripted, Typed, Asking, Clamping),
    *(Aliased, Twice, Numbered, Sized, Several, Listing, Drawing),
    *(InnerWithoutGradients, InnerCheckpointed, InTwoPlaces),
)


@pytest.mark.parametrize("cls", BLOCKS)
def test_what_a_trace_does_not_show(cls):
    assert_alike(cls)


def test_sizes_are_followed():
    kept = report(fuse(nn.Sequential(Sized(), Block()).double())).kept
    assert not any("cannot be" in reason for reason in kept.values()), kept


def test_a_decorated_forward():
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Frozen(), Block()).double()
    plain = outcome(model.eval())
    torch.testing.assert_close(outcome(fuse(model.eval())), plain)


def test_graphs_of_torch_fx_change():
    torch.manual_seed(0)
    plain = fx.symbolic_trace(nn.Sequential(Block(), Block()).double())
    model = fuse(copy.deepcopy(plain))
    assert len(report(model).changed) == 1
    models = [plain, model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for name in (None, "1.dw", "1.conv"):
        for one in models if name else ():
            node = next(node for node in one.graph.nodes if str(node.target) == name)
            node.replace_all_uses_with(node.args[0])
            one.graph.erase_node(node)
            one.recompile()
        theirs, *ours = map(outcome, models)
        for one in ours:
            torch.testing.assert_close(one, theirs)
    assert report(fuse(models[2])).changed
    torch.testing.assert_close(outcome(restore(model)), outcome(plain))


def test_what_forwards_change_outside():
    class Counting(Block):
        def after(self, x):
            global CALLS
            CALLS += 1
            return x * CALLS

    model = nn.Sequential(Counting(), Block())
    fuse(model)
    before = CALLS
    model(images().float())
    model(images().float())
    assert (before, CALLS) == (0, 2)
    assert "changes what is outside" in str(report(model))


def test_what_is_given_back_keeps_its_class():
    class Named(Block):
        def forward(self, x):
            y = super().forward(x)
            inner = collections.OrderedDict(x=x, y=y)
            return collections.OrderedDict(out=y, several=[inner])

    plain = Named().eval()
    expected = plain(images().float())
    model = fuse(copy.deepcopy(plain))
    assert list(report(model).changed) == ["conv"]
    found = model(images().float())
    assert type(found) is type(found["several"][0]) is collections.OrderedDict
    assert type(found["several"]) is list
    torch.testing.assert_close(found, expected)
    assert found["several"][0]["y"] is found["out"]
