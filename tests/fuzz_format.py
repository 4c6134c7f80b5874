"""Attack the reader of detector files with mutants, in a process that may die.

    python tests/fuzz_format.py --mutants 10000 --seed 0
    python tests/fuzz_format.py --seed 0 --only 4711

A mutant is `fuzz_mutations.mutant(corpus, seed, number)`: the same bytes on every machine with these versions. A raw
one must load *equal*, in its description and every byte of its tensors, or raise a FormatError. A resealed one, whose
hashes are right, must do all that a detector does (score, decide, explain, name, show its facts), or raise a GroodError
where it fails. Neither may do anything else, and that is:

- end the process, or raise any other exception;
- a NaN, a p-value that is none, a neighbour that does not exist;
- take more than `SECONDS` of the processor, beyond what the file that it was made from takes; 20 s on the clock are a
  hang, whatever it waits for;
- have more memory in use than twice the file and `ALLOWANCE`, or ask for more than `FENCE`.

`ALLOWANCE` is for what does not grow with the file: buffers that are as long as a block of samples, tables that a
search in a small index makes, pages that the memory allocator keeps. The report tells how much of it the unaltered
files use.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import torch

import format_file
from fuzz_corpus import Base, as_with_bfloat16, corpus
from fuzz_mutations import Mutant, mutant
from torch_grood import GROOD, FormatError, GroodError, container
from torch_grood.storage import FORMAT_VERSION

__all__ = ["ALLOWANCE", "Found", "broken", "main", "run", "use"]

SECONDS = 1.0
ALLOWANCE = 32 * 2**20
FENCE = 4 * 2**30
_HANG = 20.0
# Mutants that one process reads, so that what it leaks shows but does not pile up.
_LIFE = 2000
_LIBRARY = str(Path(container.__file__).parent)

Use = Callable[[Path, Mutant], str]


class _DefectError(Exception):
    """A mutant was read as no file may be."""


@dataclass(frozen=True)
class Found:
    """What became of a mutant.

    Attributes:
        number: of the mutant.
        base, what: see `Mutant`.
        outcome: "equal", "works", the name of an error of ours, or "broken".
        detail: the error's message; of what is broken, how.
        seconds: of the processor.
        bytes: that came into use beyond what was before.
        size: of the file.
    """

    number: int
    base: str
    what: str
    outcome: str
    detail: str = ""
    seconds: float = 0.0
    bytes: int = 0
    size: int = 0


def use(path: Path, mutant: Mutant) -> str:
    """Do with a file what a program does with it.

    Returns:
        "equal" or "works"; errors of the library come through.
    """
    detector = GROOD.load(path)
    if not mutant.sealed:
        _check_equal(path, mutant)
    d = len(detector.ood_prototype_)
    noise = torch.randn(3, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    queries = torch.cat([noise, detector.class_prototypes_[:2], detector.ood_prototype_[None]])
    scores = detector.score_features(queries)
    explanation = detector.explain_features(queries)
    _check(not scores.isnan().any() and bool((scores >= 0).all()), "a score is none")
    _check(not any(field.isnan().any() for field in explanation), "an explanation has a NaN")
    n = detector.fit_info_.n_read
    _check(bool(((explanation.neighbor >= 0) & (explanation.neighbor < n)).all()), "a neighbour does not exist")
    detector.sample_names(explanation.neighbor.flatten())
    detector.sample_names([0, n - 1])
    if detector.threshold_ is not None:
        found = detector.predict_features(queries)
        assert found.p_value is not None
        _check(bool(((found.p_value > 0) & (found.p_value <= 1)).all()), "a p-value is none")
    _show(detector, path)
    return "works" if mutant.sealed else "equal"


def _show(detector: GROOD, path: Path) -> None:
    """As `grood info` does, in both formats."""
    from torch_grood.summary import facts, operating_points, rows, stored_rows

    found = facts(detector, path)
    json.dumps(found, indent=2).encode()
    for name, value in rows(found) + stored_rows(detector.metadata):
        f"{name:<18} {value}".encode()
    for line in operating_points(found):
        line.encode()
    repr(detector)


def _check_equal(path: Path, mutant: Mutant) -> None:
    found = container.read(path, FORMAT_VERSION)
    twins = [base for base in mutant.sources if base.header == found.header]
    _check(bool(twins), "it loads with another description")
    expected = twins[0].tensors
    _check(found.tensors.keys() == expected.keys(), "it loads with other tensors")
    for name, tensor in found.tensors.items():
        same = (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape)
        _check(same and format_file.raw(tensor) == format_file.raw(expected[name]), f"it loads with another {name}")


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _DefectError(otherwise)


# --- One mutant, in this process ----------------------------------------------------------------------------------


def read(number: int, made: Mutant, path: Path, use: Use = use, limit: float = SECONDS) -> Found:
    """Write a mutant, use it, and judge what came of it."""
    path.write_bytes(made.content)
    size = len(made.content)
    before = _fresh_memory()
    start = time.process_time()
    detail = ""
    try:
        outcome = use(path, made)
    except FormatError as error:
        outcome, detail = type(error).__name__, str(error)
    except GroodError as error:
        outcome, detail = (type(error).__name__ if made.sealed else "broken"), str(error)
    except _DefectError as error:
        outcome, detail = "broken", str(error)
    except BaseException as error:
        outcome, detail = "broken", f"{type(error).__name__}: {error} at {_where(error)}"
    seconds, grown = time.process_time() - start, _peak_memory() - before
    if outcome != "broken" and re.search("bad_alloc|out of memory|memory[: ]|MemoryError", detail):
        outcome, detail = "broken", f"asked for more memory than there is: {detail}"
    elif outcome != "broken" and seconds > limit:
        outcome, detail = "broken", f"took {seconds:.1f} s, then: {outcome} {detail}"
    elif outcome != "broken" and grown > 2 * size + ALLOWANCE:
        outcome, detail = "broken", f"took {grown / 2**20:.0f} MiB, then: {outcome} {detail}"
    return Found(number, made.base.name, made.what, outcome, detail[:500], seconds, grown, size)


def _where(error: BaseException) -> str:
    """The innermost line of the library that an error came through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(_LIBRARY)]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[:-4:-1]) or "the fuzzer"


def _fresh_memory() -> int:
    """Bytes in use once all that can be given back is; the peak is counted from here."""
    gc.collect()
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak_memory() -> int:
    return _status("VmHWM")


def _status(name: str) -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return 1024 * int(line.split()[1])
    return 0


# --- Many, in processes that may die ------------------------------------------------------------------------------


def run(mutants: Callable[[int], Mutant], numbers: Sequence[int], use: Use = use) -> Iterator[Found]:
    """What becomes of the mutants of the given numbers, in their order.

    They are used in a child process, which is replaced when it dies, hangs or has lived long enough.
    """
    pending = list(numbers)
    with tempfile.TemporaryDirectory() as folder:
        while pending:
            part = pending[:_LIFE]
            found: list[Found] = []
            for one in _in_child(mutants, part, use, Path(folder)):
                found.append(one)
                yield one
            pending = pending[len(found) :]


def _in_child(mutants: Callable[[int], Mutant], numbers: Sequence[int], use: Use, folder: Path) -> Iterator[Found]:
    """As `run`, up to the first mutant that the child does not survive."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.close(reader)
            _child(mutants, numbers, use, folder, writer)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    received, count, ready = b"", 0, True
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while count < len(numbers):
            ready = bool(select.select([pipe], [], [], _HANG)[0])
            new = pipe.read(2**16) if ready else b""
            if not new:
                break
            *lines, received = (received + new).split(b"\n")
            for line in lines:
                count += 1
                yield Found(**json.loads(line))
    if count < len(numbers):
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if count < len(numbers):
        made = mutants(numbers[count])
        how = f"ends the process with {_ending(status)}" if ready else f"hangs for {_HANG:.0f} s"
        yield Found(numbers[count], made.base.name, made.what, "broken", how, size=len(made.content))


def _ending(status: int) -> str:
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"status {os.WEXITSTATUS(status)}"


def _child(mutants: Callable[[int], Mutant], numbers: Sequence[int], use: Use, folder: Path, writer: int) -> None:
    # faiss tells of every training set that it finds small.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + FENCE, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    gc.freeze()
    own: dict[str, float] = {}
    for number in numbers:
        made = mutants(number)
        if made.base.name not in own:
            # Twice: at first there is much to import.
            for _ in range(2):
                own[made.base.name] = read(number, unaltered(made.base), folder / "mutant.grood").seconds
        found = read(number, made, folder / "mutant.grood", use, SECONDS + own[made.base.name])
        os.write(writer, json.dumps(asdict(found)).encode() + b"\n")


# --- The report ---------------------------------------------------------------------------------------------------


def unaltered(base: Base) -> Mutant:
    """The base itself."""
    return Mutant(base, "unaltered", base.content, True)


def report(found: Sequence[Found]) -> list[str]:
    """Counts by outcome, kinds of errors, what took most, and all that is broken."""
    lines = [f"{'outcome':<20} {'raw':>8} {'resealed':>10}"]
    counts = Counter((one.outcome, one.what.partition(":")[0]) for one in found)
    for outcome in sorted({outcome for outcome, _ in counts}):
        lines.append(f"{outcome:<20} {counts[outcome, 'raw']:>8,} {counts[outcome, 'resealed']:>10,}")
    messages = Counter(_kind(one) for one in found if one.detail and one.outcome != "broken")
    lines += ["", f"{len(messages)} kinds of errors; the most frequent:"]
    lines += [f"{count:>8,}  {kind}" for kind, count in messages.most_common(25)]
    slowest = max(found, key=lambda one: one.seconds)
    largest = max(found, key=lambda one: one.bytes - 2 * one.size)
    lines += ["", f"slowest: {slowest.seconds:.2f} s of the processor, number {slowest.number} ({slowest.what})"]
    beyond = (largest.bytes - 2 * largest.size) / 2**20
    lines += [f"largest: {beyond:.1f} MiB beyond 2 x file, number {largest.number} ({largest.what})"]
    for one in broken(found):
        lines += ["", f"BROKEN number {one.number} ({one.base}; {one.what})", f"    {one.detail}"]
    return [*lines, "", f"{len(found):,} mutants, {len(broken(found)):,} broken"]


def broken(found: Sequence[Found]) -> list[Found]:
    """Those that no reader may allow."""
    return [one for one in found if one.outcome == "broken"]


def _kind(one: Found) -> str:
    """An error's message without what differs from file to file."""
    message = re.sub(r"\S*mutant\.grood", "FILE", one.detail)
    message = re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", message)
    return f"{one.outcome}: " + re.sub(r"-?\d[\d,.e+-]*", "#", message)[:100]


def main(arguments: Sequence[str] | None = None, use: Use = use) -> int:
    """Run the command; 0 if nothing is broken."""
    parser = argparse.ArgumentParser(description="Read mutated detector files.")
    parser.add_argument("--mutants", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, help="a folder of more files to start from")
    parser.add_argument("--only", type=int, help="one mutant by its number, and its file is kept")
    parser.add_argument("--keep", type=Path, help="folder for the mutants that break something")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    bases = corpus(given.corpus)
    start = time.monotonic()
    with as_with_bfloat16():
        own = list(run(lambda number: unaltered(bases[number]), range(len(bases)), use))
        if broken(own):
            print("\n".join(report(own)))
            return 2
        beyond = max(one.bytes - 2 * one.size for one in own)
        print(
            f"{len(bases)} files; read unaltered, they take up to {max(one.seconds for one in own):.2f} s and "
            f"{beyond / 2**20:.1f} MiB beyond twice their size"
        )

        def made(number: int) -> Mutant:
            return mutant(bases, given.seed, number)

        numbers = range(given.mutants) if given.only is None else [given.only]
        found = list(run(made, numbers, use))
    print("\n".join(report(found)))
    print(f"{time.monotonic() - start:.0f} s; seed {given.seed}")
    bad = [given.only] if given.only is not None else [one.number for one in broken(found)]
    if bad:
        folder = given.keep or Path(tempfile.mkdtemp(prefix="fuzz-format-"))
        folder.mkdir(parents=True, exist_ok=True)
        for number in bad:
            (folder / f"{given.seed}-{number}.grood").write_bytes(made(number).content)
        print(f"kept in {folder}")
    return bool(broken(found))


if __name__ == "__main__":
    sys.exit(main())
