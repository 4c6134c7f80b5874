"""A page on a benchmark, from results; tests/cli has one from the folder of a run, with its scores."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from report_world import HOSTILE, Page

from torch_grood import GroodError
from torch_grood.evaluation.results import BenchmarkResults, MethodResult, read_results
from torch_grood.report import benchmark_report

PUBLISHED = Path(__file__).parents[2] / "docs" / "results" / "cifar10" / "resnet20.json"


def sections(page: Page) -> list[str]:
    return [one.attributes["id"] for one in page.all("section")]


@pytest.fixture(scope="module")
def published() -> BenchmarkResults:
    return read_results(PUBLISHED)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(benchmark_report(PUBLISHED))


def test_published_results_are_shown(page: Page, published: BenchmarkResults) -> None:
    assert sections(page) == ["methods", "sets", "tests", "notes"]
    shown = " ".join(page.texts("th"))
    done = [one for one in published.runs[0].methods if one.status == "done"]
    assert len(done) > 10
    for one in done:
        assert one.label in shown
    grood = published.runs[0].method("GROOD")
    assert grood is not None
    tiles = " ".join(page.texts("li"))
    for group in ("near", "far"):
        value = 100 * grood.groups[group].auroc  # type: ignore[index]
        assert re.search(rf"GROOD, {group} AUROC†? {value:.1f} %", tiles)


def test_nothing_is_referred_to_that_is_not_there(page: Page) -> None:
    ids = page.ids()
    assert len(set(ids)) == len(ids)
    assert page.references() <= set(ids)


def test_the_same_results_have_the_same_bytes() -> None:
    first, second = (re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", benchmark_report(PUBLISHED)) for _ in range(2))
    assert first == second


def test_a_title_of_one_s_own(published: BenchmarkResults) -> None:
    found = Page(benchmark_report(published, title="<b>mine</b>"))
    assert found.texts("h1") == found.texts("title") == ["<b>mine</b>"]
    assert not found.all("b")


def test_hostile_labels(published: BenchmarkResults) -> None:
    methods = [one for one in published.runs[0].methods if one.status == "done"][: len(HOSTILE)]
    named = [replace(one, label=name) for one, name in zip(methods, HOSTILE, strict=True)]
    run = replace(published.runs[0], methods=tuple(named))
    text = benchmark_report(replace(published, runs=(run,), comparisons=()))
    found = Page(text)
    assert not found.all("script")
    assert not found.all("b")
    assert not found.all("img")
    cells = " ".join(found.texts("th"))
    for name in HOSTILE:
        assert name.replace("\udc80", "\\udc80") in cells
    text.encode("utf-8")


def test_results_without_any_figure(published: BenchmarkResults) -> None:
    broken = MethodResult("odin", "ODIN", {"name": "odin"}, "unavailable", "it needs the network")
    run = replace(published.runs[0], methods=(broken,))
    found = Page(benchmark_report(replace(published, runs=(run,), comparisons=())))
    assert sections(found)[0] == "methods"
    assert "ODIN" in " ".join(found.texts("body"))


def test_several_runs_have_no_intervals_of_their_own(published: BenchmarkResults) -> None:
    run = published.runs[0]
    other = replace(run, seed=1, weights="other.safetensors")
    text = benchmark_report(replace(published, runs=(run, other), comparisons=()))
    found = Page(text)
    assert "2 checkpoints or seeds of a classifier" in " ".join(found.texts("p"))
    assert "tests" not in sections(found)
    assert {"other.safetensors" in one for one in found.texts("dd")} == {True, False}


@pytest.mark.parametrize("content", ["", "[]", "{}", "no JSON"])
def test_a_file_of_another_kind(tmp_path: Path, content: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(GroodError, match=r"results\.json"):
        benchmark_report(file)
