"""A fitted detector of small images in files, and sets of them to report on: a page in a second or two."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from models import taught_cnn, write_patterns
from torch_grood import GROOD
from torch_grood.data import ImageLoader, ImageSource, ImageTransform, image_loader, read_source
from torch_grood.report import Options, ReportSet
from torch_grood.report.sets import Role, ScoredSet

# Undoes what `write_patterns` does to the numbers of `patterns`.
AS_PATTERNS = ImageTransform(None, 8, "bilinear", (128 / 255,) * 3, (40 / 255,) * 3)
QUICK = Options(points=40, draws=60, workers=0)
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "$x^{2$",
    "_a",
    "日本",
    "a\udc80b",
    "</script><b>",
    "{{ 7*7 }}{% raw %}",
    "#010101 url(#a)",
    "n" * 500,
)
_VOID = {"meta", "img", "input", "br", "link"}


@dataclass(frozen=True)
class World:
    """DIR/{train,val,test}/{a,b,c}/*.png and DIR/{near,far}/*.png, and a detector of them."""

    folder: Path
    detector: GROOD

    def loader(self, name: str) -> ImageLoader:
        """Batches of a folder."""
        return image_loader(read_source(self.folder / name), AS_PATTERNS, batch_size=16, workers=0)

    def one(self, folder: str, role: Role, name: str | None = None) -> ReportSet:
        """A folder as a set."""
        source = read_source(self.folder / folder, None, "auto" if role == "known" else "none")
        return ReportSet(folder if name is None else name, role, source)

    def sets(self) -> list[ReportSet]:
        """One of each kind but "unknown"."""
        return [self.one("test", "known"), self.one("near", "near"), self.one("far", "far")]


def write_noise(folder: Path, n: int, seed: int) -> Path:
    """DIR/*.png of noise."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03}.png")
    return folder


def make_world(folder: Path) -> World:
    """Images, a network that knows the classes a, b and c, and a calibrated detector."""
    for name, n, seed in (("train", 90, 1), ("val", 60, 2), ("test", 48, 3)):
        write_patterns(folder / name, n, seed)
    for name, n, seed in (("near", 20, 5), ("far", 12, 6)):
        write_noise(folder / name, n, seed)
    with torch.random.fork_rng():
        model = taught_cnn()
    found = World(folder, GROOD(model))
    found.detector.fit(found.loader("train"), progress=False)
    found.detector.calibrate(found.loader("val"), fpr=0.1, progress=False)
    return found


def scored(
    name: str, role: Role, score: Sequence[float] | NDArray[np.float64], *, classes: int = 3, **changes: Any
) -> ScoredSet:
    """A set with made-up decisions: above 0.5 is flagged, labels go in turn."""
    values = np.asarray(score, dtype=np.float64)
    n = len(values)
    label = np.arange(n) % classes
    made: dict[str, Any] = {
        "source": ImageSource(tuple(f"{name}/{i}.png" for i in range(n))),
        "kept": tuple(range(n)),
        "bad": (),
        "p_value": None,
        "is_ood": values > 0.5,
        "label": label,
        "prototype_label": label,
        "truth": label if role == "known" else None,
    }
    return ScoredSet(name, role, score=values, **(made | changes))


def svg_elements(svg: str) -> list[ET.Element]:
    """Of figures; the page's HTML knows their name spaces without being told."""
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return list(ET.fromstring(f"<figures {spaces}>{svg}</figures>").iter())


def svg_texts(svg: str) -> list[str]:
    """All texts of figures."""
    return ["".join(one.itertext()) for one in svg_elements(svg) if one.tag.endswith("}text")]


def svg_markers(svg: str, group: str) -> list[tuple[float, float]]:
    """Where the markers of a group are drawn."""
    found = next(one for one in svg_elements(svg) if one.get("id") == group)
    return [(float(one.get("x", "")), float(one.get("y", ""))) for one in found.iter() if one.tag.endswith("}use")]


class Element:
    """An element of a page that was read."""

    def __init__(self, tag: str, attributes: dict[str, str]) -> None:
        self.tag, self.attributes, self.text = tag, attributes, ""


class Page(HTMLParser):
    """A page as a browser's parser would see it, as far as it is well formed.

    Attributes:
        elements: all of them, in order, each with the text below it.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {[one.tag for one in self._open]}"

    def handle_starttag(self, tag: str, attributes: Iterable[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attributes}
        self.elements.append(Element(tag, named))
        if tag not in _VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attributes: Iterable[tuple[str, str | None]]) -> None:
        self.elements.append(Element(tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        found = self._open.pop()
        assert found.tag == tag, f"</{tag}> closes <{found.tag}>"

    def handle_data(self, data: str) -> None:
        for one in self._open:
            one.text += data

    def all(self, tag: str) -> list[Element]:
        """Of a tag."""
        return [one for one in self.elements if one.tag == tag]

    def texts(self, tag: str) -> list[str]:
        """Of all elements of a tag, each run of white space as one blank."""
        return [" ".join(one.text.split()) for one in self.all(tag)]

    def ids(self) -> list[str]:
        """All ids, as often as they are there."""
        return [one.attributes["id"] for one in self.elements if "id" in one.attributes]

    def references(self) -> set[str]:
        """Ids that something refers to."""
        found = set()
        for one in self.elements:
            for name, value in one.attributes.items():
                if name in ("href", "xlink:href") and value.startswith("#"):
                    found.add(value[1:])
                if name in ("aria-labelledby", "for"):
                    found |= set(value.split())
                if name in ("style", "clip-path"):
                    found |= set(re.findall(r"url\(#([^)]+)\)", value))
        return found
