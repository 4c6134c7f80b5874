"""Kill `grood fit --cache` and `GROOD.save` by SIGKILL at random moments, and look whether anything was lost.

    python benchmarks/kills.py --fits 100 --saves 100 --seed 0 --data OPENOOD_FOLDER \
        --model networks.py:resnet20 --weights resnet20_cifar10.pt

A fit runs on real images in a process of its own, is killed at a moment drawn uniformly over the time that it should
still take, and is started again until one ends. Its file must have the bytes of a fit that was neither
killed nor had a cache. What a restart does again is counted in images: one shard at most. After each kill the file that
was to be written must be as it was before, or whole.

A save over another detector's file is killed likewise: the file must be the old one or the new one, byte for byte.

The processes are forks of this one, which has imported all that they need: so a fit takes seconds, and the kills fall
into the fit and not into the start of Python.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

# A process that has run several threads must not fork.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import torch_grood.data
import torch_grood.models
import torch_grood.summary
from torch_grood import GROOD
from torch_grood.cli._app import app
from torch_grood.data import FeatureCache, ImageLoader
from torch_grood.data.dataset import Batch

# Of the time that a run should take; so some end before they are killed.
_LATEST = 1.5


@dataclass
class FitReport:
    """What came of killing fits; durations are without interruption, the second from a cache that has everything."""

    durations: list[float] = field(default_factory=list)
    durations_from_cache: list[float] = field(default_factory=list)
    kills: int = 0
    fits: int = 0
    kills_after_reading: int = 0
    repeated: list[int] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass
class SaveReport:
    """What came of killing saves."""

    duration: float = 0.0
    kills: int = 0
    old: int = 0
    new: int = 0
    temporary_files: int = 0
    failures: list[str] = field(default_factory=list)


def main() -> None:
    """Run it; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", type=int, default=100, help="kills of fits")
    parser.add_argument("--saves", type=int, default=100, help="kills of saves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, required=True, help="a folder in OpenOOD's layout")
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--images", type=int, default=600, help="training images, evenly spread over CIFAR-10's")
    parser.add_argument("--shard", type=int, default=64, help="images in a shard")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lists = options.data / "benchmark_imglist" / "cifar10"
        train = _part_of(lists / "train_cifar10.txt", options.images, folder / "train.txt")
        held_out = _part_of(lists / "val_cifar10.txt", options.images // 4, folder / "held_out.txt")
        arguments = [
            *("--model", options.model, "--weights", str(options.weights), "--transform", "cifar10"),
            *("--train", str(train), "--calibrate", str(held_out), "--root", str(options.data / "images_classic")),
            *("--batch-size", "32"),
        ]
        fits = kill_fits(arguments, folder, options.fits, options.shard, rng)
        saves = kill_saves(_synthetic(0), _synthetic(1), folder / "saved.grood", options.saves, rng)
    print(_table(fits, saves, options.shard))
    for failure in fits.failures + saves.failures:
        print(f"FAILED: {failure}", file=sys.stderr)
    sys.exit(bool(fits.failures or saves.failures))


def kill_fits(arguments: Sequence[str], folder: Path, n: int, shard_images: int, rng: random.Random) -> FitReport:
    """Kill `grood fit` n times.

    Args:
        arguments: of `grood fit`, without --output, --cache and --workers.
        folder: for the cache and the files.
        n: kills.
        shard_images: images in a shard of the cache.
        rng: draws the moments.
    """
    report = FitReport()
    output, cache, log = folder / "new.grood", folder / "cache", folder / "batches.log"
    expected, n_batches = b"", 0
    while report.kills < n:
        # Every third has processes that read images.
        plain = [*arguments, "--output", str(output), "--workers", "2" if report.fits % 3 == 2 else "0"]
        work = partial(_fit, [*plain, "--cache", str(cache)], shard_images=shard_images, log=log)
        # Measured anew for each fit: what else the machine has to do changes.
        whole = _undisturbed(partial(_fit, plain))
        report.durations.append(whole)
        expected = expected or output.read_bytes()
        log.write_bytes(b"")
        _undisturbed(work)
        n_batches = n_batches or len(log.read_text().splitlines())
        log.write_bytes(b"")
        from_cache = _undisturbed(work)
        report.durations_from_cache.append(from_cache)
        if log.read_bytes() or output.read_bytes() != expected:
            report.failures.append("a fit from a complete cache read images, or wrote other bytes")
        shutil.rmtree(cache)
        # Every other fit replaces a file.
        before = b"another file" if report.fits % 2 else None
        output.unlink() if before is None else output.write_bytes(before)
        seen: set[str] = set()
        while True:
            left = 1 - len(seen) / n_batches
            killed = _killed(_start(work), rng.uniform(0, _LATEST * (left * whole + (1 - left) * from_cache)))
            batches = log.read_text().splitlines()
            log.write_bytes(b"")
            repeated = sum(int(line.rsplit(" ", 1)[1]) for line in set(batches) & seen)
            if seen:
                report.repeated.append(repeated)
            if repeated > shard_images:
                report.failures.append(f"{repeated} images ran again after one kill, a shard has {shard_images}")
            seen |= set(batches)
            if (output.read_bytes() if output.exists() else None) not in (before, expected):
                report.failures.append(f"fit {report.fits}: the file is neither the old nor the new one")
            if not killed:
                break
            report.kills += 1
            report.kills_after_reading += len(seen) == n_batches
        report.fits += 1
        if output.read_bytes() != expected:
            report.failures.append(f"fit {report.fits}: other bytes than without interruption")
    return report


def kill_saves(old: GROOD, new: GROOD, path: Path, n: int, rng: random.Random) -> SaveReport:
    """Kill n saves of `new` over the file of `old`."""
    report = SaveReport()
    contents = []
    for detector in (old, new):
        report.duration = median(_undisturbed(partial(detector.save, path)) for _ in range(3))
        contents.append(path.read_bytes())
    while report.kills < n:
        path.write_bytes(contents[0])
        if not _killed(_start(partial(new.save, path)), rng.uniform(0, _LATEST * report.duration)):
            continue
        report.kills += 1
        found = path.read_bytes()
        report.old += found == contents[0]
        report.new += found == contents[1]
        if found not in contents:
            report.failures.append(f"after kill {report.kills} the file is neither the old nor the new one")
    new.save(path)
    if path.read_bytes() != contents[1]:
        report.failures.append("a save after the kills wrote other bytes")
    report.temporary_files = len(list(path.parent.glob(f".{path.name}.*")))
    return report


def _fit(arguments: Sequence[str], shard_images: int | None = None, log: Path | None = None) -> None:
    """`grood fit`, with small shards, and each batch that is read in the log."""
    if shard_images is not None:
        torch_grood.data.FeatureCache = partial(FeatureCache, shard_images=shard_images)  # type: ignore[assignment,misc]
    if log is not None:
        handle, read = os.open(log, os.O_WRONLY | os.O_APPEND), ImageLoader.read

        def logged(self: ImageLoader, first: int, end: int) -> Iterator[Batch]:
            for batch, found in enumerate(read(self, first, end), start=first):
                # Whoever takes the batch runs the model on it next.
                os.write(handle, f"{self.dataset.source.origin} {batch} {len(found[0])}\n".encode())
                yield found

        ImageLoader.read = logged  # type: ignore[method-assign]
    app(["fit", *arguments], standalone_mode=False)


def _start(work: Callable[[], object]) -> int:
    """Run `work` in a fork with a process group of its own, silently but for errors; its process id."""
    sys.stdout.flush()
    with warnings.catch_warnings():
        # Newer Pythons warn of forks of a process with threads; here these are idle, and nothing holds a lock.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            torch.set_num_threads(1)
            error = os.dup(2)
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            os.dup2(silent, 2)
            work()
            status = 0
        except BaseException:
            os.write(error, traceback.format_exc().encode())
        finally:
            os._exit(status)
    return child


def _killed(child: int, delay: float) -> bool:
    """Kill a process and its children after a while; whether it still ran."""
    end = time.monotonic() + delay
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(min(0.001, max(0.0, end - time.monotonic())))
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        # It has no group of its own yet, or is gone.
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status > 0:
        raise SystemExit(f"a run ended with status {status}; see above")
    return status < 0


def _undisturbed(work: Callable[[], object]) -> float:
    """How long `work` takes in a fork, in seconds."""
    started = time.monotonic()
    status = os.waitstatus_to_exitcode(os.waitpid(_start(work), 0)[1])
    if status:
        raise SystemExit(f"a run without interruption ended with status {status}; see above")
    return time.monotonic() - started


def _part_of(file: Path, n: int, target: Path) -> Path:
    """A list of n lines of `file`, evenly spread."""
    lines = file.read_text().splitlines()
    target.write_text("".join(f"{lines[i * len(lines) // n]}\n" for i in range(n)))
    return target


def _synthetic(seed: int) -> GROOD:
    """A detector of some megabytes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(20_000) % 10
    features = 3 * torch.randn(10, 128, generator=generator)[labels] + torch.randn(20_000, 128, generator=generator)
    detector = GROOD(None, seed=seed).fit_features(features, labels)
    return detector.calibrate_features(features.roll(1, 1), 0.05)


def _table(fits: FitReport, saves: SaveReport, shard: int) -> str:
    again = f"{max(fits.repeated, default=0)} at most, {median(fits.repeated or [0]):g} median"
    rows = [
        ("fit, without interruption", f"{median(fits.durations or [0]):.2f} s"),
        ("the same from a cache that has everything", f"{median(fits.durations_from_cache or [0]):.2f} s"),
        ("kills of fits", fits.kills),
        ("of these after the last image was read: mixing, search, calibration, save", fits.kills_after_reading),
        ("fits that ended, with the bytes of one without interruption", fits.fits),
        (f"images that a restart ran again, of a shard of {shard}", again),
        ("save, without interruption", f"{1000 * saves.duration:.0f} ms"),
        ("kills of saves", saves.kills),
        ("of these with the old file left, with the new one", f"{saves.old}, {saves.new}"),
        ("temporary files left beside it", saves.temporary_files),
        ("failures", len(fits.failures) + len(saves.failures)),
    ]
    return "\n".join(["| what | found |", "|---|---|", *(f"| {what} | {found} |" for what, found in rows)])


if __name__ == "__main__":
    main()
