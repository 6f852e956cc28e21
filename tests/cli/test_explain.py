"""``kconv explain`` prints each layer's candidates, as text and as JSON."""

import json

import pytest

from kconv.cli import main

ARGUMENTS = ["explain", "--model", "keffnet_b0", "--image-size", "32", "--images", "2"]


def test_text_and_json(capsys):
    options = ["--layout", "NHWC", "--direction", "grad_weight", "--ktype", "D6_16ch"]
    assert main([*ARGUMENTS, *options]) == 0
    text = capsys.readouterr().out
    assert main([*ARGUMENTS, *options, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)
    assert len(layers) > 30
    for layer in layers:
        (chosen,) = [c["algorithm"] for c in layer["candidates"] if c["chosen"]]
        block = text[text.index(f"\n{layer['layer']}\n") :].split("\n\n")[0]
        assert layer["problem"] in block
        assert f"\n* {chosen} " in block
        assert layer["operation"] != "interleave"  # which has no weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "keffnet_b99"], "keffnet_b99"),
        (["--ktype", "D7"], "D7"),
        (["--images", "0"], "0, expected at least 1"),
        (["--image-size", "0"], "is below 1"),
    ],
)
def test_bad_input(options, message, capsys):
    assert main([*ARGUMENTS, *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kconv: error: ")
    assert message in error
    assert error.count("\n") == 1
