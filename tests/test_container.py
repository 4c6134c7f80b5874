"""The container: every byte is checked before it is used, large tensors when they are used, and damage has its name."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from format_file import KEY, alter, parts, place_of, raw, read_by_hand, seal
from large_files import KINDS, QUERIES, assert_same, detector_of, gaussians, guard_of, load_late, save_with_filter
from torch_grood import (
    GROOD,
    AlteredFileError,
    FormatError,
    GroodError,
    NewerFormatError,
    TruncatedFileError,
    container,
)
from torch_grood.container import BLOCK
from torch_grood.neighbors import exact, filter
from torch_grood.neighbors.filter import BoundFilter

HEADER = {"format_version": 3, "library_version": "0", "text": 'π\n"\\'}
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK]


def numbers(size: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A file of about a kilobyte."""
    path = tmp_path / "small"
    tensors = {
        "one": torch.arange(5.0),
        "two": torch.eye(3, dtype=torch.int8),
        "scalar": torch.tensor(1.5),
        "x": numbers(0),
    }
    container.write(path, HEADER, tensors)
    return path


# --- Blocks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_every_block_is_checked(size: int, tmp_path: Path) -> None:
    """At its first and last byte, with tensors before and after it."""
    path, tensors = tmp_path / "x", {"a": numbers(7), "b": numbers(size, 1), "c": torch.arange(3)}
    container.write(path, HEADER, tensors)
    found = container.read(path, 3)
    assert found.header["text"] == HEADER["text"]
    assert {name: raw(tensor) for name, tensor in found.tensors.items()} == {
        name: raw(x) for name, x in tensors.items()
    }
    assert found.guards == {}
    n_blocks = -(-size // BLOCK)
    by_hand = read_by_hand(path)[1]
    assert by_hand["b"] == ("U8", [size], raw(tensors["b"]))
    place = place_of(path, "b")
    for block in range(n_blocks):
        for byte in (block * BLOCK, min((block + 1) * BLOCK, size) - 1):
            alter(path, place[byte])
            with pytest.raises(AlteredFileError, match=rf"the tensor 'b' was altered near its byte {block * BLOCK:,};"):
                container.read(path, 3)
            alter(path, place[byte])
    container.read(path, 3)


@pytest.mark.parametrize("size", SIZES)
def test_a_guard_checks_what_is_used_and_nothing_else(size: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    container.write(path, HEADER, {"a": numbers(9), "b": numbers(size)})
    n_blocks = -(-size // BLOCK)
    for block in range(n_blocks):
        alter(path, place_of(path, "b")[block * BLOCK])
        guard = container.read(path, 3, lazy=["b"], eager_bytes=0).guards["b"]
        start, stop = block * BLOCK, min((block + 1) * BLOCK, size)
        # All that surrounds the block, and no byte at all.
        guard.check(0, start)
        guard.check_blocks(range(block + 1, n_blocks))
        guard.check(start, start)
        for first, last in [(start, start + 1), (stop - 1, stop), (start, stop), (0, size)]:
            with pytest.raises(AlteredFileError, match="near its byte"):
                guard.check(first, last)
        with pytest.raises(AlteredFileError):
            guard.check_all()
        alter(path, place_of(path, "b")[block * BLOCK])
    guard = container.read(path, 3, lazy=["b"], eager_bytes=0).guards["b"]
    guard.check(0, size)
    guard.check_all()


def test_a_block_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, hashed = tmp_path / "x", []
    container.write(path, HEADER, {"b": numbers(2 * BLOCK + 5)})
    guard = container.read(path, 3, lazy=["b"], eager_bytes=0).guards["b"]
    sha256 = container.hashlib.sha256
    monkeypatch.setattr(container.hashlib, "sha256", lambda content: hashed.append(len(content)) or sha256(content))
    for _ in range(2):
        guard.check(5, BLOCK + 1)
        guard.check(BLOCK, BLOCK + 9)
    assert hashed == [BLOCK, BLOCK]
    guard.check_all()
    assert hashed == [BLOCK, BLOCK, 5]


def test_many_blocks_are_checked_on_all_cores(tmp_path: Path) -> None:
    path, size = tmp_path / "x", 300 * BLOCK + 1
    container.write(path, HEADER, {"b": numbers(size)})
    container.read(path, 3)
    read_by_hand(path)
    for byte in (0, 64 * BLOCK - 1, 64 * BLOCK, 128 * BLOCK, 300 * BLOCK):
        alter(path, place_of(path, "b")[byte])
        with pytest.raises(AlteredFileError):
            container.read(path, 3)
        alter(path, place_of(path, "b")[byte])


@pytest.mark.parametrize("name", ["lazy", "eager"])
def test_only_large_files_are_lazy_and_only_in_what_may_be(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    container.write(path, HEADER, {"lazy": numbers(100), "eager": numbers(100)})
    size = path.stat().st_size
    assert container.read(path, 3, lazy=["lazy"], eager_bytes=size).guards == {}
    assert list(container.read(path, 3, lazy=["lazy"], eager_bytes=size - 1).guards) == ["lazy"]
    alter(path, place_of(path, name)[50])
    with pytest.raises(AlteredFileError):
        container.read(path, 3, lazy=["lazy"], eager_bytes=size)
    if name == "lazy":
        container.read(path, 3, lazy=["lazy"], eager_bytes=0)
    else:
        with pytest.raises(AlteredFileError):
            container.read(path, 3, lazy=["lazy"], eager_bytes=0)


# --- Damage -------------------------------------------------------------------------------------------------------


def test_every_single_byte_counts(small: Path) -> None:
    """In the header, the tensors and the checksums; but the spaces after the header may be other white space."""
    content = small.read_bytes()
    for mask in (0x01, 0x80, 0xFF):
        for place in range(len(content)):
            alter(small, place, mask)
            with pytest.raises(FormatError):
                container.read(small, 3)
            alter(small, place, mask)
    assert small.read_bytes() == content
    container.read(small, 3)


def test_every_length_is_told_from_the_whole(small: Path) -> None:
    content = small.read_bytes()
    for length in range(len(content)):
        small.write_bytes(content[:length])
        with pytest.raises(FormatError) as caught:
            container.read(small, 3)
        # With the length of the header alone, nothing tells what the file was.
        assert caught.type is (TruncatedFileError if length > 8 else FormatError), length
        if length > 8:
            assert str(caught.value) == (
                f"{small} is truncated: it has {length:,} bytes and should have more; copy it again, or fit again"
            )
    small.write_bytes(content + b"\n")
    with pytest.raises(AlteredFileError):
        container.read(small, 3)


@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: torch.cat([x, x[:1]]), lambda x: x[:0], lambda x: x.T])
def test_checksums_of_another_number_of_blocks(change: Callable[[Tensor], Tensor], small: Path) -> None:
    """The chain of hashes holds, but does not fit the tensors."""
    header, tensors = parts(small)
    checksums = change(load_file(small)["checksums"]).contiguous()
    text = json.dumps(header | {"checksums": hashlib.sha256(raw(checksums)).hexdigest()})
    metadata = {KEY: f"{hashlib.sha256(text.encode()).hexdigest()} {text}"}
    save_file(tensors | {"checksums": checksums}, small, metadata=metadata)
    with pytest.raises(AlteredFileError, match="checksums"):
        container.read(small, 3)


def gone_after(name: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let another process delete a file at the end of a function of the container's."""
    real = getattr(container, name)

    def then_gone(*arguments: Any) -> Any:
        found = real(*arguments)
        path.unlink()
        return found

    monkeypatch.setattr(container, name, then_gone)


def test_a_file_that_is_deleted_before_it_is_opened(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone_after("_check_header_length", small, monkeypatch)
    with pytest.raises(FormatError, match="cannot be read"):
        container.read(small, 4)


def test_a_file_that_is_deleted_while_it_is_read(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = container.read(small, 4).header
    gone_after("_header", small, monkeypatch)
    assert container.read(small, 4).header == expected


def test_a_newer_format_is_told_from_an_altered_file(small: Path) -> None:
    header, tensors = parts(small)
    seal(small, header | {"format_version": 4, "library_version": "9.8.7"}, tensors)
    with pytest.raises(
        NewerFormatError, match=r"has format 4, written by torch-grood 9\.8\.7; this version reads up to 3"
    ):
        container.read(small, 3)
    container.read(small, 4)
    # In a format that is not known nothing can be said of the rest.
    alter(small, place_of(small, "one")[0])
    with pytest.raises(NewerFormatError):
        container.read(small, 3)
    with pytest.raises(AlteredFileError):
        container.read(small, 4)


@pytest.mark.parametrize("kind", [FormatError, NewerFormatError, TruncatedFileError, AlteredFileError])
def test_each_kind_is_an_error_of_ours(kind: type[Exception]) -> None:
    assert issubclass(kind, FormatError)
    assert issubclass(kind, GroodError)


@pytest.mark.parametrize("digits", [4000, 5000, 100_000])
def test_a_number_of_too_many_digits(digits: int, small: Path) -> None:
    header, tensors = parts(small)
    seal(small, header, tensors, text='{"format_version": ' + "1" * digits + "}")
    with pytest.raises(FormatError):
        container.read(small, 3)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_json(constant: str, small: Path) -> None:
    """Python reads it, other languages do not."""
    header, tensors = parts(small)
    seal(small, {}, tensors, text=f'{{"x": {constant}, ' + json.dumps(header)[1:])
    with pytest.raises(AlteredFileError, match="the header was altered"):
        container.read(small, 3)


@pytest.mark.parametrize("shape", [[2**62, 0], [2**63, 0], [0, 2**63 - 1], [2**31, 2**31, 0, 2**62], [2**64 - 1, 0]])
def test_shapes_that_torch_cannot_count(shape: list[int], small: Path) -> None:
    content = small.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table, data = content[8 : 8 + length], content[8 + length :]
    new = table.replace(b'"shape":[0]', f'"shape":{shape}'.encode())
    assert new != table
    new += b" " * (-len(new) % 8)
    small.write_bytes(len(new).to_bytes(8, "little") + new + data)
    with pytest.raises(FormatError):
        container.read(small, 3)


# --- Writing ------------------------------------------------------------------------------------------------------


def test_the_order_of_the_tensors_changes_no_byte(tmp_path: Path) -> None:
    tensors = {"b": numbers(5), "a": torch.eye(2), "c": torch.arange(3)}
    container.write(tmp_path / "one", HEADER, tensors)
    container.write(tmp_path / "other", HEADER, dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from torch_grood import container\n"
        "tensors = {name: torch.arange(5.0) for name in ('b', 'a', 'index.x', 'c')}\n"
        "container.write(Path(sys.argv[1]), {'format_version': 3, 'b': {'z': 1, 'a': 2}}, tensors)"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code, str(tmp_path / seed)], env=environment, check=True, timeout=240)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).view(3, 4).T,
        torch.arange(10)[::2],
        torch.ones(1).expand(5),
        torch.zeros(3, 0),
        torch.zeros(0).as_strided((0,), (0,)),
        torch.tensor(2.0, dtype=torch.float64),
        torch.arange(4).to(torch.bfloat16),
    ],
)
def test_tensors_of_every_layout(tensor: Tensor, tmp_path: Path) -> None:
    container.write(tmp_path / "x", HEADER, {"x": tensor, "y": torch.ones(1)})
    found = container.read(tmp_path / "x", 3).tensors["x"]
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert torch.equal(found, tensor)


# --- A large detector ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The file of a detector of one of the `KINDS`."""
    folder, made = tmp_path_factory.mktemp("large"), {}

    def file_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = folder / f"{kind}.grood"
            save_with_filter(detector_of(kind), made[kind])
        return made[kind]

    return file_of


@pytest.fixture
def lazily(monkeypatch: pytest.MonkeyPatch) -> Callable[..., GROOD]:
    """Load a file as if it were large, and save as if it held much."""
    monkeypatch.setattr(exact, "_WORTH_KEEPING", 0)
    return load_late


def touched(detector: GROOD) -> set[int]:
    """Blocks of the directions that were checked so far."""
    return set(guard_of(detector)._checked.nonzero().flatten().tolist())


def rows_asked_for(detector: GROOD, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Rows of the gradients that are used from here on."""
    rows: set[int] = set()
    guard: Any = detector._need_state().searcher.gradients._guard
    check, every = guard.check, torch.arange(detector.fit_info_.n_indexed)

    def record(asked: Tensor | slice) -> None:
        rows.update(every[asked].tolist())
        check(asked)

    monkeypatch.setattr(guard, "check", record)
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_late_is_the_same(
    kind: str, large: Callable[[str], Path], lazily: Callable[..., GROOD], tmp_path: Path
) -> None:
    path = large(kind)
    assert_same(GROOD.load(path), lazily(path))
    # Each alone, so that each is the first to look.
    for query in QUERIES[::9].split(1):
        assert_same(GROOD.load(path), lazily(path), query)
    lazily(path).save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert_same(lazily(path, verify=True), lazily(path))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_late_can_be_maintained(
    kind: str, large: Callable[[str], Path], lazily: Callable[..., GROOD], tmp_path: Path
) -> None:
    path = large(kind)
    content = path.read_bytes()
    for name, load in (("early", GROOD.load), ("late", lazily)):
        detector = load(path)
        detector.add_features(*gaussians(40, 11))
        detector.remove([3, 5, 2010])
        detector.calibrate_features(gaussians(50, 13)[0], fpr=0.2)
        detector.save(tmp_path / name)
    assert (tmp_path / "early").read_bytes() == (tmp_path / "late").read_bytes()
    # Over the file that it is mapped from.
    copied = tmp_path / "own"
    copied.write_bytes(content)
    late = lazily(copied)
    late.remove([1])
    late.save(copied)
    assert GROOD.load(copied).fit_info_.n_removed == 1


@pytest.mark.parametrize("kind", ["filter", "stages", "int8 filter"])
def test_an_altered_block_is_found_when_it_is_used_and_not_before(
    kind: str,
    large: Callable[[str], Path],
    lazily: Callable[..., GROOD],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "x"
    path.write_bytes(large(kind).read_bytes())
    place, whole = place_of(path, "direction"), GROOD.load(path)
    n_blocks = -(-len(place) // BLOCK)
    n_spared = 0
    for query in QUERIES[::6].split(1):
        detector = lazily(path)
        assert touched(detector) == set()
        rows = rows_asked_for(detector, monkeypatch)
        detector.score_features(query)
        used = touched(detector)
        row_bytes = len(place) // len(whole._need_state().sample_ids)
        ends = [byte for row in rows for byte in (row * row_bytes, (row + 1) * row_bytes - 1)]
        assert used == {byte // BLOCK for byte in ends} != set()
        for block in range(n_blocks):
            # The last byte of a block lies in a row that goes on in the next.
            byte = place[min((block + 1) * BLOCK, len(place)) - 1]
            alter(path, byte)
            detector = lazily(path)
            if block in used:
                with pytest.raises(AlteredFileError, match=f"'direction' was altered near its byte {block * BLOCK:,};"):
                    detector.score_features(query)
                with pytest.raises(AlteredFileError):
                    detector.score_features(query)
            else:
                n_spared += 1
                assert torch.equal(detector.score_features(query), whole.score_features(query))
            with pytest.raises(AlteredFileError, match=f"{path}.*'direction' was altered"):
                GROOD.load(path, verify=True)
            alter(path, byte)
    assert n_spared > 0


@pytest.mark.parametrize("kind", ["filter", "float16", "int8 filter"])
def test_a_row_that_lies_in_two_blocks_needs_both(
    kind: str, large: Callable[[str], Path], lazily: Callable[..., GROOD]
) -> None:
    path = large(kind)
    whole, n = GROOD.load(path)._need_state().searcher.gradients, 2000
    row_bytes = len(place_of(path, "direction")) // n
    straddling = [row for row in range(n) if row * row_bytes // BLOCK != ((row + 1) * row_bytes - 1) // BLOCK]
    assert straddling
    for rows in (
        [straddling[0]],
        straddling[:1] * 3,
        [straddling[0] - 1],
        [straddling[0] + 1],
        [0, *straddling],
        [n - 1],
    ):
        detector = lazily(path)
        found = detector._need_state().searcher.gradients.directions(torch.tensor(rows))
        assert torch.equal(found, whole.directions(torch.tensor(rows)))
        ends = [byte for row in rows for byte in (row * row_bytes, (row + 1) * row_bytes - 1)]
        assert touched(detector) == {byte // BLOCK for byte in ends}


def test_a_row_is_checked_once(
    large: Callable[[str], Path], lazily: Callable[..., GROOD], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = lazily(large("filter"))
    expected = detector.score_features(QUERIES)

    def refuse(*_: Any) -> None:
        raise AssertionError("checked again")

    monkeypatch.setattr(guard_of(detector), "check_blocks", refuse)
    assert torch.equal(detector.score_features(QUERIES), expected)


@pytest.mark.parametrize("kind", ["exact", "float16", "faiss"])
def test_what_uses_all_gradients_checks_all(
    kind: str, large: Callable[[str], Path], lazily: Callable[..., GROOD], tmp_path: Path
) -> None:
    path = tmp_path / "x"
    path.write_bytes(large(kind).read_bytes())
    alter(path, place_of(path, "direction")[-1])
    with pytest.raises(AlteredFileError, match="'direction' was altered"):
        lazily(path).score_features(QUERIES[:1])


@pytest.mark.parametrize(
    "use",
    [
        lambda detector: detector.save(os.devnull),
        lambda detector: detector.remove([0]),
        lambda detector: detector.add_features(*gaussians(4, 3)),
        lambda detector: detector.explain_features(QUERIES, 2000),
    ],
)
def test_whatever_else_needs_the_gradients_checks_them(
    use: Callable[[GROOD], Any], large: Callable[[str], Path], lazily: Callable[..., GROOD], tmp_path: Path
) -> None:
    path = tmp_path / "x"
    path.write_bytes(large("filter").read_bytes())
    alter(path, place_of(path, "direction")[-1])
    with pytest.raises(AlteredFileError, match="'direction' was altered"):
        use(lazily(path))


def test_names_are_checked_when_they_are_asked_for(
    large: Callable[[str], Path], lazily: Callable[..., GROOD], tmp_path: Path
) -> None:
    path = tmp_path / "x"
    path.write_bytes(large("filter").read_bytes())
    for name, first, last in (("training_names", 0, 1999), ("training_name_ends", 1999, 1999)):
        place = place_of(path, name)
        alter(path, place[0 if name == "training_names" else -1])
        detector = lazily(path)
        # The text fits into one block; the ends do, too.
        assert len(place) < BLOCK
        for position in (first, last):
            with pytest.raises(AlteredFileError, match=f"'{name}' was altered"):
                detector.sample_names([position])
        detector.score_features(QUERIES)
        for use in (lambda one: one.remove([0]), lambda one: one.save(tmp_path / "y")):
            with pytest.raises(AlteredFileError, match=f"'{name}' was altered"):
                use(detector)
        alter(path, place[0 if name == "training_names" else -1])
    assert lazily(path).sample_names([0, 1999]) == ["class 0/image 0.png", "class 3/image 1999.png"]


def test_hashes_of_training_samples_are_checked_when_they_are_asked_for(
    large: Callable[[str], Path], lazily: Callable[..., GROOD], tmp_path: Path
) -> None:
    path = tmp_path / "x"
    path.write_bytes(large("filter").read_bytes())
    alter(path, place_of(path, "training_hashes")[80])
    detector = lazily(path)
    detector.predict_features(QUERIES)
    for use in (
        lambda: detector.calibrate_features(gaussians(60, 5)[0], fpr=0.1),
        lambda: detector.training_.digest(),  # type: ignore[union-attr]
        lambda: detector.save(tmp_path / "y"),
        lambda: detector.remove([0]),
    ):
        with pytest.raises(AlteredFileError, match="'training_hashes' was altered"):
            use()


def test_altered_rows_that_are_no_unit_vectors_are_found_late_too(
    large: Callable[[str], Path], lazily: Callable[..., GROOD], tmp_path: Path
) -> None:
    """The hashes are right, the content is not."""
    header, tensors = parts(large("filter"))
    for value, message in ((torch.nan, "holds NaN or infinity"), (0.5, "not ones that a fit gives"), (0.0, "not ones")):
        directions = tensors["direction"].clone()
        directions[700] = value
        seal(tmp_path / "x", header, tensors | {"direction": directions})
        detector = lazily(tmp_path / "x")
        with pytest.raises(AlteredFileError, match=message):
            detector.explain_features(QUERIES, 2000)
        with pytest.raises(AlteredFileError, match=message):
            GROOD.load(tmp_path / "x")


@pytest.mark.parametrize("kind", ["filter", "stages"])
def test_a_filter_of_another_processor_is_made_anew(
    kind: str, lazily: Callable[..., GROOD], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    monkeypatch.setattr(filter, "_in_bfloat16", lambda m, device: True)
    detector_of(kind).save(path)
    assert read_by_hand(path)[1]["index.rows"][0] == "BF16"
    there = lazily(path)
    assert there._need_state().searcher._filter is not None  # type: ignore[attr-defined]
    expected = there.explain_features(QUERIES)
    monkeypatch.setattr(filter, "_in_bfloat16", lambda m, device: False)
    here = lazily(path)
    for a, b in zip(here.explain_features(QUERIES), expected, strict=True):
        assert torch.equal(a, b)
    # So few gradients need no filter, and what is saved here is what this machine would have saved.
    here.save(tmp_path / "y")
    assert "index.rows" not in read_by_hand(tmp_path / "y")[1]


def test_a_stored_filter_is_not_made_again(
    large: Callable[[str], Path], lazily: Callable[..., GROOD], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("made again")

    # Written before, whichever test comes first.
    paths = [large(kind) for kind in ("filter", "stages", "int8 filter")]
    monkeypatch.setattr(exact, "_make_filter", refuse)
    monkeypatch.setattr(BoundFilter, "_project", refuse)
    for path in paths:
        lazily(path)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mappings are listed on Linux")
def test_the_gradients_stay_in_the_file(large: Callable[[str], Path], lazily: Callable[..., GROOD]) -> None:
    path = large("exact")
    detector = lazily(path)
    address = detector._need_state().searcher.gradients.codes.data_ptr()
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(path))]
    bounds = [[int(limit, 16) for limit in line[0].split("-")] for line in lines]
    assert any(low <= address < high for low, high in bounds)


def test_one_number_of_a_matrix_is_written(tmp_path: Path) -> None:
    """A column of one row has strides that its bytes cannot be seen through."""
    column = torch.arange(8.0, dtype=torch.float64).reshape(1, 8)[:, 3]
    assert column.stride() == (8,)
    container.write(tmp_path / "one.safetensors", {"format_version": 3}, {"column": column})
    assert container.read(tmp_path / "one.safetensors", 3).tensors["column"].tolist() == [3.0]
