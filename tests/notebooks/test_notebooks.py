"""The notebooks: what is committed, and a run of each with small settings in its parameters."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed: kconv[notebooks]")
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: kconv[notebooks]")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: kconv[notebooks]")

FOLDER = Path(__file__).parents[2] / "notebooks"
KEFFNET = {
    "MODEL": "kEfficientNetS",
    "SKIP_STRIDES": 0,
    "TRAIN_IMAGES": 40,
    "TEST_IMAGES": 20,
    "EPOCHS": 1,
    "BATCH_SIZE": 6,
}
SMALL: dict[str, dict[str, Any]] = {
    "01-keffnet-v1": {**KEFFNET, "WEIGHTS": None},
    "02-keffnet-v2": KEFFNET,
    "03-class-activation-maps": {"TRAIN_IMAGES": 40, "TEST_IMAGES": 20, "EPOCHS": 1},
    "04-compress-your-model": {
        "WIDTHS": (8, 32, 64),
        "TRAIN_IMAGES": 40,
        "TEST_IMAGES": 20,
        "EPOCHS": 1,
    },
    "05-where-the-speed-comes-from": {
        "MODEL": "keffnet_s",
        "OPTIONS": {"ktype": "D6_16ch"},
        "BATCH_SIZE": 2,
        "TURNS": 1,
    },
}
every_notebook = pytest.mark.parametrize("name", SMALL)


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def parameters_of(notebook: Any) -> Any:
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    return cell


def outputs_of(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", ())]


def pictures_of(notebook: Any) -> list[str]:
    return [
        output.data["image/png"]
        for output in outputs_of(notebook)
        if "image/png" in output.get("data", {})
    ]


def run(name: str, settings: dict[str, Any]) -> Any:
    """The notebook, executed with these settings after those of its parameters."""
    notebook = read(name)
    cell = parameters_of(notebook)
    known = {node.targets[0].id for node in ast.parse(cell.source).body}
    assert settings.keys() <= known
    cell.source += "".join(f"\n{key} = {value!r}" for key, value in settings.items())
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": FOLDER}}
    )
    return client.execute()


def test_all_notebooks_are_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SMALL)


@every_notebook
def test_committed_outputs(name: str) -> None:
    """Of a whole run from top to bottom, on the embedded images, on nobody's machine."""
    notebook = read(name)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert len(pictures_of(notebook)) >= 2
    for output in outputs_of(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        assert not re.search(r"/(home|root|tmp|usr|work)/", str(output.get("text", output)))
    source = parameters_of(notebook).source
    assert "DATASET" not in source or 'DATASET = "fashion_mnist_mini"' in source


@pytest.mark.slow
@every_notebook
def test_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")  # nothing is compiled there
    settings = dict(SMALL[name])
    if "OUTPUT" in parameters_of(read(name)).source:
        settings["OUTPUT"] = str(tmp_path)
    assert len(pictures_of(run(name, settings))) == len(pictures_of(read(name)))
    assert "OUTPUT" not in settings or any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SMALL if not name.startswith("05")])
def test_run_on_cifar10(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = os.environ.get("KCONV_REFERENCE")
    archive = Path(root or "").parent / "data/cifar10-jpeg.tar.xz"
    if not root or not archive.is_file():
        pytest.skip("KCONV_REFERENCE names no folder with ../data/cifar10-jpeg.tar.xz")
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    settings = SMALL[name] | {"DATASET": str(archive), "OUTPUT": str(tmp_path)}
    if "WEIGHTS" in parameters_of(read(name)).source:  # which are of images of one channel
        settings["WEIGHTS"] = None
    text = "".join(output.get("text", "") for output in outputs_of(run(name, settings)))
    assert "accuracy" in text
