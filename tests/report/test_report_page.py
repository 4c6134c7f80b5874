"""A whole page on a detector: it is one file, it says what the library says, and nothing breaks out of it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from report_world import AS_PATTERNS, HOSTILE, QUICK, Page, World, write_noise

from torch_grood import GROOD, GroodError, OutlierSamples
from torch_grood.data import ImageSource, read_source
from torch_grood.evaluation.metrics import auroc
from torch_grood.report import Options, ReportSet, detector_report, write_page
from torch_grood.report.page import page as render

SECTIONS = ["scores", "telling", "promise", "gradients", "images", "classes", "detector"]


def report(
    world: World, sets: Sequence[ReportSet], options: Options = QUICK, detector: GROOD | None = None, **more: Any
) -> str:
    return detector_report(detector or world.detector, AS_PATTERNS, sets, options, progress=lambda name: False, **more)


def points_of(page: Page) -> dict[str, Any]:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    (found,) = [one for one in page.all("script") if one.attributes.get("id") == "points"]
    points: dict[str, Any] = json.loads(found.text, parse_constant=refuse)
    return points


def sections(page: Page) -> list[str]:
    return [one.attributes["id"] for one in page.all("section")]


def body(page: Page) -> str:
    return " ".join(page.texts("main") + page.texts("header"))


@pytest.fixture(scope="module")
def text(world: World) -> str:
    return report(world, world.sets())


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


# --- One file -----------------------------------------------------------------------------------------------------


def test_all_sections_are_there_and_linked(page: Page) -> None:
    assert sections(page) == SECTIONS
    links = [one.attributes["href"] for one in page.all("a")]
    assert links == ["#main", *(f"#{id}" for id in SECTIONS)]


def test_nothing_is_loaded(page: Page, text: str) -> None:
    assert {"http", "https"}.isdisjoint(re.findall(r"\b([a-z]+)://", text.replace("http://www.w3.org/2000/svg", "")))
    for one in page.elements:
        for name in ("src", "href", "xlink:href", "data", "action", "srcset", "poster"):
            value = one.attributes.get(name, "#")
            assert value.startswith(("#", "data:image/webp;base64,")), (one.tag, name, value[:60])
        assert one.tag not in ("link", "iframe", "object", "embed", "base", "form")
    assert "@import" not in text
    assert set(re.findall(r"url\((?!#)[^)]*\)", text)) == {"url(${data.sheet.uri})"}
    (policy,) = [one for one in page.all("meta") if one.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy.attributes["content"].startswith("default-src 'none'; img-src data:;")


def test_ids_are_unique_and_references_resolve(page: Page) -> None:
    ids = page.ids()
    assert len(set(ids)) == len(ids)
    assert page.references() <= set(ids)
    assert not re.search(r"#0[1-5]0[0-9]{3}\b", "".join(one.attributes.get("style", "") for one in page.elements))


def test_everything_has_a_name(page: Page) -> None:
    assert page.all("img")
    assert all(one.attributes.get("alt") for one in page.all("img"))
    assert all(one.attributes.get("aria-label") for one in page.elements if one.attributes.get("role") == "img")
    assert all(one.attributes.get("aria-label") for one in page.elements if one.attributes.get("tabindex") == "0")
    assert page.all("html")[0].attributes["lang"] == "en"
    headings = [int(one.tag[1]) for one in page.elements if re.fullmatch(r"h\d", one.tag)]
    assert headings[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert [len(one.text) > 0 for one in page.all("caption")] == [True] * len(page.all("table"))


def test_the_same_input_has_the_same_bytes(world: World, text: str) -> None:
    def without_date(one: str) -> str:
        return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", one)

    assert without_date(report(world, world.sets())) == without_date(text)
    assert without_date(report(world, world.sets(), replace(QUICK, batch_size=7))) == without_date(text)


def test_the_page_does_not_tell_where_it_was_made(world: World, text: str, tmp_path: Path) -> None:
    file = tmp_path / "flowers.grood"
    world.detector.save(file)
    named = report(world, world.sets(), file=file)
    for one in (text, named):
        assert str(world.folder) not in one
        assert str(tmp_path) not in one
        assert str(Path.home()) not in one
    assert "What flowers.grood knows" in named
    assert f"flowers.grood, {file.stat().st_size / 1e3:,.1f}" in named.replace("\xa0", " ")


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "é日本\n")
    assert (tmp_path / "page.html").read_bytes() == "é日本\n".encode()
    with pytest.raises(GroodError):
        write_page(tmp_path / "none" / "page.html", "")


# --- What it says -------------------------------------------------------------------------------------------------


def test_the_figures_are_the_library_s(world: World, page: Page) -> None:
    said = {name: world.detector.predict(world.loader(name), progress=False) for name in ("test", "near", "far")}
    shown = body(page)
    rates = {name: 100 * found.is_ood.double().mean().item() for name, found in said.items()}
    tiles = " ".join(page.texts("li"))
    assert f"Known images flagged {rates['test']:.1f} % promised: at most 10 %, on average" in tiles
    assert f"Near unknown images flagged {rates['near']:.1f} % near" in tiles
    far = 100 * auroc(said["test"].score, said["far"].score)
    assert f"AUROC, far unknown images {far:.1f} % far" in tiles
    threshold = world.detector.threshold_
    assert threshold is not None
    low, high = threshold.band()
    assert (
        f"if its score is above τ = {threshold.tau:.4g}, which is the case if its p-value is at most 0.1: of known "
        f"images like the 60 that set this threshold, at most 10 % are flagged on average (with this very calibration "
        f"{100 * low:.1f} to {100 * high:.1f} %, at 95 % confidence)." in shown
    )
    assert f"{int(said['test'].is_ood.sum())} of 48 known images are flagged" in shown


def test_points_are_the_library_s(world: World, page: Page) -> None:
    points = points_of(page)
    assert points["sets"] == ["test", "near", "far"]
    assert len(points["set"]) == 40
    for field in ("polar", "plane", "label", "score", "p_value", "is_ood", "file"):
        assert len(points[field]) == 40
    assert [points["set"].count(i) for i in range(3)] == [14, 14, 12]
    assert np.isfinite(np.array(points["polar"])).all()
    said = {name: world.detector.predict(world.loader(name), progress=False) for name in ("test", "near", "far")}
    paths = {
        name: ["/".join(Path(path).parts[-2:]) for path in one.source.paths]
        for name, one in zip(said, world.sets(), strict=True)
    }
    for i in range(40):
        name = points["sets"][points["set"][i]]
        at = paths[name].index(points["file"][i])
        assert points["score"][i] == f"{said[name].score[at]:.4g}"
        assert points["p_value"][i] == f"{said[name].p_value[at]:.4g}"  # type: ignore[index]
        assert points["is_ood"][i] == bool(said[name].is_ood[at])
        assert points["classes"][points["label"][i]] == "abc"[int(said[name].label[at])]  # type: ignore[index]


def test_galleries_show_the_hardest_images(world: World, page: Page, text: str) -> None:
    assert page.texts("h3")[:3] == [
        "test: least like the training images",
        "near: most like the training images",
        "far: most like the training images",
    ]
    shown = [one.text.strip() for one in page.all("span") if one.attributes.get("class") == "file"]
    assert len(shown) == 24
    for start, (name, sign) in zip((0, 8, 16), (("test", -1), ("near", 1), ("far", 1)), strict=True):
        scores = sign * world.detector.score(world.loader(name), progress=False)
        order = scores.argsort(stable=True)[:8].tolist()
        paths = read_source(world.folder / name, None, "none").paths
        assert shown[start : start + 8] == ["/".join(Path(paths[at]).parts[-2:]) for at in order]
    # Of each the nearest training images, as the detector names them.
    near = world.detector.explain(world.loader("test"), k=4, progress=False)
    worst = world.detector.score(world.loader("test"), progress=False).argsort(descending=True, stable=True)[:8]
    samples = near.neighbor[worst].flatten().tolist()
    names = ["/".join(Path(name or "").parts[-2:]) for name in world.detector.sample_names(samples)]
    titles = [one.attributes["title"] for one in page.all("span") if one.attributes.get("class") == "name"]
    assert titles[:32] == [f"Training image {name}" for name in names]
    assert len(set(names)) > 8
    distances = re.findall(r'class="name"[^>]*>[^<]*</span><span>([^<]*)</span>', text)
    assert distances[:32] == [f"{math.exp(one):.2g}" for one in near.neighbor_log_distance[worst].flatten().tolist()]
    pictures = [one.attributes["src"] for one in page.all("img") if one.attributes["alt"].startswith("Image ")]
    assert len(set(pictures)) == len(pictures) == 24
    assert 'class="gone"' not in text


def test_classes_have_their_rows(page: Page) -> None:
    assert "Each class by itself, on test" in page.texts("caption")
    assert {name for name in "abc" for row in page.texts("tr") if row.startswith(f"{name}16")} == set("abc")


# --- Other detectors and sets -------------------------------------------------------------------------------------


def test_no_sets(world: World) -> None:
    found = Page(report(world, []))
    assert sections(found) == ["detector"]
    assert not found.all("script")
    assert "Image sets of this page" not in body(found)


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ({"near": "unlabelled"}, ["scores", "gradients", "images", "detector"]),
        ({"near": "near", "far": "unknown"}, ["scores", "gradients", "images", "detector"]),
        ({"test": "known"}, ["scores", "promise", "gradients", "images", "classes", "detector"]),
        ({"test": "unlabelled", "near": "near"}, ["scores", "gradients", "images", "detector"]),
    ],
)
def test_only_some_kinds_of_sets(world: World, roles: dict[str, Any], expected: list[str]) -> None:
    found = Page(report(world, [world.one(name, role) for name, role in roles.items()]))
    assert sections(found) == expected
    assert ("AUROC" in " ".join(found.texts("li"))) == ("telling" in expected)


def test_known_images_without_labels(world: World) -> None:
    labelled = world.one("test", "known")
    found = Page(report(world, [replace(labelled, source=replace(labelled.source, labels=None, classes=None))]))
    assert "class, by the classifier" in found.texts("th")
    assert "Accuracy of the classifier" not in body(found)


def test_a_threshold_of_one_s_own(world: World) -> None:
    found = Page(report(world, world.sets(), replace(QUICK, tau=0.0)))
    assert "promise" not in sections(found)
    assert "above τ = 0, a threshold that was set by hand and promises nothing." in body(found)
    assert "Known images flagged 100.0 % nothing was promised" in " ".join(found.texts("li"))


def test_another_rate(world: World) -> None:
    found = Page(report(world, world.sets(), replace(QUICK, fpr=0.25)))
    flagged = int(world.detector.predict(world.loader("test"), fpr=0.25, progress=False).is_ood.sum())
    assert f"At the promised 25 %, {flagged} of 48 known images are flagged" in body(found)
    with pytest.raises(GroodError, match="cannot be promised"):
        report(world, [world.one("near", "near", "nothing is read")], replace(QUICK, fpr=0.001))


@pytest.fixture(scope="module")
def fitted(world: World) -> Any:
    def fit(**options: Any) -> GROOD:
        return GROOD(world.detector.model, **options).fit(world.loader("train"), progress=False)

    return fit


def test_uncalibrated(world: World, fitted: Any) -> None:
    found = Page(report(world, world.sets(), detector=fitted()))
    assert sections(found) == [one for one in SECTIONS if one != "promise"]
    assert "It is not calibrated: it gives scores, and decides nothing." in body(found)
    assert "No decision" in body(found)
    assert "agged at τ ↑" in body(found)
    points = points_of(found)
    assert set(points["is_ood"]) == set(points["p_value"]) == {None}
    assert "τ" not in " ".join(one.text for one in found.all("text"))


def test_thresholds_of_classes(world: World, fitted: Any) -> None:
    detector = fitted().calibrate(world.loader("val"), fpr=0.1, per_class=True, progress=False)
    found = Page(report(world, world.sets(), detector=detector))
    assert "above the threshold of its nearest class" in body(found)
    assert "Each class has its own threshold; the least and the greatest are drawn" in body(found)
    assert "grey band" not in body(found)
    flagged = int(detector.predict(world.loader("test"), progress=False).is_ood.sum())
    assert f"{flagged} of 48 known images are flagged" in body(found)


def test_a_broken_promise_is_told(world: World) -> None:
    # Noise that is called known.
    source = replace(world.one("near", "unlabelled").source, labels=None)
    found = body(Page(report(world, [ReportSet("noise", "known", source)])))
    assert re.search(r"So many happen with a chance of [\d.e-]+ at most if these images are like those", found)
    assert "That does not speak against the promise" not in found
    assert "That does not speak against the promise" in body(Page(report(world, [world.one("test", "known")])))


def test_other_ways_to_fit(world: World, fitted: Any, tmp_path: Path) -> None:
    from torch_grood.data import image_loader

    outliers = image_loader(read_source(write_noise(tmp_path, 20, 9)), AS_PATTERNS, batch_size=8, workers=0)
    images = torch.cat([batch[0] for batch in outliers])
    real = body(Page(report(world, world.sets(), detector=fitted(outliers=OutlierSamples([images])))))
    assert "real unknown images took part in the fit of this detector" in real
    paper = GROOD.paper(world.detector.model).fit(world.loader("train"), progress=False)
    assert "features as they are" in body(Page(report(world, world.sets(), detector=paper)))


def test_an_approximate_search_is_told(world: World, fitted: Any) -> None:
    pytest.importorskip("faiss")
    found = body(Page(report(world, world.sets(), detector=fitted(index="IVF2,Flat"))))
    assert "the search for the nearest gradients is approximate" in found


@pytest.mark.parametrize("scale", [600.0, 1e5])
def test_gradients_that_no_float_holds(world: World, scale: float) -> None:
    model = world.detector.model
    assert isinstance(model, torch.nn.Sequential)

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = model[:-2], model[-1]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(self.body(x) * scale)
            return found

    detector = GROOD.paper(Scaled().eval()).fit(world.loader("train"), progress=False)
    detector.calibrate(world.loader("val"), fpr=0.1, progress=False)
    found = Page(report(world, world.sets(), detector=detector))
    assert sections(found) == SECTIONS
    assert np.isfinite(np.array(points_of(found)["plane"])).all()


@pytest.mark.parametrize("points", [0, 1, 2, 1000])
def test_any_number_of_points(world: World, points: int) -> None:
    found = Page(report(world, world.sets(), replace(QUICK, points=points)))
    assert ("gradients" in sections(found)) == (points > 0)
    if points == 0:
        assert not found.all("img")
        assert not found.all("script")
        return
    assert len(points_of(found)["set"]) == min(points, 80)
    for view in ("polar", "plane"):
        assert {f"{view}-set-{i}" for i in range(3)} <= set(found.ids())
    assert ("All 80 images are drawn." in body(found)) == (points >= 80)


def test_images_of_one_page_of_each_size(world: World, tmp_path: Path) -> None:
    from PIL import Image

    sizes = {"large.jpg": (4000, 3000), "thin.png": (900, 3), "dot.png": (1, 1)}
    for name, size in sizes.items():
        Image.new("RGB", size, (90, 80, 70)).save(tmp_path / name)
    Image.new("L", (30, 40), 99).save(tmp_path / "grey.png")
    Image.new("RGBA", (9, 9), (1, 2, 3, 4)).save(tmp_path / "alpha.png")
    text = report(world, [ReportSet("sizes", "unlabelled", read_source(tmp_path, None, "none"))])
    assert len(text) < 150_000
    assert sorted(points_of(Page(text))["file"]) == sorted(
        f"{tmp_path.name}/{path.name}" for path in tmp_path.iterdir()
    )


# --- Hostile names ------------------------------------------------------------------------------------------------


def test_hostile_names_of_sets(world: World) -> None:
    shown = {name: name.replace("\udc80", "\\udc80") for name in HOSTILE}
    text = report(world, [world.one("test", "known", "k<i>"), *(world.one("far", "near", name) for name in HOSTILE)])
    text.encode("utf-8")
    found = Page(text)
    assert sections(found) == SECTIONS
    assert not found.all("b")
    assert not found.all("i")
    assert [one.attributes.get("id") for one in found.all("script")] == ["points", None]
    assert all("onerror" not in one.attributes for one in found.elements)
    for name in HOSTILE:
        assert any(one.startswith(shown[name]) for one in found.texts("dt")), name
        assert any(shown[name] in one for one in found.texts("label")), name
    # As many galleries as a reader may look at.
    assert found.texts("h3")[1:8] == [f"{shown[name]}: most like the training images" for name in HOSTILE[:7]]
    # JSON tells a script the name as it is.
    assert points_of(found)["sets"][1:] == list(HOSTILE)
    ids = found.ids()
    assert len(set(ids)) == len(ids)
    assert "49" not in found.texts("label")


def test_hostile_names_of_classes_and_files(world: World, tmp_path: Path) -> None:
    from PIL import Image

    names = ('<b>"&', "{{x}}</script>", "a\x1b[31m")
    folders = []
    for i, name in enumerate(names):
        folder = tmp_path / name.replace("/", "∕")
        folder.mkdir()
        folders.append(folder.name)
        for k, path in enumerate(read_source(world.folder / "train" / "abc"[i]).paths[:12]):
            Image.open(path).save(folder / f"<i>{k}'\".png")
    source = read_source(tmp_path)
    from torch_grood.data import image_loader

    loader = image_loader(source, AS_PATTERNS, batch_size=16, workers=0)
    detector = GROOD(world.detector.model).fit(loader, progress=False)
    text = report(world, [ReportSet("known", "known", source)], detector=detector)
    found = Page(text)
    assert not found.all("b")
    assert not found.all("i")
    assert len(found.all("script")) == 2
    assert "\x1b" not in text
    rows = found.texts("th")
    for name in folders:
        assert name.replace("\x1b", "\\x1b") in rows
    assert any("<i>" in one for one in found.texts("span"))


def test_a_context_is_text_but_for_figures() -> None:
    context = dict.fromkeys(("rule", "tau_text", "histograms", "roc", "promise", "promise_curve", "polar", "plane"), "")
    context |= dict.fromkeys(("promise_verdict", "n_calibration", "shown_points", "class_text", "detection"), "")
    lists: dict[str, Any] = {key: [] for key in ("tiles", "warnings", "galleries", "by_class", "set_rows", "legend")}
    more: dict[str, Any] = {"has_tau": False, "promise_has_band": False, "names_classes": False, "points": None}
    text = render("detector", "<t>", {}, context | lists | more | {"detector_rows": [("a", "10 % <x>")]})
    assert "10\u00a0% &lt;x&gt;" in text
    assert "<title>&lt;t&gt;</title>" in text


# --- What is wrong ------------------------------------------------------------------------------------------------


def test_errors_come_before_a_long_pass(world: World) -> None:
    nothing = ImageSource(("/nowhere/x.png",))
    one, other = ReportSet("a", "near", nothing), ReportSet("a", "far", nothing)
    with pytest.raises(GroodError, match="two sets are called 'a'; give them names: NAME=PATH"):
        report(world, [one, other])
    with pytest.raises(GroodError, match="there are two sets of known images"):
        report(world, [ReportSet("a", "known", nothing), ReportSet("b", "known", nothing)])
    with pytest.raises(GroodError, match="39 draws are too few for a 95 % interval; expected 0, or 40 or more"):
        report(world, [one], replace(QUICK, draws=39))
    for tau in (-1.0, math.nan, math.inf):
        with pytest.raises(GroodError, match="tau is a score, at least 0"):
            report(world, [one], replace(QUICK, tau=tau))
    with pytest.raises(GroodError, match="no such file"):
        report(world, [one])


def test_unreadable_images_are_told_of(world: World, tmp_path: Path) -> None:
    write_noise(tmp_path, 3, 0)
    (tmp_path / "x.png").write_bytes(b"no image")
    one = ReportSet("some", "far", read_source(tmp_path, None, "none"))
    found = body(Page(report(world, [one], replace(QUICK, on_bad="skip"))))
    assert "some: 1 unreadable files were left out." in found
    assert "unknown images (far-OOD), 3, 1 unreadable ones left out" in found
