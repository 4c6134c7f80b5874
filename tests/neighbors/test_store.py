"""Stored gradients: what rounding and files may change."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from torch_grood import GROOD, ExactIndex, GroodError
from torch_grood.gradients import PolarGradients
from torch_grood.neighbors import GradientStore, StoreOptions
from torch_grood.neighbors import store as store_module
from torch_grood.neighbors.store import Spool, StoreWriter, as_store_options, scratch_tensor

MakeGradients = Callable[..., PolarGradients]
DTYPES = ["float32", "float16", "int8"]


def stored(gradients: PolarGradients, dtype: str, parts: int = 1, **options: Any) -> GradientStore:
    """The gradients, written in so many parts."""
    n = len(gradients.log_magnitude)
    writer = StoreWriter(n, gradients.direction.shape[1], StoreOptions(dtype, **options))
    for start in range(0, n, -(-n // parts)):
        writer.append(gradients.take(slice(start, start + -(-n // parts))))
    return writer.finish()


def with_zeros(gradients: PolarGradients) -> PolarGradients:
    gradients.direction[[0, 7]] = 0.0
    return gradients


def same(first: GradientStore, second: GradientStore) -> bool:
    tensors = [(x.log_magnitude, x.codes, *([] if x.scale is None else [x.scale])) for x in (first, second)]
    return first.log_rounding == second.log_rounding and all(map(torch.equal, *tensors))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_any_default_dtype(make_gradients: MakeGradients, default: torch.dtype, dtype: str) -> None:
    torch.set_default_dtype(default)
    try:
        writer = StoreWriter(50, 20, StoreOptions(dtype))
        writer.append(make_gradients(50, 20))
    finally:
        torch.set_default_dtype(torch.float32)
    store = writer.finish()
    assert store.scale is not None
    assert store.scale.dtype == torch.float32
    assert float((store.directions(slice(None)).norm(dim=1) - 1).abs().max()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 20, 300])
def test_directions_stay_of_unit_length(make_gradients: MakeGradients, dtype: str, d: int) -> None:
    gradients = with_zeros(make_gradients(200, d, low=-30))
    # One component far above the others, whose codes are 0 in int8; and components that float16 holds as subnormals.
    gradients.direction[1:3] = 1e-6
    gradients.direction[1:3, 0] = 1.0
    store = stored(gradients, dtype)
    length = store.directions(slice(None)).double().norm(dim=1)
    assert length[[0, 7]].tolist() == [0.0, 0.0]
    kept = torch.ones(200, dtype=torch.bool)
    kept[[0, 7]] = False
    assert float((length[kept] - 1).abs().max()) < 3e-7
    assert torch.equal(store.log_norm() == -torch.inf, ~kept)
    assert torch.equal(store.log_norm()[kept], gradients.log_magnitude[kept])
    assert torch.equal(store.take(slice(3, 9)).log_magnitude, gradients.log_magnitude[3:9])
    assert (len(store), store.dim, store.dtype) == (200, d, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", [1, 4])
def test_no_gradient_is_rounded_by_more_than_stated(make_gradients: MakeGradients, dtype: str, parts: int) -> None:
    gradients = with_zeros(make_gradients(300, 20, low=-30))
    store = stored(gradients, dtype, parts)
    size = gradients.log_magnitude.exp()[:, None]
    # Codes are taken of the float64 directions; those of float32 count as no rounding.
    error = (size * (store.directions(slice(None)).double() - gradients.direction.double())).norm(dim=1)
    largest = float(error.max())
    assert largest <= float(torch.tensor(store.log_rounding).double().exp()) * (1 + 1e-9)
    if dtype == "float32":
        assert store.log_rounding == -torch.inf
        assert largest == 0.0
    else:
        # And it is attained: no looser than it must be.
        assert largest >= float(torch.tensor(store.log_rounding).double().exp()) * (1 - 1e-6)
        assert 1e-5 < largest < {"float16": 1e-3, "int8": 2e-2}[dtype]


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_no_score_is_off_by_more_than_stated(make_gradients: MakeGradients, dtype: str) -> None:
    gradients, queries = make_gradients(500, 20, seed=1), make_gradients(200, 20, seed=2)
    store = stored(gradients, dtype)
    exact, found = (ExactIndex().build(x).search(queries).log_distance.exp() for x in (gradients, store))
    difference = float((found - exact).abs().max())
    assert 0 < difference <= torch.tensor(store.log_rounding).double().exp()


@pytest.mark.parametrize("dtype", DTYPES)
def test_only_zero_vectors(make_gradients: MakeGradients, dtype: str) -> None:
    gradients = make_gradients(5, 4)
    gradients.direction[:] = 0.0
    store = stored(gradients, dtype)
    assert store.log_rounding == -torch.inf
    assert not bool(store.directions(slice(None)).any())
    assert bool((store.log_norm() == -torch.inf).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_size_is_as_foretold(make_gradients: MakeGradients, dtype: str) -> None:
    assert stored(make_gradients(50, 20), dtype).nbytes == StoreOptions(dtype).nbytes(50, 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gradient(make_gradients: MakeGradients, dtype: str) -> None:
    store = stored(make_gradients(3, 4), dtype).select(torch.empty(0, dtype=torch.int64), StoreOptions(dtype))
    writer = StoreWriter(0, 4, StoreOptions(dtype))
    writer.append(make_gradients(0, 4))
    for empty in (store, writer.finish()):
        assert (len(empty), empty.dim) == (0, 4)


def test_rounding_of_the_codes_does_not_depend_on_the_parts(make_gradients: MakeGradients) -> None:
    gradients = make_gradients(101, 20)
    for dtype in DTYPES:
        assert same(stored(gradients, dtype), stored(gradients, dtype, parts=7))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("bfloat16",), "gradients are stored as float32, float16, int8, not as 'bfloat16'"),
        ((None,), "stored as float32, float16, int8, not as None"),
        ((["int8"],), r"not as \['int8'\]"),
        ((torch.int8,), "not as torch.int8"),
        (("int8", -1), "memory must be a number of bytes, got -1"),
        (("int8", 1e9), "memory must be a number of bytes, got 1000000000.0"),
        (("int8", True), "memory must be a number of bytes, got True"),
        (("int8", "8G"), "memory must be a number of bytes, got '8G'"),
        (("int8", None, 5), "folder must be the path of a folder, got 5"),
        (("int8", None, b"x"), "folder must be the path of a folder, got b'x'"),
    ],
)
def test_options_that_cannot_work(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(GroodError, match=message):
        StoreOptions(*arguments)


def test_as_store_options() -> None:
    options = StoreOptions("int8", memory=5)
    assert as_store_options(options) is options
    assert as_store_options("float16") == StoreOptions("float16")
    for wrong in (None, 5, torch.int8):
        with pytest.raises(GroodError, match=r"store must be 'float32', 'float16', 'int8' or StoreOptions"):
            as_store_options(wrong)  # type: ignore[arg-type]
    with pytest.raises(GroodError, match="not as 'int4'"):
        GROOD(None, store="int4")


def test_the_budget() -> None:
    assert StoreOptions(memory=0).budget() == 0
    assert StoreOptions(memory=7).budget() == 7
    assert StoreOptions().budget() > 2**20


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_changes_no_bit_and_leaves_no_name(
    make_gradients: MakeGradients, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dtype: str
) -> None:
    gradients = with_zeros(make_gradients(300, 20))
    folder = tmp_path / "not" / "yet"
    mapped = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **kw: mapped.append(a) or from_file(*a, **kw))
    on_disk = stored(gradients, dtype, parts=3, memory=0, folder=folder)
    assert len(mapped) == 1
    assert list(folder.iterdir()) == []
    assert same(on_disk, stored(gradients, dtype))
    queries = make_gradients(30, 20, seed=1)
    found, expected = (ExactIndex().build(x).search(queries) for x in (on_disk, stored(gradients, dtype)))
    assert torch.equal(found.log_distance, expected.log_distance)
    rows = torch.tensor([5, 9, 200])
    part = on_disk.select(rows, StoreOptions(dtype, 0, folder))
    more = on_disk.extended(gradients, StoreOptions(dtype, 0, folder))
    assert len(mapped) == 4, "one selected, one added, one of both"
    del on_disk
    assert same(part, stored(gradients, dtype).select(rows, StoreOptions(dtype)))
    assert torch.equal(more.codes[:300], more.codes[300:])
    assert list(folder.iterdir()) == []


def test_the_budget_is_held_to_the_byte(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mapped = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda *a, **kw: mapped.append(a) or from_file(*a, **kw))
    for memory, n_mapped in ((400, 0), (399, 1)):
        tensor = scratch_tensor((20, 5), torch.float32, StoreOptions("float32", memory, tmp_path))
        assert (tensor.shape, tensor.dtype, len(mapped)) == ((20, 5), torch.float32, n_mapped)


def test_an_empty_tensor_needs_no_file(tmp_path: Path) -> None:
    assert scratch_tensor((0, 5), torch.float32, StoreOptions(memory=0, folder=tmp_path / "new")).shape == (0, 5)
    assert not (tmp_path / "new").exists()


def hold(use: str, options: StoreOptions) -> None:
    """Need 64 bytes as a tensor, or in a spool."""
    if use == "tensor":
        scratch_tensor((4, 4), torch.float32, options)
    else:
        Spool(options).append(torch.zeros(4, 4))


@pytest.mark.parametrize("use", ["tensor", "spool"])
def test_a_folder_that_cannot_be_used(use: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        options = StoreOptions(memory=0, folder=folder)
        with pytest.raises(GroodError, match=r"cannot hold what does not fit into memory: .*; choose another folder"):
            hold(use, options)


@pytest.mark.parametrize("use", ["tensor", "spool"])
def test_too_little_room(use: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=63))
    options = StoreOptions(memory=0, folder=tmp_path)
    with pytest.raises(GroodError, match=r"0.0 GiB more are needed in .*which has 0.0 GiB left; choose another folder"):
        hold(use, options)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "posix_fallocate", full)
    with pytest.raises(GroodError, match="No space left on device; choose another folder"):
        scratch_tensor((4, 4), torch.float32, StoreOptions(memory=0, folder=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_the_users_cache_is_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scratch_tensor((4, 4), torch.float32, StoreOptions(memory=0))
    assert (tmp_path / "torch-grood" / "stores").is_dir()


@pytest.mark.parametrize("memory", [0, 200, 10**6])
def test_a_spool_gives_back_what_it_was_given(memory: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
    # 200 bytes hold some of the parts; the later, smaller ones fit again.
    parts = [torch.randn(n, 4, generator=generator).to(dtypes[i % 4]) for i, n in enumerate([5, 0, 30, 1, 7, 0, 2])]
    parts.append(torch.randn(4, 6, generator=generator).T)
    parts.append(torch.randn(8, 8, generator=generator)[:, ::2])
    spool = Spool(StoreOptions(memory=memory, folder=tmp_path))
    for _ in range(2):
        for part in parts:
            spool.append(part)
        found = list(spool.drain())
        assert [part.dtype for part in found] == [part.dtype for part in parts]
        assert all(map(torch.equal, found, parts))
        assert list(spool.drain()) == []
    assert list(tmp_path.iterdir()) == []


def test_a_spool_counts_what_it_holds(tmp_path: Path) -> None:
    spool = Spool(StoreOptions(memory=100, folder=tmp_path))
    for n in (10, 10, 5, 1):
        spool.append(torch.zeros(n, 2))
    assert [isinstance(part, Tensor) for part in spool._parts] == [True, False, False, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_select_takes_rows_as_they_are(make_gradients: MakeGradients, dtype: str) -> None:
    store = stored(with_zeros(make_gradients(50, 20)), dtype)
    rows = torch.tensor([0, 3, 7, 49])
    part = store.select(rows, StoreOptions())
    assert part.dtype == dtype
    for found, expected in zip(part.take(slice(None)), store.take(rows), strict=True):
        assert torch.equal(found, expected)
    assert part.log_rounding == store.log_rounding
    part.codes.zero_()
    assert bool(store.codes[3].any())


@pytest.mark.parametrize("dtype", DTYPES)
def test_extended_equals_written_together(make_gradients: MakeGradients, dtype: str) -> None:
    gradients = with_zeros(make_gradients(90, 20))
    first, rest = stored(gradients.take(slice(0, 60)), dtype), gradients.take(slice(60, None))
    before = first.codes.clone()
    # The options say where the codes go; they stay of the dtype that they are.
    assert same(first.extended(rest, StoreOptions("float32")), stored(gradients, dtype))
    assert torch.equal(first.codes, before)
    assert same(first.extended(rest.take(slice(0, 0)), StoreOptions()), first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_to_another_device(make_gradients: MakeGradients, dtype: str) -> None:
    store = stored(make_gradients(5, 4), dtype)
    assert store.to("cpu") is store
    assert store.to(torch.device("cpu")) is store
    elsewhere = store.to("meta")
    assert elsewhere.device == elsewhere.log_magnitude.device == torch.device("meta")
    assert (elsewhere.scale is None) == (dtype == "float32")


def test_of_takes_gradients_without_a_copy(make_gradients: MakeGradients) -> None:
    gradients = make_gradients(5, 4)
    store = GradientStore.of(gradients)
    assert store.codes.data_ptr() == gradients.direction.data_ptr()
    assert GradientStore.of(store) is store
    assert GradientStore.of(gradients._replace(direction=gradients.direction.double())).dtype == "float32"


def test_chunks_cover_all_rows(make_gradients: MakeGradients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_CHUNK_BYTES", 100)
    gradients = with_zeros(make_gradients(11, 4))
    store = stored(gradients, "int8")
    assert [row for part in store.chunks() for row in range(11)[part]] == list(range(11))
    assert len(list(store.chunks())) == 2
    assert store.log_norm().isinf().nonzero().flatten().tolist() == [0, 7]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_fit_that_holds_nothing_in_memory_gives_the_same_bits(
    features: tuple[Tensor, Tensor], dtype: str, tmp_path: Path
) -> None:
    unlimited = GROOD(None, store=dtype).fit_features(*features)
    limited = GROOD(None, store=StoreOptions(dtype, 0, tmp_path)).fit_features(*features)
    first, second = (detector._need_state().searcher.gradients for detector in (unlimited, limited))
    assert same(first, second)
    queries = features[0] + 0.1
    assert torch.equal(limited.log_score_features(queries), unlimited.log_score_features(queries))
    assert limited.fit_info_.rounding_radius == unlimited.fit_info_.rounding_radius
    assert list(tmp_path.iterdir()) == []


def test_the_rounding_radius_is_that_of_the_scores(features: tuple[Tensor, Tensor]) -> None:
    queries = features[0] + 0.1
    exact = GROOD(None).fit_features(*features)
    assert exact.fit_info_.rounding_radius == 0.0
    for dtype in DTYPES[1:]:
        rounded = GROOD(None, store=dtype).fit_features(*features)
        difference = (rounded.score_features(queries) - exact.score_features(queries)).abs().max()
        # The directions that both round are float64; those of `exact` are float32.
        assert 0 < float(difference) <= rounded.fit_info_.rounding_radius + 1e-7
