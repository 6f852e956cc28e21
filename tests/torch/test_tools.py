"""What tools that know nn.Conv2d make of kconv's layers and of accelerated models."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import warnings

import onnx
import onnxruntime
import pytest
import timm
import torch
from timm.models._features_fx import FeatureGraphNet
from torch import fx, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.feature_extraction import create_feature_extractor

from kconv.models import create
from kconv.torch import (
    ConvUnit,
    DepthwiseConv2d,
    InterleaveChannels,
    InterleavedPointwiseConv2d,
    KPointwiseConv2d,
    MBConv,
    PointwiseConv2d,
    accelerate,
    build,
    compress,
    restore,
    to_native,
)

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")


def layers():
    torch.manual_seed(0)
    return nn.Sequential(
        PointwiseConv2d(6, 12, groups=3, interleave=4),
        DepthwiseConv2d(12, 12, 3, stride=2, padding=((0, 1), (1, 1))),
        InterleaveChannels(5),
        PointwiseConv2d(12, 8),
    ).eval()


def own_layers():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, 1, 1, groups=6)
    ).eval()


NETWORKS = {
    "layers": layers,
    "KPointwiseConv2d": lambda: KPointwiseConv2d(6, 12, "D6v3_2ch", "swish"),
    "strided unit": lambda: ConvUnit(6, 16, 3, 2),
    "MBConv": lambda: MBConv(6, 8, 5, 2, drop_connect=0.2),
    "network": lambda: build(
        create("keffnet_s", ktype="D6v3_16ch", classes=5, input_shape=(9, 8, 6))
    ),
}
X = torch.randn(2, 6, 9, 8, generator=torch.Generator().manual_seed(1))
for_each_network = pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@for_each_network
def test_fx_traces(make):
    model = make().eval()
    for module in model, to_native(model):
        traced = fx.symbolic_trace(module)
        close(traced(X), model(X))
        close(traced(X[:1]), model(X[:1]))
        assert traced.state_dict().keys() == model.state_dict().keys()
        close(pickle.loads(pickle.dumps(traced))(X), model(X))


@for_each_network
def test_torchscript_compiles_native_models(make, tmp_path):
    model = make().eval()
    torch.jit.save(torch.jit.script(to_native(model)), tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    close(loaded(X), model(X))
    close(loaded(X[:1]), model(X[:1]))
    assert set(loaded.state_dict()) == set(model.state_dict())


def test_onnx_has_constant_channels_and_unknown_sizes(tmp_path):
    path = tmp_path / "model.onnx"
    model = nn.Sequential(
        PointwiseConv2d(6, 6, groups=3, interleave=4),
        DepthwiseConv2d(6, 6, 3, padding=((0, 1), (0, 2))),
        ConvUnit(6, 16, 3, 2),
        KPointwiseConv2d(16, 12, "D6v3_4ch", "swish"),
    ).eval()
    sizes = {0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")}
    torch.onnx.export(to_native(model), (X,), path, dynamo=True, dynamic_shapes=(sizes,))
    nodes = onnx.load(path).graph.node
    kinds = InterleavedPointwiseConv2d, InterleaveChannels
    permutations = sum(isinstance(module, kinds) for module in model.modules())
    assert permutations >= 2
    assert sum(node.op_type == "Gather" for node in nodes) <= permutations + 4  # and of sizes
    assert len(nodes) < 60
    session = onnxruntime.InferenceSession(path)
    for size in (9, 8), (10, 13), (3, 4):
        x = torch.randn(3, 6, *size)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        close(torch.from_numpy(y), model(x))


def test_export_of_accelerated_models_needs_no_kconv():
    model = accelerate(own_layers())
    with pytest.warns(UserWarning, match=r"kconv\.torch\.restore"):
        program = torch.export.export(model, (X,))
    assert not [node for node in program.graph.nodes if "kconv" in str(node.target)]
    close(program.module()(X), model(X))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(compiled(X), model(X))


def test_feature_extractors():
    model = timm.create_model("mobilenetv3_small_050").eval()
    x = torch.randn(1, 3, 64, 64)
    expected = FeatureGraphNet(copy.deepcopy(model), out_indices=(1, 3))(x)
    fast = accelerate(copy.deepcopy(model))
    for found, own in zip(FeatureGraphNet(fast, out_indices=(1, 3))(x), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-3, atol=1e-4)
    small = compress(copy.deepcopy(model)).eval()
    shapes = [y.shape for y in FeatureGraphNet(small, out_indices=(1, 3))(x)]
    assert shapes == [y.shape for y in expected]
    names = ["blocks.2.0.conv_pw", "blocks.3"]
    models = model, accelerate(copy.deepcopy(model))
    first, second = (create_feature_extractor(m, names)(x) for m in models)
    for name in names:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-4)


def test_flops_are_those_of_conv2d():
    own, ours = own_layers(), accelerate(own_layers())
    pairs = [
        (own, ours),
        (nn.Conv2d(6, 8, 1, groups=2), PointwiseConv2d(6, 8, groups=2, interleave=4)),
        (nn.Conv2d(6, 6, 5, 2, 2, groups=6), DepthwiseConv2d(6, 6, 5, 2, 2)),
    ]
    for pair in pairs:
        counts = []
        for module in pair:
            with FlopCounterMode(display=False) as counter:
                module(X.clone().requires_grad_()).sum().backward()
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0
    with FlopCounterMode(display=False) as counter:
        to_native(pairs[1][1])(X)
    assert counter.get_total_flops() > 0


LATE = """
import sys
import torch, kconv.torch
assert "torch.utils.flop_counter" not in sys.modules
layer = kconv.torch.PointwiseConv2d(4, 6)
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    layer(torch.ones(1, 4, 2, 2))
print(counter.get_total_flops())
"""


def test_flop_counter_that_is_imported_afterwards():
    result = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True)
    assert result.stdout == f"{2 * 4 * 6 * 4}\n", result.stderr


def test_profiler_sees_the_operators():
    with profile(activities=[ProfilerActivity.CPU]) as profiler, torch.no_grad():
        layers()(X)
    counts = {event.key: event.count for event in profiler.key_averages()}
    assert counts["kconv::pointwise_conv"] == 2
    assert counts["kconv::depthwise_conv"] == 1


quantization = pytest.importorskip("torch.ao.quantization")


@pytest.mark.filterwarnings("ignore")
def test_fx_quantization():
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    own = own_layers()
    for model in own, accelerate(copy.deepcopy(own)):
        mapping = quantization.get_default_qconfig_mapping("fbgemm")
        prepared = prepare_fx(copy.deepcopy(model), mapping, (X,))
        prepared(X)
        quantized = convert_fx(prepared)
        # In both: as a module, and as a function.
        assert any("quantized" in str(type(m)) for m in quantized.modules()) or any(
            "quantized.conv2d" in str(node.target) for node in quantized.graph.nodes
        )
        torch.testing.assert_close(quantized(X), own(X), rtol=0.1, atol=0.05)


@pytest.mark.filterwarnings("ignore")
def test_eager_quantization_says_what_to_do():
    own = own_layers()

    def quantized(model):
        stubs = quantization.QuantStub(), *copy.deepcopy(model), quantization.DeQuantStub()
        wrapped = nn.Sequential(*stubs).eval()
        wrapped.qconfig = quantization.get_default_qconfig("fbgemm")
        prepared = quantization.prepare(wrapped)
        prepared(X)
        return quantization.convert(prepared)(X)

    model = accelerate(copy.deepcopy(own))
    with pytest.raises(NotImplementedError, match=r"kconv\.torch\.restore"):
        quantized(model)
    for plain in to_native(model), restore(model):
        torch.testing.assert_close(quantized(plain), quantized(own))


def test_layers_made_by_the_class_of_another():
    """As peft does: type(conv)(in_channels, rank, kernel_size, stride, padding, bias=False)."""
    for own in nn.Conv2d(6, 8, 1), nn.Conv2d(6, 6, 3, 1, 1, groups=6):
        conv = accelerate(copy.deepcopy(own))
        torch.manual_seed(4)
        down = type(conv)(6, 6, conv.kernel_size, conv.stride, conv.padding, bias=False)
        torch.manual_seed(4)
        expected = nn.Conv2d(6, 6, conv.kernel_size, conv.stride, conv.padding, bias=False)
        close(down(X), expected(X))


@pytest.mark.filterwarnings("ignore")
def test_lora():
    peft = pytest.importorskip("peft")
    model = accelerate(nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU()))
    config = peft.LoraConfig(target_modules=["0"], r=3, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    y = adapted(X)
    close(adapted.merge_and_unload()(X), y)


@pytest.mark.filterwarnings("ignore")
def test_pruning_by_dependencies():
    pruning = pytest.importorskip("torch_pruning")
    for conv in PointwiseConv2d(6, 8), PointwiseConv2d(6, 8, interleave=4):
        model = nn.Sequential(conv, nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
        with torch.no_grad():  # dead filters, without which all is as it was
            conv.weight[::2] = 0
            conv.bias[::2] = 0
        y = model(X)
        importance = pruning.importance.MagnitudeImportance()
        pruning.pruner.MagnitudePruner(
            model, X, importance=importance, pruning_ratio=0.5, ignored_layers=[model[2]]
        ).step()
        close(model(X), y)


def test_strides_become_dilations():
    """As segmentation_models_pytorch's encoders do it for an output of more pixels."""
    model = timm.create_model("mobilenetv3_small_050").eval()
    fast = accelerate(copy.deepcopy(model))
    for stage in model.blocks[3], fast.blocks[3]:
        for module in stage.modules():
            if isinstance(module, nn.Conv2d):
                module.stride, module.dilation = (1, 1), (2, 2)
                module.padding = tuple(k // 2 * 2 for k in module.kernel_size)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-4)


def sharded(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    from torch.distributed.tensor import (
        Replicate,
        Shard,
        distribute_module,
        distribute_tensor,
        init_device_mesh,
    )

    mesh = init_device_mesh("cpu", (2,))
    model, own = distribute_module(layers(), mesh), layers()
    for size in (9, 7), (10, 7):  # whose outputs at stride 2 have the same shape
        x = torch.randn(4, 6, *size, generator=torch.Generator().manual_seed(1))
        leaf = x.clone().requires_grad_()
        images = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
        y, expected = model(images), own(leaf)
        assert y.placements == (Shard(0),)
        close(y.full_tensor(), expected)
        for module, result in (model, y), (own, expected):
            module.zero_grad()
            result.square().sum().backward()
        assert images.grad.placements == (Shard(0),)
        close(images.grad.full_tensor(), leaf.grad)
        for mine, theirs in zip(model.parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, rtol=1e-4, atol=1e-3)
    for placement in Shard(1), Replicate():
        close(model(distribute_tensor(x, mesh, [placement])).full_tensor(), expected)
    print("done")
    sys.stdout.flush()
    os._exit(0)  # not to wait for Gloo's threads


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without distributed")
def test_distributed_tensors_shard_their_batch(tmp_path):
    script = f"import runpy; runpy.run_path({__file__!r})['sharded']({{}}, {str(tmp_path)!r})"
    commands = [[sys.executable, "-c", script.format(rank)] for rank in range(2)]
    ranks = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    for rank in ranks:
        output, errors = rank.communicate(timeout=240)
        assert output == "done\n", errors


def test_tracing_by_torch_jit_warns_of_nothing_new():
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(layers(), X)
    close(traced(X[:1, :, 1:]), layers()(X[:1, :, 1:]))
