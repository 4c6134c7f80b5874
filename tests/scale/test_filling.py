"""Features by many processes: each batch once, and a fit that ends with the same bytes."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filling_world import MakeFiller, N, fitted, write_photos

from torch_grood import GROOD, Mixup
from torch_grood.data import read_source
from torch_grood.errors import GroodError
from torch_grood.features import FeatureExtractor
from torch_grood.scale.filling import Filler, fill_as_rank, fill_on_ray

pytestmark = pytest.mark.usefixtures("one_thread")

MIXUP = Mixup(20)


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


@pytest.fixture(scope="module")
def mixed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a detector whose early activations were summed up by one process, segment by segment."""
    cache = tmp_path_factory.mktemp("cache")
    for name, source in (("train", MIXUP), ("held_out", None)):
        fill_as_rank(MakeFiller(photos / name, cache, None, source)(), 0, 1)
    return fitted(photos, cache, source=MIXUP)


def test_early_activations_are_summed_up_in_segments(
    mixed: bytes, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By three processes, of which one is killed in a segment and goes on: the file is that of one."""
    cache = tmp_path / "cache"

    def filler() -> Filler:
        return MakeFiller(photos / "train", cache, None, MIXUP)()

    segments = filler().missing()
    assert len(segments) == 16
    assert [batch for segment in segments for batch in segment] == list(range(38))
    run = FeatureExtractor._run
    left = [4]

    def run_or_die(self: FeatureExtractor, inputs: torch.Tensor, *more: Any) -> Any:
        # One image at a time is to find the layers.
        left[0] -= len(inputs) > 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return run(self, inputs, *more)

    interrupted = filler()
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractor, "_run", run_or_die)
        with pytest.raises(KeyboardInterrupt):
            fill_as_rank(interrupted, 1, 3)
    told: list[int] = []
    for rank in (1, 2, 0):
        fill_as_rank(filler(), rank, 3, tell=told.append)
    assert 0 < N - sum(told) <= 12
    assert filler().missing() == []
    # The sums of the segments are gone, and those of all are there.
    assert len(list(cache.rglob("sums-*"))) == 1
    fill_as_rank(MakeFiller(photos / "held_out", cache)(), 0, 1)

    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr("torch_grood.data.dataset.ImageLoader.read", never)
    assert fitted(photos, cache, source=MIXUP) == mixed


def test_they_are_those_of_a_plain_fit_up_to_rounding(mixed: bytes, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "mixed.grood").write_bytes(mixed)
    (tmp_path / "plain.grood").write_bytes(fitted(photos, None, source=MIXUP))
    one, other = GROOD.load(tmp_path / "mixed.grood"), GROOD.load(tmp_path / "plain.grood")
    assert torch.equal(one.class_prototypes_, other.class_prototypes_)
    torch.testing.assert_close(one.ood_prototype_, other.ood_prototype_, rtol=1e-5, atol=1e-6)
    assert one.fit_info_.outlier_source == other.fit_info_.outlier_source


def test_a_class_that_a_segment_has_no_image_of(photos: Path, tmp_path: Path) -> None:
    """Class folders follow one another: most segments have images of one class, and some none that takes part."""
    files = []
    for world in (1, 2):
        for name, source in (("train", MIXUP), ("held_out", None)):
            for rank in reversed(range(world)):
                fill_as_rank(MakeFiller(photos / name, tmp_path / f"{world}", ["a", "c"], source)(), rank, world)
        files.append(fitted(photos, tmp_path / f"{world}", ["a", "c"], MIXUP))
    assert files[0] == files[1]


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
def test_a_fit_after_ray(photos: Path, mixed: bytes, tmp_path: Path) -> None:
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
        for name, source in (("train", MIXUP), ("held_out", None)):
            fill_on_ray(MakeFiller(photos / name, tmp_path / "mixed", None, source), workers=2)
    finally:
        ray.shutdown()
        # What is left of its processes complains here, and not in some later test.
        gc.collect()
    assert sum(told) == N + 30
    expected = fitted(photos, None)
    assert fitted(photos, tmp_path / "cache") == expected
    assert MakeFiller(photos / "train", tmp_path / "other")().missing() == []
    assert fitted(photos, tmp_path / "mixed", source=MIXUP) == mixed
