"""results.json: what is written is read back, and nothing else is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_results import done, methods, results, run
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_grood.errors import GroodError
from torch_grood.evaluation.results import Accuracy, read_results, write_results

Edit = Callable[[Any], object]

_METHODS = methods()[:1]


def edited(tmp_path: Path, edit: Edit) -> Path:
    """A file that was written, and then changed in one place."""
    path = tmp_path / "results.json"
    write_results(path, results(2))
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("n_runs", [1, 3])
def test_round_trip_is_exact(tmp_path: Path, n_runs: int) -> None:
    path = tmp_path / "results.json"
    found = results(n_runs)
    write_results(path, found)
    assert read_results(path) == found
    before = path.read_bytes()
    write_results(path, read_results(path))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_the_form_of_the_file(tmp_path: Path) -> None:
    write_results(tmp_path / "x.json", results())
    data = json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))
    assert data["schema_version"] == 1
    assert data["spec"] == {"name": "cifar10", "title": "CIFAR-10", "digest": "0123456789abcdef" * 4}
    assert data["sets"][6] == {
        "key": "mnist", "title": "MNIST", "role": "far", "n": 10_000, "expected": 70_000, "status": "incomplete",
        "reason": None, "list_sha256": "0123456789abcdef" * 4,
    }  # fmt: skip
    assert data["comparable"] == {
        "near": {"comparable": True, "reasons": []},
        "far": {
            "comparable": False,
            "reasons": ["MNIST: 10,000 of 70,000 images", "SVHN: absent (no such folder)"],
        },
    }
    msp = data["runs"][0]["methods"][0]
    assert msp["figures"]["cifar100"] == {
        "auroc": 0.88, "ood_accepted_at_95_id_kept": 1.5 * (1 - 0.88), "id_flagged_at_95_ood_caught": 1.4 * (1 - 0.88),
        "aupr_ood": 0.87, "aupr_id": 0.86,
        "openood": {"fpr95": 1.3 * (1 - 0.88), "auroc": 0.88, "aupr_in": 0.85, "aupr_out": 0.84},
        "n_id": 9_000, "n_ood": 9_000, "intervals": {"auroc": [0.876, 0.883]},
    }  # fmt: skip
    assert msp["groups"]["near"]["sets"] == ["cifar100", "tin"]
    assert msp["groups"]["near"]["auroc"] == 0.885
    assert data["comparisons"][0]["test"] == "DeLong"


def test_free_data_is_kept_as_json_has_it(tmp_path: Path) -> None:
    class Way(StrEnum):
        one = "held-out classes"

    found = done("x", "X", 0.9, 0.9, 0.9, config={"k": (1, 2), "p": np.float64(0.5)}, chosen_by=Way.one)
    assert found.config == {"k": [1, 2], "p": 0.5}
    assert type(found.config["p"]) is float
    wanted = results(runs=(run(methods=(found,)),), comparisons=())
    write_results(tmp_path / "x.json", wanted)
    assert read_results(tmp_path / "x.json") == wanted


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=5), st.text(st.characters()))
def test_every_digit_and_text_comes_back(
    tmp_path_factory: pytest.TempPathFactory, values: list[float], text: str
) -> None:
    runs = tuple(
        run(seed, weights=text, accuracy=Accuracy(value), methods=_METHODS) for seed, value in enumerate(values)
    )
    wanted = results(runs=runs, comparisons=(), settings={"text": text, "value": values[0]})
    path = tmp_path_factory.mktemp("results") / "results.json"
    write_results(path, wanted)
    assert read_results(path) == wanted


def test_names_that_are_no_utf8_come_back(tmp_path: Path) -> None:
    wanted = results(runs=(run(0, weights="r18-\udcff\\udcfe.pt"),))
    write_results(tmp_path / "x.json", wanted)
    assert (tmp_path / "x.json").read_bytes().decode("utf-8")
    assert read_results(tmp_path / "x.json") == wanted


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data.update(schema_version=2), "schema_version is 2, and this version .* install a newer one"),
        (lambda data: data.update(schema_version=0), "schema_version is 0; expected 1"),
        (lambda data: data.update(schema_version=True), "schema_version is true; expected a whole number"),
        (lambda data: data.pop("schema_version"), "the file lacks schema_version"),
        (lambda data: data.update(extra=1), "the file has the unknown key 'extra'"),
        (lambda data: data["runs"][1].pop("seed"), r"runs\[1\] lacks seed"),
        (lambda data: data["runs"][0].update(seed="0"), r'runs\[0\].seed is "0"; expected a whole number'),
        (lambda data: data["runs"][0].update(seed=1.0), r"runs\[0\].seed is 1.0; expected a whole number"),
        (lambda data: data["runs"][0].update(seed=True), r"runs\[0\].seed is true; expected a whole number"),
        (lambda data: data["runs"][0].update(methods={}), r"runs\[0\].methods is \{\}; expected a list"),
        (lambda data: data.update(runs=[]), "there is no run"),
        (lambda data: data["sets"][0].update(role="fringe"), r'sets\[0\].role is "fringe"; expected one of train, val'),
        (lambda data: data["sets"][0].update(role=["near"]), r"sets\[0\].role is \[\"near\"\]; expected one of train"),
        (lambda data: data["sets"][4].update(n=8_999), r"sets\[4\]: cifar100 is called complete with 8999 of 9000"),
        (lambda data: data["sets"][7].update(status="complete"), "only an absent set has none"),
        (lambda data: data["sets"][5].update(key="cifar100"), "two OOD sets are called 'cifar100'"),
        (lambda data: data["sets"].pop(2), "there are 0 ID test sets; expected one"),
        (lambda data: data["sets"][4].update(role="val_ood"), "figures and OOD sets differ by cifar100"),
        (lambda data: data.update(created="2026-01-31 12:00"), "created is '2026-01-31 12:00'; expected a time in UTC"),
        (lambda data: data.update(created="yesterday"), "created is 'yesterday'; expected a time in UTC"),
        (lambda data: data["comparable"].pop("near"), r"comparable tells of \['far'\]"),
        (
            lambda data: data["comparable"]["far"].update(comparable=True, reasons=[]),
            "far is called comparable, in spite of MNIST: 10,000 of 70,000 images",
        ),
        (lambda data: data["comparable"]["near"].update(comparable=False), "comparable is False with 0 reasons"),
        (
            lambda data: data["runs"][0]["methods"][0]["groups"]["near"].update(comparable=False),
            r"runs\[0\], MSP: comparable differs",
        ),
        (
            lambda data: data["runs"][0]["methods"][1]["groups"]["near"].update(auroc=0.95),
            "GROOD: near auroc is 0.95, but the mean of its sets is 0.91",
        ),
        (
            lambda data: data["runs"][0]["methods"][1]["groups"]["near"]["openood"].update(aupr_in=0.5),
            "GROOD: near openood.aupr_in is 0.5, but the mean",
        ),
        (
            lambda data: data["runs"][0]["methods"][0]["groups"].pop("far"),
            r"MSP: expected means of \['far', 'near'\], got \['near'\]",
        ),
        (
            lambda data: data["runs"][0]["methods"][0]["figures"].pop("mnist"),
            r"runs\[0\].methods\[0\]: MSP: the far means take in mnist, which has no figures",
        ),
        (
            lambda data: data["runs"][0]["methods"][0]["figures"]["mnist"].update(auroc=1.2),
            r"runs\[0\].methods\[0\].figures.mnist: auroc is 1.2; expected a share, 0 to 1",
        ),
        (
            lambda data: data["runs"][0]["methods"][0]["figures"]["mnist"].update(intervals={"auroc": [0.9, 0.8]}),
            r"the interval of auroc is \[0.9, 0.8\]",
        ),
        (
            lambda data: data["runs"][0]["methods"][0]["figures"]["mnist"].update(intervals={"auroc": [0.9]}),
            r"figures.mnist.intervals.auroc is \[0.9\]; expected a list of 2",
        ),
        (
            lambda data: data["runs"][0]["methods"][0]["figures"]["mnist"].update(intervals={"f1": [0.1, 0.2]}),
            "there is an interval of 'f1'",
        ),
        (lambda data: data["runs"][0]["methods"][4].update(status="skipped"), "expected one of done, unavailable"),
        (lambda data: data["runs"][0]["methods"][4].update(reason=None), "ODIN is unavailable, so it has a reason"),
        (lambda data: data["runs"][0]["methods"][4].update(status="done", reason=None), "ODIN is done, so it has fig"),
        (lambda data: data["runs"][0]["methods"][3].update(label="MSP"), "two methods of a run are called 'MSP'"),
        (lambda data: data["comparisons"][0].update(run=2), r"comparisons\[0\] is of run 2, and there are 2"),
        (lambda data: data["comparisons"][0].update(run=-1), r"comparisons\[0\] is of run -1"),
        (lambda data: data["comparisons"][0].update(method_b="ABC"), r"comparisons\[0\] has the method 'ABC'"),
        (lambda data: data["comparisons"][0].update(p=1.5), r"comparisons\[0\]: p is 1.5; expected a share"),
        (lambda data: data["comparisons"][0].update(difference=-3), "a difference of two AUROC is -3.0"),
        (lambda data: data["versions"].update(torch=2), r"versions.torch is 2; expected a text"),
        (lambda data: data["runs"][0]["extraction"].update(images_from_cache=10**9), "of 78793 images came from"),
        (lambda data: data["runs"][0]["methods"][0]["seconds"].update(fit=-1), "fit took -1.0 seconds"),
    ],
)
def test_what_was_altered_is_refused(tmp_path: Path, edit: Edit, message: str) -> None:
    path = edited(tmp_path, edit)
    with pytest.raises(GroodError, match=message) as error:
        read_results(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[]", r"the file is \[\]; expected an object"),
        (b'{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        (b'{"schema_version": NaN}', "NaN is no number of JSON"),
        (b'{"schema_version": -Infinity}', "-Infinity is no number of JSON"),
        (b'{"schema_version": 1e999}', "1e999 is no number of JSON"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"schema_version": ' + b"9" * 5_000 + b"}", "is no JSON"),
    ],
)
def test_what_is_no_such_json_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(GroodError, match=message):
        read_results(path)


def test_a_file_that_was_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_results(path, results())
    content = path.read_bytes()
    for size in range(0, len(content) - 2, 997):
        path.write_bytes(content[:size])
        with pytest.raises(GroodError, match="is no JSON"):
            read_results(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(GroodError, match=r"absent\.json cannot be read: No such file"):
        read_results(tmp_path / "absent.json")
    with pytest.raises(GroodError, match="cannot be read"):
        read_results(tmp_path)


def test_writing_leaves_the_old_file_if_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, results())
    before = path.read_bytes()
    with pytest.raises(GroodError, match=r"the results cannot be written: versions\.torch is 2; expected a text"):
        write_results(path, results(versions={"torch": 2}))
    assert path.read_bytes() == before
    with pytest.raises(GroodError, match="cannot write"):
        write_results(tmp_path / "no" / "folder.json", results())
