"""A fit in shards: the detector of one process, byte for byte, and its scores, whatever becomes of the actors."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("ray")

import ray
from filling_world import AS_PATTERNS, BATCH, MakeFiller, fitted, loader, network, write_photos
from scaled_world import written

from torch_grood import GROOD, FaissIndex, GroodError, KCenterCoreset, UniformNoise
from torch_grood.data import FeatureCache
from torch_grood.runtime import DetectorRuntime, Runtime
from torch_grood.scale import Job, inputs_of, score_on_ray, shards
from torch_grood.scale.filling import Filler
from torch_grood.scale.parts import Folder
from torch_grood.scale.shards import check_shards, fit_in_shards, searching

pytestmark = [
    pytest.mark.slow,
    # Ray's own files and sockets, and what it says of them.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def cluster(one_thread: None) -> Iterator[None]:
    # Workers find the modules of the tests where this process does.
    where = {"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error", runtime_env=where)
    yield
    ray.shutdown()
    # What is left of its processes complains here, and not in some later test.
    gc.collect()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos"))


def in_shards(
    photos: Path,
    folder: Path,
    count: int,
    classes: list[str] | None = None,
    make_filler: Any = MakeFiller,
    **options: Any,
) -> GROOD:
    """Fitted and calibrated, and saved as f.grood."""
    cache = FeatureCache(folder / "cache")
    detector, images = GROOD(network(), **options), loader(photos / "train")
    output = folder / "f.grood"
    make = make_filler(photos / "train", folder / "cache", classes)
    files = fit_in_shards(detector, make, images, cache, output, count, classes=classes, progress=False)
    with searching(files) as searcher:
        detector.search_with(searcher)
        detector.calibrate(loader(photos / "held_out"), fpr=0.2, cache=cache, progress=False)
        detector.save(output)
    return detector


def split(photos: Path, folder: Path) -> GROOD:
    """The plain detector, as f.grood in three shards."""
    (folder / "one.grood").write_bytes(fitted(photos, None))
    GROOD.load(folder / "one.grood").save(folder / "f.grood", shards=3)
    return GROOD.load(folder / "f.grood")


@pytest.mark.parametrize(("count", "classes"), [(1, None), (3, None), (5, None), (2, ["a", "c"])])
def test_it_is_the_detector_of_one_process(count: int, classes: list[str] | None, photos: Path, tmp_path: Path) -> None:
    in_shards(photos, tmp_path, count, classes)
    loaded = GROOD.load(tmp_path / "f.grood", verify=True)
    assert loaded.shards_ is not None
    assert len(loaded.shards_.files) == count
    (tmp_path / "joined").mkdir()
    loaded.save(tmp_path / "joined" / "f.grood")
    assert (tmp_path / "joined" / "f.grood").read_bytes() == fitted(photos, None, classes)


@pytest.mark.parametrize("options", [{"outliers": UniformNoise(20)}, {"store": "int8", "geometry": "half", "k": 2}])
def test_other_settings(options: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    in_shards(photos, tmp_path, 3, **options)
    found = GROOD.load(tmp_path / "f.grood")
    plain = GROOD(network(), **options).fit(loader(photos / "train"), progress=False)
    plain.calibrate(loader(photos / "held_out"), fpr=0.2, progress=False)
    queries = torch.randn(30, plain.fit_info_.n_features, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.predict_features(queries).score, plain.predict_features(queries).score)
    assert torch.equal(found.predict_features(queries).is_ood, plain.predict_features(queries).is_ood)
    assert found.fit_info_ == plain.fit_info_


class DyingOnce(MakeFiller):
    """Whose first part dies when it is asked for its sums, once: they are made anew."""

    def __call__(self) -> Filler:
        found = super().__call__()
        collect, mark = found.collect, self.cache / "died"

        def collect_then_die(passed: Any, batches: range) -> None:
            collect(passed, batches)
            if batches.start == 0:
                go_on = passed.go_on

                def die(*sums: Any) -> None:
                    if not mark.exists():
                        mark.touch()
                        os.kill(os.getpid(), signal.SIGKILL)
                    go_on(*sums)

                passed.go_on = die

        found.collect = collect_then_die  # type: ignore[method-assign]
        return found


def test_a_part_that_dies_is_made_anew(photos: Path, tmp_path: Path) -> None:
    in_shards(photos, tmp_path, 2, make_filler=DyingOnce)
    assert (tmp_path / "cache" / "died").exists()
    (tmp_path / "joined").mkdir()
    GROOD.load(tmp_path / "f.grood").save(tmp_path / "joined" / "f.grood")
    assert (tmp_path / "joined" / "f.grood").read_bytes() == fitted(photos, None)


def test_searchers_that_die_come_again(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mortal(shards._Searcher):
        def process(self) -> int:
            return os.getpid()

    monkeypatch.setattr(shards, "_Searcher", Mortal)
    plain = split(photos, tmp_path)
    queries = torch.randn(30, plain.fit_info_.n_features, generator=torch.Generator().manual_seed(0))
    expected = plain.score_features(queries)
    assert plain.shards_ is not None
    detector = GROOD.load(tmp_path / "f.grood")
    with searching(plain.shards_) as searcher:
        detector.search_with(searcher)
        for number in (0, 2, 1, 1):
            assert torch.equal(detector.score_features(queries), expected)
            os.kill(ray.get(searcher._actors[number].process.remote()), signal.SIGKILL)
        assert torch.equal(detector.score_features(queries), expected)


class Opener:
    """Of the runtime of a detector."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self) -> Runtime:
        torch.set_num_threads(1)
        return DetectorRuntime(GROOD.load(self.path, network()), AS_PATTERNS)


def test_workers_ask_the_shards(photos: Path, tmp_path: Path) -> None:
    split(photos, tmp_path)
    opener = Opener(tmp_path / "f.grood")
    runtime = opener()
    assert isinstance(runtime, DetectorRuntime)
    inputs = inputs_of([str(photos / "held_out")])
    for name, options in (("alone", {}), ("shards", {"shards": runtime.shards})):
        job = Job(inputs, Folder(str(tmp_path / name)), "x", BATCH, 8)
        assert score_on_ray(job, opener, workers=2, **options).images == 30
    assert written(tmp_path / "shards") == written(tmp_path / "alone")


def test_what_cannot_be_in_so_many_parts(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(GroodError, match="38 batches of images make 1 to 38 shards, not 39"):
        in_shards(photos, tmp_path, 39)
    # Class folders follow one another: no image of the last batches is of the first class.
    with pytest.raises(GroodError, match=r"no image of f-.*-00003-of-00003.grood takes part; use fewer shards"):
        in_shards(photos, tmp_path, 3, ["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": FaissIndex("IVF4,Flat")}, "shards are searched exactly, not by 'IVF4,Flat'"),
        ({"subset": KCenterCoreset(ratio=0.5)}, "a subset is chosen from all gradients"),
    ],
)
def test_what_shards_cannot_do(options: dict[str, Any], message: str) -> None:
    with pytest.raises(GroodError, match=message):
        check_shards(GROOD(None, **options), 1, 10)


def test_a_cluster_without_the_memory() -> None:
    with pytest.raises(GroodError, match=r"2 parts take 1,073,741,824.0 GiB each, and the 1 nodes .* have room for 0"):
        shards._lasting(object, 2**60, 2)
