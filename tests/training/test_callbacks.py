"""TensorBoard's events, read by its own reader where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from kconv.training import Config, Epoch, Result, TensorBoard


def test_tensorboard_gets_each_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import RecordWriter  # noqa: F401

    board = TensorBoard()
    board.on_train_begin(Config(), tmp_path)
    board.on_step_end(1, 0.5, 0.5, 0.1)
    history = [Epoch(n, 0.1, 2.0 / n, 0.5, 1.5, 0.25, 100.0) for n in (1, 2)]
    for epoch in history:
        board.on_epoch_end(epoch)
    board.on_train_end(Result(history, 0.75, "", tmp_path))
    (file,) = (tmp_path / "tensorboard").iterdir()
    data, found = file.read_bytes(), []
    while data:
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        data = data[16 + size :]
    assert ("loss", 1, 2.0) in found
    assert ("loss", 2, 1.0) in found
    assert ("test_accuracy", 2, 0.75) in found
