"""What PyTorch's modules and functions are lifted to computes the same as they do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kconv.torch import fuse, report


def outcome(model, x):
    """Output, gradients and state after a call."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return y.detach(), x.grad, gradients, dict(model.named_buffers())


def assert_fused(*modules, shape=(2, 3, 9, 8), kept=()):
    """As one operation after a grouped convolution, in both modes."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 1, groups=2), nn.BatchNorm2d(6)]
    plain = nn.Sequential(*stem, *modules).double()
    model = fuse(copy.deepcopy(plain))
    found = report(model)
    assert len(found.changed) == 1, found
    assert set(found.kept) == set(kept), found
    x = torch.randn(shape, dtype=torch.float64)
    for training in (True, False):
        ours, theirs = (outcome(m.train(training), x) for m in (model, plain))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


class HardSwish(nn.Module):
    """By its formula, in the spellings that go round."""

    def __init__(self, spelling=0):
        super().__init__()
        self.spelling, self.act = spelling, nn.ReLU6(inplace=True)

    def forward(self, x):
        match self.spelling:
            case 0:
                return x * F.relu6(x + 3) / 6
            case 1:
                return x * (self.act(x + 3.0) * (1 / 6))
            case 2:
                return F.relu6(x.add(3), inplace=True).div(6).mul(x)
            case 3:
                return x * torch.clamp(3 + x, 0, 6).div_(6.0)
            case 4:
                return x.sigmoid() * x  # no hard one
            case 5:
                return x.mul_(x.sigmoid())


class Borrowing(nn.Module):
    """Parameters without modules around."""

    def __init__(self, channels=6):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2 * channels, 3, 3, 3) / 5)
        self.gamma, self.beta = (nn.Parameter(torch.rand(2 * channels) + 0.5) for _ in range(2))
        self.register_buffer("mean", torch.randn(2 * channels))
        self.register_buffer("variance", torch.rand(2 * channels) + 0.5)
        self.project = nn.ParameterList([torch.randn(channels, 2 * channels, 1, 1)])
        self.slope = nn.Parameter(torch.rand(channels))
        self.scale = nn.Parameter(torch.randn(channels, 1, 1))
        self.other_scale = nn.Parameter(torch.randn(channels))

    def forward(self, x):
        y = F.conv2d(F.pad(x, (1, 2, 0, 1)), self.weight, None, (2, 1), groups=2)
        y = F.batch_norm(
            y, self.mean, self.variance, self.gamma, self.beta, self.training, 0.2, eps=1e-3
        )
        y = F.prelu(F.conv2d(F.leaky_relu(y, 0.2), self.project[0]), self.slope)
        return self.other_scale.view(1, -1, 1, 1) * (y * self.scale)


class OwnConv2d(nn.Conv2d):
    """A class of its own whose forward is PyTorch's, with more after it."""

    def forward(self, x):
        return F.gelu(super().forward(x), approximate="tanh")


class Windows(nn.Module):
    """Pools, and convolutions with dilation."""

    def __init__(self, channels=6):
        super().__init__()
        self.conv = OwnConv2d(channels, channels, 3, padding="same", dilation=2, groups=2)
        self.norm = nn.BatchNorm2d(channels)
        self.wide = nn.Conv2d(
            channels, channels, (1, 3), padding=(0, 2), dilation=(1, 2), groups=channels
        )
        self.pools = nn.ModuleList(
            [
                nn.MaxPool2d(3, 2, 1, ceil_mode=True),
                nn.MaxPool2d((2, 3), (2, 2), (1, 0), dilation=(2, 1)),
                nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
            ]
        )

    def forward(self, x):
        x = self.norm(self.conv(x))
        x = self.pools[0](x) + self.pools[2](x)
        x = torch.cat([x, F.max_pool2d(x, 3, 1, 1), F.avg_pool2d(x, (1, 3), 1, (0, 1))], 1)
        return self.pools[1](self.wide(x[:, 3:9]))


class Branches(nn.Module):
    """A sum of branches, of which the first are not there."""

    def __init__(self, channels=6):
        super().__init__()
        convs = [nn.Conv2d(channels, channels, 1, groups=groups) for groups in (2, 3, 6)]
        self.convs = nn.ModuleList(convs)

    def forward(self, x):
        y = self.convs[0](x) + 0
        y += 0
        for conv in self.convs[1:]:
            y += conv(x)
        return y


class Forked(nn.Module):
    """Two chains that read the same."""

    def __init__(self, channels=6):
        super().__init__()
        self.one, self.other = (nn.Conv2d(channels, channels, 1, groups=2) for _ in range(2))

    def forward(self, x):
        return torch.cos(self.one(x).relu()) * self.other(x).relu()


class Squeezed(nn.Module):
    """The mean of each channel, in the spellings that go round."""

    def __init__(self, spelling):
        super().__init__()
        self.spelling, self.gate = spelling, nn.Conv2d(6, 6, 1)

    def mean(self, x):
        n, c, h, w = x.shape
        match self.spelling:
            case 0:
                return F.avg_pool2d(x, x.size()[2:])
            case 1:
                return F.avg_pool2d(x, kernel_size=(h, w))
            case 2:
                return x.mean(2, keepdim=True).mean(-1, keepdim=True)
            case 3:
                return torch.mean(torch.mean(x, 3, True), 2, True)
            case 4:
                return x.mean(3).mean(2)[:, :, None, None]
            case 5:
                return x.mean(dim=-2).mean(dim=-1).view(n, c, 1, 1)
            case 6:
                return x.flatten(2).mean(-1).unsqueeze(-1).unsqueeze(-1)
            case 7:
                return x.view(n, c, -1).mean(dim=2).view(n, c, 1, 1)

    def forward(self, x):
        return x * self.gate(self.mean(x)).sigmoid()


class Halves(nn.Module):
    """Means that are not those of whole channels, or of other images."""

    def forward(self, x):
        y = F.max_pool2d(x, 2)
        rows, columns = x.mean(3), x.mean(2, keepdim=True)
        whole = F.avg_pool2d(x[:, :, : y.shape[2], : y.shape[3]], y.shape[2:])
        row = x.flatten(2).mean(1) + x.flatten(2)[:, :, :1].mean((1, 2), keepdim=True)[:, 0]
        parts = rows.mean(1), rows.mean(2, keepdim=True), columns.mean(1), columns.mean(2), whole
        return torch.cat([row, *(part.flatten(1) for part in parts)], 1)


BLOCKS = {
    "branches": Branches,
    **{f"hard swish {i}": (lambda i=i: HardSwish(i)) for i in range(6)},
    "borrowing": Borrowing,
    "windows": Windows,
}


@pytest.mark.parametrize("spelling", range(8))
def test_squeezes(spelling):
    assert_fused(Squeezed(spelling))


def test_other_means():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 6, 1, groups=3), nn.ReLU(), Halves()).double()
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    model = fuse(copy.deepcopy(plain))
    assert report(model).changed
    torch.testing.assert_close(outcome(model, x), outcome(plain, x))


@pytest.mark.parametrize("name", BLOCKS)
def test_functions(name):
    assert_fused(BLOCKS[name]())


ACTIVATIONS = (
    *(nn.LeakyReLU(0.3, inplace=True), nn.ELU(0.7), nn.GELU(), nn.GELU("tanh"), nn.Mish()),
    *(nn.Hardtanh(-0.4, 1.5), nn.PReLU(6), nn.PReLU()),
)


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_activations(act):
    assert_fused(copy.deepcopy(act), nn.Conv2d(6, 6, 3, groups=6))


@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.Hardtanh(0, 1), nn.PReLU(6), nn.LeakyReLU()], ids=str
)
def test_derivatives_at_the_ends(act):
    """Where many values of images lie that have been through a ReLU."""
    conv = nn.Conv2d(6, 6, 1, groups=6, bias=False).double()
    nn.init.ones_(conv.weight)
    model = nn.Sequential(conv, copy.deepcopy(act).double(), nn.MaxPool2d(2))
    x = torch.randint(-1, 3, (2, 6, 8, 6)).double()
    ours = fuse(copy.deepcopy(model))
    assert report(ours).changed
    results = []
    for one in (model, ours):
        image = x.clone().requires_grad_()
        one(image).cos().sum().backward()
        results.append((image.grad, [p.grad for p in one.parameters()]))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("act", ["gelu", "gelu_tanh", "prelu", "sigmoid"])
def test_norms_with_an_activation(act):
    layers = pytest.importorskip("timm").layers
    for options in [{}, {"num_parameters": 6}] if act == "prelu" else [{}]:
        norm = layers.BatchNormAct2d(6, act_layer=act, act_kwargs=options)
        nn.init.uniform_(norm.weight, 0.5, 2)
        assert_fused(norm, layers.create_act_layer(act), nn.Conv2d(6, 6, 3, groups=6))


def test_layer_scale():
    layers = pytest.importorskip("timm").layers
    assert_fused(layers.LayerScale2d(6, 0.3), nn.Conv2d(6, 2, 1))


def test_two_chains_of_one_input():
    model = fuse(Forked())
    assert len(report(model).changed) == 2


class Levels(nn.ModuleDict):
    """A container that is called, as timm's models of features are."""

    def forward(self, x):
        for level in self.values():
            x = level(x)
        return x


def test_containers_with_a_forward():
    assert_fused(Levels({"one": nn.Conv2d(6, 6, 1, groups=2), "other": nn.ReLU()}))
    model = fuse(Levels({"one": nn.Conv2d(6, 6, 1, groups=2), "other": nn.ReLU()}))
    assert report(model).changed == {"one": "2 layers as one operation, to other"}


class Unread(nn.Module):
    """Half of what is computed is for nobody."""

    def __init__(self, channels=6):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1, groups=2)

    def forward(self, x):
        x = self.conv(x)
        return torch.cat([x, F.avg_pool2d(x, 3, 1, 1)], 1)[:, :6] + x


def test_values_that_nobody_reads():
    """A program without a gradient for each of its values would go on with another's."""
    model = fuse(Unread().double())
    plain = Unread().double()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    torch.testing.assert_close(outcome(model, x), outcome(plain, x))


@pytest.mark.parametrize("training", [True, False])
def test_channels_last_stays(training):
    """Outputs and gradients lie in memory as PyTorch's do, gradients of gradients agree."""
    torch.manual_seed(0)
    modules = (nn.Conv2d(6, 12, 1, groups=3), nn.BatchNorm2d(12), nn.SiLU(), nn.Conv2d(12, 5, 1))
    plain = nn.Sequential(*modules).double().to(memory_format=torch.channels_last)
    plain.train(training)
    results = []
    images = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    for model in (plain, fuse(copy.deepcopy(plain))):
        x = images.contiguous(memory_format=torch.channels_last).requires_grad_()
        y = model(x)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        results.append((y, grad, x.grad, *(p.grad for p in model.parameters())))
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, grad))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)
