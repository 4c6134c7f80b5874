"""Features by many processes: each batch once, and a fit that ends with the same bytes."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from filling_world import MakeFiller, N, fitted, write_photos

from torch_grood.data import read_source
from torch_grood.errors import GroodError
from torch_grood.features import FeatureExtractor
from torch_grood.scale.filling import Filler, fill_as_rank, fill_on_ray


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


class Dying(MakeFiller):
    """Whose workers die over some batches."""

    def __call__(self) -> Filler:
        found = super().__call__()
        fill = found.fill

        def fill_or_die(piece: range) -> int:
            return os._exit(9) if piece.start == 16 else fill(piece)  # type: ignore[func-returns-value]

        found.fill = fill_or_die  # type: ignore[method-assign]
        return found


@pytest.mark.parametrize("classes", [None, ["a", "c"]])
def test_ranks_share_the_batches_and_the_fit_runs_no_network(
    classes: list[str] | None, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    for name, size in (("train", N), ("held_out", 30)):
        told: list[int] = []
        shares = 0
        for rank in (2, 1, 0):
            before = len(told)
            fill_as_rank(MakeFiller(photos / name, cache, classes)(), rank, 3, tell=told.append)
            shares += len(told) > before
        assert sum(told) == (size if classes is None else size * 2 // 3)
        assert shares == (3 if name == "train" else 1)
        assert MakeFiller(photos / name, cache, classes)().missing() == []
    expected = fitted(photos, None, classes)

    calls: list[int] = []
    run = FeatureExtractor._run

    def counted(self: FeatureExtractor, inputs: torch.Tensor, *more: Any) -> Any:
        calls.append(len(inputs))
        return run(self, inputs, *more)

    monkeypatch.setattr(FeatureExtractor, "_run", counted)
    assert fitted(photos, cache, classes) == expected
    # One image at a time: to find the layers, and to check that the model is the same.
    assert set(calls) == {1}


def test_pieces_are_side_by_side_and_short(photos: Path, tmp_path: Path) -> None:
    filler = MakeFiller(photos / "train", tmp_path / "cache")()
    pieces = filler.missing()
    assert pieces == [range(0, 16), range(16, 32), range(32, 38)]
    assert filler.fill(pieces[1]) == 64
    assert filler.missing() == [range(0, 16), range(32, 38)]
    first, last = filler.names(pieces[2])
    paths = read_source(photos / "train").paths
    assert (first, last) == (paths[128], paths[-1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_fit_after_ray(photos: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    told: list[int] = []
    # Workers find this module where this process does.
    where = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error", runtime_env=where)
    try:
        for name in ("train", "held_out"):
            fill_on_ray(MakeFiller(photos / name, tmp_path / "cache"), workers=2, tell=told.append)
        with pytest.raises(
            GroodError, match=r"worker processes died over the images from .* to .*What was computed is kept"
        ):
            fill_on_ray(Dying(photos / "train", tmp_path / "other"), workers=1)
        assert range(16, 32) in MakeFiller(photos / "train", tmp_path / "other")().missing()
        fill_on_ray(MakeFiller(photos / "train", tmp_path / "other"), workers=2)
    finally:
        ray.shutdown()
        # What is left of its processes complains here, and not in some later test.
        gc.collect()
    assert sum(told) == N + 30
    expected = fitted(photos, None)
    assert fitted(photos, tmp_path / "cache") == expected
    assert MakeFiller(photos / "train", tmp_path / "other")().missing() == []
