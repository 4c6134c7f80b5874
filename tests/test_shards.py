"""A detector in several files: as one file in every bit, and refused when the files do not belong together."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from format_file import parts, read_by_hand, seal
from torch_grood import GROOD, AlteredFileError, FormatError, GroodError, KCenterCoreset
from torch_grood.summary import facts, rows

N, DIM = 300, 8
GOLDEN_4 = Path(__file__).parent / "golden" / "format-4.grood"
# That of format 4 in two shards. Once it is released it is never written again.
GOLDEN_5 = GOLDEN_4.with_name("format-5.grood")


def fitted(**options: Any) -> GROOD:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % 3
    features = torch.randn(N, DIM, generator=random) + 3 * torch.eye(DIM)[labels]
    detector = GROOD(None, k=3, **options).fit_features(features, labels)
    return detector.calibrate_features(
        torch.randn(60, DIM, generator=random) + 3 * torch.eye(DIM)[torch.arange(60) % 3]
    )


def queries() -> torch.Tensor:
    return torch.randn(40, DIM, generator=torch.Generator().manual_seed(1)) * 2


@pytest.fixture
def detector() -> GROOD:
    return fitted()


def test_it_is_as_one_file(detector: GROOD, tmp_path: Path) -> None:
    detector.save(tmp_path / "one.grood")
    detector.save(tmp_path / "many.grood", shards=4)
    assert len(list(tmp_path.glob("many-*-of-00004.grood"))) == 4
    loaded = GROOD.load(tmp_path / "many.grood")
    expected, found = detector.predict_features(queries()), loaded.predict_features(queries())
    for name in ("score", "p_value", "is_ood", "prototype_label", "neighbor"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert all(map(torch.equal, loaded.explain_features(queries(), k=7), detector.explain_features(queries(), k=7)))
    assert loaded.fit_info_ == detector.fit_info_
    assert loaded.stored_bytes_ == detector.stored_bytes_
    # Elsewhere it becomes one file again, which is the same to the byte.
    (tmp_path / "elsewhere").mkdir()
    loaded.save(tmp_path / "elsewhere" / "one.grood")
    assert (tmp_path / "elsewhere" / "one.grood").read_bytes() == (tmp_path / "one.grood").read_bytes()


def test_the_golden_files() -> None:
    one, many = GROOD.load(GOLDEN_4), GROOD.load(GOLDEN_5, verify=True)
    assert many.fit_info_ == one.fit_info_
    expected, found = one.state_.searcher.gradients, many.state_.searcher.gradients
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.log_magnitude, expected.log_magnitude)
    features = torch.arange(60).view(10, 6) % 7 / 8
    for name in ("score", "p_value", "is_ood", "neighbor"):
        expected_, found_ = (getattr(detector.predict_features(features), name) for detector in (one, many))
        assert torch.equal(found_, expected_), name


def test_the_files_are_as_specified() -> None:
    """docs/format.md, section "In several files", with nothing of ours."""
    head, tensors = read_by_hand(GOLDEN_5)
    whole, all_tensors = read_by_hand(GOLDEN_4)
    assert tensors.keys() == all_tensors.keys() - {"direction", "direction_scale", "log_magnitude", "zero_rows"}
    assert head["format_version"] == 5
    assert head["fit"] == whole["fit"]
    assert (head["shards"]["dim"], head["shards"]["dtype"]) == (whole["fit"]["n_features"], "float16")
    shards = []
    for name, n, digest in head["shards"]["files"]:
        header, found = read_by_hand(GOLDEN_5.with_name(name))
        with safe_open(GOLDEN_5.with_name(name), framework="pt") as file:
            assert file.metadata()["torch-grood"].startswith(f"{digest} ")
        assert (header["shard"]["n"], header["shard"]["d"]) == (n, head["shards"]["dim"])
        assert found["log_magnitude"][1] == [n]
        shards.append(found)
    for name in ("direction", "direction_scale", "log_magnitude"):
        assert b"".join(shard[name][2] for shard in shards) == all_tensors[name][2]


@pytest.mark.parametrize("store", ["float16", "int8"])
def test_rounded_gradients(store: str, tmp_path: Path) -> None:
    detector = fitted(store=store)
    detector.save(tmp_path / "f.grood", shards=3)
    loaded = GROOD.load(tmp_path / "f.grood", verify=True)
    assert torch.equal(loaded.score_features(queries()), detector.score_features(queries()))
    assert loaded.store.dtype == store


def test_k_may_be_more_than_a_shard_has(tmp_path: Path) -> None:
    detector = fitted()
    detector.save(tmp_path / "f.grood", shards=N)
    loaded = GROOD.load(tmp_path / "f.grood")
    assert torch.equal(loaded.score_features(queries()), detector.score_features(queries()))
    with pytest.raises(GroodError, match="asked for k=301 neighbours among 300"):
        loaded.state_.searcher.search(loaded.state_.gradient_field(queries()).gradients, 301)


def test_a_new_calibration_writes_the_head_alone(detector: GROOD, tmp_path: Path) -> None:
    detector.save(tmp_path / "f.grood", shards=2)
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.glob("f-*")}
    loaded = GROOD.load(tmp_path / "f.grood")
    loaded.calibrate_features(queries(), fpr=0.2)
    loaded.save(tmp_path / "f.grood")
    loaded.save(tmp_path / "second.grood")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*-*")} == shards
    for name in ("f", "second"):
        again = GROOD.load(tmp_path / f"{name}.grood")
        assert again.threshold_ is not None
        assert again.threshold_.fpr == 0.2
        assert torch.equal(again.score_features(queries()), detector.score_features(queries()))


def test_another_fit_leaves_the_files_of_the_first_alone(detector: GROOD, tmp_path: Path) -> None:
    """Whoever still reads the first, or a save that is killed half-way, finds all of its files."""
    detector.save(tmp_path / "f.grood", shards=2)
    first = {path: path.read_bytes() for path in tmp_path.glob("f-*")}
    fitted(geometry="unit").save(tmp_path / "f.grood", shards=2)
    assert len(list(tmp_path.glob("f-*"))) == 4
    assert all(path.read_bytes() == content for path, content in first.items())


def test_adding_and_removing_make_one_of_it(detector: GROOD, tmp_path: Path) -> None:
    detector.save(tmp_path / "f.grood", shards=3)
    loaded = GROOD.load(tmp_path / "f.grood")
    for one in (detector, loaded):
        one.add_features(queries()[:5], [0, 1, 2, 0, 1])
        assert one.remove([0, 7, 123, 299]) == 4
    loaded.save(tmp_path / "new.grood")
    detector.save(tmp_path / "expected.grood")
    assert (tmp_path / "new.grood").read_bytes() == (tmp_path / "expected.grood").read_bytes()


def test_the_files_are_named(detector: GROOD, tmp_path: Path) -> None:
    detector.save(tmp_path / "f.grood", shards=2)
    found = facts(GROOD.load(tmp_path / "f.grood"), tmp_path / "f.grood")
    assert found["shards"] == sorted(path.name for path in tmp_path.glob("f-*"))
    assert f"and its gradients in 2 beside it: {found['shards'][0]} …" in dict(rows(found))["file"]


@pytest.mark.parametrize("shards", [0, -1, N + 1, 2.0, True])
def test_impossible_numbers(shards: Any, detector: GROOD, tmp_path: Path) -> None:
    with pytest.raises(GroodError, match="300 gradients can be in 1 to 300 shards"):
        detector.save(tmp_path / "f.grood", shards=shards)
    assert list(tmp_path.iterdir()) == []


def test_an_approximate_index_cannot_be_in_shards(tmp_path: Path) -> None:
    detector = fitted(index="IVF4,Flat", subset=KCenterCoreset(ratio=0.9))
    with pytest.raises(GroodError, match="shards are searched exactly, not by 'IVF4,Flat'"):
        detector.save(tmp_path / "f.grood", shards=2)


def test_a_missing_file(detector: GROOD, tmp_path: Path) -> None:
    detector.save(tmp_path / "f.grood", shards=3)
    lost = sorted(tmp_path.glob("f-*"))[1]
    lost.unlink()
    with pytest.raises(FormatError, match=f"its gradients in 3 files beside it, and {lost.name} is missing"):
        GROOD.load(tmp_path / "f.grood")


def test_a_file_of_another_detector(detector: GROOD, tmp_path: Path) -> None:
    detector.save(tmp_path / "f.grood", shards=2)
    first, second = sorted(tmp_path.glob("f-*"))
    shutil.copy(second, first)
    with pytest.raises(AlteredFileError, match=f"{first.name} is not the shard that the detector was saved with"):
        GROOD.load(tmp_path / "f.grood", verify=True)
    # Without, it is found out before the first score.
    loaded = GROOD.load(tmp_path / "f.grood")
    with pytest.raises(AlteredFileError, match="is not the shard"):
        loaded.score_features(queries())


def test_an_altered_file(detector: GROOD, tmp_path: Path) -> None:
    detector.save(tmp_path / "f.grood", shards=2)
    path = sorted(tmp_path.glob("f-*"))[0]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(AlteredFileError, match=path.name):
        GROOD.load(tmp_path / "f.grood").score_features(queries())


def test_a_shard_is_no_detector(detector: GROOD, tmp_path: Path) -> None:
    detector.save(tmp_path / "f.grood", shards=2)
    with pytest.raises(FormatError, match="is a part of a detector; name the file that its parts lie beside"):
        GROOD.load(sorted(tmp_path.glob("f-*"))[0])


def of_shards(key: str, value: Any) -> Any:
    def edit(header: dict[str, Any]) -> None:
        header["shards"][key] = value

    return edit


def named(name: Any) -> Any:
    def edit(header: dict[str, Any]) -> None:
        header["shards"]["files"][0][0] = name

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        named("../f.grood"),
        named("/etc/passwd"),
        named("a\\b.grood"),
        named("x.bin"),
        named(7),
        named(""),
        of_shards("files", []),
        of_shards("files", "f"),
        of_shards("files", [["f.grood"]]),
        of_shards("files", [["f.grood", -1, "x"]]),
        of_shards("files", [["f.grood", 10, "x"], ["g.grood", 10, "x"]]),
        of_shards("dim", 7),
        of_shards("dim", "8"),
        of_shards("dtype", "int4"),
        lambda header: header.update(shards=[]),
        lambda header: header.update(shards=None),
        lambda header: header.update(format_version=4),
        lambda header: header.update(index={"spec": "IVF4,Flat"}),
        lambda header: header.pop("shards"),
    ],
)
def test_altered_heads(edit: Any, detector: GROOD, tmp_path: Path) -> None:
    detector.save(tmp_path / "f.grood", shards=2)
    header, tensors = parts(tmp_path / "f.grood")
    edit(header)
    seal(tmp_path / "f.grood", header, tensors)
    with pytest.raises(AlteredFileError):
        GROOD.load(tmp_path / "f.grood")


def test_more_gradients_than_the_head_lists(detector: GROOD, tmp_path: Path) -> None:
    """A shard's digest is in the head: whoever changes both on purpose meets the checks of what it says."""
    detector.save(tmp_path / "f.grood", shards=2)
    path = sorted(tmp_path.glob("f-*"))[0]
    for name, change in (("log_magnitude", lambda one: one[:-1]), ("direction", lambda one: one * 2)):
        header, tensors = parts(path)
        before = dict(tensors)
        tensors[name] = change(tensors[name]).clone()
        altered = tmp_path / "altered"
        altered.mkdir(exist_ok=True)
        for file in tmp_path.glob("f*.grood"):
            shutil.copy(file, altered / file.name)
        seal(altered / path.name, header, tensors)
        head, head_tensors = parts(altered / "f.grood")
        head["shards"]["files"][0][2] = digest_of(altered / path.name)
        seal(altered / "f.grood", head, head_tensors)
        with pytest.raises(AlteredFileError, match=f"{path.name} was altered"):
            GROOD.load(altered / "f.grood", verify=True)
        assert before.keys() == tensors.keys()


def digest_of(path: Path) -> str:
    from torch_grood import container

    return container.read(path, 5).digest
