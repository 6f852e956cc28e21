"""The options: their types, presets, TOML files, and the page that lists them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from kconv.training import PRESETS, Config, config_from, options_table, read_toml, to_toml

DOCS = Path(__file__).parents[2] / "docs/guide/training.md"

EVERYTHING = Config(
    ktype="D6_16ch",
    model_options={"width": 0.5, "name with = and \x7f\n": [1, 2]},
    data_dir='a "quoted" folder\\of\t日本',
    class_weights=(1, 2.5),
    ema_decay=0.5,
    augment=True,
    lr=1e-7,
)


@pytest.mark.parametrize("config", [Config(), EVERYTHING])
def test_toml_holds_every_option(config: Config, tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert config_from(read_toml(path)) == config
    text = path.read_text("utf-8")
    for field in dataclasses.fields(Config):
        assert re.search(rf"^(# )?{field.name} = ", text, re.MULTILINE), field.name


def test_preset_is_overruled() -> None:
    config = config_from({"preset": "paper-v2", "epochs": 3})
    assert config.ktype == "D6v3_32ch"
    assert config.epochs == 3
    for name in PRESETS:
        config_from({"preset": name})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": "three"}, "epochs='three' is a str, expected a whole number"),
        ({"epochs": 1.5}, "epochs=1.5 is a float, expected a whole number"),
        ({"epochs": True}, "epochs=True is a bool, expected a whole number"),
        ({"augment": 1}, "augment=1 is a int, expected true or false"),
        ({"lr": "0.1"}, "lr='0.1' is a str, expected a number"),
        ({"ktype": 7}, "ktype=7 is a int, expected text"),
        ({"model_options": [1]}, "expected a table"),
        ({"class_weights": [1, "x"]}, "expected text or a list of numbers"),
        ({"preset": "fats"}, r"unknown preset 'fats' \(did you mean 'fast'\?\)"),
        ({"optimiser": "sgd"}, r"has no option 'optimiser' \(did you mean 'optimizer'\?\)"),
        ({"optimizer": "adam"}, r"unknown optimizer 'adam' \(did you mean 'adamw'\?\)"),
        ({"weights": "a", "compress_from": "b"}, "both say what to start from"),
        ({"momentum": 0.5}, "momentum=0.5 has no effect without optimizer='sgd'"),
        ({"warmup_epochs": 2}, "has no effect without lr_schedule 'cosine' or 'constant'"),
        ({"teacher_weight": 0.3}, "teacher_weight=0.3 has no effect without teacher"),
        ({"preset": "fast", "augment": True}, "augment=True mirrors and shifts, .*give one"),
    ],
)
def test_bad_option_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        config_from(given)


def test_file_that_is_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    for content in (b"epochs = = 3", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"config\.toml is not TOML"):
            read_toml(path)
    path.write_text("batch-size = 32")
    assert read_toml(path) == {"batch_size": 32}


def test_the_guide_lists_the_options() -> None:
    """`python -c "from kconv import training; print(training.options_table())"` makes the table."""
    assert options_table() in DOCS.read_text("utf-8")
