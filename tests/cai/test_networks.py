"""The model constructors, and the tools that take models apart."""

from __future__ import annotations

import json
import os
import re

import h5py
import keras
import numpy as np
import pytest

import kconv.cai as cai
from kconv.models import count, create
from kconv.weights import save_weights

REFERENCE = os.environ.get("KCONV_REFERENCE", "")
needs_reference = pytest.mark.skipif(
    not REFERENCE, reason="KCONV_REFERENCE names no folder with the original's outputs"
)
TINY = {"input_shape": (32, 32, 3), "classes": 3}

NETWORKS = {
    "EfficientNetB0": (lambda: cai.efficientnet.EfficientNetB0(**TINY), "efficientnet_b0", {}),
    "kEfficientNetS": (
        lambda: cai.efficientnet.kEfficientNetS(kType=cai.layers.D6v3_32ch(), **TINY),
        "keffnet_s",
        {"ktype": "D6v3_32ch"},
    ),
    "kEfficientNetB1": (
        lambda: cai.efficientnet.kEfficientNetB1(skip_stride_cnt=3, kType=13, **TINY),
        "keffnet_b1",
        {"ktype": "D6_32ch", "skip_stride_cnt": 3},
    ),
    "kEfficientNetBN": (
        lambda: cai.efficientnet.kEfficientNetBN(0, **TINY),
        "keffnet_b0",
        {"ktype": "D6_16ch"},
    ),
    "MobileNet": (
        lambda: cai.mobilenet.MobileNet((32, 32, 3), 0.5, classes=3),
        "mobilenet",
        {"alpha": 0.5},
    ),
    "kMobileNet": (
        lambda: cai.mobilenet.kMobileNet(alpha=0.5, kType=cai.layers.D6_32ch(), **TINY),
        "kmobilenet",
        {"alpha": 0.5, "ktype": "D6_32ch"},
    ),
    "MobileNetV3Small": (
        lambda: cai.mobilenet_v3.MobileNetV3Small(weights=None, **TINY),
        "mobilenet_v3_small",
        {},
    ),
    "kMobileNetV3Large": (
        lambda: cai.mobilenet_v3.kMobileNetV3Large(kType=13, alpha=0.75, **TINY),
        "kmobilenet_v3_large",
        {"ktype": 13, "alpha": 0.75},
    ),
    "simple_densenet": (
        lambda: cai.densenet.simple_densenet((32, 32, 3), 3, num_classes=3),
        "densenet_bc_l100",
        {"blocks": 3},
    ),
    "ksimple_densenet": (
        lambda: cai.densenet.ksimple_densenet((32, 32, 3), 3, num_classes=3, kTypeBlock=40),
        "kdensenet_bc_l100",
        {
            "blocks": 3,
            "ktype": "D6_12ch",
            "ktype_transition": "D6_32ch",
            "interleave_at_transition": False,
        },
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_constructors_give_the_specs_networks(name: str) -> None:
    construct, network, options = NETWORKS[name]
    spec = create(network, **options, **TINY)
    model = construct()
    assert model.output_shape == (None, 3)
    assert cai.util.get_model_parameter_counts(model) == count(spec)[:2]
    names = [layer.name.replace("/", "_") for layer in spec.graph().layers]
    assert sorted(layer.name for layer in model.layers) == sorted(names)


def test_inception(tmp_path) -> None:
    model = cai.inception_v3.two_path_inception_v3(input_shape=(75, 75, 3), classes=3, kType=13)
    expected = count(create("kinception_v3", ktype=13, input_shape=(75, 75, 3), classes=3))
    assert cai.util.get_model_parameter_counts(model) == expected[:2]
    assert model.name == "two_path_inception_v3"
    short = cai.inception_v3.two_path_inception_v3(
        False, input_shape=(75, 75, 3), max_mix_idx=0, pooling="max", kType=13
    )
    assert short.output_shape == (None, 256)
    for wrong in ({"deep_two_paths": True}, {"two_paths_first_block": True}):
        with pytest.raises(NotImplementedError, match=next(iter(wrong))):
            cai.inception_v3.two_path_inception_v3(**wrong)
    with pytest.raises(ValueError, match="max_mix_idx=11 is not from 0 to 10"):
        cai.inception_v3.two_path_inception_v3(max_mix_idx=11)


def test_options() -> None:
    s = cai.efficientnet.kEfficientNetS
    assert s(include_top=False, pooling=None).output_shape == (None, None, None, 1280)
    assert s(include_top=False, pooling="max").output_shape == (None, 1280)
    relu = s(activation_fn="relu", **TINY).get_layer("k_stem_activation")
    assert relu.activation is keras.activations.relu
    plain = s(dropout_rate=0, drop_connect_rate=0.5, **TINY)
    everywhere = s(dropout_rate=0, drop_connect_rate=0.5, dropout_all_blocks=True, **TINY)
    dropouts = [
        [layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)]
        for model in (plain, everywhere)
    ]
    assert dropouts == [[], pytest.approx([0.5 * block / 7 for block in range(1, 7)])]
    paths = s(kType=[2, "D6v3_32ch"], concat_paths=False, **TINY)
    assert paths.get_layer("add").output.shape[-1] == 320


def stages(**changes) -> list[dict]:
    """Two stages, the first with some changes."""
    first, second, *_ = cai.efficientnet.DEFAULT_BLOCKS_ARGS
    return [{**first, **changes}, {**second, "repeats": 3, "kernel_size": 5}]


def test_other_stages_divisors_and_prefixes() -> None:
    options = {"blocks_args": stages(), "depth_divisor": 4, **TINY}
    plain = cai.efficientnet.EfficientNet(0.7, 1, 32, **options)
    grouped = cai.efficientnet.kEfficientNet(0.7, 1, kType=13, name_prefix="pre_", **options)
    assert all(layer.name.startswith(("pre_", "input")) for layer in grouped.layers)
    for model, block in ((plain, "block{}_dwconv"), (grouped, "pre_block{}__0dwconv")):
        kernels = [
            model.get_layer(block.format(at)).kernel.shape for at in ("1a", "2a", "2b", "2c")
        ]
        # 0.7 of 32, 16 and 24 filters are 22.4, 11.2 and 16.8: 24, 12 and 16 in multiples of 4.
        expected = [(3, 3, 24, 1), (5, 5, 6 * 12, 1), (5, 5, 6 * 16, 1), (5, 5, 6 * 16, 1)]
        assert [tuple(kernel) for kernel in kernels] == expected


def test_input_tensor() -> None:
    x = keras.Input((32, 32, 3))
    model = cai.mobilenet.MobileNet(alpha=0.125, input_tensor=x, classes=3)
    assert model.inputs[0] is x
    assert model.get_layer("conv1_pad").padding == ((0, 1), (0, 1))
    with pytest.raises(ValueError, match=r"input_tensor is not a keras\.Input"):
        cai.mobilenet.MobileNet(alpha=0.125, input_tensor=keras.layers.ReLU()(x), classes=3)


def test_densenets_decay() -> None:
    model = cai.densenet.simple_densenet((8, 8, 3), 1, l2_decay=0.01)
    kernels = [layer.kernel for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
    expected = 0.01 * sum(float(keras.ops.sum(kernel**2)) for kernel in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-4)
    assert not cai.densenet.simple_densenet((8, 8, 3), 1, l2_decay=0).losses


@pytest.mark.parametrize(
    ("construct", "error", "message"),
    [
        (lambda: cai.efficientnet.kEfficientNetB0(kType=29), NotImplementedError, "kType 29 of"),
        (lambda: cai.efficientnet.kEfficientNetS(kType=[2, 7]), NotImplementedError, "kType 7 of"),
        (lambda: cai.efficientnet.kEfficientNetS(kType=99), ValueError, "unknown ktype=99"),
        (lambda: cai.efficientnet.kEfficientNetS(size=3), TypeError, "argument 'size'"),
        (lambda: cai.efficientnet.kEfficientNetBN(8), ValueError, "N=8 is not from 0 to 7"),
        (
            lambda: cai.efficientnet.kEfficientNet(1, 1, blocks_args=stages(se_ratio=0)),
            NotImplementedError,
            "no se_ratio=0",
        ),
        (
            lambda: cai.efficientnet.EfficientNet(1, 1, 32, blocks_args=stages(filters_in=16)),
            ValueError,
            "stage 1 of blocks_args has filters_in=16, and what comes before it 32 filters",
        ),
        (
            lambda: cai.efficientnet.EfficientNet(1, 1, 32, depth_divisor=0),
            ValueError,
            "depth_divisor=0",
        ),
        (
            lambda: cai.efficientnet.kEfficientNetS(activation_fn=abs),
            ValueError,
            "unknown activation .*known are relu",
        ),
        (lambda: cai.mobilenet.kMobileNet(l_ratio=0.5), NotImplementedError, "no l_ratio=0.5"),
        (
            lambda: cai.densenet.ksimple_densenet((8, 8, 3), extra_compression=True),
            NotImplementedError,
            "no extra_compression=True",
        ),
        (
            lambda: cai.datasets.load_hyperspectral_matlab_image("", "", "", "", ""),
            NotImplementedError,
            "load_hyperspectral_matlab_image",
        ),
    ],
)
def test_refusals(construct, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        construct()


def test_weights_argument(tmp_path) -> None:
    source = cai.mobilenet.kMobileNet(alpha=0.25, **TINY)
    save_weights(source, tmp_path / "w.safetensors")
    model = cai.mobilenet.kMobileNet(alpha=0.25, weights=tmp_path / "w.safetensors", **TINY)
    np.testing.assert_equal(model.get_weights(), source.get_weights())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "construct"),
    [
        ("MobileNet", lambda w: cai.mobilenet.MobileNet((32, 32, 3), 0.25, weights=w)),
        ("MobileNetV3Small", lambda w: cai.mobilenet_v3.MobileNetV3Small((32, 32, 3), weights=w)),
        ("InceptionV3", lambda w: cai.inception_v3.InceptionV3(True, w, None, (75, 75, 3))),
    ],
)
def test_imagenet_weights_are_those_of_keras(name: str, construct, monkeypatch) -> None:
    """Keras's own application, here with random weights, and the baseline compute the same."""
    application, donors = getattr(keras.applications, name), []

    def without_download(*args, **kwargs):
        model = application(*args, weights=None, **kwargs)
        rng = np.random.default_rng(0)
        for weight in model.weights:
            spread = (6 / max(1, np.prod(weight.shape[:-1]))) ** 0.5
            low = 0.5 if len(weight.shape) == 1 else -spread
            weight.assign(rng.uniform(low, spread if low < 0 else 1.5, weight.shape))
        donors.append(model)
        return model

    monkeypatch.setattr(keras.applications, name, without_download)
    model = construct("imagenet")
    images = np.random.default_rng(0).random((1, *model.input_shape[1:]), np.float32)
    expected = donors[0].predict(images, verbose=0)
    assert expected.max() > 2 * expected.mean()  # else anything would agree
    np.testing.assert_allclose(model.predict(images, verbose=0), expected, rtol=1e-2, atol=1e-4)


@needs_reference
@pytest.mark.parametrize("name", ["kEffNetB0_D6_16ch_skip3", "kMobileNet_D6v3_32ch"])
def test_load_the_originals_checkpoints(name: str) -> None:
    model = cai.models.load_kereas_model(f"{REFERENCE}/models/{name}.hdf5")
    expected = np.load(f"{REFERENCE}/models/{name}.npz")
    found = model.predict_on_batch(expected["x"])
    np.testing.assert_allclose(found, expected["y"], atol=1e-4)


@needs_reference
def test_load_the_published_checkpoint() -> None:
    """ReLU layers, and images of any size."""
    model = cai.models.load_kereas_model(f"{REFERENCE}/published/kMobileNet_D6_32ch_cifar10.hdf5")
    assert model.input_shape == (None, None, None, 3)
    assert isinstance(model.get_layer("conv1_relu"), keras.layers.ReLU)


def test_load_an_originals_own_layers(tmp_path) -> None:
    """A Keras 2 configuration: "/" in names, functions by name, layers of the original."""

    def layer(kind: str, name: str, *inputs: str, **config) -> dict:
        nodes = [[[source, 0, 0, {}] for source in inputs]] if inputs else []
        return {
            "class_name": kind,
            "name": name,
            "config": {"name": name, "dtype": "float32", **config},
            "inbound_nodes": nodes,
        }

    convolution = {
        "filters": 4,
        "kernel_size": [1, 1],
        "strides": [1, 1],
        "padding": "same",
        "dilation_rate": [1, 1],
        "groups": 2,
        "activation": "linear",
        "use_bias": False,
        "kernel_initializer": {"class_name": "GlorotUniform", "config": {"seed": None}},
        "kernel_regularizer": {"class_name": "L2", "config": {"l2": 0.5}},
    }
    layers = [
        layer("InputLayer", "input_1", batch_input_shape=[None, 8, 8, 4], sparse=False),
        layer("Conv2D", "a/b", "input_1", **convolution),
        layer("Activation", "act/x", "a/b", activation="HardSwish"),
        layer("CopyChannels", "copy_channels", "act/x", channel_start=1, channel_count=2),
        layer("Concatenate", "concatenate_3", "act/x", "copy_channels", axis=3),
    ]
    config = {"name": "m", "layers": layers, "input_layers": [["input_1", 0, 0]]}
    config["output_layers"] = [["concatenate_3", 0, 0]]
    with h5py.File(tmp_path / "m.hdf5", "w") as file:
        file.attrs["keras_version"] = "2.6.0"
        file.attrs["model_config"] = json.dumps({"class_name": "Functional", "config": config})
        weights = file.create_group("model_weights")
        weights.attrs["layer_names"] = np.array(["a/b"], "S")
        weights["a/b/a/b/kernel:0"] = np.ones((1, 1, 2, 4), np.float32)
        weights["a/b"].attrs["weight_names"] = np.array(["a/b/kernel:0"], "S")
    model = cai.models.load_kereas_model(tmp_path / "m.hdf5")
    found = keras.ops.convert_to_numpy(model(np.full((1, 8, 8, 4), 0.5, np.float32)))
    np.testing.assert_allclose(found, np.full((1, 8, 8, 6), 4 / 6), rtol=1e-5)
    assert float(model.losses[0]) == 4


def test_load_keras_file_and_wrong_ones(tmp_path) -> None:
    model = cai.densenet.ksimple_densenet((8, 8, 3), 1, has_interleave_at_transition=True)
    model.save(tmp_path / "m.keras")
    model.save(tmp_path / "m.h5")
    for file in ("m.keras", "m.h5"):
        again = cai.models.load_kereas_model(tmp_path / file)
        np.testing.assert_equal(again.get_weights(), model.get_weights())
    (tmp_path / "text.hdf5").write_text("not a model")
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}/text.hdf5 holds no model"):
        cai.models.load_kereas_model(tmp_path / "text.hdf5")
    with pytest.raises(FileNotFoundError):
        cai.models.load_kereas_model(tmp_path / "absent.hdf5")


def small_model() -> keras.Model:
    keras.utils.set_random_seed(0)  # some weights have means so near zero that rounding shows
    x = keras.Input((6, 5, 3))
    y = keras.layers.Conv2D(4, 3, name="features")(x)
    pooled = keras.layers.GlobalAveragePooling2D(name="pooled")(y)
    return keras.Model(x, keras.layers.Dense(2, name="probs")(pooled))


def test_partial_models() -> None:
    model = small_model()
    x = np.random.default_rng(0).random((3, 6, 5, 3), np.float32)
    features = cai.models.PartialModelPredict(x, model, "features")
    assert features.shape == (3, 4, 3, 4)
    pooled = cai.models.PartialModelPredict(x, model, "features", hasGlobalAvg=True, pBatchSize=2)
    np.testing.assert_allclose(pooled, features.mean(axis=(1, 2)), rtol=1e-5)
    part = cai.models.CreatePartialModelCopyingChannels(model, "features", 1, 2)
    np.testing.assert_allclose(part.predict(x, verbose=0), features[..., 1:3], rtol=1e-5)
    one = cai.models.CreatePartialModelFromChannel(model, "features", 3)
    np.testing.assert_allclose(one.predict(x, verbose=0), features[..., 3:], rtol=1e-5)
    assert cai.models.CreatePartialModelWithSoftMax(model, "pooled", 7).output_shape == (None, 7)
    cai.models.make_model_untrainable(model)
    assert not model.trainable_weights
    cai.models.make_model_trainable(model)
    assert len(model.trainable_weights) == 4
    with pytest.raises(ValueError, match="absent"):
        cai.models.CreatePartialModel(model, "absent")


def test_heat_map() -> None:
    model = small_model()
    x = np.random.default_rng(0).random((3, 6, 5, 3), np.float32)
    features = cai.models.PartialModelPredict(x, model, "features")
    weights = np.array(model.get_layer("probs").kernel)[:, 1]
    expected = np.maximum(features @ weights, 0)
    expected /= np.maximum(expected.max(axis=(1, 2), keepdims=True), 1e-9)
    heat_map = cai.models.calculate_heat_map_from_dense_and_avgpool
    np.testing.assert_allclose(heat_map(x, 1, model, "features", "probs"), expected, atol=1e-5)
    for image in (x[0], x[:1]):
        found = heat_map(image, 1, model, "features", "probs")
        np.testing.assert_allclose(found, expected[0], atol=1e-5)
    model.get_layer("probs").kernel.assign(np.full((4, 2), -1.0))
    model.get_layer("features").kernel.assign(np.ones((3, 3, 3, 4)))
    assert (heat_map(x, 0, model, "features", "probs") == 0).all()
    with pytest.raises(ValueError, match="target_class=2 is not one of 2 classes"):
        heat_map(x, 2, model, "features", "probs")


def test_gradient_ascent() -> None:
    model = small_model()
    part = cai.models.CreatePartialModel(model, "features")
    image = np.random.default_rng(0).random((6, 5, 3)).astype(np.float32)

    def excitement(img):
        return float(cai.gradientascent.calc_sum_channel_mean_from_model(img, part))

    moved = cai.gradientascent.run_gradient_ascent(image, part, steps=5, step_size=0.1)
    assert moved.shape == image.shape
    assert excitement(moved) > excitement(image)
    assert abs(moved).max() <= 1
    resizable = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(2, 1)])
    dreamt = cai.gradientascent.run_gradient_ascent_octaves(image, resizable, 2, high_range=2)
    assert dreamt.shape == (7, 6, 3)  # 1.3 times as large
    assert np.isfinite(dreamt).all()
