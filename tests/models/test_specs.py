"""Options of the specs, the shapes that follow from them, and errors."""

from __future__ import annotations

import dataclasses
import json

import pytest

from kconv.models import GraphBuilder, KEffNet, create, list_models
from kconv.models import graph as ir


def strided(graph):
    """Names of the layers that halve the image."""
    windows = (ir.Conv, ir.DepthwiseConv)
    layers = [layer for layer in graph.layers if isinstance(layer, windows)]
    return [layer.name for layer in layers if layer.strides not in (1, (1, 1))]


@pytest.mark.parametrize(
    ("skip", "blocks"),
    [
        (-1, ["k_stem_conv", "k_block2a__0", "k_block3a__0", "k_block4a__0", "k_block6a__0"]),
        (0, ["k_block2a__0", "k_block3a__0", "k_block4a__0", "k_block6a__0"]),
        (1, ["k_block2a__0", "k_block3a__0", "k_block4a__0", "k_block6a__0"]),
        (3, ["k_block4a__0", "k_block6a__0"]),
        (7, []),
    ],
)
def test_keffnet_skips_strides(skip, blocks):
    graph = create("keffnet_b0", skip_stride_cnt=skip).graph()
    assert [name.removesuffix("dwconv") for name in strided(graph)] == blocks


@pytest.mark.parametrize(
    ("size", "padding", "stem"), [(32, (0, 1), 16), (31, (1, 1), 16), (1, (1, 1), 1)]
)
def test_padding_follows_the_size(size, padding, stem):
    graph = create("keffnet_b0", input_shape=(size, 32, 1), classes=3).graph()
    assert graph["k_stem_conv_pad"].padding == (padding, (0, 1))
    assert graph["k_stem_conv"].shape == (stem, 16, 32)
    assert graph["k_stem_conv"].weights() == {"kernel": (3, 3, 1, 32)}
    assert graph["k_probs"].shape == (3,)


def test_unknown_sizes_pad_like_even_ones():
    graph = create("keffnet_b0", input_shape=(None, 31, 3)).graph()
    assert graph["k_stem_conv_pad"].padding == ((0, 1), (1, 1))
    assert graph["k_top_conv_bn"].shape == (None, 1, 1280)


def test_drop_connect_grows_by_the_unscaled_depth():
    rates = [
        layer.rate
        for layer in create("keffnet_b7").graph().layers
        if isinstance(layer, ir.Dropout) and layer.per_sample
    ]
    assert rates == sorted(rates)
    assert rates[0] == 0.2 * 1 / 16
    assert rates[-1] == 0.2 * 54 / 16
    assert not any(
        isinstance(layer, ir.Dropout)
        for layer in create("keffnet_b0", drop_connect=0, dropout=0).graph().layers
    )


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        (-1, ["conv1", "conv_dw_2", "conv_dw_4", "conv_dw_6", "conv_dw_12"]),
        (0, ["conv_dw_2", "conv_dw_4", "conv_dw_6", "conv_dw_12"]),
        (2, ["conv_dw_6", "conv_dw_12"]),
        (4, []),
        (9, []),
    ],
)
def test_kmobilenet_skips_strides(skip, expected):
    graph = create("kmobilenet", skip_stride_cnt=skip).graph()
    assert strided(graph) == expected
    pads = [layer.name for layer in graph.layers if isinstance(layer, ir.ZeroPad)]
    # The stem is padded at any stride.
    padded = [name.replace("dw", "pad") for name in expected if name != "conv1"]
    assert pads == ["conv1_pad", *padded]


def test_kmobilenet_names_activations_after_the_originals_layers():
    published = {"conv1_activation": "relu6", "d_separable_activation": "relu6"}
    kinds = {
        layer.name: layer.kind
        for layer in create("kmobilenet", **published).graph().layers
        if isinstance(layer, ir.Activation)
    }
    assert kinds["conv1_relu"] == kinds["conv_dw_13_relu"] == "relu6"
    assert kinds["conv_pw_13_bn"] == "swish"
    assert "conv1_act" in {layer.name for layer in create("kmobilenet").graph().layers}


def test_kdensenet_transitions():
    options = {"ktype": "D6_12ch", "blocks": 2, "compression": 0.75, "dropout": 0.1}
    graph = create("kdensenet_bc_l100", ktype_transition="conv", **options).graph()
    transition = graph["dntransition1_conv"]
    assert (transition.in_channels, transition.filters, transition.groups) == (48, 36, 1)
    assert graph["dntransition1_inter"].step == 12
    assert graph["dn2_b1_k_conv"].groups > 1
    assert sum(isinstance(layer, ir.Dropout) for layer in graph.layers) == 2 * 3 + 2
    plain = create("kdensenet_bc_l100", interleave_at_transition=False).graph()
    assert graph["dntransition1_bn"].inputs == ("dntransition1_inter",)
    assert plain["dntransition1_bn"].inputs == ("concatenate_15",)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mobilenet", {"alpha": 0.01}, "'conv1': filters=0"),
        ("kmobilenet", {"alpha": 0.01}, "'conv1': filters=0"),
        ("kdensenet_bc_l100", {"compression": 0.001}, "'dntransition1': c_out=0"),
        ("densenet_bc_l100", {"compression": 0.001}, "'conv2d_33': filters=0"),
        ("inception_v3", {"input_shape": (32, 32, 3)}, "'mixed3_33a_conv'.*3x3 window.*1x1 pixels"),
        ("densenet_bc_l100", {"input_shape": (3, 3, 3)}, "'average_pooling2d_1'.*too small"),
    ],
)
def test_impossible_networks_name_the_layer(name, options, message):
    with pytest.raises(ValueError, match=message):
        create(name, **options).graph()


@pytest.mark.parametrize("name", list_models())
def test_odd_and_tiny_images(name):
    size = {"densenet_bc_l100": 4, "inception_v3": 75}.get(name.removeprefix("k"), 1)
    graph = create(name, input_shape=(size, 75, 1), classes=1).graph()
    assert graph.layers[-1].shape == (1,)


def test_keffnet_s_has_each_stage_once():
    graph = create("keffnet_s").graph()
    blocks = [layer.name for layer in graph.layers if isinstance(layer, ir.DepthwiseConv)]
    assert blocks == [f"k_block{stage}a__0dwconv" for stage in range(1, 8)]


@pytest.mark.parametrize(("concat", "channels"), [(True, 640), (False, 320)])
def test_parallel_paths(concat, channels):
    graph = create("keffnet_b0", ktype=["D6_16ch", 33], concat_paths=concat).graph()
    joined = graph[graph["k_top_conv_conv"].inputs[0]]
    assert (type(joined), joined.channels) == (ir.Concat if concat else ir.Add, channels)
    assert [name[:18] for name in joined.inputs] == ["k_block7a__0projec", "k_block7a__1projec"]
    assert graph["k_block1a__1dwconv"].inputs == ("k_stem_activation",)


@pytest.mark.parametrize("name", list_models())
def test_without_top(name):
    spec = create(name, include_top=False)
    assert len(spec.graph().layers[-1].shape) == 1
    features = create(name, include_top=False, pooling=None).graph()
    assert len(features.layers[-1].shape) == 3
    assert features.output == features.layers[-1].name
    pooled = create(name, include_top=False, pooling="max").graph().layers[-1]
    assert isinstance(pooled, ir.GlobalPool)
    assert pooled.kind == "max"


@pytest.mark.parametrize("name", list_models())
def test_specs_survive_json(name):
    spec = create(name, classes=7, input_shape=(64, 48, 2))
    options = json.loads(json.dumps(dataclasses.asdict(spec)))
    assert options.pop("name") == name
    assert create(name, **options) == spec


@pytest.mark.parametrize("name", list_models())
def test_graphs_are_in_order(name):
    seen = set()
    layers = create(name).graph().layers
    for layer in layers:
        assert seen.issuperset(layer.inputs)
        seen.add(layer.name)
    # Keras 3 refuses "/" in names, so the front ends write "_".
    assert len({name.replace("/", "_") for name in seen}) == len(layers)


def test_ktypes_are_kept_by_name():
    assert create("keffnet_b0", ktype=2).ktype == "D6_16ch"
    assert create("keffnet_b0", ktype=[2, "D6v3_16ch"]).ktype == ("D6_16ch", "D6v3_16ch")


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"'resnet50'.*keffnet_b0, keffnet_b1"):
        create("resnet50")
    with pytest.raises(TypeError, match=r"keffnet_b0 has no option 'kType'.*ktype"):
        create("keffnet_b0", kType=2)
    with pytest.raises(TypeError, match="no option 'name'"):
        create("keffnet_b0", name="x")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"classes": 0}, ValueError, "classes=0"),
        ({"classes": 2.5}, TypeError, r"classes=2\.5"),
        ({"input_shape": (32, 32)}, ValueError, "input_shape"),
        ({"input_shape": 32}, ValueError, "input_shape"),
        ({"input_shape": (32, 32, None)}, TypeError, "input_shape.2.=None"),
        ({"input_shape": (0, 32, 3)}, ValueError, "input_shape.0.=0"),
        ({"pooling": "sum"}, ValueError, "pooling='sum'"),
        ({"pooling": None}, ValueError, "pooling=None"),
        ({"dropout": 1.0}, ValueError, r"dropout=1\.0"),
        ({"dropout": "much"}, TypeError, "dropout='much'"),
        ({"drop_connect": -0.1}, ValueError, r"drop_connect=-0\.1"),
        ({"ktype": "D7"}, ValueError, "D7"),
        ({"ktype": ["D6_16ch", "D7"]}, ValueError, "D7"),
        ({"ktype": []}, ValueError, r"ktype=\[\]"),
        ({"ktype": None}, TypeError, "ktype=None"),
        ({"activation": "tanh"}, ValueError, "activation='tanh'"),
        ({"skip_stride_cnt": "3"}, TypeError, "skip_stride_cnt='3'"),
        ({"width": 0}, ValueError, "width=0"),
    ],
)
def test_options_without_meaning(options, error, message):
    with pytest.raises(error, match=message):
        create("keffnet_b0", **options)


def test_rates_that_grow_too_large_name_the_layer():
    with pytest.raises(ValueError, match=r"k_block\d[a-z]__0drop.*rate="):
        create("keffnet_b7", drop_connect=0.9).graph()


def test_specs_are_plain_dataclasses():
    spec = KEffNet(name="mine", ktype="D6_32ch", width=0.5, input_shape=(32, 32, 3))
    assert spec.graph()["k_stem_conv"].filters == 16
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.ktype = "D6_16ch"


class TestBuilder:
    """Errors of the graph builder name the layer."""

    def test_names_are_unique(self):
        g = GraphBuilder("net", (8, 8, 4))
        g.conv("a", g.input, 4)
        with pytest.raises(ValueError, match="two layers 'a'"):
            g.conv("a", g.input, 4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"filters": 0}, "'a': filters=0"),
            ({"filters": 6, "groups": 4}, "'a'.*4 to 6 channels.*groups=4"),
            ({"filters": 4, "kernel_size": 9, "padding": "valid"}, "'a'.*9x9.*8x8"),
        ],
    )
    def test_impossible_convolutions(self, options, message):
        g = GraphBuilder("net", (8, 8, 4))
        with pytest.raises(ValueError, match=message):
            g.conv("a", g.input, **options)

    def test_impossible_pointwise_blocks(self):
        g = GraphBuilder("net", (8, 8, 4))
        with pytest.raises(ValueError, match="'a': c_out=0"):
            g.pointwise("a", g.input, 0, "D6_16ch", activation=None)
