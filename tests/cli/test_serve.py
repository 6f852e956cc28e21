"""The commands for trained networks: predict, evaluate, bench and export."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import kconv
from kconv import cli, datasets, models
from kconv._model_folder import ImageInput, ModelConfig, expected_weights
from kconv.runtime import FrozenNetwork

NAMES = datasets.load("fashion_mnist_mini", image_size=8, train_images=10).class_names


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of random weights; nothing but NumPy makes it."""
    spec = models.create("keffnet_s", classes=10, input_shape=(8, 8, 1))
    image = ImageInput(height=8, width=8, channels=1)
    config = ModelConfig(network=spec, class_names=NAMES, image=image, dataset="fashion_mnist_mini")
    rng = np.random.default_rng(0)
    weights = {
        key: rng.uniform(0.1, 0.4, shape).astype(np.float32) - (key[1] == "kernel") / 4
        for key, (_, shape) in expected_weights(spec.graph()).items()
    }
    FrozenNetwork(config, weights).save(folder := tmp_path_factory.mktemp("run"))
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of three images, one of them below another folder, and a file that is none."""
    folder = tmp_path / "pictures"
    (folder / "inner").mkdir(parents=True)
    rng = np.random.default_rng(1)
    for name in ("a.png", "b.png", "inner/c.png"):
        Image.fromarray(rng.integers(0, 256, (9, 11), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("text")
    return folder


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    try:
        status = cli.main(arguments)
    except SystemExit as error:
        status = error.code  # type: ignore[assignment]
    output = capsys.readouterr()
    assert status == 2
    return output.err


def test_predict_files_folders_and_archives(
    run: Path, pictures: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = kconv.load(run)
    files = sorted(pictures.rglob("*.png"))
    expected = {str(path): net.predict(path, top=3) for path in files}
    lines = [
        f"{name}: {', '.join(f'{label} {p:.1%}' for label, p in ranked)}"
        for name, ranked in expected.items()
    ]
    assert cli.main(["predict", str(run), str(pictures), "--top", "3"]) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(lines)

    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(map(str, files)) + "\n\n"))
    assert cli.main(["predict", str(run), "-", "--top", "3"]) == 0
    assert capsys.readouterr().out.splitlines() == lines

    with tarfile.open(pictures / "all.tar", "w") as archive:
        for path in files:
            archive.add(path, path.name)
    assert cli.main(["predict", str(run), str(pictures / "all.tar"), "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["image"] for record in records] == [
        str(pictures / "all.tar" / path.name) for path in files
    ]
    for record, ranked in zip(records, expected.values(), strict=True):
        assert record["predictions"] == [
            {"label": ranked[0][0], "probability": pytest.approx(ranked[0][1], abs=1e-6)}
        ]


def test_unreadable_images_are_left_out(
    run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (1, 1)).save(pictures / "small.png")
    names = ["notes.txt", "small.png", "missing.png", "a.png"]
    assert cli.main(["predict", str(run), *(str(pictures / name) for name in names)]) == 0
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == 1
    errors = output.err.splitlines()
    assert "notes.txt is not a readable image" in errors[0]
    assert "small.png has 1x1 pixels, too few" in errors[1]
    assert "missing.png" in errors[2]
    assert len(errors) == 3


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_one_unreadable_file_hides_no_others(
    run: Path, pictures: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a folder or archive: a link that leads nowhere, or damaged bytes within."""
    files = sorted(pictures.rglob("*.png"))
    where = pictures
    if form == "folder":
        (pictures / "0.png").symlink_to("nowhere")
    else:
        where = pictures / "all.zip"
        with zipfile.ZipFile(where, "w") as archive:
            archive.writestr("0.png", b"0123456789")
            for path in files:
                archive.write(path, path.name)
        where.write_bytes(where.read_bytes().replace(b"0123456789", b"0123456798"))
    assert cli.main(["predict", str(run), str(where)]) == 0
    output = capsys.readouterr()
    assert len(output.out.splitlines()) == len(files)
    (error,) = output.err.splitlines()
    assert "0.png cannot be read" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict", "RUN", "missing.png"], "none of 1 images can be read in missing.png"),
        (["predict", "RUN", "/dev/null"], "/dev/null is neither a file nor a folder"),
        (["predict", "RUN", "."], "there are no images in ."),
        (["predict", "missing", "a.png"], "there is no folder or file missing"),
        (["predict", ".", "a.png"], ". is no run, as it has no config.json"),
        (["predict", "/dev/null", "a.png"], "/dev/null is no folder of a run, but a file"),
        (["predict", "RUN", "a.png", "--top", "0"], "--top 0 must be at least 1"),
        (["predict", "RUN", "a.png", "--threads", "0"], "0"),
        (
            ["evaluate", "RUN", "--dataset", "fashion_mnist_min"],
            "did you mean 'fashion_mnist_mini'",
        ),
        (["evaluate", "RUN", "--test-images", "0"], "test_images=0 must be at least 1"),
        (["bench", "RUN", "--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (["export", "RUN", "--format", "onx"], "invalid choice: 'onx' (did you mean 'onnx'?)"),
        (["export", "RUN", "--format", "onnx", "--output", "a.b"], "a.b does not end in .onnx"),
        (["export", "missing", "--format", "onnx"], "there is no folder or file missing"),
        (["predcit"], "invalid choice: 'predcit' (did you mean 'predict'?)"),
        (
            ["train", "--epcohs", "3"],
            "unrecognized arguments: --epcohs (did you mean '--epochs'?)",
        ),
        (
            ["train", "--model", "kefnet_b0"],
            "unknown model 'kefnet_b0' (did you mean 'keffnet_b0'?)",
        ),
        (["train", "--weights", "missing"], "missing"),
    ],
)
def test_bad_input_is_named_and_nothing_written(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(run.iterdir())
    errors = error_of(capsys, *[str(run) if word == "RUN" else word for word in arguments])
    assert message in errors
    assert len(errors.splitlines()) == (2 if "left out" in errors else 1)
    assert not list(tmp_path.iterdir())
    assert sorted(run.iterdir()) == before


def test_file_of_another_model_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((run / "config.json").read_text())
    config["spec"]["width"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    errors = error_of(capsys, "predict", str(tmp_path), "a.png")
    assert "model.safetensors is damaged, or another model's: its" in errors
    assert errors.count("\n") == 1


def test_what_gives_no_probabilities_is_refused(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = kconv.load(run)
    layers = net.graph.layers
    logits = models.Graph(
        "logits", (*layers[:-1], dataclasses.replace(layers[-1], activation=None)), layers[-1].name
    )
    config = dataclasses.replace(net.config, network=logits)
    FrozenNetwork(config, net.weights).save(folder := tmp_path / "logits")
    for arguments in (["predict", str(folder), str(pictures)], ["evaluate", str(folder)]):
        assert "ends in no softmax" in error_of(capsys, *arguments)
    weights = {key: array * np.nan for key, array in net.weights.items()}
    FrozenNetwork(net.config, weights).save(folder := tmp_path / "diverged")
    options = ["--test-images", "10"]
    for arguments in (["predict", str(folder), str(pictures)], ["evaluate", str(folder), *options]):
        assert "outputs are not finite" in error_of(capsys, *arguments, "--json")


def test_names_that_the_output_lacks_are_escaped(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("L", (8, 8)).save(tmp_path / name)
    assert cli.main(["predict", str(run), str(tmp_path)]) == 0
    assert r"caf\udce9.png: " in capsys.readouterr().out


def test_evaluate_counts_as_by_hand(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = datasets.load("fashion_mnist_mini", image_size=8, test_images=70)
    outputs = kconv.load(run)(data.x_test)
    assert cli.main(["evaluate", str(run), "--test-images", "70", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["images"] == 70
    assert record["accuracy"] == pytest.approx((outputs.argmax(1) == data.y_test).mean())
    loss = -np.log(np.maximum(outputs[np.arange(70), data.y_test], 1e-7)).mean()
    assert record["loss"] == pytest.approx(loss, rel=1e-5)
    assert np.sum(record["confusion"]) == 70
    assert np.trace(record["confusion"]) == (outputs.argmax(1) == data.y_test).sum()
    assert cli.main(["evaluate", str(run), "--test-images", "70"]) == 0
    assert re.search(r"test accuracy +0\.\d{4} \(70 images\)", capsys.readouterr().out)
    for label in "ab":
        (tmp_path / label).mkdir()
        for number in range(2):
            Image.new("RGB", (8, 8)).save(tmp_path / label / f"{number}.png")
    message = error_of(capsys, "evaluate", str(run), "--dataset", str(tmp_path))
    assert "has images of 3 channels, the network reads 1" in message


def test_evaluate_of_a_network_whose_data_came_from_python(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, run := tmp_path / "run")
    text = (run / "config.json").read_text("utf-8")
    (run / "config.json").write_text(text.replace('"fashion_mnist_mini"', '"objects"'), "utf-8")
    message = error_of(capsys, "evaluate", str(run))
    assert "--dataset: the network was trained on 'objects', which is neither" in message
    assert "unknown data set ''" in error_of(capsys, "evaluate", str(run), "--dataset", "")


def test_bench_times_calls(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli._serve, "_BENCH_SECONDS", 0.01)
    assert cli.main(["bench", str(run), "--batch-size", "1", "3", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [call["batch_size"] for call in record["calls"]] == [1, 3]
    for call in record["calls"]:
        assert 0 < call["best_ms"] <= call["median_ms"] <= call["p99_ms"]
        assert call["images_per_second"] == pytest.approx(
            1000 * call["batch_size"] / call["median_ms"]
        )
    assert record["threads"] == kconv.get_num_threads()
    assert cli.main(["bench", str(run), "--batch-size", "1"]) == 0
    assert "median ms" in capsys.readouterr().out


def test_export_says_what_it_checked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "net.onnx"
    assert cli.main(["export", str(run), "--format", "onnx", "--output", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"written      {path}"
    assert lines[1] == "input        images (N, 1, 8, 8) float32"
    assert re.fullmatch(r"checked      by \w+ [\d.]+: largest difference .*", lines[3])
    assert path.exists()


def test_version_and_tables_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"kconv {kconv.__version__}\n"
    assert cli.main(["models", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert records[0] == models.table()[0]._asdict()
    assert cli.main(["table", "--csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(models.paper_table())
    assert lines[0].startswith("paper,dataset,epochs,model,ktype,input,classes,saving")
