"""kconv put into models made of PyTorch's layers, and taken out again."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune

from kconv.models import create
from kconv.torch import (
    AcceleratedConv2d,
    DepthwiseConv2d,
    KPointwiseConv2d,
    PointwiseConv2d,
    accelerate,
    build,
    compress,
    fuse,
    report,
    restore,
    to_native,
)


class Bottleneck(nn.Module):
    """A residual block whose last activation follows the sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act1 = (
            nn.Conv2d(64, 32, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.SiLU(),
        )
        self.conv2 = nn.Conv2d(32, 32, 3, 2, 1, groups=32)
        self.bn2, self.act2 = nn.BatchNorm2d(32), nn.SiLU()
        self.conv3, self.bn3 = nn.Conv2d(32, 64, 1, bias=False), nn.BatchNorm2d(64, eps=1e-4)
        self.down = nn.Sequential(nn.Conv2d(64, 64, 1, 2), nn.BatchNorm2d(64))
        self.act3 = nn.SiLU()

    def forward(self, x):
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        return self.act3(self.bn3(self.conv3(y)) + self.down(x))


class Shape(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + x.shape[2]


@pytest.fixture
def model():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 64, 3), Bottleneck(), nn.Conv2d(64, 8, 1), Shape(8, 8, 1)
    return nn.Sequential(*layers).eval()


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_accelerate_and_restore(model):
    x = torch.randn(2, 3, 12, 12)
    y, before = model(x), dict(model.named_parameters())
    classes = [type(module) for module in model.modules()]
    calls = []
    model[2].register_forward_hook(lambda *_: calls.append(1))
    assert accelerate(model, all_layers=True) is model
    changed = report(model).changed
    assert list(changed) == ["1.conv1", "1.conv2", "1.conv3", "2"]
    assert set(changed.values()) == {"AcceleratedConv2d"}
    kept = report(model).kept
    assert list(kept) == ["0", "1.down.0", "3"]
    assert "stride=(2, 2)" in kept["1.down.0"]
    assert "Shape" in kept["3"]
    assert type(model[1].conv1) is type(model[1].conv2) is AcceleratedConv2d
    assert type(model[1].down[0]) is nn.Conv2d  # stride 2
    assert type(model[3]) is Shape
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    torch.testing.assert_close(model(x), y)
    assert report(accelerate(model, all_layers=True)).changed == {}
    for moved in copy.deepcopy(model), to_native(model):
        torch.testing.assert_close(moved(x), y)
    assert restore(model) is model
    assert report(model).changed.keys() == changed.keys()
    assert report(restore(model)).changed == {}
    assert [type(module) for module in model.modules()] == classes
    assert torch.equal(model(x), y)
    assert calls


def test_accelerate_leaves_alone_what_gains_nothing():
    layers = nn.Conv2d(32, 34, 1), nn.Conv2d(34, 129, 1), nn.Conv2d(128, 130, 1, groups=2)
    model = accelerate(nn.Sequential(*layers))
    assert list(report(model).changed) == ["0", "2"]
    reason = "34 to 129 channels in one group gain nothing between PyTorch's operators"
    assert report(model).kept == {"1": reason}
    assert type(model[1]) is nn.Conv2d
    assert list(report(accelerate(model, all_layers=True)).changed) == ["1"]


def test_accelerate_keeps_training_on_course(model):
    other = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.9) for m in (model, other)]
    accelerate(model, all_layers=True)
    x = torch.randn(4, 3, 12, 12)
    for _ in range(3):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_restore_leaves_kconv_layers_alone():
    layer = PointwiseConv2d(4, 4)
    assert report(restore(nn.Sequential(layer))).changed == {}
    assert type(layer) is PointwiseConv2d


def test_compress(model, tmp_path):
    before = parameters(model)
    assert compress(model.train(), "D6_16ch") is model
    assert parameters(model) < before
    block = model[1]
    assert isinstance(block.conv1, KPointwiseConv2d)
    assert isinstance(block.bn1, nn.Identity)
    assert isinstance(block.conv1.k_bn, nn.BatchNorm2d)
    assert isinstance(block.conv1.k_group_interconn, nn.SiLU)
    assert block.conv3.k_bn.eps == 1e-4
    assert isinstance(block.act3, nn.SiLU)  # it follows the sum, not the convolution
    assert isinstance(block.down[1], nn.Identity)
    x = torch.randn(2, 3, 12, 12)
    y = model(x)
    assert y.shape == (2, 8, 5, 5)
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.save(model.state_dict(), tmp_path / "compressed.pt")
    state = torch.load(tmp_path / "compressed.pt", weights_only=True)
    fresh = nn.Sequential(nn.Conv2d(3, 64, 3), Bottleneck(), nn.Conv2d(64, 8, 1), Shape(8, 8, 1))
    compress(fresh, "D6_16ch").load_state_dict(state)
    assert torch.equal(fresh.eval()(x), model.eval()(x))


def test_compress_keeps_what_is_shared_or_small():
    relu, conv = nn.ReLU(), nn.Conv2d(64, 64, 1)
    model = nn.Sequential(conv, relu, conv, nn.Conv2d(64, 32, 1), relu, nn.Conv2d(32, 8, 1))
    weights = model[5].weight
    compress(model, "D6_32ch")
    assert model[0] is model[2] is conv  # called twice
    assert isinstance(model[3], KPointwiseConv2d)
    assert model[1] is model[4] is relu
    assert not any(isinstance(m, nn.ReLU) for m in model[3].modules())
    assert model[5].weight is weights  # too few channels for groups of 32
    assert isinstance(compress(nn.Conv2d(64, 64, 1)), KPointwiseConv2d)


@pytest.mark.parametrize("ktype", ["D6v3_4ch", "kT3_16ch", "D10", "D8"])
def test_compress_by_other_ktypes(model, ktype):
    compress(model, ktype)
    assert model(torch.randn(1, 3, 12, 12)).shape == (1, 8, 5, 5)


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else x


def test_compress_bad_input(model):
    with pytest.raises(ValueError, match="cannot trace this Untraceable"):
        compress(Untraceable())
    with pytest.raises(ValueError, match="D7"):
        compress(model, "D7")


@pytest.mark.parametrize("convert", [accelerate, compress, fuse, restore, report, to_native])
def test_what_is_no_module_is_refused(convert):
    with pytest.raises(TypeError, match=r"model=<class .*Conv2d'>, expected a torch\.nn\.Module"):
        convert(nn.Conv2d)


def test_what_is_no_tensor_is_pytorchs_to_refuse():
    (layer,) = accelerate(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)))
    for x in (None, [1.0], (torch.ones(1, 4, 3, 3),), torch.ones(1, 4, 3, 3).numpy()):
        with pytest.raises(TypeError, match="conv2d"):
            layer(x)


def test_to_native():
    model = build(create("keffnet_s", ktype="D6v3_16ch", classes=5, input_shape=(32, 32, 3))).eval()
    native = to_native(model)
    kconv = {type(m) for m in native.modules()} & {PointwiseConv2d, DepthwiseConv2d}
    assert not kconv
    assert {type(m) for m in model.modules()} >= {PointwiseConv2d, DepthwiseConv2d}
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(native(x), model(x), rtol=1e-5, atol=1e-5)
    assert native.state_dict().keys() == model.state_dict().keys()
    shared = PointwiseConv2d(4, 4)
    twice = to_native(nn.Sequential(shared, shared))
    assert twice[0] is twice[1]


@pytest.mark.parametrize(
    ("make", "name", "before", "after"),
    [
        (timm.create_model, "tf_efficientnet_lite0", 4_652_008, 1_722_568),
        (timm.create_model, "efficientnet_b0", 5_288_548, 1_907_892),
        (timm.create_model, "mobilenetv3_large_100", 5_483_032, 1_669_192),
        (timm.create_model, "resnet50", 25_557_032, 13_819_304),
        (torchvision.models.get_model, "mobilenet_v2", 3_504_872, 1_559_776),
    ],
)
def test_published_models(make, name, before, after, tmp_path):
    """With the numbers of parameters to be trained, for 1,000 classes."""
    torch.manual_seed(0)
    model = make(name).eval()
    x = torch.randn(2, 3, 64, 64)
    y = model(x)
    assert len(report(accelerate(model, all_layers=True)).changed) > 30
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-4 * y.abs().max().item())
    restore(model)
    assert parameters(model) == before
    compress(model.train())
    assert parameters(model) == after
    model(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    torch.save(model.state_dict(), tmp_path / "compressed.pt")
    other = compress(make(name))
    other.load_state_dict(torch.load(tmp_path / "compressed.pt", weights_only=True))
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_compressed_blocks_keep_the_epsilon_of_the_batch_norm():
    model = nn.Sequential(nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64, eps=0.5), nn.ReLU())
    compress(model, "D6_16ch").eval()
    x = torch.randn(2, 64, 5, 5)
    torch.testing.assert_close(model(x), to_native(model)(x), rtol=1e-4, atol=1e-5)


class Twice(nn.Module):
    """A convolution, its batch norm and its activation under two names each."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(64, 32, 1), nn.BatchNorm2d(32)
        self.body = nn.Sequential(self.conv, self.norm, nn.ReLU())

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("accelerated", [False, True])
def test_compress_replaces_a_module_under_all_its_names(accelerated):
    model = Twice()
    compress(accelerate(model, all_layers=True) if accelerated else model)
    assert isinstance(model.conv, KPointwiseConv2d)
    assert model.conv is model.body[0]
    assert isinstance(model.norm, nn.Identity)
    assert model.norm is model.body[1]
    assert report(model).changed == {"conv": "KPointwiseConv2d"}
    model(torch.randn(2, 64, 3, 4)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


class Reads(Twice):
    def forward(self, x):
        return super().forward(x.to(self.conv.weight.dtype))


class Holds(Twice):
    def __init__(self):
        super().__init__()
        self.order = [{"first": self.conv}]


class Hidden(nn.Module):
    """Calls another's convolution, which it does not register."""

    def __init__(self, conv):
        super().__init__()
        self.calls = (conv,)

    def forward(self, x):
        return self.calls[0](x)


def tied():
    model = nn.Sequential(nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 64, 1))
    model[2].weight = model[0].weight
    return model


def changed_by(change):
    model = Twice()
    change(model)
    return model


MASK = torch.ones(32, 64, 1, 1)
DEPENDENT = {
    "it is read": (Reads, "read outside"),
    "a list has it": (Holds, "refers to it"),
    "another calls it": (
        lambda: changed_by(lambda m: m.body.append(Hidden(m.conv.to("meta")))),
        "refers to it",
    ),
    "tied": (tied, "same parameters"),
    "called twice": (
        lambda: nn.Sequential(*[nn.Conv2d(64, 64, 1)] * 2),
        "calls it 2 times",
    ),
    "forward hook": (
        lambda: changed_by(lambda m: m.conv.register_forward_hook(print)),
        "has hooks",
    ),
    "backward hook": (
        lambda: changed_by(lambda m: m.conv.register_full_backward_hook(print)),
        "has hooks",
    ),
    "pruned": (
        lambda: changed_by(lambda m: prune.custom_from_mask(m.conv, "weight", MASK)),
        "has hooks",
    ),
    "weight norm": (
        lambda: changed_by(lambda m: parametrizations.weight_norm(m.conv)),
        "parametrizations",
    ),
    "its own forward": (
        lambda: changed_by(lambda m: setattr(m.conv, "forward", lambda x: x)),
        "forward of its own",
    ),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(64, 64, 1, groups=2)), "groups=2"),
    "padded": (lambda: nn.Sequential(nn.Conv2d(64, 64, 1, padding=1)), r"padding=\(1, 1\)"),
    "small": (lambda: nn.Sequential(nn.Conv2d(8, 4, 1)), "8 to 4 channels"),
}


@pytest.mark.parametrize(("make", "words"), DEPENDENT.values(), ids=DEPENDENT)
def test_compress_keeps_what_something_depends_on(make, words):
    model = make()
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    if words == "refers to it" and isinstance(model.body[-1], Hidden):
        model.body[0] = nn.Identity()  # only the one that is not seen calls it
    assert compress(model) is model
    assert [module for module in model.modules() if isinstance(module, nn.Conv2d)] == convs
    result = report(model)
    assert not result.changed
    assert all(re.search(words, reason) for reason in result.kept.values())
    assert len(result.kept) == len(convs)


def test_compress_does_not_swallow_what_is_watched():
    model = Twice()
    seen = []
    model.norm.register_forward_hook(lambda *_: seen.append(1))
    compress(model)
    assert isinstance(model.conv, KPointwiseConv2d)
    assert isinstance(model.norm, nn.BatchNorm2d)
    model(torch.randn(2, 64, 3, 4))
    assert seen

    class Offset(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    model = compress(nn.Sequential(nn.Conv2d(64, 32, 1), Offset(32), nn.ReLU()))
    assert type(model[1]) is Offset


def test_compressed_blocks_have_a_convolutions_attributes():
    for stride in (1, 1), (2, 1):
        conv = nn.Conv2d(64, 32, 1, stride)
        block = compress(copy.deepcopy(conv))
        for name in "in_channels out_channels kernel_size stride padding dilation groups".split():
            assert getattr(block, name) == getattr(conv, name)
        assert block(torch.randn(1, 64, 5, 6)).shape == conv(torch.randn(1, 64, 5, 6)).shape
        with pytest.raises(AttributeError):
            block.stride = (2, 2)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
@pytest.mark.parametrize("convert", [partial(accelerate, all_layers=True), compress])
def test_wrapped_models(convert, wrap):
    model = nn.Sequential(nn.Conv2d(64, 32, 1), nn.ReLU())
    wrapped = wrap(model)
    assert convert(wrapped) is wrapped
    assert list(report(wrapped).changed) == list(report(model).changed) == ["0"]
    assert type(model[0]) in (AcceleratedConv2d, KPointwiseConv2d)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_compress_refuses_wrappers_that_hold_the_parameters(tmp_path):
    store = f"file://{tmp_path}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Conv2d(64, 32, 1)))
        with pytest.raises(ValueError, match="DistributedDataParallel has taken over"):
            compress(model)
    finally:
        torch.distributed.destroy_process_group()


class Doubled(PointwiseConv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled_output(_, __, y):
    return y * 2


def halved_input(_, inputs):
    return (inputs[0] / 2,)


def patched(module):
    inner = module.forward
    module.forward = lambda x: inner(x) + 1


WRAPPERS = {
    "weight_norm": parametrizations.weight_norm,
    "older weight_norm": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "older spectral_norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruned": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "forward hook": lambda m: m.register_forward_hook(doubled_output),
    "forward pre-hook": lambda m: m.register_forward_pre_hook(halved_input),
    "backward hook": lambda m: m.register_full_backward_hook(lambda _, g, __: (g[0] * 3,)),
}


def results(module, x):
    x = x.clone().requires_grad_()
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y, x.grad


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("change", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize(
    "make",
    [
        lambda: accelerate(nn.Sequential(nn.Conv2d(8, 8, 1))),
        lambda: nn.Sequential(PointwiseConv2d(8, 8, groups=2)),
        lambda: nn.Sequential(PointwiseConv2d(8, 8, interleave=4)),
        lambda: nn.Sequential(DepthwiseConv2d(8, 8, 3, padding=((0, 1), (1, 0)))),
    ],
    ids="accelerated pointwise interleaving depthwise".split(),
)
def test_restore_and_to_native_after_changes(make, change):
    torch.manual_seed(8)
    model = make().double().eval()
    change(model[0])
    x = torch.randn(2, 8, 4, 5, dtype=torch.float64)
    expected = results(model, x)
    native = to_native(model)
    assert "kconv.torch.layers" not in str([type(m).__mro__ for m in native.modules()])
    for _ in range(2):  # the first call may compute the weight anew
        torch.testing.assert_close(results(native, x), expected)
    restored = restore(model)
    assert restored is model
    torch.testing.assert_close(results(restored, x), expected)
    assert not [m for m in model.modules() if isinstance(m, AcceleratedConv2d)]


def test_what_is_in_the_way_of_a_conversion():
    model = nn.Sequential(PointwiseConv2d(8, 8), Doubled(8, 8))
    x = torch.randn(1, 8, 2, 2)
    y = model(x)
    with pytest.raises(ValueError, match="to_native: module '1' is a Doubled, which is derived"):
        to_native(model)
    assert torch.equal(model(x), y)

    class Tripled(AcceleratedConv2d):
        def forward(self, x):
            return 3 * super().forward(x)

    model = accelerate(nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)))
    model[1].__class__ = Tripled
    with pytest.raises(ValueError, match="restore: module '1' is a Tripled"):
        restore(model)
    assert type(model[0]) is AcceleratedConv2d  # all of them, or none

    model = nn.Sequential(PointwiseConv2d(8, 8))
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match="to_native: this Sequential cannot be copied"):
        to_native(model)


def test_forwards_of_instances_stay():
    model = accelerate(nn.Sequential(nn.Conv2d(8, 8, 1)))
    patched(model[0])
    x = torch.randn(1, 8, 2, 2)
    y = model(x)
    torch.testing.assert_close(restore(model)(x), y)
    assert type(model[0]) is nn.Conv2d


def test_reports_stay_with_the_model(model):
    with pytest.raises(ValueError, match="this Sequential is none that accelerate"):
        report(model)
    keys = list(model.state_dict())
    accelerate(model, all_layers=True)
    expected = report(model)
    assert (expected.action, len(expected.changed), len(expected.kept)) == ("accelerate", 4, 3)
    assert report(copy.deepcopy(model)) == report(pickle.loads(pickle.dumps(model))) == expected
    assert list(model.state_dict()) == keys
    native = to_native(model)
    assert report(native).action == "to_native"
    assert report(native).changed.keys() == expected.changed.keys()
    assert report(model) == expected
    assert "1.conv1" in str(expected)
