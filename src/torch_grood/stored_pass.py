"""A pass over images that a store remembers: what it has is taken, the rest is computed and kept for the next time.

A pass consists of the loader's batches, the same ones in every run, so that their bits are the same too. A store keeps
tensors of each batch in a *journal*, named by what they depend on beyond the model and the files:

    features        features, logits, content hashes, shape and range of the images
    content-SEED    pseudo-random numbers of the images, which decide what is mixed and what a subset keeps
    scores-NAME     scores that need more of the model than its features
    sums of LAYER   running sums of the early prototypes, of all batches up to one; or, by many processes, of some

So another λ, source or index needs no pass at all, another seed no model, and a killed run only what it had not kept.
All else that `fit` collects follows from these in the order of the batches. Images to mix are not kept: their positions
are known from the numbers, and they are read once more at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_grood._progress import Progress, track
from torch_grood.errors import GroodError
from torch_grood.feature_store import Columns, FeatureStore, Step, Sums
from torch_grood.features import Extraction, FeatureExtractor, model_fingerprint
from torch_grood.outliers import content_keys
from torch_grood.prototypes import ClassPrototypes
from torch_grood.provenance import content_hashes
from torch_grood.training_pass import Members, TrainingPass, shape_and_range

__all__ = ["FeaturePass", "StoredExtraction", "run_stored", "stored_extractions", "stored_scores"]

# To be raised when the same model and images come to have other features or other content numbers.
FEATURES_VERSION = 1
_FEATURES = "features"


def run_stored(
    passed: TrainingPass,
    loader: Iterable[Any],
    store: FeatureStore,
    progress: Progress,
    batches: range | None = None,
) -> None:
    """Let `passed` take all of the loader's batches, or those with the given numbers, side by side.

    What is kept of early activations of some batches are sums of their own: `FeaturePass.join_sums` makes those of all.

    Raises:
        GroodError: as `TrainingPass.add`; or if the store does not take the loader, or cannot be written.
    """
    run = _StoredRun(passed, loader, _checked(store), batches)
    for step in track(run.steps(), progress, "fit"):
        run.take(step)
    run.finish()


class _StoredRun:
    """One training pass over one loader with one store."""

    def __init__(self, passed: TrainingPass, loader: Iterable[Any], store: FeatureStore, batches: range | None) -> None:
        self._passed, self._batches = passed, batches
        first = store.first_image(loader)
        probe = passed.start(first)
        self._stored = store.open(loader, _key(passed.extractor, probe, passed.left_out()), probe)
        passed.read_again = self._stored.images
        self._templates = {_FEATURES: _none_of(_features(probe, first))}
        self._content: str | None = None
        if passed.needs_content:
            self._content = f"content-{passed.seed}"
            self._templates[self._content] = _none_of(self._content_of(first))
        self._early = passed.early_prototypes
        self._layer = None if self._early is None else _sums_name(passed.extractor, batches)
        # Batches before this one were in the sums from the start, those before the other are in what is kept of them.
        self._summed = self._kept_sums = self._restore_sums()
        self._changed: set[int] = set()

    def steps(self) -> Iterable[Step]:
        return self._stored.steps(self._templates, self._layer, self._batches)

    def take(self, step: Step) -> None:
        """Take a batch: what is kept of it from there, the rest from its images."""
        passed = self._passed
        members = passed.members(step.labels, len(step.labels))
        is_summed = self._early is None or step.batch < self._summed
        features, content = self._columns(step, members, is_summed)
        if len(members.rows):
            found = Extraction(features["features"], features["logits"])
            passed.collect(members, found, features["hashes"])
            if self._early is not None and is_summed:
                self._early.counts += torch.bincount(members.rows, minlength=len(self._early.counts))
            passed.measure(tuple(features["shape"][0].tolist()), (features["low"][0], features["high"][0]))
            if content is not None:
                passed.take_content(content, step.positions[members.taking_part], found.logits)
            passed.say_memory()
        if step.images is not None:
            for journal, columns in ((_FEATURES, features), (self._content, content)):
                if journal is not None and columns is not None and journal not in step.kept:
                    self._stored.keep(step, journal, columns)
            if not is_summed:
                self._changed.update(members.rows.tolist())
            if self._stored.flush(force=False):
                self._keep_sums(step.batch + 1, force=False)

    def _columns(self, step: Step, members: Members, is_summed: bool) -> tuple[Columns, Columns | None]:
        """Columns of the features, and of the content if that is needed."""
        if len(members.rows) == 0:
            return self._templates[_FEATURES], self._templates.get(self._content or "")
        features, content = step.kept.get(_FEATURES), step.kept.get(self._content or "")
        if step.images is not None:
            images = members.of(step.images)
            if features is None or not is_summed:
                found = self._passed.run_model(images, members, None if is_summed else self._early)
                features = features or _features(found, images)
            if content is None and self._content is not None:
                content = self._content_of(images)
        assert features is not None
        return features, content

    def finish(self) -> None:
        """Write what is not written yet."""
        self._stored.flush(force=True)
        self._keep_sums(len(self._stored) if self._batches is None else self._batches.stop, force=True)

    def _content_of(self, images: Tensor) -> Columns:
        priorities = self._passed.reservoir.priorities(images)
        return {"priorities": priorities, "keys": content_keys(images, self._passed.seed)}

    def _restore_sums(self) -> int:
        """Set the early prototypes to what is kept of them; the number of batches in them."""
        end = 0
        if self._layer is not None and self._early is not None:
            device = next(self._passed.extractor.model.parameters()).device
            for sums in self._stored.sums(self._layer):
                _restore(self._early, self._passed, sums, device)
                end = sums.end
        return end

    def _keep_sums(self, end: int, *, force: bool) -> None:
        """Write the sums that changed; forced, also that none did since."""
        early = self._early
        if self._layer is None or early is None or end <= self._kept_sums or not (early.sample_size or force):
            return
        rows = torch.tensor(sorted(self._changed), dtype=torch.int64)
        if force or self._stored.wants_sums(self._layer, len(rows) * early.sample_size * 8):
            # That there is nothing to add is a sum, too.
            values = early.sums_of(rows) if early.sample_size else torch.empty(0, dtype=torch.float64)
            self._stored.keep_sums(self._layer, Sums(end, self._passed.class_ids[rows], values))
            self._changed.clear()
            self._kept_sums = end


def _restore(early: ClassPrototypes, passed: TrainingPass, sums: Sums, device: torch.device) -> None:
    if len(sums.labels):
        early.restore(passed.rows_of(sums.labels), sums.values, device)


def _sums_name(extractor: FeatureExtractor, batches: range | None) -> str:
    """What sums of early activations are kept under: the layer, and which batches they are of, if not of all."""
    layer = str(extractor.early_layer)
    return layer if batches is None else f"{layer}, batches {batches.start} to {batches.stop - 1}"


class StoredExtraction(NamedTuple):
    """What is known of a batch of b images.

    Attributes:
        found: features (b, d) and logits (b, C), on the CPU.
        hashes: see `content_hashes`.
        shape: of each image.
    """

    found: Extraction
    hashes: Tensor
    shape: tuple[int, ...]


class FeaturePass:
    """The features of one loader's images in one store, which is opened once: that looks at every file of the loader.

    Args:
        extractor: of the model.
        loader: of known files.
        store: takes what it does not have.
        left_out: images with these labels are passed over.

    Raises:
        GroodError: if the store does not take the loader, or cannot be written.
    """

    def __init__(
        self, extractor: FeatureExtractor, loader: Iterable[Any], store: FeatureStore, left_out: Sequence[int] = ()
    ) -> None:
        first = _checked(store).first_image(loader)
        probe = extractor(first)
        self._extractor = extractor
        self._stored = store.open(loader, _key(extractor, probe, left_out), probe)
        self._template = _none_of(_features(probe, first))
        self._unwanted = torch.tensor(list(left_out), dtype=torch.int64)

    def missing(self) -> list[int]:
        """Numbers of the batches whose features are not kept."""
        return self._stored.missing({_FEATURES: self._template})

    def lacks_sums(self, batches: range | None = None) -> bool:
        """Whether sums of early activations over some batches, or all, are not kept; the extractor knows the layer."""
        end = len(self._stored) if batches is None else batches.stop
        return self._stored.summed(_sums_name(self._extractor, batches)) < end

    def join_sums(self, passed: TrainingPass, parts: Sequence[range]) -> None:
        """Make the sums of all batches of those of parts of them, which are deleted.

        Args:
            passed: a pass that has started: its classes are those of the sums.
            parts: ranges of batches, one after the other; they are added up in this order.
        """
        early, device = passed.early_prototypes, torch.device("cpu")
        assert early is not None
        total = ClassPrototypes(early.classes)
        for part in parts:
            found = ClassPrototypes(early.classes)
            for sums in self._stored.sums(_sums_name(self._extractor, part)):
                _restore(found, passed, sums, device)
            total.merge(found)
        name = _sums_name(self._extractor, None)
        self._stored.sums(name)
        if total.sample_size:
            rows = torch.arange(len(total.classes))
            self._stored.keep_sums(name, Sums(len(self._stored), passed.class_ids, total.sums_of(rows)))
        for part in parts:
            self._stored.drop_sums(_sums_name(self._extractor, part))

    def extractions(
        self, batches: range | None = None, *, progress: Progress = None, description: str = "extract"
    ) -> Generator[StoredExtraction]:
        """Features batch by batch; batches without an image are passed over.

        Args:
            batches: numbers of those that are wanted, side by side; None: all.
            progress: see `GROOD.fit`.
            description: of the progress bar.

        Raises:
            GroodError: for images that cannot be read, or a store that cannot be written.
        """
        stored, template = self._stored, self._template
        for step in track(stored.steps({_FEATURES: template}, batches=batches), progress, description):
            columns = step.kept.get(_FEATURES)
            if columns is None:
                assert step.images is not None
                wanted = ~torch.isin(step.labels, self._unwanted)
                images = step.images if bool(wanted.all()) else step.images[wanted]
                columns = _features(self._extractor(images), images) if len(images) else template
                stored.keep(step, _FEATURES, columns)
                stored.flush(force=False)
            if len(columns["features"]):
                found = Extraction(columns["features"], columns["logits"])
                yield StoredExtraction(found, columns["hashes"], tuple(columns["shape"][0].tolist()))
        stored.flush(force=True)


def stored_extractions(
    extractor: FeatureExtractor,
    loader: Iterable[Any],
    store: FeatureStore,
    *,
    left_out: Sequence[int] = (),
    progress: Progress = None,
    description: str = "extract",
) -> Generator[StoredExtraction]:
    """Features of all of the loader's images; arguments and errors as of `FeaturePass`."""
    opened = FeaturePass(extractor, loader, store, left_out)
    yield from opened.extractions(progress=progress, description=description)


def stored_scores(
    extractor: FeatureExtractor,
    loader: Iterable[Any],
    store: FeatureStore,
    name: str,
    score: Callable[[Tensor], Tensor],
    *,
    progress: Progress = None,
    description: str = "score",
) -> Tensor:
    """Scores of all of the loader's images, float64 (n,).

    Args:
        extractor: of the model.
        loader: of known files.
        store: takes what it does not have.
        name: of the scores, in a file name: letters, digits and hyphens, another one for other settings.
        score: from images (b, ...) to (b,); it may run the model as it likes.
        progress: see `GROOD.fit`.
        description: of the progress bar.

    Raises:
        GroodError: if the store does not take the loader, or cannot be written.
    """
    journal = f"scores-{name}"
    probe = extractor(_checked(store).first_image(loader))
    stored = store.open(loader, _key(extractor, probe, ()), probe)
    template = {"scores": torch.empty(0, dtype=torch.float64)}
    found = [template["scores"]]
    for step in track(stored.steps({journal: template}), progress, description):
        columns = step.kept.get(journal)
        if columns is None:
            assert step.images is not None
            columns = {"scores": score(step.images).detach().to("cpu", torch.float64)} if len(step.images) else template
            stored.keep(step, journal, columns)
            stored.flush(force=False)
        found.append(columns["scores"])
    stored.flush(force=True)
    return torch.cat(found)


def _features(found: Extraction, images: Tensor) -> Columns:
    """The columns of the journal of features, of n ≥ 1 images; the last three have one row for all of them."""
    shape, channel_range = shape_and_range(images)
    assert channel_range is not None
    return {
        "features": found.features.cpu(),
        "logits": found.logits.cpu(),
        "hashes": content_hashes(images),
        "shape": torch.tensor([shape]),
        "low": channel_range[0][None],
        "high": channel_range[1][None],
    }


def _none_of(columns: Columns) -> Columns:
    return {name: column[:0] for name, column in columns.items()}


def _key(extractor: FeatureExtractor, probe: Extraction, left_out: Sequence[int]) -> dict[str, Any]:
    """All that features depend on, beside the images."""
    return {
        "features_version": FEATURES_VERSION,
        "weights": model_fingerprint(extractor.model).weights,
        "head": extractor.head,
        "dtype": str(probe.features.dtype).removeprefix("torch."),
        "device": probe.features.device.type,
        # Images of classes that are left out do not run through the model, and another batch has other bits.
        "left_out": sorted(left_out),
    }


def _checked(store: Any) -> FeatureStore:
    if not isinstance(store, FeatureStore):
        raise GroodError(
            f"cache must keep features, as torch_grood.data.FeatureCache(folder) does; got {type(store).__name__}"
        )
    return store
