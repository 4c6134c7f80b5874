"""The demo from end to end: train, fit, calibrate, score, compare, write.

Nothing here prints; `torch_grood.cli.demo` does. On one machine with one number of threads all figures
depend on the seed alone (elsewhere sums may round otherwise); only `DemoResult.seconds` differs from run to run.
"""

from __future__ import annotations

import io
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from torch_grood._files import replacing
from torch_grood._optional import require
from torch_grood.data import ImageTransform
from torch_grood.demo import network
from torch_grood.demo.digits import DigitsData, load_digits_data
from torch_grood.demo.figure import scores_figure
from torch_grood.demo.network import DigitsCNN, train_digits_cnn
from torch_grood.detector import GROOD
from torch_grood.errors import GroodError
from torch_grood.evaluation import DetectionMetrics, clopper_pearson, detection_metrics
from torch_grood.evaluation.methods import Energy, Knn, Method, Msp
from torch_grood.evaluation.outputs import Outputs, World

__all__ = ["DemoResult", "FalseAlarms", "run_demo"]

FPR = 0.05
# In float32 the surest predictions have the same MSP, and no threshold could part them.
BASELINES_SHOWN: dict[str, Method] = {"MSP": Msp(precision="float64"), "energy": Energy(), "KNN": Knn()}
NEAR, FAR = ("near",), ("photos", "noise")
DETECTOR_FILE, WEIGHTS_FILE, RESULTS_FILE, FIGURE_FILE = (
    "digits.grood",
    "digits_cnn.safetensors",
    "results.json",
    "scores.png",
)
IMAGES_FOLDER = "images"
_PACKAGES = ("torch-grood", "torch", "numpy", "scikit-learn", "pytorch-ood")


@dataclass(frozen=True)
class FalseAlarms:
    """What calibration promised, and what held-out ID images then showed.

    Attributes:
        promised: the share of ID images that may be flagged, on average over calibration sets.
        count: ID test images flagged, of n.
        n: ID test images.
        n_calibration: ID images that set τ.
        low, high: 95 % interval (Clopper–Pearson) of the rate behind `count`. It knows of the chance in the test set
            only: τ itself varies with the calibration set, so the promise falls outside somewhat more often than in
            5 % of runs.
    """

    promised: float
    count: int
    n: int
    n_calibration: int
    low: float
    high: float

    @property
    def observed(self) -> float:
        """Share of ID test images flagged."""
        return self.count / self.n

    @property
    def is_consistent(self) -> bool:
        """Whether the promised rate, or a lower one, may well be behind the observed one."""
        return self.low <= self.promised

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**vars(self), "observed": self.observed, "is_consistent": self.is_consistent}


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo found.

    Attributes:
        output: the folder written.
        seed: of the split, the training, the noise and GROOD.
        counts: number of images in each set.
        classifier_accuracy: of the network's own labels on the ID test set.
        prototype_accuracy: of the nearest class prototype there.
        false_alarms: on the ID test set.
        tau: the threshold.
        metrics: detector → OOD set → figures against the ID test set.
        flagged: set → share of its images that GROOD flags at τ.
        settings: what was chosen, for the record.
        versions: of Python and the packages that the figures depend on.
        seconds: what each step took; the only part that the seed does not fix.
    """

    output: Path
    seed: int
    counts: dict[str, int]
    classifier_accuracy: float
    prototype_accuracy: float
    false_alarms: FalseAlarms
    tau: float
    metrics: dict[str, dict[str, DetectionMetrics]]
    flagged: dict[str, float]
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: dict[str, float] = field(compare=False)

    def mean(self, detector: str, figure: str, sets: tuple[str, ...]) -> float:
        """Unweighted mean of one figure over some OOD sets, as OpenOOD takes it over the near or the far ones."""
        return float(np.mean([getattr(self.metrics[detector][name], figure) for name in sets]))

    def to_dict(self) -> dict[str, Any]:
        """What results.json holds."""
        return {
            "seed": self.seed,
            "counts": self.counts,
            "classifier_accuracy": self.classifier_accuracy,
            "prototype_accuracy": self.prototype_accuracy,
            "false_alarms": self.false_alarms.to_dict(),
            "tau": self.tau,
            "flagged": self.flagged,
            "metrics": {
                detector: {name: figures.to_dict() for name, figures in sets.items()}
                for detector, sets in self.metrics.items()
            },
            "settings": self.settings,
            "versions": self.versions,
            "seconds": self.seconds,
        }


def run_demo(
    output: str | os.PathLike[str], seed: int = 0, progress: Callable[[str], None] | None = None
) -> DemoResult:
    """Run the demo and write its files into `output`, which is made if need be; files of an earlier run are replaced.

    Args:
        output: folder for digits.grood, digits_cnn.safetensors, images/, results.json and scores.png.
        seed: 0 to 2^63 - 1; the same seed gives the same figures.
        progress: called with a few words at the start of each step.

    Raises:
        GroodError: if `output` cannot be written to, or `seed` is out of range.
        MissingDependencyError: without the extra ``bench``. Both are known before the work starts.
    """
    folder = _prepare(Path(output), seed)
    with _one_thread():
        return _run(folder, seed, _Clock(progress))


def _run(folder: Path, seed: int, clock: _Clock) -> DemoResult:

    with clock.step("load", "loading digits and photographs"):
        data = load_digits_data(seed)
        transform = data.transform()
        batches = {name: images.batches(transform) for name, images in data.items()}
    with clock.step("train", f"training a small CNN on {len(data.train)} digits 0-5"):
        images = torch.cat([batch for batch, _ in batches["train"]])
        model = train_digits_cnn(images, data.train.labels, seed)
    with clock.step("fit", "fitting GROOD"):
        detector = GROOD(model, seed=seed)
        detector.fit(batches["train"], progress=False)
    with clock.step("calibrate", f"calibrating on {len(data.calibration)} held-out digits"):
        detector.calibrate(batches["calibration"], fpr=FPR, progress=False)
    with clock.step("score", "scoring known and unknown images"):
        tested = ("test", *NEAR, *FAR)
        predictions = {name: detector.predict(batches[name], progress=False) for name in tested}
    with clock.step("baselines", f"scoring with {', '.join(BASELINES_SHOWN)}"):
        extracted = {name: detector.extract(batches[name], progress=False) for name in ("train", *tested)}
        outputs = {name: Outputs(found.features, found.logits) for name, found in extracted.items()}
        world = World(outputs["train"], seed=seed)
        scores = {"GROOD": {name: prediction.score for name, prediction in predictions.items()}}
        for baseline, method in BASELINES_SHOWN.items():
            scorer = method.fit(world)
            scores[baseline] = {name: scorer(outputs[name]) for name in tested}

    labels, test = data.test.labels, predictions["test"]
    count = int(test.is_ood.sum())
    low, high = clopper_pearson(count, len(labels))
    threshold = detector.threshold_
    assert threshold is not None  # calibrate has set it
    result = DemoResult(
        output=folder,
        seed=seed,
        counts={name: len(images) for name, images in data.items()},
        classifier_accuracy=_share(outputs["test"].logits.argmax(1) == labels),
        prototype_accuracy=_share(test.prototype_label == labels),
        false_alarms=FalseAlarms(FPR, count, len(labels), len(data.calibration), low, high),
        tau=threshold.tau,
        metrics={
            name: {ood: detection_metrics(of_sets["test"], of_sets[ood]) for ood in (*NEAR, *FAR)}
            for name, of_sets in scores.items()
        },
        flagged={name: _share(prediction.is_ood) for name, prediction in predictions.items()},
        settings=_settings(detector, transform),
        versions={"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}},
        seconds=clock.seconds,
    )
    with clock.step("write", f"writing {folder}"), _write_errors(folder):
        detector.metadata.update(
            {
                "model": {"spec": "torch_grood.demo:DigitsCNN", "weights": WEIGHTS_FILE},
                "transform": transform.to_dict(),
            }
        )
        _write_samples(folder / IMAGES_FOLDER, data)
        _write(folder / WEIGHTS_FILE, safetensors_bytes(_state(model)))
        detector.save(folder / DETECTOR_FILE)
        grood_scores = {name: tensor.numpy() for name, tensor in scores["GROOD"].items()}
        _write(folder / FIGURE_FILE, _figure(result, grood_scores, data))
    with _write_errors(folder):
        _write(folder / RESULTS_FILE, (json.dumps(result.to_dict(), indent=2) + "\n").encode())
    return result


class _Clock:
    """Announces each step and keeps its time."""

    def __init__(self, progress: Callable[[str], None] | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def step(self, name: str, announcement: str) -> Iterator[None]:
        if self._progress is not None:
            self._progress(announcement)
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


@contextmanager
def _one_thread() -> Iterator[None]:
    """So small a net gains nothing from more threads, loses much on a busy machine, and sums up alike everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare(folder: Path, seed: int) -> Path:
    """Everything that can fail for a reason outside the demo, before the first second is spent."""
    if not 0 <= seed < 2**63:
        raise GroodError(f"seed must be an integer from 0 to 2^63 - 1, got {seed}")
    for module in ("sklearn.datasets", "scipy.stats", "pytorch_ood.detector", "matplotlib.figure", "PIL.Image"):
        require(module, extra="bench")
    with _write_errors(folder):
        (folder / IMAGES_FOLDER).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


@contextmanager
def _write_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise GroodError(
            f"cannot write to the folder {folder}: {error.strerror or error}. Choose one that is not a file, that you "
            "may write to, and that has 1 MB of room"
        ) from error


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _write_samples(folder: Path, data: DigitsData) -> None:
    """A dozen images that the model has not seen, named by what they are."""
    image = require("PIL.Image", extra="bench")
    for name, pixels in _samples(data).items():
        buffer = io.BytesIO()
        image.fromarray(pixels).save(buffer, format="PNG")
        _write(folder / f"{name}.png", buffer.getvalue())


def _samples(data: DigitsData) -> dict[str, NDArray[np.uint8]]:
    def first(images: Any, digit: int) -> NDArray[np.uint8]:
        pixels: NDArray[np.uint8] = images.pixels[int((images.labels == digit).nonzero()[0])]
        return pixels

    samples = {f"id-digit-{digit}": first(data.test, digit) for digit in range(6)}
    samples |= {f"near-digit-{digit}": first(data.near, digit) for digit in range(6, 10)}
    for kind, images in (("photo", data.photos), ("noise", data.noise)):
        samples |= {f"far-{kind}-{i + 1}": images.pixels[i] for i in range(2)}
    return samples


def _figure(result: DemoResult, scores: dict[str, NDArray[np.float64]], data: DigitsData) -> bytes:
    samples = {name: _from_flat_to_rich(images.pixels) for name, images in data.items() if name in scores}
    return scores_figure(scores, samples, result.tau, result.flagged, result.false_alarms)


def _from_flat_to_rich(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Four images at evenly spaced ranks of contrast: the first four tiles of a photograph may all be sky."""
    order = np.argsort(pixels.std(axis=(1, 2)), kind="stable")
    return pixels[order[[len(order) * part // 8 for part in (1, 3, 5, 7)]]]


def _settings(detector: GROOD, transform: ImageTransform) -> dict[str, Any]:
    return {
        "model": "torch_grood.demo:DigitsCNN",
        "training": {
            "optimizer": "Adam, one-cycle",
            "epochs": network.EPOCHS,
            "batch_size": network.BATCH_SIZE,
            "peak_learning_rate": network.PEAK_LEARNING_RATE,
        },
        "transform": transform.to_dict(),
        "threads": torch.get_num_threads(),
        "fpr": FPR,
        "knn_neighbors": Knn().k,
        "outliers": repr(detector.outliers),
        "index": detector.index.spec,
        "head": detector.fit_info_.head,
        "early_layer": detector.fit_info_.early_layer,
        "near": list(NEAR),
        "far": list(FAR),
    }


def _state(model: DigitsCNN) -> dict[str, Tensor]:
    return {name: tensor.contiguous() for name, tensor in model.state_dict().items()}


def _share(flags: Tensor) -> float:
    return float(flags.double().mean())
