"""Threads that score at once give the serial bits; processes share a file's memory, and none disturbs another."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from format_file import alter, place_of
from large_files import KINDS, QUERIES, detector_of, gaussians, load_late, save_with_filter
from models import batches, patterns, taught_cnn
from torch_grood import GROOD, AlteredFileError, ExactIndex, FaissIndex, Mixup

N_THREADS = 8


@pytest.fixture(autouse=True)
def restless() -> Iterator[None]:
    """Let threads take turns as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """What `work(0)` … `work(7)` give or raise, each in a thread of its own, all started together."""
    found: list[Any] = [None] * N_THREADS
    start = threading.Barrier(N_THREADS)

    def run(number: int) -> None:
        start.wait()
        try:
            found[number] = work(number)
        except Exception as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(N_THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def assert_equal(found: Any, expected: Any) -> None:
    """Tensors, and what is made of them, bit for bit."""
    if isinstance(found, Exception):
        raise found
    if isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def in_turn(uses: Sequence[Callable[[], Any]], turn: int) -> list[Any]:
    """What all of them give, beginning with another one for each turn."""
    found: list[Any] = [None] * len(uses)
    for step in range(len(uses)):
        place = (turn + step) % len(uses)
        found[place] = uses[place]()
    return found


def said_of_features(detector: GROOD, turn: int) -> list[Any]:
    """All that a detector says of features, other ones for each turn and some of them shared."""
    queries = torch.cat([QUERIES[turn : turn + 12], QUERIES[-6:]])
    uses: list[Callable[[], Any]] = [
        lambda: detector.log_score_features(queries),
        lambda: detector.predict_features(queries),
        lambda: detector.explain_features(queries, 3),
        lambda: detector.sample_names(list(range(turn, detector.fit_info_.n_read, 301))),
    ]
    return in_turn(uses, turn)


# --- Threads ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_threads_give_the_serial_bits(kind: str, tmp_path: Path) -> None:
    """On what was fitted, and on what was loaded and has checked nothing yet: then they race for the first look."""
    fitted, path = detector_of(kind), tmp_path / "x"
    save_with_filter(fitted, path)
    expected = [said_of_features(fitted, turn) for turn in range(N_THREADS)]
    for load in (lambda: fitted, lambda: GROOD.load(path), *[lambda: load_late(path)] * 4):
        assert_equal(at_once(partial(said_of_features, load())), expected)


@pytest.mark.parametrize("index", ["exact", "brute force", "HNSW16", "IVF8,PQ4x4", "PCA4,SQ8"])
def test_every_kind_of_index_can_be_searched_at_once(index: str) -> None:
    chosen: Any = {"exact": "exact", "brute force": ExactIndex(prune=False)}.get(index, FaissIndex(index))
    features, labels = gaussians(3000, 1, d=12)
    detector = GROOD(None, index=chosen).fit_features(features, labels)
    queries = [gaussians(300, turn, d=12)[0] for turn in range(N_THREADS)]
    expected = [detector.log_score_features(each) for each in queries]
    for _ in range(3):
        assert_equal(at_once(lambda turn: detector.log_score_features(queries[turn])), expected)


def test_the_filter_that_many_gradients_get_can_be_searched_at_once() -> None:
    features, labels = gaussians(24_000, 1)
    detector = GROOD(None).fit_features(features, labels)
    assert detector._need_state().searcher.widths  # type: ignore[attr-defined]
    queries = [gaussians(60, turn)[0] for turn in range(N_THREADS)]
    expected = [detector.log_score_features(each) for each in queries]
    for _ in range(3):
        assert_equal(at_once(lambda turn: detector.log_score_features(queries[turn])), expected)


def said_of_images(detector: GROOD, turn: int) -> list[Any]:
    images = patterns(27 + turn, seed=turn)[0]
    loader = batches(images, torch.zeros(len(images), dtype=torch.int64), 9)
    uses: list[Callable[[], Any]] = [
        lambda: detector.log_score(loader, progress=False),
        lambda: detector.predict(loader, progress=False),
        lambda: detector.explain(loader, 3, progress=False),
        lambda: detector.extract(loader, progress=False)[:2],
    ]
    return in_turn(uses, turn)


@pytest.mark.parametrize("index", ["exact", "IVF4,Flat"])
@pytest.mark.parametrize("bound", ["fitted", "loaded"])
def test_threads_on_images_give_the_serial_bits(index: str, bound: str, tmp_path: Path) -> None:
    model = taught_cnn(width=16)
    model.train()
    fitted = GROOD(model, outliers=Mixup(n=20), index=index).fit(batches(*patterns(90), 30), progress=False)
    fitted.calibrate([patterns(40, seed=5)[0]], fpr=0.1, progress=False).save(tmp_path / "x")
    expected = [said_of_images(fitted, turn) for turn in range(N_THREADS)]
    for _ in range(3):
        # What was loaded looks for nothing before its first batch.
        detector = fitted if bound == "fitted" else load_late(tmp_path / "x", model=model)
        assert_equal(at_once(partial(said_of_images, detector)), expected)
    assert model.training


def _explained_by_all(detector: GROOD, _: int) -> Any:
    return detector.explain_features(QUERIES, detector.fit_info_.n_indexed)


@pytest.mark.parametrize("kind", ["exact", "filter", "int8"])
def test_no_thread_gets_past_an_altered_block(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_with_filter(detector_of(kind), path)
    alter(path, place_of(path, "direction")[-1])
    for _ in range(5):
        detector = load_late(path)
        found = at_once(partial(_explained_by_all, detector))
        assert [type(one) for one in found] == [AlteredFileError] * N_THREADS


USES: dict[str, Callable[[GROOD], Any]] = {
    "predict": lambda detector: detector.predict_features(QUERIES),
    "predict at a rate": lambda detector: detector.predict_features(QUERIES, fpr=0.3),
    "predict many": lambda detector: detector.predict_features(QUERIES, fdr=0.3),
    "predict with a tau": lambda detector: detector.predict_features(QUERIES, tau=1e-3),
    "explain": lambda detector: detector.explain_features(QUERIES, 3),
    "score": lambda detector: detector.log_score_features(QUERIES),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("other", ["fit", "calibrate", "remove"])
def test_what_is_learned_in_the_middle_of_scoring_is_for_the_next(
    use: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread may put something else in its place at any moment: here it does, while neighbours are searched."""
    detector = detector_of("exact", 200)
    expected = USES[use](detector)
    searcher = detector._need_state().searcher
    search = searcher.search
    others: dict[str, Callable[[], object]] = {
        "fit": lambda: detector.fit_features(*gaussians(12, 3)),
        "calibrate": lambda: detector.calibrate_features(gaussians(70, 6)[0] + 1, fpr=0.5),
        "remove": lambda: detector.remove(range(0, 200, 2)),
    }

    def search_and_be_interrupted(*arguments: Any) -> Any:
        found = search(*arguments)
        monkeypatch.undo()
        others[other]()
        return found

    monkeypatch.setattr(searcher, "search", search_and_be_interrupted)
    assert_equal(USES[use](detector), expected)
    assert detector._need_state().searcher is not searcher or other == "calibrate"


# --- Processes ----------------------------------------------------------------------------------------------------

READER = """
import sys
import torch
torch.set_num_threads(1)
from large_files import QUERIES, load_late
from torch_grood import GROOD
path, how = sys.argv[1:]
detector = load_late(path) if how == "late" else GROOD.load(path)
queries = QUERIES if detector.fit_info_.n_features == 48 else torch.ones(3, detector.fit_info_.n_features)
if how == "early":
    detector.score_features(queries)
print("ready", flush=True)
for line in sys.stdin:
    print(" ".join(number.hex() for number in detector.log_score_features(queries).tolist()), flush=True)
"""


class Reader:
    """A process that has loaded a file."""

    def __init__(self, path: Path, how: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER, str(path), how],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parent,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def scores(self) -> list[float]:
        """Of the `QUERIES`, now."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return [float.fromhex(number) for number in self.line().split()]

    def mapped(self, path: Path) -> dict[str, int]:
        """Bytes of a file that the process has mapped: "Rss" in its memory, "Pss" shared out among all that have."""
        found: dict[str, int] = {}
        inside = False
        for line in Path(f"/proc/{self.process.pid}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                inside = line.endswith(str(path))
            elif inside and line.endswith(" kB"):
                name, count = line.split()[:2]
                found[name.strip(":")] = found.get(name.strip(":"), 0) + 1024 * int(count)
        return found


@contextmanager
def readers(path: Path, how: Sequence[str]) -> Iterator[list[Reader]]:
    """Processes that have loaded a file; all begin together."""
    made = [Reader(path, one) for one in how]
    try:
        for reader in made:
            assert reader.line() == "ready"
        yield made
    finally:
        for reader in made:
            reader.process.communicate(timeout=120)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system does not tell what memory is shared")
def test_two_processes_share_the_memory_of_a_file(tmp_path: Path) -> None:
    path, features = tmp_path / "x", torch.randn(4000, 256, generator=torch.Generator().manual_seed(1))
    GROOD(None).fit_features(features, torch.arange(4000) % 4).save(path)
    size = path.stat().st_size
    assert size > 4_000_000
    with readers(path, ["early", "early"]) as (first, second):
        # Both score: what is used then is in the memory of both.
        scores = [first.scores(), second.scores()]
        assert scores[0] == scores[1]
        for found in (first.mapped(path), second.mapped(path)):
            assert found["Rss"] > 0.9 * size
            assert found["Pss"] < 0.6 * found["Rss"]
            assert found["Private_Dirty"] < 0.05 * size


@pytest.mark.parametrize("kind", ["exact", "filter"])
def test_who_has_a_file_open_keeps_it_when_it_is_replaced(kind: str, tmp_path: Path) -> None:
    path, old = tmp_path / "x", detector_of(kind)
    save_with_filter(old, path)
    expected = old.log_score_features(QUERIES).tolist()
    with readers(path, ["late"]) as (reader,):
        here = load_late(path)
        detector_of("float16", 300).save(path)
        # Neither has looked at a gradient so far.
        assert reader.scores() == expected
        assert here.log_score_features(QUERIES).tolist() == expected
    assert [one.name for one in tmp_path.iterdir()] == ["x"]
    assert GROOD.load(path).log_score_features(QUERIES).tolist() != expected


def test_who_loads_while_another_saves_gets_one_or_the_other(tmp_path: Path) -> None:
    path = tmp_path / "x"
    detectors = [detector_of("exact", n) for n in (200, 300)]
    expected = [detector.log_score_features(QUERIES) for detector in detectors]
    detectors[0].save(path)
    done = threading.Event()

    def save() -> None:
        for i in range(40):
            detectors[i % 2].save(path)
        done.set()

    writer = threading.Thread(target=save)
    writer.start()
    counts = [0, 0]
    while not done.is_set():
        found = load_late(path).log_score_features(QUERIES)
        counts[[torch.equal(found, one) for one in expected].index(True)] += 1
    writer.join()
    assert all(counts)
