"""The kTypes' rules against blocks of the original implementation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kconv import ktypes
from kconv.ktypes import INPUT, KTYPES, interleave_index, plan, resolve

BLOCKS = sorted((Path(__file__).parents[1] / "data" / "blocks").glob("*.npz"))
ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "swish": lambda x: x / (1 + np.exp(-x)),
}


@pytest.fixture(params=BLOCKS, ids=lambda path: path.stem)
def block(request):
    """(arrays, meta) of one block of the original."""
    with np.load(request.param) as arrays:
        return dict(arrays), json.loads(str(arrays["meta"]))


def layer_list(block_plan, has_batch_norm):
    """A plan as the layer list of the original: name -> (type, inputs, details)."""
    layers, output = {}, {INPUT: "input_1"}
    for step in block_plan:
        inputs = [output[name] for name in step.inputs]
        match step:
            case ktypes.Unit():
                details = {"filters": step.channels, "groups": step.groups}
                layers[step.conv_name] = ("Conv2D", inputs, details)
                inputs = [step.conv_name]
                if has_batch_norm:
                    layers[step.bn_name] = ("BatchNormalization", inputs, {})
                    inputs = [step.bn_name]
                layers[step.name] = ("Activation", inputs, {})
            case ktypes.Interleave():
                layers[step.name] = ("InterleaveChannels", inputs, {"step": step.step})
            case ktypes.CopyChannels():
                layers[step.name] = ("CopyChannels", inputs, {})
            case ktypes.Concat():
                layers[step.name] = ("Concatenate", inputs, {})
            case ktypes.Add():
                layers[step.name] = ("Add", inputs, {})
        output[step.name] = step.name
    return layers


def evaluate(block_plan, arrays, meta, *, training):
    """The block's output in float64, channels last, straight from the definitions."""
    activation = ACTIVATIONS[meta["activation"]]

    def weight(layer, which):
        return arrays[f"w:{layer}/{which}"].astype(np.float64)

    def unit(step, x):
        kernel = weight(step.conv_name, "kernel")[0, 0]
        parts = np.split(x, step.groups, axis=-1)
        filters = np.split(kernel, step.groups, axis=-1)
        y = np.concatenate([p @ f for p, f in zip(parts, filters, strict=True)], axis=-1)
        if meta["use_bias"]:
            y = y + weight(step.conv_name, "bias")
        if meta["has_batch_norm"]:
            bn = step.bn_name
            mean, variance = weight(bn, "moving_mean"), weight(bn, "moving_variance")
            if training:
                mean, variance = y.mean(axis=(0, 1, 2)), y.var(axis=(0, 1, 2))
            y = (y - mean) / np.sqrt(variance + meta["bn_epsilon"])
            y = y * weight(bn, "gamma") + weight(bn, "beta")
        return activation(y)

    values = {INPUT: arrays["x"].astype(np.float64)}
    for step in block_plan:
        x = [values[name] for name in step.inputs]
        match step:
            case ktypes.Unit():
                y = unit(step, x[0])
            case ktypes.Interleave():
                y = x[0][..., interleave_index(x[0].shape[-1], step.step)]
            case ktypes.CopyChannels():
                y = x[0][..., step.start : step.start + step.channels]
            case ktypes.Concat():
                y = np.concatenate(x, axis=-1)
            case ktypes.Add():
                y = x[0] + x[1]
        assert y.shape[-1] == step.channels
        values[step.name] = y
    return values[block_plan.output]


def test_layers_are_the_originals(block):
    _, meta = block
    block_plan = plan(meta["kType"], meta["cin"], meta["cout"], "k")
    found = layer_list(block_plan, meta["has_batch_norm"])
    details = ("filters", "groups", "step")
    original = {
        layer["name"]: (
            layer["type"],
            layer["inputs"],
            {key: layer[key] for key in details if key in layer},
        )
        for layer in meta["layers"][1:]
    }
    assert found == original


def test_weight_shapes_are_the_originals(block):
    arrays, meta = block
    expected = {}
    for unit in plan(meta["kType"], meta["cin"], meta["cout"], "k").units:
        kernel = (1, 1, unit.in_channels // unit.groups, unit.channels)
        expected[f"w:{unit.conv_name}/kernel"] = kernel
        if meta["use_bias"]:
            expected[f"w:{unit.conv_name}/bias"] = kernel[-1:]
        if meta["has_batch_norm"]:
            for name in ("gamma", "beta", "moving_mean", "moving_variance"):
                expected[f"w:{unit.bn_name}/{name}"] = kernel[-1:]
    assert {k: a.shape for k, a in arrays.items() if k.startswith("w:")} == expected


@pytest.mark.parametrize("mode", ["infer", "train"])
def test_values_are_the_originals(block, mode):
    arrays, meta = block
    block_plan = plan(meta["kType"], meta["cin"], meta["cout"], "k")
    found = evaluate(block_plan, arrays, meta, training=mode == "train")
    expected = arrays[f"y_{mode}"]
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def names(ktype, c_in, c_out):
    return [step.name for step in plan(ktype, c_in, c_out, "k")]


def test_interleave_is_skipped_where_each_group_has_one_output():
    assert names("D6_16ch", 96, 4) == ["k", "k_group_interconn", "k_inter_group_add"]
    assert names(1, 96, 4) == ["k"]


def test_type_4_appends_a_grouped_convolution():
    block = plan(4, 64, 32, "k")
    assert [step.name for step in block] == [*names(2, 64, 32), "e_k"]
    last = block.units[-1]
    assert (last.inputs, last.in_channels, last.groups) == (("k_inter_group_add",), 32, 2)


def test_type_5_adds_the_interleaved_output():
    assert plan(5, 64, 32, "k").steps[-1].inputs == ("k_group_interconn", "k_group_interleaved")
    assert plan(2, 64, 32, "k").steps[-1].inputs == ("k_group_interconn", "k")


def test_type_6_folds_both_and_drops_an_odd_channel():
    block = plan(6, 64, 32, "k")
    concat = block.steps[-1]
    by_name = {step.name: step for step in block}
    assert concat.name == "k_inter_group_concat"
    assert [by_name[name].inputs for name in concat.inputs] == [("k_group_interconn",), ("k",)]
    assert block.out_channels == 32
    assert plan(6, 81, 27, "k").out_channels == 26
    assert names(6, 32, 64) == ["k", "k_group_interleaved"]


def test_filters_limit_the_groups():
    # 100 channels in groups of 4 would make 25 groups; 6 filters allow 6 of ceil(100 / 6) = 17.
    block = plan("kT3v3_4ch", 100, 6, "k")
    assert [type(step).__name__ for step in block] == ["CopyChannels", "Concat", "Unit"]
    assert (block.units[0].in_channels, block.units[0].groups) == (102, 6)


@pytest.mark.parametrize("c_in", [1, 2, 3, 7, 16, 17, 31, 33, 64, 97])
@pytest.mark.parametrize("c_out", [1, 2, 5, 16, 24, 61, 96])
def test_every_ktype_makes_a_sound_block(c_in, c_out):
    for ktype in KTYPES:
        block = plan(ktype, c_in, c_out, "k")
        channels = {INPUT: c_in}
        for step in block:
            total = [channels[name] for name in step.inputs]
            match step:
                case ktypes.Unit():
                    assert total == [step.in_channels]
                    assert step.in_channels % step.groups == step.channels % step.groups == 0
                case ktypes.CopyChannels():
                    assert 0 < step.channels <= total[0]
                case ktypes.Concat():
                    assert sum(total) == step.channels
                case ktypes.Add():
                    assert total == [step.channels] * 2
                case ktypes.Interleave():
                    assert step.step > 1
            assert step.name not in channels
            channels[step.name] = step.channels
        assert block.out_channels == c_out or ktype.name == "D8"


@pytest.mark.parametrize("step", range(1, 12))
def test_interleave_index(step):
    index = interleave_index(10, step)
    expected = [c for s in range(step) for c in range(10) if c % step == s]
    assert list(index) == expected
    assert sorted(index) == list(range(10))


def test_interleave_index_of_nothing_and_of_a_bad_step():
    assert interleave_index(0, 3) == ()
    with pytest.raises(ValueError, match="step=0"):
        interleave_index(4, 0)


def test_resolve():
    assert len({k.number for k in KTYPES}) == len({k.name for k in KTYPES}) == len(KTYPES)
    for ktype in KTYPES:
        assert resolve(ktype.name) is resolve(ktype.number) is resolve(ktype) is ktype
    assert resolve("kT3v3_8ch").number == 48


@pytest.mark.parametrize("bad", ["D6_17ch", "d6_16ch", "", 7, -1, 99])
def test_unknown_ktypes_list_the_known(bad):
    with pytest.raises(ValueError, match=r"D6_16ch \(2\).*kT3v3_128ch"):
        resolve(bad)


def test_unknown_ktypes_name_a_close_one():
    with pytest.raises(ValueError, match=r"unknown ktype='d6_16ch' \(did you mean 'D6_16ch'\?\)"):
        resolve("d6_16ch")


@pytest.mark.parametrize("bad", [None, 2.0, True, ["D6_16ch"]])
def test_ktypes_of_a_wrong_type(bad):
    with pytest.raises(TypeError, match="ktype="):
        resolve(bad)


@pytest.mark.parametrize(("c_in", "c_out", "name"), [(0, 8, "c_in=0"), (8, -1, "c_out=-1")])
def test_impossible_channel_counts(c_in, c_out, name):
    with pytest.raises(ValueError, match=rf"^{name}: a convolution needs"):
        plan(2, c_in, c_out)
    with pytest.raises(ValueError, match=rf"^layer 'project': {name}"):
        plan(2, c_in, c_out, "project")


def test_channel_counts_are_whole_numbers():
    assert plan(2, np.int64(64), np.int32(32)).out_channels == 32
    with pytest.raises(TypeError, match=r"c_in=8\.5"):
        plan(2, 8.5, 8)
