"""The file of how fast whole networks have been."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

BENCHES = Path(__file__).resolve().parents[2] / "benches"


@pytest.fixture
def history(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHES))
    monkeypatch.delitem(sys.modules, "history", raising=False)
    import history

    return history


ROWS = [
    {"side": "torch", "best": 0.3},
    {"side": "torch-compile", "best": 0.25},
    {"side": "kconv-torch", "best": 0.1},
    {"side": "kconv-keras-jax", "best": 0.12},
]


def test_a_run_is_added_and_drawn(history, tmp_path):
    path = tmp_path / "history.jsonl"
    history.append("step keffnet32 64", ROWS, path)
    history.append("step keffnet32 64", [{**ROWS[0], "best": 0.5}, ROWS[2]], path)
    first, second = history.read(path)
    assert first["ratios"] == {"torch": 3.0, "torch-compile": 2.5}
    assert second["ratios"] == {"torch": 5.0}
    assert first["what"] == "step keffnet32 64"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", first["date"])
    assert first["machine"]
    history.plot([first, second], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("rows", [ROWS[:2], ROWS[2:]])
def test_without_ours_or_a_peer_nothing_is_written(history, tmp_path, rows):
    with pytest.raises(SystemExit, match="--history needs kconv-torch and a peer"):
        history.append("step keffnet32 64", rows, tmp_path / "history.jsonl")
    assert not list(tmp_path.iterdir())


def test_committed_lines_are_whole():
    path = BENCHES / "history.jsonl"
    if not path.exists():
        pytest.skip("no run has been kept yet")
    keys = {"date", "commit", "kconv", "machine", "isa", "threads", "what", "ratios"}
    for line in path.read_text().splitlines():
        run = json.loads(line)
        assert run.keys() == keys
        assert all(ratio > 0 for ratio in run["ratios"].values())
