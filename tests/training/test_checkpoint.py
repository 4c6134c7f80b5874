"""A checkpoint comes back to the bit, or not at all."""

from __future__ import annotations

import contextlib
import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torch_grood import GroodError
from torch_grood.training.checkpoint import Checkpoint, read_checkpoint, write_checkpoint, write_weights

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (100 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def checkpoint() -> Checkpoint:
    """One of everything: types, shapes, memory orders, special values, names with dots."""
    shared = numbers(6)
    return Checkpoint(
        step=12_345,
        model={
            **{f"layer.{dtype}".replace("torch.", ""): numbers(3, 2, dtype=dtype) for dtype in DTYPES},
            "conv.weight": numbers(4, 3, 5, 5).to(memory_format=torch.channels_last),
            "transposed": numbers(3, 4).T,
            "every.second": numbers(9)[::2],
            "expanded": numbers(1).expand(7),
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(7),
            "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
            "tied.a": shared,
            "tied.b": shared,
            "parameter": nn.Parameter(numbers(2)),
        },
        optimizer={
            0: {"momentum_buffer": numbers(4, 3, 5, 5, seed=1).to(memory_format=torch.channels_last)},
            11: {"step": torch.tensor(3.0), "exp_avg": numbers(2), "exp_avg_sq": numbers(2)},
        },
        sums={"loss": torch.tensor(0.1), "images": torch.tensor(2**40)},
        record={"figures": [{"loss": 0.1 + 0.2, "epoch": 1}], "scaler": None, "text": "ä\ud800 \n", "big": 2**60},
    )


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        # Bits, so that NaN equals NaN, and −0 not 0.
        ours, theirs = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(ours, theirs), name


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.safetensors"
    write_checkpoint(path, checkpoint())
    return path


def test_it_comes_back_to_the_bit(file: Path) -> None:
    found, expected = read_checkpoint(file), checkpoint()
    assert found.step == expected.step
    assert found.record == expected.record
    assert_same(found.model, expected.model)
    assert_same(found.sums, expected.sums)
    assert found.optimizer.keys() == expected.optimizer.keys()
    for number, state in expected.optimizer.items():
        assert_same(found.optimizer[number], state)
    # Writing changes nothing that it was given, and the same state is the same file.
    again = file.with_name("again")
    write_checkpoint(again, found)
    write_checkpoint(file, expected)
    assert again.read_bytes() == file.read_bytes()


def test_one_without_tensors_comes_back(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "a", Checkpoint(0, {}, {}, {}, {}))
    assert read_checkpoint(tmp_path / "a") == Checkpoint(0, {}, {}, {}, {})


def test_what_was_read_does_not_change_with_the_file(file: Path) -> None:
    found = read_checkpoint(file)
    content = file.read_bytes()
    with file.open("r+b") as stream:
        stream.write(b"\0" * len(content))
    assert_same(found.model, checkpoint().model)


def test_a_truncated_file_is_refused(file: Path) -> None:
    content = file.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for length in {0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) - 1}:
        file.write_bytes(content[:length])
        with pytest.raises(GroodError, match="cannot be read as a checkpoint"):
            read_checkpoint(file)


def test_a_changed_byte_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    expected = Checkpoint(12, {"a": numbers(3)}, {0: {"b": numbers(2)}}, {"loss": numbers()}, {"seconds": 1.5})
    write_checkpoint(path, expected)
    content = path.read_bytes()
    read: list[Checkpoint] = []
    for position in range(len(content)):
        # A bit that leaves digits digits and letters letters: what a parser would not mind.
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        with contextlib.suppress(GroodError):
            read.append(read_checkpoint(path))
    # The blanks that fill up the header mean nothing.
    assert len(read) < 8
    for found in read:
        assert (found.step, found.record) == (expected.step, expected.record)
        assert_same(found.model, expected.model)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"step": None},
        {"step": float("inf")},
        {"step": [1]},
        {"record": None},
        {"record": 3},
        {"record": [1]},
    ],
)
def test_a_header_of_another_form_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """Also where somebody computed the checksum anew."""
    from torch_grood.training import checkpoint as module

    path = tmp_path / "checkpoint.safetensors"
    tensors = {"model.a": torch.ones(2)}
    text = json.dumps({"format": 1, "step": 3, "record": {}} | change)
    key, digest = "torch-grood-training", module._digest(text, tensors)
    save_file(tensors, path, metadata={key: f"{digest} {text}"})
    with pytest.raises(GroodError, match=r"cannot be read as a checkpoint|has the form"):
        read_checkpoint(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(GroodError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)
    path.mkdir()
    with pytest.raises(GroodError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)
    path.rmdir()
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(GroodError, match=f"cannot be read as a checkpoint .*delete the folder {tmp_path}"):
        read_checkpoint(path)
    torch.save({"a": torch.ones(2)}, path)
    with pytest.raises(GroodError, match="cannot be read as a checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize("fails", ["safetensors.torch.save_file", "pathlib.Path.replace", "os.fsync"])
def test_a_failure_leaves_the_older_one(file: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(fails, full)
        with pytest.raises(GroodError, match=rf"cannot write {file}: .*No space left on device"):
            write_checkpoint(file, replace(checkpoint(), step=99_999))
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    assert read_checkpoint(file).step == 12_345


def test_safetensors_own_errors_leave_the_older_one_too(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(GroodError, match=f"cannot write {file}: .*No space left"):
            write_checkpoint(file, replace(checkpoint(), step=99_999))
    assert [entry.name for entry in file.parent.iterdir()] == [file.name]
    assert read_checkpoint(file).step == 12_345


def test_weights_are_a_plain_state_dict(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last)
    write_weights(tmp_path / "model.safetensors", model)
    assert_same(load_file(tmp_path / "model.safetensors"), dict(model.state_dict()))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
