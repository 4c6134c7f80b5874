"""What is stored and how it is searched: options of `fit`, and `grood add` and `grood remove`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command import PREPARED, Result, run

from torch_grood import GROOD, GroodError
from torch_grood.cli._search import Store, index_of, store_of, subset_of

MODEL = ("--model", "nets.py:net")
FIT = ("fit", *MODEL, "--weights", "net.safetensors", *PREPARED, "--train", "train", "--output", "new.grood")


def facts(path: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("info", path, "--format", "json").raw)
    return found


def test_fit_with_a_smaller_store(digits: Path) -> None:
    result = run(*FIT, "--store", "int8", "--coreset", "20%", "--calibrate", "val", "--k", "1")
    assert result.code == 0, result.err
    assert "gradients in int8" in result.err
    found = facts("new.grood")
    fit = found["fit"]
    assert found["store"]["dtype"] == "int8"
    assert fit["n_indexed"] == -(-fit["n_correct"] // 5)
    assert fit["covering_radius"] > fit["rounding_radius"] > 0
    assert fit["subset"] == {"name": "KCenterCoreset", "ratio": 0.2}
    for text in ("KCenterCoreset(ratio=0.2)", "ε =", "store int8", "of float32's"):
        assert text in result.out
        assert text in run("info", "new.grood").out


def test_fit_with_a_sample_of_each_class_and_a_store_on_disk(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(digits / "cache"))
    result = run(*FIT, "--memory", "1kB", "--per-class", "7")
    assert result.code == 0, result.err
    assert "on disk" in result.err
    assert facts("new.grood")["fit"]["n_indexed"] == 28
    # The file was used, and is gone.
    assert list((digits / "cache" / "torch-grood" / "stores").iterdir()) == []


def test_fit_with_a_faiss_index_and_its_parameters(digits: Path) -> None:
    result = run(*FIT, "--index", "IVF8,Flat", "--index-option", "nprobe=8", "--index-option", "candidates=4")
    assert result.code == 0, result.err
    assert "recall at 1 1" in result.out
    index = GROOD.load("new.grood").index
    assert index == index_of("IVF8,Flat", ["nprobe=8", "candidates=4"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--index-option", "nprobe=4"), "is for a faiss index"),
        (("--index", "IVF8,Flat", "--index-option", "nprobe"), "must be NAME=NUMBER"),
        (("--memory", "much"), "must be a size such as 500MB or 4GiB, got 'much'"),
        (("--coreset", "ten"), "--coreset must be a number such as 500, or a share such as 10%; got 'ten'"),
        (("--coreset", "5", "--per-class", "5"), "exclude each other"),
        (("--per-class", "0"), "0"),
        (("--coreset", "200%"), "2"),
    ],
)
def test_mistakes_are_found_before_the_fit(digits: Path, options: tuple[str, ...], message: str) -> None:
    result = run(*FIT, *options)
    assert (result.code, message in result.err) == (1, True), result.err
    assert not (digits / "new.grood").exists()


def test_sizes_and_amounts() -> None:
    for text, count in (("0", 0), ("12", 12), ("1.5kB", 1500), ("2MiB", 2**21), ("4 gib", 2**32), ("3G", 3 * 10**9)):
        assert store_of(Store.float16, text).memory == count
    assert subset_of(None, None) is None
    with pytest.raises(GroodError, match="must be a size"):
        store_of(Store.float32, "-1")


def add(*arguments: object) -> Result:
    return run("add", "net.grood", *arguments, *MODEL)


def test_add(digits: Path) -> None:
    before, scores = GROOD.load("net.grood"), run("score", "net.grood", "test", *MODEL, "--output", "before.csv")
    assert scores.code == 0
    result = add("val", "--output", "more.grood")
    assert result.code == 0, result.err
    after = GROOD.load("more.grood")
    n_val = len(list((digits / "val").glob("*/*.png")))
    assert after.fit_info_.n_added == n_val
    assert f"of {n_val} images are stored now, {after.fit_info_.n_indexed:,} in all" in result.out
    assert after.threshold_ is not None
    assert before.threshold_ is not None
    assert after.threshold_.log_tau == before.threshold_.log_tau
    assert f"{n_val} added since the fit" in run("info", "more.grood").out
    assert after.metadata == before.metadata


def test_a_folder_with_some_of_the_classes_is_matched_by_name(digits: Path) -> None:
    for name in ("one", "three"):
        (digits / "val" / name).rename(digits / "val" / f"gone-{name}")
    for folder in (digits / "val").glob("gone-*"):
        folder.rename(digits / folder.name)
    result = add("val", "--output", "more.grood")
    assert result.code == 0, result.err
    before, after = GROOD.load("net.grood"), GROOD.load("more.grood")
    stored = after.fit_info_.n_indexed - before.fit_info_.n_indexed
    # By position they would all be wrong, and none stored.
    assert stored > 0.9 * len(list((digits / "val").glob("*/*.png")))


def test_add_mistakes(digits: Path) -> None:
    before = (digits / "net.grood").read_bytes()
    (digits / "val" / "one").rename(digits / "val" / "eleven")
    result = add("val")
    assert (result.code, "a class 'eleven', which is none of the detector's 4 classes" in result.err) == (1, True)
    assert (digits / "net.grood").read_bytes() == before
    assert add("ood").code == 1
    assert (digits / "net.grood").read_bytes() == before


def test_remove(digits: Path) -> None:
    stored = GROOD.load("net.grood")._need_state().sample_ids.tolist()
    (digits / "requests.txt").write_text(f"{stored[1]}\n\n {stored[2]}\n")
    result = run("remove", "net.grood", stored[0], "--from", "requests.txt", "--output", "less.grood")
    assert result.code == 0, result.err
    assert f"3 stored gradients deleted, {len(stored) - 3:,} left" in result.out
    assert "its threshold is gone; run: grood calibrate" in result.out
    less = GROOD.load("less.grood")
    assert less._need_state().sample_ids.tolist() == stored[3:]
    assert less.threshold_ is None
    assert "3 removed since the fit" in run("info", "less.grood").out
    calibrated = run("calibrate", "less.grood", "val", *MODEL)
    assert calibrated.code == 0, calibrated.err
    assert GROOD.load("net.grood").threshold_ is not None


def test_removing_what_is_not_stored_changes_nothing(digits: Path) -> None:
    assert run(*FIT, "--per-class", "5", "--calibrate", "val").code == 0
    stored = GROOD.load("new.grood")._need_state().sample_ids.tolist()
    other = next(i for i in range(100) if i not in stored)
    result = run("remove", "new.grood", other)
    assert result.code == 0
    assert "0 stored gradients deleted, 20 left" in result.out
    assert "1 of the images had none" in result.out
    assert GROOD.load("new.grood").threshold_ is not None


def test_remove_mistakes(digits: Path) -> None:
    before = (digits / "net.grood").read_bytes()
    n_read = GROOD.load("net.grood").fit_info_.n_read
    (digits / "broken.txt").write_text("1\n-2\n")
    for arguments, message in (
        ((), "name the training images to delete"),
        ((10_000,), "positions from 0 to"),
        (("--from", "absent.txt"), "absent.txt cannot be read"),
        (("--from", "broken.txt"), "broken.txt, line 2: expected the position"),
        (tuple(range(n_read)), "at least one"),
    ):
        result = run("remove", "net.grood", *arguments)
        assert (result.code, message in result.err) == (1, True), result.err
        assert (digits / "net.grood").read_bytes() == before
