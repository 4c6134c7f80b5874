"""What nearest-gradient search costs, and what approximate search gets wrong: one table for each set of gradients.

    python benchmarks/search.py cifar10 --model networks.py:resnet20 --weights resnet20_cifar10.pt \
        --mean .485,.456,.406 --std .229,.224,.225 --data OPENOOD_FOLDER --output DIR
    python benchmarks/search.py cifar10 --detector resnet20.grood --id cifar10.pt --ood cifar100.pt --output DIR
    python benchmarks/search.py imagenet --store float16 --output DIR      # synthetic features: see synthetic.py
    python benchmarks/search.py growth --output DIR                        # time against the number of gradients
    python benchmarks/search.py plot DIR --output docs/images/search.png
    python benchmarks/search.py tables DIR

Every row is written to DIR/<name>.json as soon as it is measured, and is not measured again by a run with the same
settings. How to read a row:

- build: seconds, without measuring the quality; bytes an image: of the gradients and of the index.
- queries a second, of gradients that are there already, one at a time and 256 at a time, each for ID and OOD queries:
  the median over different queries after one warm-up. In brackets: the ratio to the reference (faiss Flat on CIFAR-10,
  brute force in torch on the ImageNet-like set), which is measured anew right before each row.
- recall: share of the ID and OOD queries whose true nearest gradient was found; inflation: mean of the score over the
  true one; AUROC of OOD against ID by the score, and Δ, its difference to exact search on the same queries, in points.
- peak: of the process's memory so far, so that it never falls from row to row.

- c in the name of a row: candidates that faiss proposes for a query, and that are re-scored exactly.

Exact search is itself checked, against brute force in float64: a wrong neighbour ends the run. Under the table stands
the share of rows that its bounds let through, computed here from their definition.
"""

from __future__ import annotations

import argparse
import functools
import gc
import hashlib
import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import torch
from _search_plot import figure, header, markdown, text_notes, text_row
from synthetic import N_CLASSES, N_FEATURES, SyntheticImageNet
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from torch_grood import GROOD
from torch_grood._files import replacing
from torch_grood.data import ImageTransform, image_loader, read_source
from torch_grood.errors import GroodError
from torch_grood.evaluation.metrics import detection_metrics
from torch_grood.gradients import GradientField, PolarGradients
from torch_grood.models import load_model
from torch_grood.neighbors import ExactIndex, FaissIndex, GradientStore, Neighbors, StoreOptions, log_distance
from torch_grood.neighbors.store import StoreWriter, scratch_tensor
from torch_grood.prototypes import ClassPrototypes
from torch_grood.state import FittedState
from torch_grood.storage import load as load_detector

BATCHES = {1: 40, 256: 8}
VERIFIED = 512
Search = Callable[[PolarGradients], Neighbors]


def main() -> None:
    """Run one of the commands of the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cifar10 = commands.add_parser("cifar10", help="the gradients of a CIFAR-10 classifier; near-OOD is CIFAR-100")
    for name in ("--model", "--mean", "--std"):
        cifar10.add_argument(name)
    for name in ("--weights", "--data", "--detector", "--id", "--ood"):
        cifar10.add_argument(name, type=Path)
    cifar10.add_argument("--cache", type=Path, default=Path("~/.cache/torch-grood/search").expanduser())
    imagenet = commands.add_parser("imagenet", help="gradients of features like ImageNet-1k's, from a generator")
    imagenet.add_argument("--n", type=int, default=1_281_167, help="training images")
    growth = commands.add_parser("growth", help="time against the number of gradients, on the first of the same")
    growth.add_argument("--n", type=int, help="training images that the gradients come from; else as --sizes needs")
    growth.add_argument("--sizes", default="10000,30000,100000,300000,1000000")
    for command in (imagenet, growth):
        command.add_argument("--hard", action="store_true", help="features without a manifold; see synthetic.py")
        command.add_argument("--store", choices=("float32", "float16", "int8"))
        command.add_argument("--cache", type=Path, help="folder to keep the gradients in, up to 10 GiB")
        command.add_argument("--memory", type=float, default=20.0, help="GiB that the process may allocate")
    imagenet.set_defaults(store="float32")
    growth.set_defaults(store="float16")
    for command in (cifar10, imagenet, growth):
        command.add_argument("--output", type=Path, required=True)
        command.add_argument("--limit", type=float, default=20.0, help="seconds for one measurement, after two runs")
        command.add_argument("--again", nargs="?", const="", help="measure all rows again, or those that contain this")
    for name in ("plot", "tables"):
        command = commands.add_parser(name)
        command.add_argument("folder", type=Path)
        if name == "plot":
            command.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        with torch.no_grad():
            COMMANDS[arguments.command](arguments)
    except GroodError as error:
        raise SystemExit(f"error: {error}") from None


@dataclass(frozen=True)
class Problem:
    """Gradients to search, and queries.

    Attributes:
        name: of the JSON file.
        title: for people.
        store: N gradients.
        queries: of "ID" and of "OOD" samples, directions in float32.
        settings: what figures depend on; rows measured under others are not in the same table.
        facts: about the data.
    """

    name: str
    title: str
    store: GradientStore
    queries: dict[str, PolarGradients]
    settings: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def unit(self) -> float:
        """Log of the largest stored norm."""
        return float(self.store.log_norm().max())


@dataclass(frozen=True)
class Method:
    """A way to search, built.

    Attributes:
        name: of the row.
        search: the nearest row of each query, and the log of the score that the method gives.
        nbytes: of its gradients and its index.
        build_seconds: how long it took.
        checked: queries of each kind that its quality is measured on; None: all. The AUROC of a part is not shown
            beside that of all.
        divisor: of its rate, for a method that searches 1 / divisor of the rows.
        extra: further figures for the row.
    """

    name: str
    search: Search
    nbytes: int
    build_seconds: float = 0.0
    checked: int | None = None
    divisor: int = 1
    extra: dict[str, Any] = field(default_factory=dict)


class Group(NamedTuple):
    """Rows that share what is built for them; `methods` builds it."""

    names: tuple[str, ...]
    methods: Callable[[], Iterator[Method]]


def single(name: str, build: Callable[[], Method]) -> Group:
    """A group of one row."""
    return Group((name,), lambda: iter([build()]))


class Results:
    """The rows of a JSON file, which is written after each.

    Args:
        path: of the file.
        problem: what they are measured on.
        again: rows to measure again although they are there: those whose name contains it; None: none.
        order: of the rows, by name; others come last.
    """

    def __init__(self, path: Path, problem: Problem, again: str | None, order: Sequence[str] = ()) -> None:
        self._path, self._again, self._order, self._fresh = path, again, list(order), set[str]()
        self.data: dict[str, Any] = {
            "name": problem.name, "title": problem.title, "settings": problem.settings, "facts": problem.facts,
            "rows": [],
        }  # fmt: skip
        if again == "" or not path.exists():
            return
        stored = json.loads(path.read_text())
        if stored["settings"] != problem.settings:
            raise GroodError(
                f"{path} was measured with {_difference(stored['settings'], problem.settings)}, this run has "
                f"{_difference(problem.settings, stored['settings'])}; choose another --output, or start it afresh "
                "with --again"
            )
        # What was true of the process that built the gradients may not be of this one.
        self.data |= {"rows": stored["rows"], "facts": {**problem.facts, **stored["facts"]}}

    def done(self, name: str) -> bool:
        """Whether the row needs no measuring."""
        if name in self._fresh:
            return True
        return (self._again is None or self._again not in name) and any(r["method"] == name for r in self.data["rows"])

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, or put it in the place of the one of its name, and write the file."""
        self._fresh.add(row["method"])
        rows = self.data["rows"]
        place = next((i for i, other in enumerate(rows) if other["method"] == row["method"]), len(rows))
        rows[place : place + 1] = [row]
        rows.sort(
            key=lambda row: self._order.index(row["method"]) if row["method"] in self._order else len(self._order)
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self._path) as temporary:
            temporary.write_text(json.dumps(self.data, indent=1, ensure_ascii=False) + "\n")


def _difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in one.items() if other.get(key) != value) or "nothing more"


# The data sets.


def run_cifar10(arguments: argparse.Namespace) -> None:
    """All methods on the gradients of a CIFAR-10 classifier."""
    detector, id_features, ood_features = arguments.detector, arguments.id, arguments.ood
    if detector is None:
        detector, id_features, ood_features = fit_cifar10(arguments)
    elif id_features is None or ood_features is None:
        raise GroodError("--detector needs --id and --ood: files with the features of its queries")
    state = load_detector(detector).state
    store = state.searcher.gradients
    queries = {
        kind: _rounded(state.gradient_field(torch.load(path, weights_only=True)["features"]).gradients)
        for kind, path in (("ID", id_features), ("OOD", ood_features))
    }
    network = detector.stem.partition("-")[0]
    title = f"CIFAR-10, {network}: {len(store):,} gradients of dimension {store.dim:,}; OOD is CIFAR-100"
    problem = Problem(f"cifar10-{network}", title, store, queries, _settings(store, detector=_digest(detector)))
    # The parts of a product quantizer are of equal size: four dimensions or a few more.
    parts = max(m for m in range(1, min(store.dim // 4, 48) + 1) if store.dim % m == 0)
    flat, exact = single("faiss Flat", functools.cache(lambda: faiss_flat(problem))), exact_group(problem)
    groups = [
        single("torch brute force", lambda: torch_brute_force(problem, copy=True)),
        flat,
        faiss_group(problem, "IVF256,Flat", [({"nprobe": n}, 8) for n in (1, 4, 16)]),
        faiss_group(problem, "IVF256,SQ8", [({"nprobe": 8}, 8)]),
        faiss_group(problem, f"IVF256,PQ{parts}", [({"nprobe": 8}, 8)]),
        faiss_group(problem, "HNSW32", [({"efSearch": n}, 8) for n in (16, 64)]),
        exact,
        *(rounded_group(problem, dtype) for dtype in ("float16", "int8")),
        *(subset_group(problem, kind, state) for kind in ("KCenterCoreset", "ClassSample")),
    ]
    run(problem, groups, exact, flat, arguments)


def fit_cifar10(arguments: argparse.Namespace) -> tuple[Path, Path, Path]:
    """The files of a detector and of the test sets' features, made unless they are in the cache."""
    wanted = ("model", "weights", "mean", "std", "data")
    if missing := [f"--{name}" for name in wanted if getattr(arguments, name) is None]:
        raise GroodError(f"without --detector, these are needed too: {', '.join(missing)}")
    settings = f"{arguments.model} {arguments.mean} {arguments.std} {arguments.data.resolve()}"
    key = hashlib.sha256(arguments.weights.read_bytes() + settings.encode()).hexdigest()[:12]
    stem = f"{arguments.model.rpartition(':')[2]}-{key}"
    arguments.cache.mkdir(parents=True, exist_ok=True)
    model = load_model(arguments.model, arguments.weights, num_classes=10).model
    mean, std = (tuple(float(x) for x in text.split(",")) for text in (arguments.mean, arguments.std))
    transform = ImageTransform(resize=32, crop=32, interpolation="bilinear", mean=mean, std=std)  # type: ignore[arg-type]
    lists, images = arguments.data / "benchmark_imglist" / "cifar10", arguments.data / "images_classic"

    def loader(name: str) -> Any:
        return image_loader(read_source(lists / f"{name}.txt", root=images), transform, batch_size=200)

    detector = arguments.cache / f"{stem}.grood"
    if not detector.exists():
        GROOD.paper(model).fit(loader("train_cifar10")).save(detector)
    found = []
    for name in ("test_cifar10", "test_cifar100"):
        found.append(arguments.cache / f"{stem}-{name}.pt")
        if not found[-1].exists():
            features = GROOD.paper(model).extract(loader(name)).features
            with replacing(found[-1]) as temporary:
                torch.save({"features": features}, temporary)
    return detector, found[0], found[1]


def run_imagenet(arguments: argparse.Namespace) -> None:
    """All methods on the ImageNet-like set."""
    _limit_memory(arguments.memory)
    store, gradient_field, facts = synthetic_gradients(arguments, arguments.n)
    print(f"peak memory with the gradients: {facts['peak with the gradients, GiB']:.1f} GiB", flush=True)
    name = f"imagenet-{arguments.store}{'-hard' if arguments.hard else ''}"
    title = f"ImageNet-like, synthetic: {len(store):,} gradients of dimension {store.dim:,} ({arguments.store})"
    settings = _settings(store, images=arguments.n, hard=arguments.hard)
    queries = synthetic_queries(arguments, gradient_field, 2048)
    problem = Problem(name, title, store, queries, settings, facts)
    exact = exact_group(problem)
    brute = single("torch brute force", functools.cache(lambda: torch_brute_force(problem, copy=False)))
    groups = [brute, exact, single("faiss Flat, 1/8 of the rows, rate / 8", lambda: faiss_flat(problem, 8))]
    plans: list[tuple[str, str, Sequence[int]]] = [
        ("PCA64,IVF4096,Flat", "nprobe", (4, 16, 64)),
        ("PCA64,IVF4096,SQ8", "nprobe", (16,)),
        ("PCA128,IVF4096,PQ32", "nprobe", (16,)),
        ("PCA64,HNSW32", "efSearch", (64,)),
    ]
    for factory, parameter, values in plans:
        runs = [({parameter: value}, candidates) for value in values for candidates in (8, 32)]
        groups.append(faiss_group(problem, factory, runs, train_size=131_072))
    run(problem, groups, exact, brute, arguments)


def synthetic_gradients(arguments: argparse.Namespace, n: int) -> tuple[GradientStore, GradientField, dict[str, Any]]:
    """The gradients of those of n training samples whose class prototype is the nearest; read twice, kept once.

    The outliers are mixed as Mixup does it at an early layer, here at the features: 0.9 of each of 1,000 samples, 0.1
    of the second-nearest class prototype.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    path = None
    if arguments.cache is not None:
        arguments.cache.mkdir(parents=True, exist_ok=True)
        path = arguments.cache / f"synthetic-{n}-{arguments.store}{'-hard' if arguments.hard else ''}.safetensors"
    options = StoreOptions(arguments.store)
    print(
        f"up to {options.nbytes(n, N_FEATURES) / 2**30:.1f} GiB for {n:,} gradients of dimension {N_FEATURES:,} in "
        f"{arguments.store}" + ("" if path is None else f", kept in {path}"),
        flush=True,
    )
    if path is not None and path.exists():
        with safe_open(path, framework="pt") as file:
            # In memory: a mapped file's pages come and go with what else the machine does.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            facts = json.loads(file.metadata()["facts"])
        facts["peak with the gradients, GiB"] = peak_memory()
    else:
        tensors, facts = _make_gradients(SyntheticImageNet(hard=arguments.hard), n, options)
        if path is not None:
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata={"facts": json.dumps(facts)})
    log_rounding = math.log(facts["largest rounding"]) if facts["largest rounding"] else -math.inf
    store = GradientStore(tensors["log_magnitude"], tensors["codes"], tensors.get("scale"), log_rounding)
    print(f"training accuracy {100 * facts['training accuracy']:.1f} %, {len(store):,} gradients kept", flush=True)
    return store, GradientField(tensors["class_prototypes"], tensors["ood_prototype"]), facts


def _make_gradients(
    source: SyntheticImageNet, n: int, options: StoreOptions
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    prototypes = ClassPrototypes(N_CLASSES)
    first: list[Tensor] = []
    for features, labels in _parts(source, n, "class prototypes"):
        prototypes.update(features, labels)
        first = first or [features[:1000]]
    means = prototypes.means
    second = torch.cdist(first[0].double(), means).topk(2, largest=False).indices[:, 1]
    ood_prototype = (0.9 * first[0] + 0.1 * means[second]).mean(0)
    gradient_field = GradientField(means, ood_prototype)
    # How many rows will be kept is not known before; pages that are never written take no memory.
    codes = scratch_tensor((n, N_FEATURES), options.torch_dtype, options)
    scale, log_magnitude = torch.empty(n), torch.empty(n, dtype=torch.float64)
    kept, log_rounding = 0, -math.inf
    for features, labels in _parts(source, n, "gradients"):
        geometry = gradient_field(features)
        gradients = geometry.gradients.take(geometry.nearest == labels)
        writer = StoreWriter(len(gradients.log_magnitude), N_FEATURES, options)
        writer.append(gradients)
        part = writer.finish()
        rows = slice(kept, kept + len(part))
        codes[rows], log_magnitude[rows], kept = part.codes, part.log_magnitude, rows.stop
        if part.scale is not None:
            scale[rows] = part.scale
        log_rounding = max(log_rounding, part.log_rounding)
    tensors = {"log_magnitude": log_magnitude[:kept], "codes": codes[:kept]}
    if options.dtype != "float32":
        tensors["scale"] = scale[:kept]
    facts = {
        "synthetic": "yes: benchmarks/synthetic.py",
        "training accuracy": kept / n,
        "largest rounding": math.exp(log_rounding),
        "peak with the gradients, GiB": peak_memory(),
    }
    return {**tensors, "class_prototypes": means, "ood_prototype": ood_prototype}, facts


def _parts(source: SyntheticImageNet, n: int, description: str) -> Iterator[tuple[Tensor, Tensor]]:
    chunk = 8192
    parts = source.training_set(n, chunk=chunk)
    found: Iterator[tuple[Tensor, Tensor]] = iter(tqdm(parts, description, -(-n // chunk), disable=None, unit="part"))
    return found


def synthetic_queries(
    arguments: argparse.Namespace, gradient_field: GradientField, n: int
) -> dict[str, PolarGradients]:
    """The gradients of n samples of seen classes and n of unseen ones."""
    sets = SyntheticImageNet(hard=arguments.hard).queries(n)
    return {k: _rounded(gradient_field(features).gradients) for k, features in zip(("ID", "OOD"), sets, strict=True)}


def _rounded(gradients: PolarGradients) -> PolarGradients:
    return gradients._replace(direction=gradients.direction.float())


def _settings(store: GradientStore, **others: Any) -> dict[str, Any]:
    return {
        "gradients": len(store), "dimension": store.dim, "store": store.dtype, **others,
        "torch": torch.__version__, "torch threads": torch.get_num_threads(),
        "faiss": faiss.__version__, "faiss threads": faiss.omp_get_max_threads(),
    }  # fmt: skip


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _limit_memory(gib: float) -> None:
    """An allocation beyond fails, and its row is left out, instead of the machine's running out of memory."""
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30), hard))


def peak_memory() -> float:
    """The most memory that the process ever had, GiB."""
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# The methods.


def torch_brute_force(problem: Problem, *, copy: bool) -> Method:
    """‖q‖² + ‖g‖² - 2⟨q, g⟩ in float32 by matrix products, a running minimum, and nothing else.

    With `copy`, of the gradients themselves; without, of their directions, and each product is multiplied by the norm:
    a pass over the products, but no second copy of the gradients.
    """
    store, unit = problem.store, problem.unit
    norm = (store.log_norm() - unit).exp().float()
    square = norm.square()
    started = time.perf_counter()
    vectors = store.take(slice(None)).vectors(unit) if copy else None
    built = time.perf_counter() - started

    def search(queries: PolarGradients) -> Neighbors:
        columns = queries.vectors(unit)
        least = torch.full((len(columns),), torch.inf)
        nearest = torch.zeros(len(columns), dtype=torch.int64)
        # Codes are made float32 in parts that the allocator can use again.
        step = min(2**20 // len(columns), (2**26 if store.dtype == "float32" else 2**22) // store.dim)
        for start in range(0, len(store), step):
            rows = slice(start, start + step)
            if vectors is not None:
                values = torch.addmm(square[rows], columns, vectors[rows].T, alpha=-2)
            else:
                products = torch.mm(columns, store.directions(rows).T)
                values = torch.addcmul(square[rows], products, norm[rows], value=-2)
            smallest, place = values.min(1)
            better = smallest < least
            least = torch.where(better, smallest, least)
            nearest = torch.where(better, place + start, nearest)
        distance2 = least + columns.square().sum(1)
        return Neighbors((unit + 0.5 * distance2.clamp(min=0).double().log())[:, None], nearest[:, None])

    nbytes = square.nbytes + (vectors.nbytes if vectors is not None else store.nbytes + norm.nbytes)
    return Method("torch brute force", search, nbytes, built, None if copy else VERIFIED)


def faiss_flat(problem: Problem, divisor: int = 1) -> Method:
    """faiss's IndexFlatL2 as it is, over 1 / divisor of the rows."""
    store, unit = problem.store, problem.unit
    started = time.perf_counter()
    index = faiss.IndexFlatL2(store.dim)
    n = len(store) // divisor
    for rows in store.chunks():
        index.add(store.take(slice(rows.start, min(rows.stop, n))).vectors(unit).numpy())
        if rows.stop >= n:
            break

    def search(queries: PolarGradients) -> Neighbors:
        distance2, row = index.search(queries.vectors(unit).numpy(), 1)
        log_score = unit + 0.5 * torch.from_numpy(distance2).double().clamp(min=0).log()
        return Neighbors(log_score, torch.from_numpy(row))

    nbytes, built = 4 * store.dim * len(store), time.perf_counter() - started
    if divisor == 1:
        return Method("faiss Flat", search, nbytes, built)
    # What it finds among a part of the rows says nothing of the whole.
    return Method(f"faiss Flat, 1/{divisor} of the rows, rate / {divisor}", search, nbytes, built, 0, divisor)


def exact_group(problem: Problem) -> Group:
    """Exact search over the gradients as they are stored, checked, and built once: all others are compared to it."""
    name = f"ExactIndex, {problem.store.dtype}"

    @functools.cache
    def build() -> Method:
        method = exact_search(name, problem.store)
        verify(problem, method.search)
        return method

    return single(name, build)


def exact_search(name: str, store: GradientStore) -> Method:
    """Exact search over a store."""
    started = time.perf_counter()
    searcher = ExactIndex().build(store)
    built = time.perf_counter() - started
    extra = {"widths": list(searcher.widths), "peak when built": peak_memory()}
    return Method(name, searcher.search, store.nbytes + searcher.nbytes, built, extra=extra)


def rounded_group(problem: Problem, dtype: str) -> Group:
    """Exact search over the gradients in another dtype."""
    name = f"ExactIndex, {dtype}"

    def build() -> Method:
        writer = StoreWriter(len(problem.store), problem.store.dim, StoreOptions(dtype))
        for rows in problem.store.chunks():
            writer.append(problem.store.take(rows))
        return exact_search(name, writer.finish())

    return single(name, build)


def faiss_group(
    problem: Problem, factory: str, runs: Sequence[tuple[Mapping[str, float], int]], train_size: int | None = None
) -> Group:
    """One faiss index with several (search parameters, candidates)."""
    names = tuple(
        f"{factory}, " + " ".join(f"{key} {value}" for key, value in parameters.items()) + f", c {candidates}"
        for parameters, candidates in runs
    )

    def methods() -> Iterator[Method]:
        started = time.perf_counter()
        # No GPU: it has a copy of the index, whose parameters are not changed below.
        index = FaissIndex(factory, train_size=train_size, quality_queries=0, gpu=False)
        searcher: Any = index.build(problem.store)
        built = time.perf_counter() - started
        # A searcher offers no other parameters once it is built, and to build anew for each row would take too long:
        # hence its own parts are changed.
        nbytes = problem.store.nbytes + _faiss_bytes(searcher._index)
        for name, (parameters, candidates) in zip(names, runs, strict=True):
            for key, value in parameters.items():
                faiss.ParameterSpace().set_index_parameter(searcher._index, key, value)
            searcher._candidates = candidates
            yield Method(name, searcher.search, nbytes, built)

    return Group(names, methods)


def _faiss_bytes(index: Any) -> int:
    """The size that faiss.serialize_index gives, without holding it in memory."""
    sizes: list[int] = []
    writer = faiss.PyCallbackIOWriter(lambda data: sizes.append(len(data)))  # type: ignore[attr-defined]
    faiss.write_index(index, writer)
    # What is left in its buffer is written when it goes.
    del writer
    return sum(sizes)


def subset_group(problem: Problem, kind: str, state: FittedState) -> Group:
    """Exact search over a tenth of the gradients; the choice is part of the build."""
    name = f"ExactIndex, {kind} 10 %"

    def build() -> Method:
        from torch_grood.neighbors.subset import make_subset

        store = problem.store
        started = time.perf_counter()
        subset = make_subset({"name": kind, "ratio": 0.1})
        assert subset is not None
        if coverage := subset.cover(store):
            rows, extra = coverage.rows, {"covering radius": math.exp(coverage.log_radius)}
        else:
            # A detector's file has no labels, but the gradients of a class point to its prototype.
            directions = functional.normalize(state.class_prototypes - state.ood_prototype).float()
            labels = torch.cat([(store.directions(part) @ directions.T).argmax(1) for part in store.chunks()])
            keys = torch.randint(2**62, (len(store),), generator=torch.Generator().manual_seed(0))
            chosen = subset.sample(labels, keys)
            assert chosen is not None
            rows, extra = chosen, {}
        method = exact_search(name, store.select(rows, StoreOptions(store.dtype)))

        def search(queries: PolarGradients) -> Neighbors:
            found = method.search(queries)
            return Neighbors(found.log_distance, rows[found.row])

        return replace(
            method, search=search, build_seconds=time.perf_counter() - started, extra={**method.extra, **extra}
        )

    return single(name, build)


# The measurements.


def run(
    problem: Problem, groups: Sequence[Group], exact: Group, reference: Group, arguments: argparse.Namespace
) -> None:
    """Measure what is not measured yet, and print it."""
    order = [name for group in groups for name in group.names]
    results = Results(arguments.output / f"{problem.name}.json", problem, arguments.again, order)
    results.data["reference"] = reference.names[0]
    print(f"\n{problem.title}\n{_machine()}\n\n{header(reference.names[0])}", flush=True)
    truth: dict[str, Neighbors] = {}
    for group in groups:
        if not all(map(results.done, group.names)):
            # Only where something is to be measured: exact search, its check, and the reference take a while.
            truth = truth or _truth(next(exact.methods()), problem)
            base = next(reference.methods())
            try:
                for method in group.methods():
                    if not results.done(method.name):
                        row = measure(method, problem, truth, base, arguments.limit)
                        if group is exact:
                            row["passing"] = passing(problem, truth, row["widths"])
                        results.add(row)
            except (GroodError, RuntimeError, MemoryError) as error:
                print(f"left out: {', '.join(group.names)}: {str(error).strip().splitlines()[0]}", flush=True)
            gc.collect()
        for row in results.data["rows"]:
            if row["method"] in group.names:
                print(text_row(row), flush=True)
    print("\n" + text_notes(results.data))


def _truth(exact: Method, problem: Problem) -> dict[str, Neighbors]:
    return {kind: _in_batches(exact.search, queries) for kind, queries in problem.queries.items()}


def measure(
    method: Method, problem: Problem, truth: Mapping[str, Neighbors], reference: Method, limit: float
) -> dict[str, Any]:
    """All figures of one row."""
    # The reference takes the same time for all queries.
    base = {} if method is reference else rates(reference, {"ID": problem.queries["ID"]}, limit / 4)
    found = rates(method, problem.queries, limit)
    base = base or found
    return {
        "method": method.name, "build seconds": method.build_seconds, "bytes": method.nbytes / len(problem.store),
        "rates": found, "ratios": {key: rate / base[f"ID {key.split()[1]}"] for key, rate in found.items()},
        **(quality(method, problem, truth) if method.checked != 0 else {}), **method.extra, "peak": peak_memory(),
    }  # fmt: skip


def rates(method: Method, queries: Mapping[str, PolarGradients], limit: float) -> dict[str, float]:
    """Queries a second, for each kind of query and size of batch."""
    return {
        f"{kind} {size}": size / median_seconds(method.search, gradients, size, limit) / method.divisor
        for kind, gradients in queries.items()
        for size in BATCHES
    }


def median_seconds(search: Search, queries: PolarGradients, size: int, limit: float) -> float:
    """Time of a batch: after one warm-up, over as many different batches as the limit allows, but at least two."""
    n = len(queries.log_magnitude)
    starts = [i * size % max(1, n - size + 1) for i in range(BATCHES[size] + 1)]
    times: list[float] = []
    for i, start in enumerate(starts):
        batch = queries.take(slice(start, start + size))
        started = time.perf_counter()
        search(batch)
        if i > 0:
            times.append(time.perf_counter() - started)
        if len(times) >= 2 and sum(times) > limit:
            break
    return statistics.median(times)


def _in_batches(search: Search, queries: PolarGradients, n: int | None = None) -> Neighbors:
    n = len(queries.log_magnitude) if n is None else n
    found = [search(queries.take(slice(start, min(start + 256, n)))) for start in range(0, n, 256)]
    return Neighbors(*(torch.cat(part).flatten() for part in zip(*found, strict=True)))


def quality(method: Method, problem: Problem, truth: Mapping[str, Neighbors]) -> dict[str, float]:
    """Recall, inflation of the score, and AUROC against exact search on the same queries."""
    hits, inflations = [], []
    scores: dict[str, Tensor] = {}
    true_scores: dict[str, Tensor] = {}
    for kind, queries in problem.queries.items():
        found = _in_batches(method.search, queries, method.checked)
        n = len(found.row)
        scores[kind], true_scores[kind] = found.log_distance, truth[kind].log_distance[:n]
        # By the distance, which ties have in common, to the row as exact search has it.
        distance = log_distance(queries.take(slice(0, n)), problem.store.take(found.row))
        hits.append(distance <= true_scores[kind] + 1e-9)
        difference = scores[kind] - true_scores[kind]
        inflations.append(difference[difference.isfinite()].exp())
    auroc, true_auroc = (detection_metrics(s["ID"], s["OOD"]).auroc for s in (scores, true_scores))
    found_auroc = {"auroc": auroc} if method.checked is None else {}
    return {
        "recall": float(torch.cat(hits).double().mean()), "inflation": float(torch.cat(inflations).mean()),
        **found_auroc, "delta auroc": auroc - true_auroc, "checked": sum(map(len, hits)),
    }  # fmt: skip


def verify(problem: Problem, search: Search) -> None:
    """Compare exact search with brute force in float64; a wrong neighbour ends the run."""
    store, unit = problem.store, problem.unit
    for kind, queries in problem.queries.items():
        part = queries.take(slice(0, VERIFIED))
        found = _in_batches(search, part)
        own = _vectors(part, unit)
        least = torch.full((len(own),), torch.inf, dtype=torch.float64)
        for rows in tqdm(list(store.chunks()), f"check of exact search, {kind}", disable=None, unit="part"):
            others = _vectors(store.take(rows), unit)
            values = torch.addmm(others.square().sum(1), own, others.T, alpha=-2)
            least = torch.minimum(least, values.amin(1))
        square = own.square().sum(1)
        expected, got = least + square, (2 * (found.log_distance - unit)).exp()
        # The expansion cancels, in float64 to about 1e-13 of the squares.
        wrong = ((got - expected).abs() > 2e-6 * expected + 1e-12 * square).nonzero().flatten()
        if len(wrong):
            i = int(wrong[0])
            raise SystemExit(
                f"exact search is wrong for {len(wrong)} of {len(own)} {kind} queries: for query {i}, it names row "
                f"{int(found.row[i])} at distance² {float(got[i]):.9g}, the least is {float(expected[i]):.9g}"
            )


def passing(problem: Problem, truth: Mapping[str, Neighbors], widths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Share of the rows g that a bound lets through: with W the first m principal directions of the stored gradients,

        z = Wᵀg,  ρ = ‖g - Wz‖₂,  ‖z(q) - z(g)‖² + (ρ(q) - ρ(g))² ≤ the squared distance of q's nearest row,

    for each m of `widths`, over some queries of each kind.
    """
    if not widths:
        return {}
    store, unit = problem.store, problem.unit
    n = len(store)
    sample = torch.linspace(0, n - 1, min(n, max(16_384, 4 * store.dim)), dtype=torch.float64).round().long()
    vectors = store.take(sample).vectors(unit)
    axes = torch.linalg.eigh((vectors.T @ vectors).double()).eigenvectors.flip(1)[:, : max(widths)]

    def bounded(gradients: PolarGradients, m: int) -> Tensor:
        own = _vectors(gradients, unit)
        z = own @ axes[:, :m]
        residual = (own.square().sum(1) - z.square().sum(1)).clamp(min=0).sqrt()
        return torch.cat([z, residual[:, None]], dim=1)

    chosen = {kind: queries.take(slice(0, 256)) for kind, queries in problem.queries.items()}
    found: dict[str, dict[str, float]] = {str(m): dict.fromkeys(chosen, 0.0) for m in widths}
    for rows in tqdm(list(store.chunks()), "rows that the bounds let through", disable=None, unit="part"):
        part = store.take(rows)
        for m in widths:
            others = bounded(part, m)
            for kind, queries in chosen.items():
                distance = (truth[kind].log_distance[: len(queries.log_magnitude), None] - unit).exp()
                share = (torch.cdist(bounded(queries, m), others) <= distance).double().mean(0).sum() / n
                found[str(m)][kind] += float(share)
    return found


def _vectors(gradients: PolarGradients, unit: float) -> Tensor:
    return gradients._replace(direction=gradients.direction.double()).vectors(unit)


# Growth with N.


def run_growth(arguments: argparse.Namespace) -> None:
    """Time of three ways to search among the first N of the ImageNet-like set's gradients."""
    _limit_memory(arguments.memory)
    sizes = sorted(int(size) for size in arguments.sizes.split(","))
    # About an eighth of the samples is nearer to another class's prototype, and is not stored.
    images = arguments.n or int(1.2 * sizes[-1])
    store, gradient_field, facts = synthetic_gradients(arguments, images)
    if len(store) < sizes[-1]:
        raise GroodError(f"{images:,} images gave {len(store):,} gradients; give smaller --sizes")
    settings = _settings(store, images=images, hard=arguments.hard)
    name = f"growth{'-hard' if arguments.hard else ''}"
    title = f"Growth with N, ImageNet-like (synthetic), dimension {store.dim:,}, {arguments.store}"
    whole = Problem(name, title, store, synthetic_queries(arguments, gradient_field, 2048), settings, facts)
    results = Results(arguments.output / f"{name}.json", whole, arguments.again)
    print(f"\n{title}\n{_machine()}\n", flush=True)
    for size in sizes:
        scale = None if store.scale is None else store.scale[:size]
        part = replace(whole, store=GradientStore(store.log_magnitude[:size], store.codes[:size], scale))
        for label, group in _growing(part).items():
            row_name = f"{label}, N = {size:,}"
            if results.done(row_name):
                continue
            method = next(group.methods())
            # Brute force takes the same time for all queries.
            queries = part.queries if label != "torch brute force" else {"ID": part.queries["ID"]}
            found = rates(method, queries, arguments.limit)
            row = {
                "method": row_name, "label": label, "n": size, "build seconds": method.build_seconds,
                "seconds": {key: 1 / rate for key, rate in found.items()}, **method.extra, "peak": peak_memory(),
            }  # fmt: skip
            if "IVF" in label:
                row |= quality(method, part, _truth(exact_search("", part.store), part))
            results.add(row)
            print(f"{row_name}: " + ", ".join(f"{key}: {1e3 / rate:.3g} ms" for key, rate in found.items()), flush=True)
            gc.collect()
    print("\n" + markdown(results.data))


def _growing(problem: Problem) -> dict[str, Group]:
    lists = 2 ** round(math.log2(4 * math.sqrt(len(problem.store))))
    return {
        "ExactIndex": single("", lambda: exact_search("", problem.store)),
        "torch brute force": single("", lambda: torch_brute_force(problem, copy=False)),
        "PCA64,IVF(4√N),Flat, nprobe 16": faiss_group(
            problem, f"PCA64,IVF{lists},Flat", [({"nprobe": 16}, 8)], train_size=131_072
        ),
    }


def _machine() -> str:
    return (
        f"torch {torch.__version__} with {torch.get_num_threads()} threads, faiss {faiss.__version__} with "
        f"{faiss.omp_get_max_threads()} threads"
    )


def _stored(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise GroodError(f"{folder} has no results; run `cifar10`, `imagenet` or `growth` with --output {folder} first")
    return found


def plot(arguments: argparse.Namespace) -> None:
    """Draw what a folder holds."""
    png = figure(_stored(arguments.folder))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(arguments.output) as temporary:
        temporary.write_bytes(png)


def tables(arguments: argparse.Namespace) -> None:
    """Print what a folder holds as Markdown."""
    print("\n\n".join(markdown(data) for data in _stored(arguments.folder)))


COMMANDS = {"cifar10": run_cifar10, "imagenet": run_imagenet, "growth": run_growth, "plot": plot, "tables": tables}

if __name__ == "__main__":
    main()
