"""One job: what is scored, by what, in which batches; and the scoring of one span of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from torch_grood._optional import require
from torch_grood._text import encodable, plain
from torch_grood.data.images import BadImageError, decode_image
from torch_grood.errors import GroodError
from torch_grood.runtime.base import Decision, decide_each
from torch_grood.scale.inputs import Inputs, Span
from torch_grood.scale.parts import BAD, SCORES, Folder, missing

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from torch_grood.data.transforms import ImageTransform
    from torch_grood.runtime import Runtime

__all__ = ["Counts", "Job", "Summary", "score_span"]

_LONGEST_REASON = 500
# Batches that are read while one is decided about.
_AHEAD, _READERS = 1, 2


class Counts(NamedTuple):
    """What has become of inputs: scored, of these flagged, and left out for a reason."""

    images: int = 0
    ood: int = 0
    bad: int = 0

    def plus(self, other: Counts) -> Counts:
        """The sums."""
        return Counts(*(a + b for a, b in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Summary:
    """Of a job that is done.

    Attributes:
        inputs: all of them.
        images: that have a score.
        ood: of these, flagged.
        bad: that have none, each with a reason in the side table.
    """

    inputs: int
    images: int
    ood: int
    bad: int


@dataclass(frozen=True)
class Job:
    """What is to be done; it can be sent to a worker, without the inputs.

    Attributes:
        inputs: all of them.
        folder: of the output.
        by: what decides: see `torch_grood.watching.made_by`. Parts of two detectors are never mixed.
        batch_size: images that the network gets at a time. It is part of the job: batches of another size may round
            differently.
        span: inputs of a part, about; a whole number of batches.
    """

    inputs: Inputs
    folder: Folder
    by: str
    batch_size: int = 64
    span: int = 1024
    spans: list[Span] = field(init=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.span < 1:
            raise GroodError(f"batches and spans have at least one image; got {self.batch_size} and {self.span}")
        if len(self.inputs) == 0:
            raise GroodError("there is no image to score; check the path")
        size = math.ceil(self.span / self.batch_size) * self.batch_size
        object.__setattr__(self, "spans", self.inputs.spans(size))

    def begin(self) -> list[Span]:
        """Note what the job is about, or find that it is what was begun there.

        Returns:
            the spans that are not done.

        Raises:
            GroodError: if the folder belongs to another job.
        """
        described = {
            "format": 1,
            "by": self.by,
            "inputs": len(self.inputs),
            "digest": self.inputs.digest(),
            "batch_size": self.batch_size,
        }
        known = self.folder.read("job.json")
        if known is None:
            self.folder.write_json("job.json", described)
        elif known != described:
            names = {"by": "detector, rate or preprocessing", "inputs": "number of images", "digest": "images"}
            keys = [key for key in described if not isinstance(known, dict) or known.get(key) != described[key]]
            differing = ", ".join(names.get(key, key.replace("_", " ")) for key in keys)
            raise GroodError(
                f"{self.folder.url} is the output of another job, which has another {differing}; give another "
                "--output, or delete it"
            )
        return missing(self.spans, self.folder.done())

    def finish(self) -> Summary:
        """Count what is there, and say that the job is done.

        Raises:
            GroodError: if a part is missing or does not hold what it should.
        """
        done = self.folder.done()
        left = missing(self.spans, done)
        if left:
            raise GroodError(f"{len(left)} parts are missing, the first of inputs {left[0][0]} to {left[0][1] - 1}")
        if sum(stop - start for start, stop in done) != len(self.inputs):
            raise GroodError(f"parts in {self.folder.url} overlap: it was written by something else, too")
        counts = self.counted()
        if counts.images + counts.bad != len(self.inputs):
            raise GroodError(
                f"{counts.images:,} scores and {counts.bad:,} reasons are not those of {len(self.inputs):,} inputs"
            )
        summary = Summary(len(self.inputs), counts.images, counts.ood, counts.bad)
        self.folder.write_json("done.json", vars(summary))
        return summary

    def counted(self) -> Counts:
        """What the parts hold that are there."""
        dataset = require("pyarrow.dataset", extra="cli")
        system, path = require("fsspec", extra="scale").core.url_to_fs(self.folder.url)
        system.invalidate_cache()
        found = []
        for kind, flagged in ((SCORES, True), (BAD, False)):
            table = None
            if system.exists(f"{path}/{kind}"):
                table = dataset.dataset(f"{path}/{kind}", filesystem=system, format="parquet")
            found.append(0 if table is None else table.count_rows())
            if flagged:
                flags = dataset.field("is_ood")
                found.append(0 if table is None else table.count_rows(filter=flags))
        return Counts(*found)


def score_span(
    runtime: Runtime,
    inputs: Inputs,
    span: Span,
    folder: Folder,
    batch_size: int,
    excluded: Mapping[int, str] | None = None,
) -> Counts:
    """Score the inputs of a span and write its part.

    Args:
        runtime: decides.
        inputs: of this span alone.
        span: their numbers.
        folder: of the output.
        batch_size: images at a time.
        excluded: numbers of inputs that are not to be touched, and why not.

    Raises:
        GroodError: if the part cannot be written.
    """
    scores: list[dict[str, Any]] = []
    bad: list[dict[str, Any]] = []
    for first, batch in _batches(inputs, span[0], batch_size, runtime.transform, excluded or {}):
        images = [image for _, image in batch if not isinstance(image, GroodError)]
        decisions = iter(decide_each(runtime, images))
        for number, (name, image) in enumerate(batch, first):
            decided = image if isinstance(image, GroodError) else next(decisions)
            row = {"number": number, "path": encodable(name)}
            if not isinstance(decided, GroodError) and not math.isfinite(decided.score):
                decided = GroodError("the network gives it no finite score")
            if isinstance(decided, GroodError):
                reason = decided.reason if isinstance(decided, BadImageError) else str(decided)
                bad.append(row | {"error": plain(reason)[:_LONGEST_REASON]})
            else:
                scores.append(row | _columns(decided, runtime.classes))
    score_schema, bad_schema = _schemas()
    if bad:
        folder.write_part(BAD, span, bad, bad_schema)
    folder.write_part(SCORES, span, scores, score_schema)
    return Counts(len(scores), sum(row["is_ood"] is True for row in scores), len(bad))


def probe(runtime: Runtime, inputs: Inputs) -> None:
    """Do with one input all that could end a process, and nothing else."""
    for _, batch in _batches(inputs, 0, 1, runtime.transform, {}):
        decide_each(runtime, [image for _, image in batch if not isinstance(image, GroodError)])


Prepared = tuple[str, "NDArray[Any] | GroodError"]


def _batches(
    inputs: Inputs, first: int, batch_size: int, transform: ImageTransform, excluded: Mapping[int, str]
) -> Iterator[tuple[int, list[Prepared]]]:
    """Batches of prepared images with the number of the first; the next one is read meanwhile."""

    def prepared(number: int, name: str, content: Callable[[], bytes]) -> Prepared:
        if number in excluded:
            return name, BadImageError(name, excluded[number])
        try:
            return name, transform.pixels(decode_image(content(), name))
        except GroodError as error:
            return name, error

    with ThreadPoolExecutor(_READERS) as pool:
        pending: list[tuple[int, list[Future[Prepared]]]] = []
        batch: list[Future[Prepared]] = []
        number = first
        for name, content in inputs.read():
            batch.append(pool.submit(prepared, number, name, content))
            number += 1
            if len(batch) == batch_size:
                pending.append((number - len(batch), batch))
                batch = []
                if len(pending) > _AHEAD:
                    yield _gathered(pending.pop(0))
        if batch:
            pending.append((number - len(batch), batch))
        for one in pending:
            yield _gathered(one)


def _gathered(batch: tuple[int, Sequence[Future[Prepared]]]) -> tuple[int, list[Prepared]]:
    return batch[0], [future.result() for future in batch[1]]


def _columns(decision: Decision, classes: Sequence[str]) -> dict[str, Any]:
    return {
        "score": decision.score,
        "p_value": decision.p_value,
        "is_ood": decision.is_ood,
        "label": classes[decision.label],
        "prototype_label": classes[decision.prototype_label],
    }


def _schemas() -> tuple[Any, Any]:
    arrow = require("pyarrow", extra="cli")
    which = [("number", arrow.int64()), ("path", arrow.string())]
    scores = [("score", arrow.float64()), ("p_value", arrow.float64()), ("is_ood", arrow.bool_())]
    labels = [("label", arrow.string()), ("prototype_label", arrow.string())]
    return arrow.schema(which + scores + labels), arrow.schema([*which, ("error", arrow.string())])
