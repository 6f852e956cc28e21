"""Parameters and multiply-accumulates against the papers and the original's figures."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from kconv.models import Counts, GraphBuilder, count, create, list_models

TABLE = Path(__file__).parents[1] / "data" / "paper_tables.csv"
PAPER = list(csv.DictReader(TABLE.read_text().splitlines()))
MODELS = {
    "EfficientNet-B0": "efficientnet_b0",
    "kEffNet-B0": "keffnet_b0",
    "kEffNet-B0 (skip_stride_cnt=3)": "keffnet_b0",
}


def paper_spec(row):
    """The spec of a row of the papers' tables."""
    size = int(row["input"].split("x")[0])
    options = {"input_shape": (size, size, 3), "classes": int(row["classes"])}
    if row["ktype"]:
        options["ktype"] = row["ktype"]
    if "skip_stride_cnt=3" in row["model"]:
        options["skip_stride_cnt"] = 3
    return create(MODELS[row["model"]], **options)


def published_totals(row):
    """Whether the published figure counts the moving statistics too (see the paper's table)."""
    few_channels = row["ktype"] in ("D6v3_2ch", "D6v3_4ch", "D6v3_8ch")
    return few_channels and row["dataset"].startswith("Colorectal")


@pytest.mark.parametrize(
    "row",
    [row for row in PAPER if row["model"] in MODELS],
    ids=lambda row: f"{row['dataset']}-{row['model']}-{row['ktype']}",
)
def test_published_parameters(row):
    counts = count(paper_spec(row))
    found = counts.total if published_totals(row) else counts.trainable
    assert found == int(row["trainable_params"])


@pytest.mark.parametrize(
    ("name", "options", "macs"),
    [
        ("keffnet_b0", {"ktype": "D6_16ch"}, 123_613_524),
        (
            "keffnet_b0",
            {"ktype": "D6_16ch", "skip_stride_cnt": 3, "input_shape": (32, 32, 3)},
            81_153_588,
        ),
        ("efficientnet_b0", {}, 384_547_552),
    ],
)
def test_multiply_accumulates(name, options, macs):
    assert count(create(name, classes=10, **options)).macs == macs


@pytest.mark.parametrize("name", list_models())
def test_unknown_sizes_leave_the_parameters_known(name):
    known = count(create(name, classes=7))
    unknown = count(create(name, classes=7, input_shape=(None, None, 3)))
    assert unknown == (known.trainable, known.total, None)
    assert count(create(name, classes=7), input_shape=(None, None, 3)) == unknown


def test_count_by_hand():
    g = GraphBuilder("hand", (9, 8, 3))
    x = g.conv("conv", g.input, 4, kernel_size=(3, 1), strides=2, use_bias=True)  # 5 x 4 pixels
    x = g.depthwise_conv("depthwise", x, 3, padding="valid")  # 3 x 2 pixels
    x = g.batch_norm("bn", x, scale=False)
    x = g.dense("dense", g.global_pool("pool", x), 2)
    trainable = (3 * 3 * 4 + 4) + 3 * 3 * 4 + 4 + (4 * 2 + 2)
    macs = 5 * 4 * 3 * 3 * 4 + 3 * 2 * 3 * 3 * 4 + 4 * 2
    assert count(g.build(x)) == Counts(trainable, trainable + 2 * 4, macs)


def test_a_graph_has_no_other_input_shape():
    graph = create("keffnet_b0").graph()
    with pytest.raises(TypeError, match="input_shape"):
        count(graph, input_shape=(32, 32, 3))
