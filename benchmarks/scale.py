"""Ray on one machine: images a second of one and of two workers beside the plain command; and random kills.

    python benchmarks/scale.py score r20.onnx --images test/
    python benchmarks/scale.py fit --model networks.py:resnet20 --weights r20.pt --train train/
    python benchmarks/scale.py kills r20.onnx --images train/ --kills 20
    python benchmarks/scale.py shards r20.grood --model networks.py:resnet20 --weights r20.pt --images test/
    python benchmarks/scale.py parts --features 2048 --classes 1000

All that is compared takes turns, since machines are noisy. "Steady" is the rate from the first part to the last one,
what a long job comes to; "all" counts the start of Ray and of the workers, too. After kills, each input must have one
row.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import pyarrow.dataset as ds
import ray
import torch

from torch_grood import GROOD
from torch_grood.data import PRESETS, FeatureCache, ImageTransform, image_loader, read_source
from torch_grood.features import FeatureExtractor
from torch_grood.geometry import SquareSum, placed
from torch_grood.models import load_model
from torch_grood.neighbors import ExactIndex, StoreOptions
from torch_grood.outliers import HighEnergy
from torch_grood.prototypes import ClassPrototypes
from torch_grood.runtime import DetectorRuntime, OnnxRuntime
from torch_grood.scale import Job, inputs_of, score_on_ray
from torch_grood.scale.filling import Filler, fill_on_ray
from torch_grood.scale.job import Counts, score_span
from torch_grood.scale.parts import Folder
from torch_grood.state import gradient_field_of, store_gradients
from torch_grood.storage import save_shard

T = TypeVar("T")


@dataclass
class Pace:
    """When how many images were done."""

    began: float = field(default_factory=time.perf_counter)
    done: list[tuple[float, int]] = field(default_factory=list)

    def tell(self, images: int) -> None:
        self.done.append((time.perf_counter(), images))

    def tell_counts(self, counts: Counts) -> None:
        self.tell(counts.images + counts.bad)

    @property
    def steady(self) -> float:
        """Images a second from the first part to the last."""
        return sum(n for _, n in self.done[1:]) / (self.done[-1][0] - self.done[0][0])

    @property
    def all(self) -> float:
        """Images a second from the start."""
        return sum(n for _, n in self.done) / (self.done[-1][0] - self.began)


def make_runtime(detector: str) -> OnnxRuntime:
    return OnnxRuntime(detector, threads=1)


def score_one_process(detector: str, images: str) -> Pace:
    """The same work in this process."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(inputs_of([images]), Folder(folder), "benchmark")
        runtime, pace = make_runtime(detector), Pace()
        for span in job.begin():
            pace.tell_counts(score_span(runtime, job.inputs.slice(span), span, job.folder, job.batch_size))
    return pace


def score_by(workers: int, detector: str, images: str) -> Pace:
    with tempfile.TemporaryDirectory() as folder:
        job, pace = Job(inputs_of([images]), Folder(folder), "benchmark"), Pace()
        score_on_ray(job, partial(make_runtime, detector), workers=workers, tell=pace.tell_counts)
    return pace


@dataclass(frozen=True)
class MakeFiller:
    """For a worker."""

    model: str
    weights: Path
    train: str
    transform: ImageTransform
    cache: Path

    def __call__(self) -> Filler:
        torch.set_num_threads(1)
        loader = image_loader(read_source(self.train), self.transform, workers=0)
        extractor = FeatureExtractor(load_model(self.model, self.weights, None).model)
        return Filler(extractor, loader, FeatureCache(self.cache))


def fit_one_process(make: MakeFiller) -> Pace:
    """A plain fit on one thread, without a cache; all of it counts."""
    torch.set_num_threads(1)
    loader = image_loader(read_source(make.train), make.transform, workers=0)
    detector, pace = GROOD(load_model(make.model, make.weights, None).model), Pace()
    detector.fit(loader, progress=False)
    pace.tell(0)
    pace.tell(detector.fit_info_.n_samples)
    return Pace(pace.began, [(pace.began, 0), pace.done[-1]])


def fit_by(workers: int, make: MakeFiller) -> Pace:
    """Features by workers, then the fit on them."""
    with tempfile.TemporaryDirectory() as folder:
        make = MakeFiller(make.model, make.weights, make.train, make.transform, Path(folder))
        pace = Pace()
        fill_on_ray(make, workers=workers, tell=pace.tell)
        loader = image_loader(read_source(make.train), make.transform, workers=0)
        detector = GROOD(load_model(make.model, make.weights, None).model)
        detector.fit(loader, progress=False, cache=FeatureCache(make.cache))
        pace.tell(0)
    return pace


@dataclass(frozen=True)
class OpenDetector:
    """For a worker."""

    detector: Path
    model: str
    weights: Path

    def __call__(self) -> DetectorRuntime:
        torch.set_num_threads(1)
        detector = GROOD.load(self.detector, load_model(self.model, self.weights, None).model)
        return DetectorRuntime(detector, ImageTransform.from_dict(detector.metadata["transform"]))


def compare_shards(make: OpenDetector, images: str, rounds: int) -> None:
    """Two workers that search all gradients themselves, or ask 1, 2 or 4 processes that hold them."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        detector = GROOD.load(make.detector)
        openers = {"in each worker": make}
        for count in (1, 2, 4):
            head = Path(folder, f"{count}.grood")
            detector.save(head, shards=count)
            openers[f"in {count} shards"] = OpenDetector(head, make.model, make.weights)
        for _ in range(rounds):
            for name, opener in openers.items():
                with tempfile.TemporaryDirectory() as output:
                    job, pace = Job(inputs_of([images]), Folder(output), "benchmark"), Pace()
                    score_on_ray(job, opener, workers=2, shards=opener().shards, tell=pace.tell_counts)
                found.setdefault(name, []).append(pace.steady)
    whole = found["in each worker"]
    for name, rates in found.items():
        ratios = [rate / other for rate, other in zip(rates, whole, strict=True)]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(
            f"{name:<15} {statistics.median(rates):8,.0f} images/s steady, {statistics.median(ratios):.2f} x ({shown})"
        )


def time_parts(n: int, d: int, classes: int) -> None:
    """What a shard does with an image beside the network, on one thread: large fits are worked out from it."""
    torch.set_num_threads(1)
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (n,), generator=random)
    # Non-negative, of few strong directions, as the features of trained networks are.
    centres = torch.randn(classes, d, generator=random).relu()
    features = (centres[labels] + 0.5 * torch.randn(n, d, generator=random)).relu()
    prototypes, squares = ClassPrototypes(classes), SquareSum()

    def timed(name: str, work: Callable[[], T]) -> T:
        began = time.perf_counter()
        found = work()
        seconds = time.perf_counter() - began
        print(f"{name:<28} {n / seconds:10,.0f} images/s")
        return found

    def sum_up() -> None:
        for part, rows in zip(torch.split(features, 64), torch.split(labels, 64), strict=True):
            in_place = placed(part, "unit")
            prototypes.update(in_place, rows)
            squares.update(in_place)

    timed("sums, one part after another", sum_up)
    source = HighEnergy()
    field = gradient_field_of(prototypes, squares, features[:1000], source, source.settings)
    store = StoreOptions("int8")
    given = {"features": torch.split(features, 8192), "labels": labels, "predictions": None}
    ids = {"sample_ids": torch.arange(n), "class_ids": torch.arange(classes)}
    made = timed("gradients, int8", lambda: store_gradients(field, **given, **ids, store=store))  # type: ignore[arg-type]
    searcher = timed("index", lambda: ExactIndex().build(made.gradients))
    with tempfile.TemporaryDirectory() as folder:
        file = timed("file", lambda: save_shard(Path(folder, "x.grood"), searcher))
        size = Path(folder, file.name).stat().st_size
    queries = field(features[:640] + 0.3 * torch.randn(640, d, generator=random)).gradients
    began = time.perf_counter()
    for start in range(0, 640, 64):
        searcher.search(queries.take(slice(start, start + 64)), 10)
    each = (time.perf_counter() - began) / 640
    print(f"{size / n:,.0f} bytes an image in the file; a search among {n:,}: {1e3 * each:.2f} ms an image")


def compare(one: Callable[[], Pace], by: Callable[[int], Pace], rounds: int) -> None:
    """Print rates and ratios, medians over the rounds."""
    found: dict[str, list[Pace]] = {"plain": [], "1 worker": [], "2 workers": []}
    for _ in range(rounds):
        for name, run in (("plain", one), ("1 worker", partial(by, 1)), ("2 workers", partial(by, 2))):
            found[name].append(run())
    for name, paces in found.items():
        steady, whole = (statistics.median(getattr(pace, kind) for pace in paces) for kind in ("steady", "all"))
        print(f"{name:<10} {steady:8,.0f} images/s steady, {whole:8,.0f} in all")
    for title, a, b in (("2 workers / 1 worker", "2 workers", "1 worker"), ("1 worker / plain", "1 worker", "plain")):
        ratios = [x.steady / y.steady for x, y in zip(found[a], found[b], strict=True)]
        shown = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        print(f"{title}: {statistics.median(ratios):.2f} x steady (rounds: {shown})")


def kill_workers(detector: str, images: str, kills: int) -> None:
    """Kill a random worker again and again while a job runs; then count the rows of each input."""
    with tempfile.TemporaryDirectory() as folder:
        job, pace = Job(inputs_of([images]), Folder(folder), "benchmark"), Pace()
        with killing(kills) as killed:
            summary = score_on_ray(job, partial(make_runtime, detector), workers=2, tell=pace.tell_counts)
        numbers = ds.dataset(f"{folder}/scores").to_table(columns=["number"])["number"].to_pylist()
        once = sorted(numbers) == list(range(len(job.inputs)))
        print(
            f"{len(killed)} workers killed; {summary.images:,} of {summary.inputs:,} images scored, {summary.bad} left "
            f"out; each exactly once: {once}; {pace.all:,.0f} images/s in all"
        )


@contextmanager
def killing(kills: int) -> Iterator[list[int]]:
    """While it lasts, kills so many workers at random times."""
    over, killed, generator = threading.Event(), list[int](), random.Random(0)

    def work() -> None:
        while len(killed) < kills and not over.wait(generator.uniform(0.2, 1.4)):
            pids = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_worker(pid)]  # noqa: PTH208
            if pids:
                killed.append(generator.choice(pids))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(killed[-1], signal.SIGKILL)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def is_worker(pid: int) -> bool:
    try:
        return "ray::_Worker" in Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("score", "kills"):
        command = commands.add_parser(name)
        command.add_argument("detector", type=lambda path: str(Path(path).absolute()), help="an .onnx file")
        command.add_argument("--images", required=True)
        command.add_argument("--rounds", type=int, default=3)
        command.add_argument("--kills", type=int, default=20)
    fit = commands.add_parser("fit")
    fit.add_argument("--model", required=True)
    fit.add_argument("--weights", type=Path, required=True)
    fit.add_argument("--train", required=True, help="class folders of 32 × 32 images")
    fit.add_argument("--rounds", type=int, default=3)
    shards = commands.add_parser("shards")
    shards.add_argument(
        "detector", type=lambda path: Path(path).absolute(), help="a .grood file that tells its transform"
    )
    shards.add_argument("--model", required=True)
    shards.add_argument("--weights", type=Path, required=True)
    shards.add_argument("--images", required=True)
    shards.add_argument("--rounds", type=int, default=3)
    parts = commands.add_parser("parts")
    parts.add_argument("--images", type=int, default=50_000)
    parts.add_argument("--features", type=int, default=2048)
    parts.add_argument("--classes", type=int, default=1000)
    arguments = parser.parse_args()
    if arguments.command == "parts":
        time_parts(arguments.images, arguments.features, arguments.classes)
        return
    # The workers import this file's classes from where it lies.
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="error", runtime_env=here)
    if arguments.command == "kills":
        kill_workers(arguments.detector, arguments.images, arguments.kills)
        return
    if arguments.command == "score":
        one = partial(score_one_process, arguments.detector, arguments.images)
        compare(one, lambda workers: score_by(workers, arguments.detector, arguments.images), arguments.rounds)
        return
    file, _, factory = arguments.model.rpartition(":")
    model = f"{Path(file).absolute()}:{factory}" if Path(file).is_file() else arguments.model
    if arguments.command == "shards":
        make_detector = OpenDetector(arguments.detector, model, arguments.weights.absolute())
        compare_shards(make_detector, arguments.images, arguments.rounds)
    else:
        train = str(Path(arguments.train).absolute())
        make = MakeFiller(model, arguments.weights.absolute(), train, PRESETS["cifar10"], Path())
        compare(partial(fit_one_process, make), lambda workers: fit_by(workers, make), arguments.rounds)


if __name__ == "__main__":
    main()
