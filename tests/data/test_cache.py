"""The feature cache: the same bytes whatever happened before, and nothing computed twice that was kept."""

from __future__ import annotations

import itertools
import json
import logging
import os
import re
import resource
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from models import cnn, patterns, taught_cnn, write_patterns
from torch_grood import GROOD, ClassSample, Mixup, OutlierSamples, PrototypeMean, UniformNoise, container
from torch_grood.data import (
    BadImageError,
    FeatureCache,
    ImageLoader,
    ImageSource,
    ImageTransform,
    image_loader,
    read_source,
)
from torch_grood.data import cache_entry as entry_module
from torch_grood.data.cache import _hash_of_files
from torch_grood.data.sums import SumsJournal
from torch_grood.errors import FormatError, GroodError
from torch_grood.feature_store import FeatureStore, Sums
from torch_grood.training_pass import TrainingPass

# Undoes what `write_patterns` does to the numbers of `patterns`.
AS_PATTERNS = ImageTransform(None, 8, "bilinear", (128 / 255,) * 3, (40 / 255,) * 3)
N, BATCH, SHARD = 66, 4, 12


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the library catches it."""


def _write(folder: Path, n: int, seed: int) -> ImageSource:
    return read_source(write_patterns(folder, n, seed))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Of processes that fork, and of equal bits in both."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # No test pulls the plug, and this is most of the time.
        patch.setattr(os, "fsync", lambda handle: None)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    _write(folder / "train", N, seed=1)
    _write(folder / "held_out", 30, seed=2)
    _write(folder / "ood", 9, seed=3)
    return folder


@pytest.fixture
def photos(original: Path, tmp_path: Path) -> Path:
    """{train,held_out,ood}/{a,b,c}/*.png, images of 8 × 8; each file has its own time."""
    return Path(shutil.copytree(original, tmp_path / "photos"))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return taught_cnn()


def loader(folder: Path, **options: Any) -> ImageLoader:
    transform = options.pop("transform", AS_PATTERNS)
    return image_loader(read_source(folder), transform, **{"batch_size": BATCH, "workers": 0, **options})


def cache(folder: Path, **options: Any) -> FeatureCache:
    return FeatureCache(folder / "cache", **{"shard_images": SHARD, **options})


def run(
    model: nn.Module,
    photos: Path,
    kept: FeatureStore | None,
    *,
    classes: Any = None,
    progress: Any = False,
    reading: dict[str, Any] | None = None,
    **arguments: Any,
) -> bytes:
    """Fit, calibrate, save: the file."""
    options = reading or {}
    detector = GROOD(model, **{"outliers": Mixup(n=10), **arguments})
    detector.fit(loader(photos / "train", **options), classes=classes, progress=progress, cache=kept)
    detector.calibrate(loader(photos / "held_out", **options), fpr=0.2, progress=progress, cache=kept)
    path = photos.parent / "new.grood"
    detector.save(path)
    return path.read_bytes()


def killed_after(batches: int) -> Callable[[Iterable[Any]], Iterator[Any]]:
    """For `progress`: dies when so many batches were taken, over all loops."""
    left = batches

    def wrap(steps: Iterable[Any]) -> Iterator[Any]:
        nonlocal left
        for step in steps:
            if left == 0:
                raise Killed
            left -= 1
            yield step

    return wrap


@pytest.fixture
def images_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of the training images that the model runs on, in the order of the runs."""
    seen: list[int] = []
    run_model = TrainingPass.run_model

    def counted(self: TrainingPass, images: Tensor, members: Any, early: Any) -> Any:
        seen.extend(members.sample_ids.tolist())
        return run_model(self, images, members, early)

    monkeypatch.setattr(TrainingPass, "run_model", counted)
    return seen


SETTINGS: dict[str, dict[str, Any]] = {
    "mixup": {},
    "mixup of all": {"outliers": Mixup(n=1000, lam=0.3), "seed": 2**63 - 1},
    "subset": {"outliers": PrototypeMean(), "subset": ClassSample(n=5), "seed": 3},
    "noise": {"outliers": UniformNoise(n=10)},
    "mean": {"outliers": PrototypeMean()},
    "two classes": {"classes": ["a", "c"]},
    "late layer": {"early_layer": "2", "store": "int8"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_file_is_the_same_with_a_cache_killed_or_not(model: nn.Module, photos: Path, name: str) -> None:
    settings = SETTINGS[name]
    plain = run(model, photos, None, **settings)
    assert run(model, photos, cache(photos.parent), **settings) == plain
    assert run(model, photos, cache(photos.parent), **settings) == plain, "all from the cache"
    shutil.rmtree(photos.parent / "cache")
    for batches in (0, 1, 2, 3, 5, 14, 16, 17, 18, 20):
        with pytest.raises(Killed):
            run(model, photos, cache(photos.parent), progress=killed_after(batches), **settings)
    assert run(model, photos, cache(photos.parent), **settings) == plain, "killed ten times"


@pytest.mark.parametrize("writes_before", [True, False])
def test_a_kill_at_any_write_loses_one_shard_at_most(
    model: nn.Module, photos: Path, monkeypatch: pytest.MonkeyPatch, images_run: list[int], writes_before: bool
) -> None:
    plain = run(model, photos, None)
    write = container.write
    left = 0

    def dying(path: Path, *arguments: Any) -> None:
        nonlocal left
        if left == 0:
            if writes_before:
                write(path, *arguments)
            raise Killed
        left -= 1
        write(path, *arguments)

    monkeypatch.setattr(container, "write", dying)
    for n_writes in range(1000):
        shutil.rmtree(photos.parent / "cache", ignore_errors=True)
        images_run.clear()
        left = n_writes
        try:
            assert run(model, photos, cache(photos.parent)) == plain
        except Killed:
            left = 1000
            assert run(model, photos, cache(photos.parent)) == plain
            assert set(images_run) == set(range(N))
            assert len(images_run) - N <= SHARD, "one shard is repeated"
        else:
            break
    # The probe, six shards of three files; the same without content and sums for 30 held-out images; the detector.
    assert n_writes == 1 + 6 * 3 + 1 + 3 + 1


def test_nothing_is_computed_that_is_kept(
    model: nn.Module, photos: Path, images_run: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "torch_grood")
    store = cache(photos.parent)
    run(model, photos, store)
    assert sorted(images_run) == list(range(N))
    shards = {path: path.read_bytes() for path in (photos.parent / "cache").rglob("*.safetensors")}

    for settings in ({"outliers": Mixup(n=20, lam=0.2)}, SETTINGS["noise"], SETTINGS["mean"], {"index": "Flat"}):
        images_run.clear()
        caplog.clear()
        assert run(model, photos, store, **settings) == run(model, photos, None, **settings)
        assert len(images_run) == N, "by the run without a cache only"
        assert f"continued: {N} of {N} images are in the cache" in caplog.messages
        assert "continued: 30 of 30 images are in the cache" in caplog.messages

    images_run.clear()
    caplog.clear()
    with_cache = run(model, photos, store, seed=5)
    assert images_run == [], "another seed needs the images, but not the model"
    assert caplog.messages[0] == (
        f"continued: {N} of {N} images are in the cache; {N} of them are read again for this seed and early layer"
    )
    assert with_cache == run(model, photos, None, seed=5)

    images_run.clear()
    with_cache = run(model, photos, store, early_layer="2")
    assert sorted(images_run) == list(range(N)), "another early layer needs the model"
    assert with_cache == run(model, photos, None, early_layer="2")
    images_run.clear()
    assert run(model, photos, store, early_layer="2", outliers=Mixup(n=10, lam=0.1)) != with_cache
    assert images_run == []
    assert {path: path.read_bytes() for path in shards} == shards, "no shard is written twice"


def test_batches_without_anyone_who_takes_part_are_not_read_again(
    model: nn.Module, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for classes, source in ((["c"], PrototypeMean()), (["a", "b"], Mixup(n=10)), (["b", "c"], Mixup(n=10))):
        plain = run(model, photos, cache(photos.parent), classes=classes, outliers=source)
        with monkeypatch.context() as patch:
            patch.delattr(ImageLoader, "read")
            assert run(model, photos, cache(photos.parent), classes=classes, outliers=source) == plain


def test_shards_close_by_images_bytes_or_time(model: nn.Module, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shards(**options: Any) -> list[str]:
        shutil.rmtree(photos.parent / "cache", ignore_errors=True)
        run(model, photos, cache(photos.parent, **{"shard_images": 10**6, **options}), outliers=PrototypeMean())
        return sorted(path.name for path in _entry(photos, 66).glob("features-*"))

    assert shards(shard_images=30) == [
        "features-0000000-0000008.safetensors",
        "features-0000008-0000016.safetensors",
        "features-0000016-0000017.safetensors",
    ]
    # A batch has 4 x 32 float32 features, and 128 bytes of other columns.
    assert shards(shard_bytes=8 * 640)[:2] == [
        "features-0000000-0000008.safetensors",
        "features-0000008-0000016.safetensors",
    ]
    assert len(shards()) == 1
    clock = itertools.count()
    monkeypatch.setattr(entry_module.time, "monotonic", lambda: 31.0 * next(clock))
    assert len(shards()) == 9, "the clock is read once a batch and once a shard"


def _entry(photos: Path, n_files: int) -> Path:
    """The one entry for so many images."""
    keys = [path for path in (photos.parent / "cache").glob("*/key.json") if _read(path)["n_files"] == n_files]
    assert len(keys) == 1
    return keys[0].parent


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


# --- running sums ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes_at_a_time", [1, 3, 40])
def test_sums_are_kept_whatever_changes_when(tmp_path: Path, classes_at_a_time: int) -> None:
    """Classes come mostly in order, as in class folders; after each write the newest sums of all of them are there."""
    rng = np.random.default_rng(classes_at_a_time)
    newest: dict[int, Tensor] = {}
    journal = SumsJournal(tmp_path, "entry", "layer1")
    for end in range(1, 60):
        first = min(end // 2, 40 - classes_at_a_time)
        labels = torch.tensor(sorted({*range(first, first + classes_at_a_time), int(rng.integers(end))}))
        values = torch.from_numpy(rng.standard_normal((len(labels), 2, 3)))
        newest |= dict(zip(labels.tolist(), values, strict=True))
        journal.write(Sums(end, labels, values))
        if end % 7 == 0:
            journal = SumsJournal(tmp_path, "entry", "layer1")
            found: dict[int, Tensor] = {}
            for sums in journal.read():
                found |= dict(zip(sums.labels.tolist(), sums.values, strict=True))
            assert found.keys() == newest.keys()
            assert all(torch.equal(found[label], newest[label]) for label in newest)
            assert sums.end == end
    assert len(list(tmp_path.iterdir())) <= len(newest), "what is superseded is deleted"
    assert SumsJournal(tmp_path, "entry", "layer2").read() == []


def test_superseded_sums_that_a_kill_left_are_swept_away(tmp_path: Path) -> None:
    def write(end: int) -> None:
        SumsJournal(tmp_path, "entry", "fc").write(Sums(end, torch.tensor([0]), torch.ones(1, 2, dtype=torch.float64)))

    write(1)
    old = next(tmp_path.iterdir())
    write(2)
    assert len(list(tmp_path.iterdir())) == 2
    assert [sums.end for sums in SumsJournal(tmp_path, "entry", "fc").read()] == [2]
    assert old.exists(), "another process may be about to read it"
    os.utime(old, (time.time() - 90_000,) * 2)
    SumsJournal(tmp_path, "entry", "fc").read()
    assert not old.exists()


def test_large_sums_are_written_as_often_as_they_are_worth(
    model: nn.Module, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard a batch; a batch takes a second, and to write sums, 4,096 bytes a class, 0.09 seconds."""
    now, ends = 0.0, []
    write = SumsJournal.write

    def slow(self: SumsJournal, sums: Sums) -> None:
        nonlocal now
        now += 0.09
        ends.append(sums.end)
        write(self, sums)

    def seconds(steps: Iterable[Any]) -> Iterator[Any]:
        nonlocal now
        for step in steps:
            now += 1
            yield step

    plain = run(model, photos, None)
    monkeypatch.setattr(SumsJournal, "write", slow)
    monkeypatch.setattr(entry_module.time, "monotonic", lambda: now)
    assert run(model, photos, cache(photos.parent, shard_images=4, shard_bytes=3000), progress=seconds) == plain
    assert ends == [1, 6, 11, 16, 17], "the first, as its cost is not known, and the last in any case"
    ends.clear()
    shutil.rmtree(photos.parent / "cache")
    run(model, photos, cache(photos.parent, shard_images=4), progress=seconds)
    assert ends == list(range(1, 18)), "small ones with every shard"


# --- the key -------------------------------------------------------------------------------------------------------


def _n_entries(photos: Path) -> int:
    return len(list((photos.parent / "cache").iterdir()))


def _weights(model: nn.Module, photos: Path) -> dict[str, Any]:
    other = cnn(3).eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other[0].bias[0] += 1e-6
    return {"model": other}


def _touch(model: nn.Module, photos: Path) -> dict[str, Any]:
    file = photos / "train" / "b" / "001.png"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    return {}


def _rewrite(model: nn.Module, photos: Path) -> dict[str, Any]:
    file = photos / "train" / "b" / "001.png"
    status = file.stat()
    file.write_bytes(file.read_bytes() + b"\0")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    return {}


def _rename(model: nn.Module, photos: Path) -> dict[str, Any]:
    (photos / "train" / "a" / "063.png").rename(photos / "train" / "a" / "064.png")
    return {}


CHANGES: dict[str, Callable[[nn.Module, Path], dict[str, Any]]] = {
    "weights": _weights,
    "time": _touch,
    "size": _rewrite,
    "name": _rename,
    "dtype": lambda model, photos: {"model": _as_double(model)},
    "batch size": lambda model, photos: {"reading": {"batch_size": 5}},
    "transform": lambda model, photos: {"reading": {"transform": replace(AS_PATTERNS, interpolation="box")}},
    "classes": lambda model, photos: {"classes": ["a", "b"]},
    "head": lambda model, photos: {"head": "6", "outliers": PrototypeMean()},
}


def _as_double(model: nn.Module) -> nn.Module:
    other = cnn(3).eval()
    other.load_state_dict(model.state_dict())
    return other.double()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_anything_makes_another_entry(model: nn.Module, photos: Path, name: str) -> None:
    run(model, photos, cache(photos.parent))
    n_before = _n_entries(photos)
    arguments = {"model": model, **CHANGES[name](model, photos)}
    found = run(photos=photos, kept=cache(photos.parent), **arguments)
    assert _n_entries(photos) > n_before
    assert found == run(photos=photos, kept=None, **arguments)


def test_what_changes_no_feature_changes_no_key(
    model: nn.Module, photos: Path, images_run: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, photos, cache(photos.parent))
    images_run.clear()
    moved = photos.parent / "elsewhere" / "photos"
    shutil.copytree(photos, moved)
    (photos.parent / "cache").rename(moved.parent / "cache")
    run(model, moved, cache(moved.parent), reading={"workers": 2, "on_bad": "skip"})
    monkeypatch.chdir(moved)
    GROOD(model).fit(loader(Path("train")), cache=FeatureCache("../cache"), progress=False)
    assert images_run == []
    # A label and a name belong to the key even where all else is the same.
    source = read_source(moved / "train")
    labels = source.labels or ()
    assert _hash_of_files(source) != _hash_of_files(replace(source, labels=(1, *labels[1:])))
    assert _hash_of_files(source) != _hash_of_files(replace(source, labels=None))
    assert _hash_of_files(source) != _hash_of_files(replace(source, paths=source.paths[::-1]))


def test_it_says_what_differs(model: nn.Module, photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "torch_grood")
    run(model, photos, cache(photos.parent))
    caplog.clear()
    run(model, photos, cache(photos.parent), reading={"batch_size": 5})
    assert "the cache has an entry that differs in batch_size only: 4, now 5; it is not used" in caplog.messages


def test_the_key_is_there_to_be_read(model: nn.Module, photos: Path) -> None:
    run(model, photos, cache(photos.parent))
    key = _read(_entry(photos, N) / "key.json")
    assert (key["origin"], key["head"], key["dtype"]) == (str(photos / "train"), "8", "float32")
    assert (key["device"], key["batch_size"], key["left_out"]) == ("cpu", BATCH, [])
    assert (key["format"], key["features_version"]) == (1, 1)
    assert key["transform"] == AS_PATTERNS.to_dict()


class Scaled(nn.Module):
    """A classifier whose code can be changed without its weights."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.factor = body, 1.0

    def forward(self, images: Tensor) -> Tensor:
        return self.body(images * self.factor)


def test_other_code_with_the_same_weights_is_noticed(
    model: nn.Module, photos: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = Scaled(model).eval()
    run(network, photos, cache(photos.parent))
    network.factor = 1 + 1e-6
    run(network, photos, cache(photos.parent))
    assert "were computed with another rounding" in caplog.text
    network.factor = 1.5
    with pytest.raises(GroodError, match=r"of the first image the model now has others .*another cache folder"):
        run(network, photos, cache(photos.parent))


# --- damage --------------------------------------------------------------------------------------------------------


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-50] ^= 4
    file.write_bytes(content)


def _flip_header(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"batches", b"batchez"))


def _empty(file: Path) -> None:
    file.write_bytes(b"")


def _other_content(file: Path) -> None:
    """What the header tells is right, but not what was written here."""
    found = container.read(file, 3)
    header = {name: value for name, value in found.header.items() if name not in ("tensors", "checksums")}
    tensors = {name: tensor.clone() for name, tensor in found.tensors.items()}
    for name in ("features", "priorities", "values"):
        if name in tensors:
            tensors[name] = tensors[name].half()
    container.write(file, header, tensors)


def _exchange(file: Path) -> None:
    """A whole file of another place."""
    others = [path for path in file.parent.glob(f"{file.name.split('-')[0]}-*") if path != file]
    shutil.copyfile(sorted(others)[0], file)


DAMAGE = [_truncate, _flip, _flip_header, _empty, _other_content, _exchange]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["features", "content", "sums"])
def test_a_damaged_file_is_made_again(
    model: nn.Module,
    photos: Path,
    images_run: list[int],
    caplog: pytest.LogCaptureFixture,
    kind: str,
    damage: Callable[[Path], None],
) -> None:
    plain = run(model, photos, cache(photos.parent))
    files = sorted(_entry(photos, N).glob(f"{kind}-*"))
    victim = files[len(files) // 2]
    whole = victim.read_bytes()
    damage(victim)
    images_run.clear()
    caplog.clear()
    assert run(model, photos, cache(photos.parent)) == plain
    assert f"{victim.name} cannot be used and is made again: " in caplog.text
    # Sums go on from the newest that need nothing of what is lost.
    least, most = {"features": (SHARD, SHARD), "content": (0, 0), "sums": (SHARD, N)}[kind]
    assert least <= len(images_run) <= most
    images_run.clear()
    caplog.clear()
    assert run(model, photos, cache(photos.parent)) == plain
    assert (images_run, "cannot be used" in caplog.text) == ([], False)
    if kind != "sums":
        assert victim.read_bytes() == whole


def test_a_damaged_file_is_deleted_one_that_cannot_be_read_now_is_not(
    model: nn.Module, photos: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run(model, photos, cache(photos.parent))
    victim = _entry(photos, N) / "features-0000003-0000006.safetensors"
    read = container.read

    def failing(path: Path, *arguments: Any) -> Any:
        if path == victim:
            try:
                raise OSError(5, "Input/output error")
            except OSError as error:
                raise FormatError(f"{path} cannot be read: {error.strerror}") from None
        return read(path, *arguments)

    monkeypatch.setattr(container, "read", failing)
    assert run(model, photos, cache(photos.parent, shard_images=4)) == plain
    assert f"{victim.name} cannot be used and is made again: {victim} cannot be read: Input/output" in caplog.text
    assert victim.exists()
    monkeypatch.setattr(container, "read", read)
    for path in _entry(photos, N).glob("features-0000003-0000004*"):
        path.unlink()
    _flip(victim)
    assert run(model, photos, cache(photos.parent, shard_images=4)) == plain
    assert not victim.exists()


def test_files_of_another_entry_are_not_taken(model: nn.Module, photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(model, photos, cache(photos.parent), outliers=PrototypeMean())
    first = _entry(photos, N)
    other = Scaled(model).eval()
    other.factor = 0.5
    with torch.no_grad():
        model[-1].bias.add_(0.25)
        run(other, photos, cache(photos.parent), outliers=PrototypeMean())
        model[-1].bias.sub_(0.25)
    second = next(
        path.parent
        for path in (photos.parent / "cache").glob("*/key.json")
        if path.parent != first and _read(path)["n_files"] == N
    )
    plain = run(model, photos, None, outliers=PrototypeMean())
    for path in second.glob("features-*"):
        shutil.copyfile(path, first / path.name)
    assert run(model, photos, cache(photos.parent), outliers=PrototypeMean()) == plain
    assert "it belongs elsewhere" in caplog.text


def test_no_path_and_no_code_of_a_file_is_followed(model: nn.Module, photos: Path) -> None:
    run(model, photos, cache(photos.parent))
    entry = _entry(photos, N)
    victim = sorted(entry.glob("sums-*"))[-1]
    found = container.read(victim, 3)
    header = {name: value for name, value in found.header.items() if name not in ("tensors", "checksums")}
    outside = photos.parent / "sums-outside.safetensors"
    shutil.copyfile(victim, outside)
    container.write(victim, {**header, "needs": ["../sums-outside"]}, found.tensors)
    assert run(model, photos, cache(photos.parent)) == run(model, photos, None)
    assert outside.exists()


def test_several_missing_files_are_made_again_at_their_places(
    model: nn.Module, photos: Path, images_run: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    plain = run(model, photos, cache(photos.parent))
    for name in ("features-0000003-0000006", "features-0000009-0000012", "content-0-0000009-0000012"):
        (_entry(photos, N) / f"{name}.safetensors").unlink()
    images_run.clear()
    assert run(model, photos, cache(photos.parent, shard_images=10**6)) == plain
    assert images_run == [*range(12, 24), *range(36, 48)]
    images_run.clear()
    assert run(model, photos, cache(photos.parent)) == plain
    assert (images_run, "cannot be used" in caplog.text) == ([], False)


def _replace_unseen(file: Path, content: bytes) -> None:
    """Without a change of size and time."""
    status = file.stat()
    file.write_bytes(content.ljust(status.st_size, b"\0"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_images_that_changed_unseen_are_noticed_where_they_are_needed(model: nn.Module, photos: Path) -> None:
    run(model, photos, cache(photos.parent), outliers=Mixup(n=N))
    files = sorted((photos / "train").rglob("*.png"), key=lambda path: path.stat().st_size)
    _replace_unseen(files[-1], files[0].read_bytes())
    with pytest.raises(GroodError, match=r"training image \d+ is another one than when its features were kept"):
        run(model, photos, cache(photos.parent), outliers=Mixup(n=N))
    _replace_unseen(files[-1], b"")
    with pytest.raises(BadImageError, match="it could be read before"):
        run(model, photos, cache(photos.parent), outliers=Mixup(n=N))


def test_images_that_can_be_read_only_before_or_only_now_are_named(model: nn.Module, photos: Path) -> None:
    reading, file = {"on_bad": "skip"}, photos / "train" / "b" / "001.png"
    content = file.read_bytes()
    run(model, photos, cache(photos.parent), reading=reading)
    _replace_unseen(file, b"")
    with pytest.raises(GroodError, match=r"001\.png cannot be read, but could when its features were kept"):
        run(model, photos, cache(photos.parent), seed=5, reading=reading)
    shutil.rmtree(photos.parent / "cache")
    run(model, photos, cache(photos.parent), reading=reading)
    _replace_unseen(file, content)
    with pytest.raises(GroodError, match=r"001\.png can be read, but could not when .*; delete .*, or choose another"):
        run(model, photos, cache(photos.parent), seed=5, reading=reading)


# --- images that cannot be read, or are of several sizes -----------------------------------------------------------


def test_unreadable_images_are_remembered(model: nn.Module, photos: Path) -> None:
    broken = [photos / "train" / "a" / "000.png", *sorted((photos / "train" / "b").iterdir())[4:12]]
    for path in broken:
        path.write_bytes(b"broken")
    skipping = {"on_bad": "skip"}
    plain = run(model, photos, None, reading=skipping)
    images = loader(photos / "train", **skipping)
    for batches in (3, 9, 16, 100, 100):
        detector = GROOD(model, outliers=Mixup(n=10))
        try:
            detector.fit(images, cache=cache(photos.parent), progress=killed_after(batches))
        except Killed:
            continue
        assert [path for path, _ in images.bad] == [str(path) for path in broken]
        assert all(reason.startswith("not an image") for _, reason in images.bad)
        assert len(images.kept) == N - 9
        assert images.names() == [path for path in images.dataset.source.paths if Path(path) not in broken]
    assert run(model, photos, cache(photos.parent), reading=skipping) == plain
    with pytest.raises(BadImageError, match=r"000\.png: not an image.*--skip-bad"):
        run(model, photos, cache(photos.parent), reading={"on_bad": "raise"})


def test_a_shard_without_a_readable_image(model: nn.Module, photos: Path) -> None:
    for path in sorted((photos / "train" / "b").iterdir())[2:18]:
        path.write_bytes(b"")
    reading = {"on_bad": "skip"}
    plain = run(model, photos, None, reading=reading)
    for _ in range(2):
        assert run(model, photos, cache(photos.parent, shard_images=4), reading=reading) == plain


def test_stopped_at_a_bad_image_and_continued_without_it(model: nn.Module, photos: Path, images_run: list[int]) -> None:
    (photos / "train" / "c" / "065.png").write_bytes(b"")
    with pytest.raises(BadImageError, match="the file is empty"):
        run(model, photos, cache(photos.parent))
    n_first = len(images_run)
    found = run(model, photos, cache(photos.parent), reading={"on_bad": "skip"})
    assert len(images_run) - n_first <= N - n_first + SHARD
    assert found == run(model, photos, None, reading={"on_bad": "skip"})


def test_bad_images_later_marked_to_be_refused(model: nn.Module, photos: Path) -> None:
    (photos / "train" / "c" / "065.png").write_bytes(b"")
    run(model, photos, cache(photos.parent), reading={"on_bad": "skip"})
    with pytest.raises(BadImageError, match=r"065\.png: the file is empty; on_bad='skip'"):
        run(model, photos, cache(photos.parent))


def test_no_readable_image_at_all(model: nn.Module, photos: Path) -> None:
    for path in (photos / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(GroodError, match=f"none of the {N} images of .*train can be read"):
        run(model, photos, cache(photos.parent), reading={"on_bad": "skip"})


def test_images_of_several_sizes(model: nn.Module, photos: Path) -> None:
    Image.new("RGB", (12, 9), (40, 90, 200)).save(photos / "train" / "b" / "001.png")
    reading = {"batch_size": 1, "transform": replace(AS_PATTERNS, crop=None)}
    plain = run(model, photos, None, outliers=PrototypeMean(), reading=reading)
    for _ in range(2):
        assert run(model, photos, cache(photos.parent), outliers=PrototypeMean(), reading=reading) == plain
    messages = []
    for kept in (None, cache(photos.parent), cache(photos.parent)):
        with pytest.raises(GroodError, match="bring all inputs to one size") as caught:
            run(model, photos, kept, reading=reading)
        messages.append(str(caught.value))
    assert messages == messages[:1] * 3


# --- calibration ---------------------------------------------------------------------------------------------------


def test_calibration_takes_its_features_from_the_cache(model: nn.Module, photos: Path) -> None:
    store = cache(photos.parent)
    detector = GROOD(model).fit(loader(photos / "train"), progress=False)
    plain = detector.calibrate(loader(photos / "held_out"), progress=False).threshold_
    for batches in (0, 2, 4):
        with pytest.raises(Killed):
            detector.calibrate(loader(photos / "held_out"), progress=killed_after(batches), cache=store)
    detector.calibrate(loader(photos / "held_out"), progress=False, cache=store)
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, images: calls.append(len(images[0])))
    again = detector.calibrate(loader(photos / "held_out"), progress=False, cache=store).threshold_
    handle.remove()
    assert calls == [1], "the probe"
    assert plain is not None
    assert again is not None
    assert torch.equal(again.log_scores, plain.log_scores)


def test_calibration_passes_over_classes_that_were_left_out(model: nn.Module, photos: Path) -> None:
    store = cache(photos.parent)
    detector = GROOD(model).fit(loader(photos / "train"), classes=["a", "b"], progress=False)
    found = []
    for kept in (None, store, store):
        detector.calibrate(loader(photos / "held_out"), progress=False, cache=kept)
        found.append(detector.threshold_)
    assert all(threshold is not None and torch.equal(threshold.log_scores, found[0].log_scores) for threshold in found)
    assert len(found[0].log_scores) == 20
    only_c = replace(read_source(photos / "held_out" / "c"), labels=(2,) * 10)
    with pytest.raises(GroodError, match="there is no image to calibrate"):
        detector.calibrate(image_loader(only_c, AS_PATTERNS), progress=False, cache=store)


def test_a_class_that_is_left_out_and_does_not_occur_changes_nothing(model: nn.Module, photos: Path) -> None:
    store = cache(photos.parent)
    lines = [f"{path} {'ab'.index(path.parent.name)}\n" for path in sorted((photos / "held_out").glob("[ab]/*"))]
    (photos / "held_out.txt").write_text("".join(lines))
    for classes in (None, ["a", "b"]):
        detector = GROOD(model).fit(loader(photos / "train"), classes=classes, progress=False)
        detector.calibrate(loader(photos / "held_out.txt"), progress=False, cache=store)
    assert _n_entries(photos) == 1


def test_calibration_on_images_of_another_size(model: nn.Module, photos: Path) -> None:
    detector = GROOD(model).fit(loader(photos / "train"), progress=False)
    other = loader(photos / "held_out", transform=replace(AS_PATTERNS, crop=16))
    with pytest.raises(GroodError, match=r"images of shape \(3, 16, 16\) cannot be scored"):
        detector.calibrate(other, progress=False, cache=cache(photos.parent))


def test_training_images_among_the_held_out_are_found_in_the_cache_too(model: nn.Module, photos: Path) -> None:
    shutil.copy(photos / "train" / "a" / "000.png", photos / "held_out" / "a" / "copy.png")
    with pytest.raises(GroodError, match="1 of 31 calibration samples are training samples"):
        run(model, photos, cache(photos.parent))
    with pytest.raises(GroodError, match="1 of 31 calibration samples are training samples"):
        run(model, photos, cache(photos.parent))


# --- what a cache needs --------------------------------------------------------------------------------------------


def test_the_loader_must_know_its_files(model: nn.Module, photos: Path) -> None:
    images, labels = patterns(12)
    store = cache(photos.parent)
    with pytest.raises(GroodError, match=r"pass a loader of torch_grood\.data\.image_loader, not list"):
        GROOD(model).fit([(images, labels)], cache=store)
    detector = GROOD(model).fit(loader(photos / "train"), progress=False)
    with pytest.raises(GroodError, match=r"pass a loader of torch_grood\.data\.image_loader, not Tensor"):
        detector.calibrate(images, cache=store)
    with pytest.raises(GroodError, match=r"as torch_grood\.data\.FeatureCache\(folder\) does; got str"):
        detector.fit(loader(photos / "train"), cache="cache")  # type: ignore[arg-type]
    with pytest.raises(GroodError, match="got PosixPath"):
        detector.calibrate(loader(photos / "held_out"), cache=photos)  # type: ignore[arg-type]


def test_other_sources_of_outliers_are_read_as_ever(model: nn.Module, photos: Path) -> None:
    def source() -> OutlierSamples:
        return OutlierSamples(loader(photos / "ood"))

    plain = run(model, photos, None, outliers=source())
    for _ in range(2):
        assert run(model, photos, cache(photos.parent), outliers=source()) == plain


def test_options_are_checked(tmp_path: Path) -> None:
    for name in ("shard_images", "shard_bytes", "shard_seconds"):
        with pytest.raises(GroodError, match=f"{name} must be more than 0, got 0"):
            FeatureCache(tmp_path, **{name: 0})
    (tmp_path / "file").write_text("")
    with pytest.raises(GroodError, match=r"the cache folder .*file cannot be made: File exists; choose another"):
        FeatureCache(tmp_path / "file")
    assert FeatureCache(tmp_path / "a" / "b").folder == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()


# --- disks ---------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_explained_and_loses_nothing(
    model: nn.Module, photos: Path, monkeypatch: pytest.MonkeyPatch, images_run: list[int]
) -> None:
    plain = run(model, photos, None)
    images_run.clear()
    write, n_writes = container.write, 0

    def full(path: Path, *arguments: Any) -> None:
        nonlocal n_writes
        n_writes += 1
        if n_writes > 7:
            raise GroodError(f"cannot write {path}: No space left on device")
        write(path, *arguments)

    monkeypatch.setattr(container, "write", full)
    message = (
        r"cannot write .*features-0000006-0000009\.safetensors: No space left on device\. The features of 24 of 66 "
        r"images are kept; make room, or make the folder writable, and run the same again: it continues from there"
    )
    with pytest.raises(GroodError, match=message):
        run(model, photos, cache(photos.parent))
    monkeypatch.setattr(container, "write", write)
    assert run(model, photos, cache(photos.parent)) == plain
    assert len(images_run) == N + SHARD


def _fork(work: Callable[[], Any]) -> Callable[[], tuple[int, str]]:
    """Start `work` in another process; the result waits for its exit status and the message of its error."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Newer Pythons warn of threads, which are idle here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(status)
    os.close(writer)

    def result() -> tuple[int, str]:
        with os.fdopen(reader, "rb") as pipe:
            message = pipe.read().decode()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), message

    return result


def test_a_limit_on_the_size_of_files(model: nn.Module, photos: Path) -> None:
    """As a full disk: writing stops in the middle of a file."""
    plain = run(model, photos, None)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        run(model, photos, cache(photos.parent))

    status, message = _fork(limited)()
    assert status == 1
    assert re.search(r"^GroodError: cannot write .*: .*File too large.*run the same again", message), message
    assert not [path for path in (photos.parent / "cache").rglob(".*") if path.is_file()], "no litter"
    assert run(model, photos, cache(photos.parent)) == plain


def test_few_files_are_open_at_a_time(model: nn.Module, photos: Path) -> None:
    """A tensor that comes from another process holds a file open as long as it lives."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        reading = {"workers": 2, "batch_size": 1}
        run(model, photos, cache(photos.parent, shard_images=10**6), outliers=Mixup(n=N), reading=reading)

    assert _fork(limited)() == (0, "")


def test_a_folder_that_cannot_be_written_to(model: nn.Module, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed):
        run(model, photos, cache(photos.parent), progress=killed_after(10))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    with pytest.raises(GroodError, match=r"cannot be written to, and lacks 30 of 66 images; choose another"):
        run(model, photos, cache(photos.parent))
    monkeypatch.setattr(os, "access", access)
    plain = run(model, photos, cache(photos.parent))
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    assert run(model, photos, cache(photos.parent)) == plain, "reading is enough where everything is there"


def test_litter_of_killed_runs_is_swept_away(model: nn.Module, photos: Path) -> None:
    run(model, photos, cache(photos.parent))
    entry = _entry(photos, N)
    old, young = entry / ".features-0000000-0000003.safetensors.abcd", entry / ".key.json.efgh"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 90_000,) * 2)
    run(model, photos, cache(photos.parent))
    assert (old.exists(), young.exists()) == (False, True)


def test_two_processes_on_one_cache(model: nn.Module, photos: Path) -> None:
    plain = run(model, photos, None)

    def work() -> None:
        for shard in (8, 20, 12):
            assert run(model, photos, cache(photos.parent, shard_images=shard)) == plain

    for _ in range(3):
        shutil.rmtree(photos.parent / "cache", ignore_errors=True)
        assert [result() for result in [_fork(work), _fork(work)]] == [(0, "")] * 2
    assert run(model, photos, cache(photos.parent)) == plain
