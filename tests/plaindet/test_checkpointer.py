"""Checkpoints that are whole or not there."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from plaindet.engine import PlainCheckpointer
from plaindet.files import write_atomically


@pytest.fixture
def checkpointer(tmp_path):
    """With checkpoints of the iterations 1, 3 and 5, in which the weights are the iteration."""
    model = nn.Linear(100, 100)
    checkpointer = PlainCheckpointer(model, str(tmp_path))
    for iteration in (1, 3, 5):
        nn.init.constant_(model.weight, iteration)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    return checkpointer


def resume(checkpointer):
    nn.init.zeros_(checkpointer.model.weight)
    extra = checkpointer.resume_or_load("", resume=True)
    assert (checkpointer.model.weight == extra["iteration"]).all()
    return extra["iteration"]


def test_resumes_from_the_newest(checkpointer, tmp_path, caplog):
    assert resume(checkpointer) == 5
    assert "damaged" not in caplog.text
    assert not list(tmp_path.glob("*.unfinished"))


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the weights: the file still has all its parts
    path.write_bytes(content)


def garble_the_directory(path):
    """The names of the parts, near the end of the file."""
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\x01\x02") + 46
    content[start : start + 8] = b"\xff" * 8
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize("break_file", [cut_off, empty, flip_a_bit, garble_the_directory, remove])
def test_falls_back_to_the_one_before(checkpointer, tmp_path, caplog, break_file):
    newest, before = (tmp_path / f"model_000000{i}.pth" for i in (5, 3))
    break_file(newest)
    assert resume(checkpointer) == 3
    (message,) = [record.getMessage() for record in caplog.records if "damaged" in record.msg]
    assert message.startswith(f"{newest} is damaged (")
    assert message.endswith(f"resuming from {before} instead")


def test_final_checkpoint_is_the_newest(checkpointer, tmp_path, caplog):
    nn.init.constant_(checkpointer.model.weight, 6)
    checkpointer.save("model_final", iteration=6)
    assert resume(checkpointer) == 6
    cut_off(tmp_path / "model_final.pth")
    empty(tmp_path / "model_0000005.pth")
    assert resume(checkpointer) == 3
    assert "model_final.pth is damaged" in caplog.text


def test_later_checkpoints_of_another_run_are_no_fallback(checkpointer, tmp_path):
    checkpointer.tag_last_checkpoint("model_0000003.pth")
    cut_off(tmp_path / "model_0000003.pth")
    assert resume(checkpointer) == 1


def test_all_damaged(checkpointer, tmp_path):
    for path in tmp_path.glob("*.pth"):
        cut_off(path)
    with pytest.raises(ValueError, match=r"No checkpoint in .* can be resumed from: .*0000001.pth"):
        resume(checkpointer)


def test_failed_write_leaves_the_file_before(tmp_path):
    """The state after each step of a write is the old file or the new one."""
    path = tmp_path / "file"
    write_atomically(str(path), lambda f: f.write(b"old"))

    def fail(f):
        f.write(b"ne")
        f.flush()
        assert path.read_bytes() == b"old"
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(str(path), fail)
    assert path.read_bytes() == b"old"
    write_atomically(str(path), lambda f: f.write(b"new"))
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


class State:
    """Of a hook or a schedule."""

    def __init__(self, **values):
        self.values = values

    def state_dict(self):
        return self.values

    def load_state_dict(self, values):
        self.values = values


def test_numbers_of_numpy(tmp_path, caplog):
    """Such as the learning rate of a schedule that is computed with NumPy."""
    states = {"schedule": State(lr=[np.float64(0.1)], counts={np.int64(3): (np.float32(2),)})}
    checkpointer = PlainCheckpointer(nn.Linear(1, 1), str(tmp_path), **states)
    checkpointer.save("model_0000001", iteration=np.int64(1))
    assert checkpointer.resume_or_load("", resume=True)["iteration"] == 1
    assert states["schedule"].values == {"lr": [0.1], "counts": {3: (2.0,)}}
    assert "cannot be resumed" not in caplog.text


def test_state_that_cannot_be_read(tmp_path, caplog):
    state = State(path=Path("somewhere"), sizes=torch.Size([1]), on=torch.device("cpu"))
    checkpointer = PlainCheckpointer(nn.Linear(1, 1), str(tmp_path), hook=state)
    for iteration in (1, 2):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    assert caplog.text.count("This run cannot be resumed") == 1
    assert ": hook.path (PosixPath). Let" in caplog.text
    with pytest.raises(ValueError, match=r"can be resumed from: .*holds more than tensors"):
        checkpointer.resume_or_load("", resume=True)
    state.values.pop("path")
    checkpointer.save("model_0000003", iteration=3)
    assert resume_state(checkpointer) == {"sizes": torch.Size([1]), "on": torch.device("cpu")}


def resume_state(checkpointer):
    checkpointer.resume_or_load("", resume=True)
    return checkpointer.checkpointables["hook"].values


def test_content_is_detectron2s(checkpointer, tmp_path):
    checkpoint = torch.load(tmp_path / "model_0000005.pth", weights_only=True)
    assert checkpoint.keys() == {"model", "iteration"}
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000005.pth"
