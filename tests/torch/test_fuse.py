"""Fused models of any origin compute what they did, in training and after changes."""

from __future__ import annotations

import copy
import pickle
import random
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from kconv.torch import accelerate, fuse, report, restore, to_native

# Squeeze-excite, as people spell it.


class MeanGate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)

    def forward(self, x):
        y = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(y), inplace=True)))


class PoolGate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce, self.expand = nn.Conv2d(channels, 3, 1), nn.Conv2d(3, channels, 1)
        self.act, self.gate = nn.SiLU(inplace=True), nn.Hardsigmoid()

    def forward(self, x):
        return self.gate(self.expand(self.act(self.reduce(self.pool(x))))) * x


class LinearGate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(channels, 3), nn.ReLU(), nn.Linear(3, channels), nn.Sigmoid()
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1)
        return x * y.expand_as(x)


class UnsqueezeGate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x):
        return x * self.fc(x.mean([-1, -2])).sigmoid().unsqueeze(-1).unsqueeze(-1)


class IndexGate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.fc = nn.Linear(channels, channels, bias=False)

    def forward(self, x):
        y = F.hardtanh(self.fc(torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1)), 0, 6)
        return x.mul(y[:, :, None, None])


# Blocks.


class Inverted(nn.Module):
    """Inverted residual with a gate and torchvision's kind of sum."""

    def __init__(self, channels=6, gate=MeanGate, kernel=3):
        super().__init__()
        hidden = 2 * channels
        self.expand = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish()
        )
        self.dw = nn.Conv2d(hidden, hidden, kernel, 1, kernel // 2, groups=hidden, bias=False)
        self.dw_bn, self.dw_act = nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)
        self.gate = gate(hidden)
        self.project, self.bn = nn.Conv2d(hidden, channels, 1), nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.gate(self.dw_act(self.dw_bn(self.dw(self.expand(x)))))
        y = self.bn(self.project(y))
        y += x
        return y


class Ghost(nn.Module):
    """Half of the channels from the other half by cheap depthwise convolutions."""

    def __init__(self, channels=6, out_channels=7):
        super().__init__()
        self.out_channels = out_channels
        self.primary = nn.Sequential(
            nn.Conv2d(channels, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        )
        self.cheap = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        )
        self.back = nn.Conv2d(out_channels, channels, 1)

    def forward(self, x):
        one = self.primary(x)
        out = torch.cat([one, self.cheap(one)], dim=1)
        return self.back(out[:, : self.out_channels, :, :])


class Shuffle(nn.Module):
    """ShuffleNet's unit: one half stays, channels are shuffled."""

    def __init__(self, channels=6):
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.BatchNorm2d(half),
        )

    def forward(self, x):
        one, other = x.chunk(2, dim=1)
        y = torch.cat((one, self.branch(other)), dim=1)
        n, c, h, w = y.size()
        y = y.view(n, 2, c // 2, h, w)
        return torch.transpose(y, 1, 2).contiguous().view(n, -1, h, w)


class DropPath(nn.Module):
    """As many write it: drawn in training, nothing in evaluation."""

    def forward(self, x):
        if not self.training:
            return x
        keep = torch.rand(len(x), 1, 1, 1, dtype=x.dtype) < 0.7
        return x * keep


class Dropped(nn.Module):
    def __init__(self, channels=6):
        super().__init__()
        self.inner, self.drop = Inverted(channels), DropPath()
        self.dropout = nn.Dropout(0.3)

    def forward(self, x):
        return x + self.drop(self.dropout(self.inner(x)))


class Functional(nn.Module):
    def __init__(self, channels=6):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1, groups=2)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x, scale=None):
        y = F.relu6(self.bn(self.conv(x)))
        y = F.silu(y).add(F.hardswish(x))
        y = F.dropout(y, 0.2, training=False)
        return torch.clamp(y, 0, 6) if scale is None else y * scale


class Net(nn.Module):
    """A stem, blocks, and a classifier."""

    def __init__(self, *blocks):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        )
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(6, 4)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.classifier(x.view(x.size(0), -1))


def net(*blocks):
    torch.manual_seed(0)
    return Net(*(block() for block in blocks or (Inverted, Functional))).double()


def images(*shape):
    torch.manual_seed(1)
    return torch.randn(*(shape or (3, 3, 11, 9)), dtype=torch.float64)


def chains(model):
    return len(report(model).changed)


class ExactHardsigmoid(nn.Module):
    """PyTorch's own has a sixth of float32 in its derivative, also in float64."""

    def forward(self, x):
        return F.relu6(x + 3) / 6


def stepped(model, optimizer, x):
    """Loss, gradients and buffers of a step."""
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), torch.arange(len(x)) % 4)
    loss.backward()
    optimizer.step()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return loss.detach(), gradients, dict(model.named_buffers())


def assert_trains_alike(model, x=None, *, whole=True, synchronised=False):
    """As the unfused copy in three steps, to rounding: of the gradients that of the largest.

    Batch norms over few pixels amplify rounding, so that steps of deep networks in a row drift
    apart; synchronised, each starts from the same state.
    """
    x = images() if x is None else x
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if type(module) is nn.Hardsigmoid:
            plain.set_submodule(name, ExactHardsigmoid())
    keys = list(model.state_dict())
    assert fuse(model) is model
    assert list(model.state_dict()) == keys
    if whole:
        assert chains(model) == 1, str(report(model))
    models = [one.train() for one in (plain, model)]
    optimizers = [torch.optim.SGD(one.parameters(), 0.1) for one in models]
    for seed in range(3):
        results = []
        for one, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(seed)
            results.append(stepped(one, optimizer, x))
        (loss, gradients, buffers), (our_loss, our_gradients, our_buffers) = results
        torch.testing.assert_close(our_loss, loss, rtol=1e-10, atol=0)
        largest = max(gradient.abs().max().item() for gradient in gradients.values())
        torch.testing.assert_close(our_gradients, gradients, rtol=1e-10, atol=1e-10 * largest)
        torch.testing.assert_close(our_buffers, buffers, rtol=1e-10, atol=1e-10)
        if synchronised:
            model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        theirs, ours = plain.eval()(x), model.eval()(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item())


BLOCKS = {
    "mean gate": (lambda: Inverted(gate=MeanGate),),
    "pool gate": (lambda: Inverted(gate=PoolGate, kernel=5),),
    "linear gate": (lambda: Inverted(gate=LinearGate),),
    "unsqueezed gate": (lambda: Inverted(gate=UnsqueezeGate),),
    "indexed gate": (lambda: Inverted(gate=IndexGate), Inverted),
    "ghost": (Ghost, Inverted),
    "shuffle": (Shuffle, Shuffle),
    "functional": (Functional,),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_trains_alike(name):
    assert_trains_alike(net(*BLOCKS[name]))


def test_a_shared_convolution_with_norms_of_its_own_for_each_call():
    model = net(Inverted, Inverted)
    model.blocks[1].dw = model.blocks[0].dw
    assert_trains_alike(model)


def test_random_depth_and_dropout_run_between_chains():
    assert_trains_alike(net(Dropped, Functional), whole=False)


def test_evaluation_joins_what_training_separates():
    model = fuse(net(Dropped).eval())
    assert chains(model) == 1


# What other packages bring.

MODELS = (
    *("efficientnet_b0", "tf_efficientnet_lite0", "mobilenetv2_100", "mobilenetv3_large_100"),
    *("mobilenetv4_conv_small", "mnasnet_100", "ghostnet_100", "regnety_008", "rexnet_100"),
    *("efficientnetv2_rw_t", "resnet50", "densenet121", "convnext_atto"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {} if name.startswith(("ghost", "dense")) else {"drop_path_rate": 0.2}
    if name == "resnet50":
        options["layers"] = (1, 1, 1, 1)
    model = timm.create_model(name, num_classes=4, **options).double()
    assert_trains_alike(model, images(3, 3, 40, 37), whole=False, synchronised=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "shufflenet_v2_x1_0", "efficientnet_b0"])
def test_torchvision(name):
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    model = getattr(models, name)(num_classes=4).double()
    assert_trains_alike(model, images(3, 3, 40, 37), whole=False, synchronised=True)


def test_frozen_batch_norms():
    misc = pytest.importorskip("torchvision").ops.misc
    model = net(Inverted)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = misc.FrozenBatchNorm2d(child.num_features)
                frozen.weight.uniform_(0.5, 2)
                frozen.running_mean.uniform_(-1, 1)
                setattr(module, name, frozen.double())
    assert_trains_alike(model)


def test_torchvisions_stochastic_depth():
    ops = pytest.importorskip("torchvision").ops
    for mode in ("row", "batch"):
        model = net(Inverted)
        model.blocks[0].gate = nn.Sequential(ops.StochasticDepth(0.5, mode), MeanGate(12).double())
        assert_trains_alike(model)


def test_timms_norm_act():
    layers = pytest.importorskip("timm").layers
    model = net(Inverted, Functional)
    model.blocks[0].dw_bn = layers.BatchNormAct2d(12, act_layer=nn.SiLU).double()
    model.blocks[0].dw_act = layers.DropPath(0.4)
    assert_trains_alike(model)
    model.blocks[0].dw_bn.act = nn.Tanh()
    plain = restore(copy.deepcopy(model))
    torch.testing.assert_close(model.train()(images()), plain.train()(images()))


# The contract: the same as the model's own layers, or these run.


def outcome(model, x):
    """Output, gradients and state after a call, or the type of what it raises."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    torch.manual_seed(2)
    try:
        y = model(x)
        (y * torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()).sum().backward()
    except Exception as error:
        return type(error)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return y.detach(), x.grad, gradients, dict(model.state_dict())


def assert_same_after(change, x=None, blocks=(Inverted, Functional)):
    """Also after calls in both modes, so that there is something from before the change."""
    x = images() if x is None else x
    models = [net(*blocks), fuse(net(*blocks))]
    for model in models:
        for training in (True, False):
            model.train(training)
            outcome(model, images())
        torch.manual_seed(3)
        change(model)
        model.double()
    for training in (True, False, None):
        for model in models:
            if training is not None:
                model.train(training)
        theirs, ours = (outcome(model, x) for model in models)
        if isinstance(theirs, type):
            assert ours is theirs
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    return models[1]


def set_(name, **attributes):
    def change(model):
        for attribute, value in attributes.items():
            setattr(model.get_submodule(name), attribute, value)

    return change


def put(name, make):
    return lambda model: model.set_submodule(name, make())


def freeze_half(model):
    for module in model.blocks[0].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train = lambda mode=True, module=module: nn.Module.train(module, False)
            module.eval()


def own_forward(model):
    old = model.blocks[0].gate.forward
    model.blocks[0].gate.forward = lambda x: 2 * old(x)


def own_root_forward(model):
    old = model.forward
    model.forward = lambda x: 2 * old(x)


def other_class(model):
    class Doubled(Functional):
        def forward(self, x):
            return 2 * super().forward(x)

    model.blocks[1].__class__ = Doubled


CHANGES = {
    "nothing": lambda model: None,
    "stride": set_("blocks.0.dw", stride=(2, 2)),
    "groups": set_("stem.0", padding_mode="circular"),
    "eps": set_("blocks.0.dw_bn", eps=0.3),
    "eps of nothing": set_("blocks.0.dw_bn", eps=0.0),
    "momentum": set_("stem.1", momentum=None),
    "drop rate": lambda model: model.blocks.append(nn.Dropout(0.5)),
    "another activation": put("blocks.0.dw_act", nn.Tanh),
    "another gate": put("blocks.0.gate", lambda: LinearGate(12)),
    "another block": put("blocks.1", lambda: Shuffle(6)),
    "an unknown block": put("blocks.1", lambda: nn.Sequential(nn.GroupNorm(2, 6), Inverted(6))),
    "one block more": lambda model: model.blocks.append(Ghost()),
    "one block less": lambda model: model.blocks.pop(1),
    "another class": other_class,
    "own forward": own_forward,
    "own forward of the model": own_root_forward,
    "hook on a layer": lambda m: m.blocks[0].dw.register_forward_hook(lambda m, x, y: 2 * y),
    "hook on a block": lambda m: m.blocks[0].register_forward_hook(lambda m, x, y: 2 * y),
    "hook before a gate": lambda m: m.blocks[0].gate.register_forward_pre_hook(
        lambda m, x: (x[0] + 1,)
    ),
    "hook on the model": lambda m: m.register_forward_hook(lambda m, x, y: 2 * y),
    "hook on gradients": lambda m: m.blocks[0].register_full_backward_hook(
        lambda m, gx, gy: tuple(3 * g for g in gx)
    ),
    "frozen parameters": lambda model: model.blocks[0].requires_grad_(False),
    "some norms frozen": freeze_half,
    "weights assigned": lambda m: m.load_state_dict(
        {k: 0.5 * v + 0.1 if v.is_floating_point() else v for k, v in m.state_dict().items()},
        assign=True,
    ),
    "weight norm": lambda m: nn.utils.parametrizations.weight_norm(m.blocks[0].project),
    "accelerated": accelerate,
    "restored": restore,
    "twice": lambda model: fuse(model) if hasattr(model, "_kconv_fusion") else None,
    "without bias": lambda m: m.blocks[0].project.register_parameter("bias", None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes(name):
    assert_same_after(CHANGES[name])


@pytest.mark.parametrize(
    "shape", [(1, 3, 11, 9), (0, 3, 11, 9), (2, 3, 1, 1), (2, 4, 8, 8), (3, 8, 8)]
)
def test_inputs(shape):
    assert_same_after(lambda model: None, images(*shape))


def test_patched_functions(monkeypatch):
    models = [net(), fuse(net())]
    x = images()
    before = [outcome(model, x) for model in models]
    monkeypatch.setattr(F, "adaptive_avg_pool2d", lambda x, size: F.adaptive_max_pool2d(x, size))
    ours, theirs = (outcome(model, x)[0] for model in models)
    torch.testing.assert_close(ours, theirs)
    assert (ours - before[0][0]).abs().max() > 1e-3
    monkeypatch.setattr(Functional, "forward", lambda self, x: self.bn(x))
    ours, theirs = (outcome(model, x)[0] for model in models)
    torch.testing.assert_close(ours, theirs)


class Switch(nn.Module):
    """Whose code depends on more than its layers."""

    def __init__(self):
        super().__init__()
        self.one, self.other = Inverted(), Inverted()
        self.use_other, self.options, self.calls = False, {"scale": 2.0}, 0

    def forward(self, x):
        x = (self.other if self.use_other else self.one)(x)
        return x * self.options["scale"] if self.training else x


def test_attributes_that_code_depends_on():
    for change in (
        set_("blocks.0", use_other=True),
        lambda model: model.blocks[0].options.update(scale=3.0),
        set_("blocks.0", options={"scale": 0.5}),
    ):
        assert_same_after(change, blocks=(Switch,))


class Counting(Switch):
    def forward(self, x):
        self.calls += 1
        return super().forward(x) * self.calls


class Choosing(Switch):
    def forward(self, x):
        return self.one(x) if random.random() < 0.5 else self.other(x)


class Branching(Switch):
    def forward(self, x):
        return self.one(x) if x.mean() > 0 else self.other(x)


class Remembering(Switch):
    def forward(self, x):
        REMEMBERED.append(x)
        return self.one(x)


class Asking(Switch):
    def forward(self, x):
        one = isinstance(x, torch.Tensor) and torch.is_grad_enabled()
        return self.one(x) if one else self.other(x)


REMEMBERED: list[object] = []


@pytest.mark.parametrize("block", [Counting, Choosing, Branching, Remembering, Asking])
def test_what_cannot_be_followed(block):
    random.seed(2)  # traced with the other choice than the first that is made
    models = [net(Inverted, block), fuse(net(Inverted, block))]
    assert models[1].blocks[1].calls == 0
    for sign in (1, -1):
        results = []
        for model in models:
            random.seed(4)
            REMEMBERED.clear()
            for _ in range(3):
                y = model(sign * images())
            with torch.no_grad():
                results.append((y, model(sign * images()), model.blocks[1].calls))
            assert all(isinstance(kept, torch.Tensor) for kept in REMEMBERED)
        torch.testing.assert_close(*results)


class Pyramid(nn.Module):
    """Several inputs, options, and outputs of several kinds."""

    def __init__(self):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 6, 3, 2, 1), Inverted(), Functional()

    def forward(self, x, y=None, *, double=False):
        x = self.stem(x)
        first = self.one(x if y is None else x + y)
        second = self.two(first)
        return {"maps": [first, (second, x)], "double": 2 * second if double else None}


def test_arguments_and_outputs():
    torch.manual_seed(0)
    plain = Pyramid().double()
    model = fuse(copy.deepcopy(plain))
    assert chains(model) == 2
    x, y = images(2, 3, 9, 8), images(2, 6, 5, 4)
    for args, options in (
        *(((x,), {}), ((x, y), {}), ((x,), {"y": y, "double": True}), ((x,), {"double": 1})),
        *(((x, None), {}), ((x, y), {})),
    ):
        ours, theirs = model(*args, **options), plain(*args, **options)
        torch.testing.assert_close(ours, theirs)
        assert type(ours) is dict
        assert type(ours["maps"]) is list
        assert type(ours["maps"][1]) is tuple


def test_copies_pickles_averages():
    x = images()
    model = fuse(net())
    y = model.eval()(x)
    for other in (copy.deepcopy(model), copy.copy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        torch.testing.assert_close(other(x), y)
    other = copy.deepcopy(model)
    nn.init.zeros_(other.classifier.weight)
    nn.init.zeros_(other.blocks[0].project.weight)
    assert (other(x) - y).abs().max() > 1e-3
    torch.testing.assert_close(model(x), y)
    average = AveragedModel(model)
    average.update_parameters(other)
    torch.testing.assert_close(average(x), restore(copy.deepcopy(average.module))(x))


def test_restore_and_to_native():
    model = net()
    cls, x = type(model), images()
    y = model.eval()(x)
    assert isinstance(fuse(model), cls)
    assert type(to_native(model)) is cls
    assert type(restore(model)) is cls
    assert report(model).changed == {"": "Net"}
    assert "_kconv_fusion" not in vars(model)
    torch.testing.assert_close(model(x), y)


def test_transforms_see_the_layers():
    model, plain = fuse(net().eval()), net().eval()
    x = images()
    graph_module = torch.fx.symbolic_trace(model)
    assert any(node.target == "blocks.0.dw" for node in graph_module.graph.nodes)
    torch.testing.assert_close(graph_module(x), plain(x))
    torch.testing.assert_close(torch.jit.trace(model, x)(x), plain(x))
    blocks = net(Inverted, Ghost)
    script = torch.jit.script(fuse(copy.deepcopy(blocks)))
    torch.testing.assert_close(script(x), blocks(x))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), plain(x))
    torch.testing.assert_close(torch.vmap(model)(x[None]), torch.vmap(plain)(x[None]))
    with torch.autocast("cpu", torch.bfloat16):
        y = model.float()(x.float())
        torch.testing.assert_close(y, plain.float()(x.float()))


def test_gradients_of_gradients():
    results = []
    for model in (net(), fuse(net())):
        x = images(2, 3, 7, 7).requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
        results.append([x.grad, *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*results)


def test_layouts_dtypes_and_no_grad():
    x = images(2, 3, 12, 10)
    for prepare in (
        lambda t: t.to(memory_format=torch.channels_last),
        lambda t: t.to(torch.bfloat16),
        lambda t: t.float(),
    ):
        plain, model = prepare(net()).eval(), prepare(fuse(net())).eval()
        with torch.inference_mode():
            torch.testing.assert_close(model(prepare(x)), plain(prepare(x)))
        torch.testing.assert_close(model(prepare(x)), plain(prepare(x)))


def test_threads_trace_at_once():
    model = fuse(net()).eval()
    plain = net().eval()
    x = images()
    results = []

    def work():
        with torch.no_grad():
            results.append((model(x), plain(x)))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 6
    for ours, theirs in results:
        torch.testing.assert_close(ours, theirs)


def test_report_of_what_stays_outside():
    model = net()
    model.blocks.append(nn.Sequential(nn.GroupNorm(2, 6), Inverted()))
    model.stem[0].register_forward_hook(lambda module, x, y: None)
    found = report(fuse(model))
    assert found.action == "fuse"
    assert found.kept["stem.0"] == "it has hooks"
    assert found.kept["blocks.2.0"] == "no fused operation computes a GroupNorm"
    assert set(found.changed) == {"stem.1", "blocks.2.1.expand.0"}


def test_models_without_chains_stay():
    dense = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    for model in (nn.Sequential(nn.Linear(3, 4), nn.ReLU()), dense):
        assert type(fuse(model)) is nn.Sequential
        assert not report(model).changed
