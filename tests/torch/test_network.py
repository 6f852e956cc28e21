"""Whole networks: parameters, training beside PyTorch's own layers, checkpoints."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from kconv.models import GraphBuilder, Spec, count, create, list_models
from kconv.torch import DepthwiseConv2d, Network, PointwiseConv2d, build

SMALL = [name for name in list_models() if "net_b" not in name or name.endswith("b0")]
OPTIONS = {"classes": 10, "input_shape": (32, 32, 3)}


def small_spec(**options):
    """kEffNet-B0 D6_16ch for small images, without what is random in training."""
    return create(
        "keffnet_b0",
        ktype="D6_16ch",
        skip_stride_cnt=1,
        dropout=0.0,
        drop_connect=0.0,
        **(OPTIONS | options),
    )


def pair(dtype):
    """The same network on kconv's layers and on PyTorch's."""
    torch.manual_seed(1)
    spec = small_spec(input_shape=(16, 16, 3))
    ours, own = build(spec), build(spec, kernels="torch")
    own.load_state_dict(ours.state_dict())
    return ours.to(dtype), own.to(dtype)


def batches(count, dtype):
    generator = torch.Generator().manual_seed(2)
    for _ in range(count):
        images = torch.rand(8, 3, 16, 16, generator=generator, dtype=dtype) * 4 - 2
        yield images, torch.randint(10, (8,), generator=generator)


def loss_of(model, images, labels):
    return F.cross_entropy(model(images), labels)


@pytest.mark.parametrize("name", list_models())
def test_parameters(name):
    spec = create(name)
    with torch.device("meta"):
        model = build(spec)
    counts = count(spec)
    trainable = sum(parameter.numel() for parameter in model.parameters())
    statistics = [b for n, b in model.named_buffers() if not n.endswith("num_batches_tracked")]
    assert trainable == counts.trainable
    assert trainable + sum(buffer.numel() for buffer in statistics) == counts.total


def test_modules_have_the_names_of_the_layers():
    spec = small_spec()
    model = build(spec)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for layer in spec.graph().layers:
        weights = layer.weights()
        if "moving_mean" in weights:
            assert shapes[f"{layer.name}.running_mean"] == weights["moving_mean"]
        elif "kernel" in weights:
            assert math.prod(shapes[f"{layer.name}.weight"]) == math.prod(weights["kernel"])
    assert isinstance(model.k_block1a__0dwconv, DepthwiseConv2d)
    assert isinstance(model.k_block2a__0expand_conv, PointwiseConv2d)
    assert model.k_stem_bn.eps == 1e-3
    assert model.k_stem_bn.momentum == pytest.approx(0.01)
    assert not any(isinstance(m, PointwiseConv2d) for m in build(spec, kernels="torch").modules())


@pytest.mark.parametrize("shape", [(33, 31, 3), (40, 24, 1)])
def test_odd_images(shape):
    spec = small_spec(input_shape=shape)
    ours, own = build(spec).eval(), build(spec, kernels="torch").eval()
    own.load_state_dict(ours.state_dict())
    height, width, channels = shape
    x = torch.randn(2, channels, height, width)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), own(x), rtol=1e-4, atol=1e-5)


def test_eight_steps_of_training_in_float64():
    ours, own = pair(torch.float64)
    last = copy.deepcopy(ours).to(memory_format=torch.channels_last)
    runs = []
    for model in ours, last, own:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        format_ = torch.channels_last if model is last else torch.contiguous_format
        runs.append([])
        for images, labels in batches(8, torch.float64):
            loss = loss_of(model, images.to(memory_format=format_), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            runs[-1].append(loss.item())
    assert runs[0] == pytest.approx(runs[2], rel=1e-3)
    assert runs[1] == pytest.approx(runs[2], rel=1e-3)
    assert len(set(runs[2])) == 8


def test_fifty_steps_of_training_in_float32():
    """Each step starts from the reference's weights and statistics."""
    ours, own = pair(torch.float32)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.01)
    for images, labels in batches(50, torch.float32):
        ours.load_state_dict(own.state_dict())
        losses = []
        for model in (ours, own):
            model.zero_grad()
            losses.append(loss_of(model, images, labels))
            losses[-1].backward()
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)
        magnitudes = [parameter.grad.abs().max() for parameter in own.parameters()]
        # What a later batch norm takes out again has no gradient, only rounding errors.
        floor = 1e-3 * max(magnitudes)
        for (name, mine), theirs, magnitude in zip(
            ours.named_parameters(), own.parameters(), magnitudes, strict=True
        ):
            error = (mine.grad - theirs.grad).abs().max()
            assert error <= 1e-3 * max(magnitude, floor), name
        optimizer.step()


@pytest.mark.parametrize("ktype", ["D6_16ch", "D6v3_16ch", "D6_16ch_kT3", "D8", "kT3v3_16ch"])
def test_every_parameter_gets_a_gradient(ktype):
    torch.manual_seed(3)
    model = build(create("keffnet_s", ktype=ktype, skip_stride_cnt=1, **OPTIONS))
    ((images, labels),) = batches(1, torch.float32)
    loss_of(model, images, labels).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        # An only shift that a later batch norm takes out again has one rounding error, or 0.
        lone_shift = name.endswith("_bn.bias") and parameter.numel() == 1
        assert lone_shift or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", [name for name in SMALL if "effnet" not in name])
def test_other_networks(name):
    torch.manual_seed(4)
    shape = (75, 75, 3) if "inception" in name else (32, 32, 3)
    model = build(create(name, classes=10, input_shape=shape)).eval()
    native = build(create(name, classes=10, input_shape=shape), kernels="torch").eval()
    native.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, *shape[:2])
    y = model(x)
    torch.testing.assert_close(y, native(x), rtol=1e-3, atol=1e-4 * y.abs().max().item())
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_checkpoint(tmp_path):
    model = build(small_spec())
    x = torch.randn(4, 3, 32, 32)
    model(x)  # moves the statistics
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = build(small_spec())
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other.eval()(x), model.eval()(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        build(small_spec(classes=11)).load_state_dict(model.state_dict())


def test_initial_values():
    """As Keras draws them: its fans, its truncated normal distribution."""
    torch.manual_seed(5)
    state = build(small_spec(classes=1000)).state_dict()

    def fans(name):
        outputs, inputs, height, width = state[name].shape
        return height * width * inputs, height * width * outputs

    limit = math.sqrt(6 / sum(fans("k_block6b__0expand_conv.weight")))
    kernel = state["k_block6b__0expand_conv.weight"]
    assert 0.99 * limit < kernel.abs().max() <= limit
    dense = state["k_probs.weight"]
    assert 0.99 * math.sqrt(1 / 1000) < dense.abs().max() <= math.sqrt(1 / 1000)
    assert not state["k_probs.bias"].any()
    depthwise = state["k_block6b__0dwconv.weight"]
    assert depthwise.std().item() == pytest.approx(math.sqrt(2 / 25), rel=0.05)
    assert depthwise.abs().max() <= 2 * math.sqrt(2 / 25) / 0.8796256


def test_drop_connect_drops_whole_samples():
    torch.manual_seed(6)
    model = build(create("keffnet_b0", drop_connect=0.5, skip_stride_cnt=3, **OPTIONS))
    drop = model.k_block6d__0drop
    x = torch.rand(64, 2, 3, 3) + 1
    y = drop(x)
    kept = y.flatten(1).any(1)
    assert 0 < kept.sum() < 64
    torch.testing.assert_close(y[kept], x[kept] / (1 - drop.rate))
    assert torch.equal(drop.eval()(x), x)


class Strided(Spec):
    """TensorFlow's padding "same" at stride 2."""

    def graph(self):
        g = GraphBuilder("strided", self.input_shape)
        x = g.conv("conv", g.input, 8, 3, 2, padding="same")
        x = g.depthwise_conv("dw", x, 3, 2, padding="same")
        x = g.pool("pool", x, "avg", 3, 1, padding="same")
        x = g.flatten("flat", g.reshape("image", g.global_pool("mean", x, "max")))
        return g.build(g.activation("probs", x, "softmax"))


@pytest.mark.parametrize("size", [(12, 12), (13, 11)])
def test_same_padding_at_stride_2(size):
    model = build(Strided(name="strided", input_shape=(*size, 3)))
    x = torch.randn(2, 3, *size)

    def same(x, weight, groups=1):
        total = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[2:]]
        (top, left), (bottom, right) = ([f(t / 2) for t in total] for f in (math.floor, math.ceil))
        return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, 2, groups=groups)

    y = same(same(x, model.conv.weight), model.dw.weight, 8)
    expected = F.avg_pool2d(y, 3, 1, 1, count_include_pad=False).amax((2, 3))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("training", [False, True])
def test_traced_by_fx(training):
    """The layers stand in the graph under their names, those without weights as modules."""
    model = build(create("keffnet_s", **OPTIONS)).train(training)
    x = torch.randn(3, 3, 32, 32)
    model(x)
    traced = fx.symbolic_trace(model)
    called = {node.target for node in traced.graph.nodes if node.op == "call_module"}
    assert {"k_stem_bn", "k_stem_activation"} <= called
    torch.manual_seed(0)  # the same values dropped
    y = traced(x)
    torch.manual_seed(0)
    torch.testing.assert_close(y, model(x), rtol=1e-3, atol=1e-4)
    names = ["k_stem_activation", "k_block2a__0project_conv_conv"]
    features = create_feature_extractor(model, names)(x)
    seen = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda module, args, y: seen.append(y))
    model(x)
    for ours, theirs in zip(features.values(), seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_counted_operations():
    """As many as those of PyTorch's own layers, forward and backward."""
    counts = []
    for kernels in ("kconv", "torch"):
        model = build(small_spec(input_shape=(16, 16, 3)), kernels=kernels)
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 3, 16, 16)).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_bad_input():
    with pytest.raises(ValueError, match="'cuda'"):
        build(small_spec(), kernels="cuda")
    g = GraphBuilder("pool", (8, 8, 3))
    with pytest.raises(ValueError, match="'p'"):
        Network(g.build(g.pool("p", g.input, "max", 2, 2, padding="same")))
