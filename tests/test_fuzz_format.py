"""A short run of the fuzzer, and that it sees what it looks for."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="the fuzzer forks")

HERE = Path(__file__).parent

# Each defect as a way to use a file, and what it is to be told of.
DEFECTS = """
import json, os, signal, time
import torch
import fuzz_format as fuzzer
from fuzz_corpus import corpus
from fuzz_mutations import Mutant
from torch_grood import GROOD, GroodError, container

fuzzer._HANG, fuzzer.SECONDS = 2.0, 0.2
bases = corpus()[:2]
last = len(bases[0].content) - 1
raw = Mutant(bases[0], "raw: none", bases[0].content, False, bases)
sealed = raw._replace(sealed=True)

def crash(path, mutant):
    os.kill(os.getpid(), signal.SIGSEGV)

def leave(path, mutant):
    os._exit(3)

def hang(path, mutant):
    time.sleep(1000)

def dawdle(path, mutant):
    start = time.process_time()
    while time.process_time() - start < 0.5:
        pass
    return "works"

def eat(path, mutant):
    kept = bytearray(b"x") * 80_000_000
    return "works"

def ask(path, mutant):
    raise GroodError("faiss: std::bad_alloc")

def key(path, mutant):
    raise KeyError("x")

def stop(path, mutant):
    raise KeyboardInterrupt

def foreign(path, mutant):
    raise GroodError("not of the format")

def nan(path, mutant):
    GROOD.score_features = lambda detector, queries: torch.full((len(queries),), torch.nan)
    return fuzzer.use(path, mutant)

def other(path, mutant):
    read = container.read
    def altered(*arguments, **named):
        found = read(*arguments, **named)
        found.tensors["class_prototypes"] = found.tensors["class_prototypes"] + 1e-9
        return found
    container.read = altered
    return fuzzer.use(path, mutant)

def fine(path, mutant):
    return fuzzer.use(path, mutant)

for use, made in [(crash, raw), (leave, raw), (hang, raw), (dawdle, raw), (eat, raw), (ask, sealed), (key, raw),
                  (stop, raw), (foreign, raw), (foreign, sealed), (nan, sealed), (other, raw), (fine, raw),
                  (fine, sealed)]:
    # Three, so that it goes on after a death.
    found = list(fuzzer.run(lambda number: made, range(3 if use is crash else 1), use))
    print(json.dumps([use.__name__, made.sealed, [one.outcome for one in found], found[-1].detail]))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=HERE, timeout=280, check=False
    )


def test_some_hundred_mutants() -> None:
    found = python("fuzz_format.py", "--mutants", "300", "--seed", "0")
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    assert "300 mutants, 0 broken" in found.stdout


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["1", "2"])
def test_thousands_of_mutants(seed: str) -> None:
    found = python("fuzz_format.py", "--mutants", "3000", "--seed", seed)
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]


def test_the_fuzzer_sees_every_defect() -> None:
    found = python("-c", DEFECTS)
    assert found.returncode == 0, found.stderr[-3000:]
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    seen = {(name, sealed): (outcomes, detail) for name, sealed, outcomes, detail in lines}
    expected = {
        ("crash", False): (["broken"] * 3, "ends the process with SIGSEGV"),
        ("leave", False): (["broken"], "ends the process with status 3"),
        ("hang", False): (["broken"], "hangs for 2 s"),
        ("ask", True): (["broken"], "asked for more memory than there is: faiss: std::bad_alloc"),
        ("foreign", False): (["broken"], "not of the format"),
        ("foreign", True): (["GroodError"], "not of the format"),
        ("nan", True): (["broken"], "a score is none"),
        ("other", False): (["broken"], "it loads with another class_prototypes"),
        ("fine", False): (["equal"], ""),
        ("fine", True): (["works"], ""),
    }
    assert {key: seen[key] for key in expected} == expected
    for name, start in [
        ("dawdle", "took 0.5"),
        ("eat", "took 7"),
        ("key", "KeyError: 'x'"),
        ("stop", "KeyboardInterrupt"),
    ]:
        outcomes, detail = seen[name, False]
        assert outcomes == ["broken"]
        assert detail.startswith(start)


def test_a_mutant_has_its_number(tmp_path: Path) -> None:
    """Whatever came before it, and in whatever process it is made."""
    code = (
        "import hashlib; from fuzz_corpus import corpus; from fuzz_mutations import mutant\n"
        "bases, numbers = corpus(), [*range(60), *range(59, -1, -1)]\n"
        "digests = [hashlib.sha256(mutant(bases, 7, number).content).hexdigest() for number in numbers]\n"
        "assert digests[:60] == digests[:59:-1]\n"
        "print(*digests[:60])"
    )
    made = python("-c", code)
    assert made.returncode == 0, made.stderr[-3000:]
    digests = made.stdout.split()
    assert len(set(digests)) > 55
    kept = python("fuzz_format.py", "--seed", "7", "--only", "5", "--keep", str(tmp_path))
    assert "1 mutants" in kept.stdout
    assert hashlib.sha256((tmp_path / "7-5.grood").read_bytes()).hexdigest() == digests[5]
