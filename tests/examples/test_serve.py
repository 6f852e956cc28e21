"""The HTTP server of examples/serve: many clients at once, and what they may send wrong."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import kconv
from kconv import models
from kconv._model_folder import ImageInput, ModelConfig, expected_weights
from kconv.runtime import FrozenNetwork

for needed in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(needed)

SERVE = Path(__file__).resolve().parents[2] / "examples/serve"
CLIENTS, REQUESTS = 16, 128


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    spec = models.create("keffnet_s", classes=3, input_shape=(16, 16, 3))
    config = ModelConfig(
        network=spec,
        class_names=("ant", "bee", "cat"),
        image=ImageInput(height=16, width=16, channels=3),
    )
    rng, shapes = np.random.default_rng(0), expected_weights(spec.graph())
    weights = {key: rng.normal(0, 0.3, shape) for key, (_, shape) in shapes.items()}
    for (_, name), values in weights.items():
        if name in ("gamma", "moving_variance"):
            values[:] = 1
    weights = {key: values.astype(np.float32) for key, values in weights.items()}
    FrozenNetwork(config, weights).save(folder := tmp_path_factory.mktemp("run"))
    return folder


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    """Of a server on this machine alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["app:app", "--host", "127.0.0.1", "--port", str(port), "--log-level", "warning"]
    path = os.pathsep.join(filter(None, sys.path))
    with subprocess.Popen(
        [sys.executable, "-m", "uvicorn", *arguments],
        cwd=SERVE,
        env={**os.environ, "KCONV_RUN": str(run), "PYTHONPATH": path},
    ) as server:
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(600):
                assert server.poll() is None
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5).close()
                    break
                except urllib.error.URLError:
                    time.sleep(0.1)
            yield address
        finally:
            server.terminate()


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 17, 3), np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "png")
    return buffer.getvalue()


def post(address: str, data: bytes, query: str = "") -> Any:
    """What the server answers to an image, sent as browsers send files."""
    border = "border"
    body = (
        f'--{border}\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    ).encode()
    body += data + f"\r\n--{border}--\r\n".encode()
    request = urllib.request.Request(
        f"{address}/predict{query}",
        body,
        {"Content-Type": f"multipart/form-data; boundary={border}"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)


def test_many_clients_get_the_right_answers(address: str, run: Path) -> None:
    net = kconv.load(run)
    pictures = [picture(seed) for seed in range(8)]
    expected = []
    for data in pictures:
        ranked = net.ranked(net(net.read_image(data)[None])[0], 3)
        expected.append([{"label": label, "probability": p} for label, p in ranked])
    assert len({json.dumps(answer) for answer in expected}) == len(pictures)
    with ThreadPoolExecutor(CLIENTS) as clients:
        numbers = [number % len(pictures) for number in range(REQUESTS)]
        answers = clients.map(lambda n: post(address, pictures[n], "?top=3"), numbers)
        for number, answer in zip(numbers, answers, strict=True):
            assert answer == expected[number]


@pytest.mark.parametrize(
    ("data", "query", "message"),
    [
        (b"text", "", "is not a readable image"),
        (b"", "", ""),
        (b"0" * (2**24 + 1), "", "more than 16,777,216 bytes"),
        (None, "?top=0", "greater than or equal to 1"),
    ],
)
def test_bad_requests_are_answered(
    address: str, data: bytes | None, query: str, message: str
) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(address, picture(0) if data is None else data, query)
    assert caught.value.code in (413, 422)
    assert message in caught.value.read().decode()
    assert post(address, picture(0))  # it goes on


def test_server_is_as_small_as_it_says() -> None:
    assert len((SERVE / "app.py").read_text().splitlines()) <= 42
    packages = re.findall(r"^[\w-]+", (SERVE / "requirements.txt").read_text(), re.M)
    assert packages == ["fastapi", "numpy", "pillow", "python-multipart", "uvicorn"]
