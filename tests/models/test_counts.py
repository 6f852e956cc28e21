"""Parameters and multiply-accumulates against the papers and the original's figures."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from kconv.models import Counts, GraphBuilder, count, create, list_models, paper_table, table

TABLE = Path(__file__).parents[1] / "data" / "paper_tables.csv"
PAPER = list(csv.DictReader(TABLE.read_text().splitlines()))


def paper_id(row):
    return f"{row.dataset}-{row.model}-{row.ktype}"


@pytest.mark.parametrize("row", paper_table(), ids=paper_id)
def test_published_parameters(row):
    found = row.counts.total if row.published_is_total else row.counts.trainable
    assert found == row.published_parameters


@pytest.mark.parametrize("row", paper_table(), ids=paper_id)
def test_published_operations_are_a_few_per_cent_above_ours(row):
    if (row.model, row.ktype) == ("kMobileNet", "D6_128ch"):
        pytest.skip("an outlier in the paper")
    # The smallest networks spend the largest share in other operations.
    assert 1.0 <= row.published_flops / row.counts.macs < 1.11


def test_the_paper_table_is_the_papers():
    def fields(row):
        what = (row.paper, row.dataset, row.epochs, row.model, row.ktype, row.input, row.classes)
        accuracy = f"{row.published_accuracy:.4f}"
        return [*map(str, (*what, row.published_parameters, row.published_flops)), accuracy]

    assert [fields(row) for row in paper_table()] == [list(row.values()) for row in PAPER]
    totals = [(row.dataset, row.ktype) for row in paper_table() if row.published_is_total]
    histology = "Colorectal cancer histology"
    assert totals == [(histology, f"D6v3_{ch}ch") for ch in (2, 4, 8)]


def test_savings_are_against_the_unmodified_network():
    savings = {(r.dataset, r.model, r.ktype): r.saving for r in paper_table()}
    assert savings["CIFAR-10", "EfficientNet-B0", ""] == 0
    saving = savings["CIFAR-10", "kEffNet-B0 (skip_stride_cnt=3)", "D6_16ch"]
    assert saving == pytest.approx(1 - 639_702 / 4_020_358)
    assert savings["CIFAR-10", "kMobileNet", "D6_32ch"] == pytest.approx(1 - 403_018 / 3_217_226)


def test_table():
    rows = table()
    assert [(row.model, row.ktype) for row in rows] == [
        (f"keffnet_b{n}", ktype)
        for n in range(8)
        for ktype in ("D6_16ch", "D6_32ch", "D6v3_16ch", "D6v3_32ch")
    ]
    assert rows[0] == ("keffnet_b0", "D6_16ch", 639_702, 123_613_524)
    small = table(["kmobilenet"], [13], classes=100, input_shape=(32, 32, 1))
    assert [(row.model, row.ktype) for row in small] == [("kmobilenet", "D6_32ch")]
    with pytest.raises(TypeError, match="'ktype'"):
        table(["mobilenet"])


@pytest.mark.parametrize(
    ("name", "options", "trainable", "total"),
    [
        # From keras.applications with 1000 classes; its EfficientNets hold 7 statistics more.
        ("efficientnet_b1", {}, 7_794_184, 7_856_239 - 7),
        ("efficientnet_b4", {}, 19_341_616, 19_466_823 - 7),
        ("efficientnet_b7", {}, 66_347_960, 66_658_687 - 7),
        ("inception_v3", {}, 23_817_352, 23_851_784),
        ("mobilenet", {"alpha": 0.5}, 1_331_592, 1_342_536),
        ("mobilenet", {"depth_multiplier": 2}, 7_426_120, 7_457_928),
        ("mobilenet_v3_large", {"alpha": 0.75}, 3_993_528, 4_012_616),
        ("mobilenet_v3_large", {"alpha": 1.3}, 8_709_384, 8_741_320),
        ("mobilenet_v3_large", {"minimalistic": True}, 3_924_288, 3_948_688),
        ("mobilenet_v3_small", {"alpha": 0.75}, 2_041_872, 2_051_552),
        ("mobilenet_v3_small", {"alpha": 1.3}, 3_983_152, 3_999_536),
        ("mobilenet_v3_small", {"minimalistic": True}, 2_044_736, 2_056_848),
    ],
)
def test_baselines_have_the_parameters_of_keras_applications(name, options, trainable, total):
    assert count(create(name, **options))[:2] == (trainable, total)


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
        ("kmobilenet", {"ktype": "D6_32ch"}, 151_867_904),
        ("kdensenet_bc_l100", {"ktype": "D6_12ch"}, 136_968_540),
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
