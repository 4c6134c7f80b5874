"""What an accident or an attacker makes of a detector's file: bytes from a base and a random number generator.

Raw mutants are the work of disks, networks and editors, and of attackers who do not know the format: bits, bytes, and a
table of tensors that lies. Their hashes are wrong. Resealed mutants have the description and the tensors altered and
every hash made right again, so that they reach the checks behind the hashes.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor

import format_file
from fuzz_corpus import Base

__all__ = ["Mutant", "mutant"]

# Formats 1 and 2 have no hashes: of these every mutant counts as resealed.
_FIRST_SEALED = 3
_SIZES = [0, 1, 2, 7, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64]
_CODES = ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "U64", "BOOL", "F8_E4M3", "F4", "C64", "X", ""]


class Mutant(NamedTuple):
    """A file to be read.

    Attributes:
        base: that it was made from.
        what: was done to it, for people.
        content: its bytes.
        sealed: its hashes are right, or its format has none.
        sources: the bases that it may be equal to; a file's header on its twin's data is that file.
    """

    base: Base
    what: str
    content: bytes
    sealed: bool
    sources: Sequence[Base] = ()


def mutant(bases: Sequence[Base], seed: int, number: int) -> Mutant:
    """Mutant `number` of a seed: always the same bytes, whatever came before."""
    random = Random(f"{seed}:{number}")
    base = random.choice(bases)
    if random.random() < 0.3:
        change = random.choice(_RAW)
        content = change(random, base, bases)
        return Mutant(base, f"raw: {change.__name__.strip('_')}", content, base.version < _FIRST_SEALED, bases)
    file = _File(random, base, bases)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        random.choices(_RESEALED, _WEIGHTS)[0](file)
    return Mutant(base, "resealed: " + ", ".join(file.done), file.sealed(), True)


# --- Raw ----------------------------------------------------------------------------------------------------------


def _table(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The table of tensors, and their bytes."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _assembled(table: dict[str, Any] | bytes, data: bytes) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table, ensure_ascii=False).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def _place(random: Random, content: bytes) -> int:
    """A byte; half of them in the header."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return random.randrange(end if random.random() < 0.5 else len(content))


def _flipped_bits(random: Random, base: Base, _: Sequence[Base]) -> bytes:
    content = bytearray(base.content)
    for _i in range(random.choice((1, 1, 2, 8))):
        content[_place(random, base.content)] ^= 1 << random.randrange(8)
    return bytes(content)


def _overwritten_run(random: Random, base: Base, _: Sequence[Base]) -> bytes:
    content, start = bytearray(base.content), _place(random, base.content)
    run = random.choice((1, 4, 100, 4096))
    new = random.choice((bytes(run), b"\xff" * run, b" " * run, random.randbytes(run)))
    content[start : start + run] = new[: len(content) - start]
    return bytes(content)


def _inserted_or_removed_run(random: Random, base: Base, _: Sequence[Base]) -> bytes:
    start, run = _place(random, base.content), random.choice((1, 8, 100, 4096))
    if random.random() < 0.5:
        return base.content[:start] + base.content[start + run :]
    return base.content[:start] + random.randbytes(run) + base.content[start:]


def _truncated(random: Random, base: Base, _: Sequence[Base]) -> bytes:
    end = 8 + struct.unpack("<Q", base.content[:8])[0]
    length = random.choice((random.randrange(len(base.content)), random.randrange(end + 2), len(base.content) - 1))
    return base.content[:length]


def _appended(random: Random, base: Base, bases: Sequence[Base]) -> bytes:
    return base.content + random.choice((b"\0", b"\n", random.randbytes(4096), random.choice(bases).content))


def _blocks_swapped(random: Random, base: Base, _: Sequence[Base]) -> bytes:
    size = random.choice((1, 8, 512, 4096))
    one, other = sorted(random.randrange(max(1, len(base.content) // size)) * size for _i in range(2))
    content = bytearray(base.content)
    first, second = content[one : one + size], content[other : other + size]
    if len(first) == len(second):
        content[one : one + size], content[other : other + size] = second, first
    return bytes(content)


def _spliced(random: Random, base: Base, bases: Sequence[Base]) -> bytes:
    """The header of one file on the data of another, or its description in the other's table."""
    other = random.choice(bases)
    table, data = _table(base.content)
    their_table, their_data = _table(other.content)
    if random.random() < 0.5:
        return _assembled(table, their_data)
    table["__metadata__"] = their_table["__metadata__"]
    return _assembled(table, data)


def _lying_length(random: Random, base: Base, _: Sequence[Base]) -> bytes:
    (length,) = struct.unpack("<Q", base.content[:8])
    new = random.choice([*_SIZES[:-1], length - 1, length + 1, length + 8, len(base.content), 100_000_000, 99_999_999])
    return struct.pack("<Q", max(0, new) % 2**64) + base.content[8:]


def _lying_table(random: Random, base: Base, _: Sequence[Base]) -> bytes:
    """Sizes, offsets, types and names that are not those of the data."""
    table, data = _table(base.content)
    name, other = (random.choice([key for key in table if key != "__metadata__"]) for _i in range(2))
    entry, their = table[name], table[other]
    begin, end = entry["data_offsets"]
    sizes = [random.choice(_SIZES) for _i in range(random.randrange(4))]
    hostile = random.choice([None, -1, 1.5, "x", [], {}, True, [None], [-1, 0], [2**64], *_SIZES])
    match random.randrange(13):
        case 0:
            entry["shape"] = sizes
        case 1:
            # Whose product overflows to what the data have, or to nothing.
            entry["shape"] = [*random.choice(([2**63, 2], [2**32, 2**32], [2**62, 4])), *entry["shape"]]
        case 2:
            entry["shape"] = list(reversed(entry["shape"]))
        case 3:
            entry["data_offsets"] = [random.choice([begin, *_SIZES]), random.choice([end, *_SIZES])]
        case 4:
            entry["data_offsets"], their["data_offsets"] = their["data_offsets"], entry["data_offsets"]
        case 5:
            table[name], table[other] = their, entry
        case 6:
            entry["dtype"] = random.choice(_CODES)
        case 7:
            entry[random.choice(["dtype", "shape", "data_offsets", "unknown"])] = hostile
        case 8:
            table[name] = hostile
        case 9:
            table[random.choice(["", "index.new", "checksums", "\0", "a" * 70_000])] = table.pop(name)
        case 10:
            table["new"] = {"dtype": "U8", "shape": sizes, "data_offsets": [len(data), len(data)]}
        case 11:
            empty = {"dtype": "U8", "shape": [0], "data_offsets": [len(data), len(data)]}
            table |= {f"new{i}": empty for i in range(random.choice((100, 30_000)))}
        case _:
            del table[name]
    return _assembled(table, data)


def _lying_metadata(random: Random, base: Base, _: Sequence[Base]) -> bytes:
    table, data = _table(base.content)
    metadata = table["__metadata__"]
    hostile = random.choice([None, 1, [], {}, "x", "\0", "[" * 10_000, {"torch-grood": {}}, "a" * 64 + " {}"])
    match random.randrange(6):
        case 0:
            table["__metadata__"] = hostile
        case 1:
            metadata[format_file.KEY] = hostile
        case 2:
            metadata[random.choice(["format", "", "torch-grood "])] = random.choice([hostile, "pt"])
        case 3:
            del metadata[format_file.KEY]
        case 4:
            digest, _space, text = metadata[format_file.KEY].partition(" ")
            metadata[format_file.KEY] = random.choice((text, f"{digest.upper()} {text}", f"{digest}  {text}"))
        case _:
            metadata[format_file.KEY] = metadata[format_file.KEY].replace(
                '"seed": ', random.choice(('"seed": 1', '"seed": 5, "seed": ', '"seed": NaN, "x": '))
            )
    return _assembled(table, data)


def _other_text(random: Random, base: Base, _: Sequence[Base]) -> bytes:
    """A header that is the same table otherwise written, or no JSON at all."""
    table, data = _table(base.content)
    text = json.dumps(table).encode()
    match random.randrange(9):
        case 0:
            text = json.dumps(dict(sorted(table.items(), key=lambda _item: random.random())), indent=1).encode()
        case 1:
            text += random.choice((b"\n\t ", b"\0", b"}", b"//", b" " * 100_000))
        case 2:
            text = random.choice((b"\xef\xbb\xbf", b" ", b"\xff")) + text
        case 3:
            # A key twice.
            name = random.choice([key for key in table if key != "__metadata__"])
            text = text[:-1] + f", {json.dumps(name)}: {json.dumps(random.choice(list(table.values())))}}}".encode()
        case 4:
            text = text[:-1] + f', "__metadata__": {json.dumps(table["__metadata__"])}}}'.encode()
        case 5:
            deep = random.choice((100, 1000, 100_000))
            text = text[:-1] + b', "deep": ' + b"[" * deep + b"]" * deep + b"}"
        case 6:
            text = text.replace(b"0", random.choice((b"NaN", b"1e400", b"-0", b"00", b"0.0", b"9" * 5000)), 1)
        case 7:
            text = text.replace(b'"', random.choice((b"'", b"\xff", b"\xed\xa0\x80")), 1)
        case _:
            text = json.dumps(table).encode(random.choice(("utf-16", "utf-32")))
    return _assembled(text, data)


_RAW: list[Callable[[Random, Base, Sequence[Base]], bytes]] = [
    _flipped_bits,
    _flipped_bits,
    _overwritten_run,
    _inserted_or_removed_run,
    _truncated,
    _appended,
    _blocks_swapped,
    _spliced,
    _lying_length,
    _lying_table,
    _lying_table,
    _lying_table,
    _lying_metadata,
    _other_text,
]

# --- Resealed -----------------------------------------------------------------------------------------------------

_TYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint32, torch.uint64, torch.bool),
]
_NUMBERS = [
    *(0, 1, -1, 2, 3, 5, 100, 4096, 10**6, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64),
    *(-(2**31), -(2**63), 10**30, 10**400, -(10**4000), 0.0, -0.0, 0.5, 1.0, 1.5, 0.05, 1e-3, 1e-17, 5e-324, 1e308),
    *(-1e308, math.nan, math.inf, -math.inf, 1 - 1e-16, 0.999),
]
# Texts that stand in place of these strings, quotes included, once the description is written.
_TEXTS = {
    "@deep@": "[" * 100_000 + "]" * 100_000,
    "@nested@": '{"a":' * 400 + "1" + "}" * 400,
    "@nested deeper@": '{"a":' * 900 + "1" + "}" * 900,
    "@listed@": "[" * 200 + "]" * 200,
    "@listed deeper@": "[" * 800 + "]" * 800,
    "@digits@": "1" * 5000,
    "@huge@": "1e999999",
    "@many@": "[" + "[]," * 200_000 + "0]",
    "@long@": '"' + "a" * 10**6 + '"',
    "@keys@": "{" + ",".join(f'"{i}":{i}' for i in range(50_000)) + "}",
    "@surrogate@": '"\\ud800"',
    "@control@": '"\\u0000\\u001b[31m\\u0007\\u202e\\r\\n"',
    "@twice@": '{"a": 1, "a": 2}',
}
_STRINGS = [
    "",
    "x",
    "exact",
    "Flat",
    "Mixup",
    "PrototypeMean",
    "0",
    "\0",
    "\x1b[2J",
    "名",
    "💥",
    "a" * 10_000,
    "../../x",
]
_OBJECTS: list[Any] = [
    *([], {}, [0], [None], [[]], ["a", "a"], [1, "1"], [True, False], [1e400, math.nan], list(range(100_000))),
    *({"name": "Mixup"}, {"name": "Mixup", "n": -1}, {"name": "Mixup", "lam": math.nan}, {"name": "UniformNoise"}),
    *({"name": "OutlierSamples", "n": 10**30}, {"name": "\0"}, {"name": 1}, {"name": []}, {"spec": "Flat"}),
    *({"name": "ClassSample", "ratio": 5}, {"name": "KCenterCoreset", "radius": 10**400}, {"name": "a" * 10_000}),
]
_SPECS = [
    *("exact", "Flat", "IVF1,Flat", "IVF8,Flat", "IVF9,Flat", "IVF1000000000,Flat", "IVF4096,Flat", "IVF640,Flat"),
    *("HNSW8", "HNSW2", "HNSW128", "HNSW100000", "HNSW8,Flat", "HNSW0", "HNSW1", "HNSW4096,PQ8x8", "HNSW8,PQ2x4"),
    *("PQ4x4", "PQ2x8", "PQ8x8", "PQ8x12", "PQ64x24", "PQ1x12", "PQ3", "PQ0", "PQ4x0", "PQ8x1", "PQ4x16", "PQ16x8np"),
    *("SQ8", "SQ4", "SQ6", "SQfp16", "SQbf16", "IVF4,SQ8", "IVF64,SQ6", "IVF4,PQ8x12", "IVF640,PQ8x8", "IVF4,PQ4x4fs"),
    *("LSH", "LSHr", "LSHrt", "LSHt", "RR8,Flat", "RR3000,Flat", "RR1,Flat", "RR64,LSHr", "Pad80,Flat", "Pad6064,Flat"),
    *(
        "OPQ8,PQ8x8",
        "OPQ8_8,PQ8x8",
        "OPQ1_8,IVF4,PQ1x4",
        "OPQ4_16,IVF8,Flat",
        "OPQ16,IVF32,PQ16x8",
        "OPQ1500_3000,Flat",
    ),
    *("PCA4,Flat", "PCAR8,IVF8,Flat", "PCAW8,SQ8", "PCAWR4,HNSW8", "PCA3000,Flat", "PCA0,Flat", "RR8,RR8,Flat"),
    *(
        "Pad12,PCA12,Flat",
        "IVF8_HNSW128,PQ4x4",
        "IVF640_HNSW4,Flat",
        "IVF8_HNSW,Flat,RFlat",
        "PQ4x4,RFlat",
        "Flat,RFlat",
    ),
    *("IDMap,Flat", "IMI2x16,Flat", "IVF8(PQ4),Flat", "NSG32", "Flat,Flat", "IVF4,Flat,Refine(Flat)", "IVF4,,Flat", ""),
    *("IVF٤,Flat", "IVF 4,Flat", "IVF4,Flat\n", "IVF-4,Flat", "IVF1e3,Flat", "0", "Flat" * 30, "Hamming"),
]
_PARAMETERS = [
    *("nprobe", "efSearch", "efConstruction", "max_codes", "ht", "k_factor_rf", "quantizer_nprobe", "verbose"),
    *("quantizer_efSearch", "quantizer_efConstruction", "quantizer_ht", "", "nprobe;", "k_factor", "\0"),
]


class _File:
    """A description and tensors that are altered step by step, and sealed in the end."""

    def __init__(self, random: Random, base: Base, bases: Sequence[Base]) -> None:
        self.random, self.bases, self.version = random, bases, base.version
        self.header: dict[str, Any] = json.loads(json.dumps(base.header))
        self.tensors = dict(base.tensors)
        self.done: list[str] = []

    def sealed(self) -> bytes:
        text: str | None = None
        header = {key: value for key, value in self.header.items() if key not in ("tensors", "checksums")}
        written = json.dumps(header)
        if any(f'"{name}"' in written for name in _TEXTS):
            # As `seal` would: what replaces a text may be no JSON.
            for name, new in _TEXTS.items():
                written = written.replace(f'"{name}"', new)
            text = written if self.version < _FIRST_SEALED else written[:-1] + ", " + self._own_lists()
        # safetensors writes no two tensors that share memory.
        tensors = {name: tensor.clone() for name, tensor in self.tensors.items()}
        seal = format_file.write_unchecked if self.version < _FIRST_SEALED else format_file.seal
        with tempfile.NamedTemporaryFile() as file:
            seal(Path(file.name), header, tensors, text)
            return Path(file.name).read_bytes()

    def _own_lists(self) -> str:
        return json.dumps(format_file.lists_of(self.tensors))[1:]

    def fields(self) -> list[tuple[dict[str, Any] | list[Any], Any]]:
        """Every place of the description, however deep: where, and the key there."""
        found: list[tuple[dict[str, Any] | list[Any], Any]] = []
        pending: list[Any] = [self.header]
        while pending:
            place = pending.pop()
            keys: Any = list(place) if isinstance(place, dict) else range(min(len(place), 5))
            for key in keys:
                if place is self.header and key in ("tensors", "checksums"):
                    continue
                found.append((place, key))
                if isinstance(place[key], (dict, list)):
                    pending.append(place[key])
        return found

    def a_name(self) -> str:
        return self.random.choice(sorted(self.tensors) or ["new"])


def _value(random: Random) -> Any:
    kind = random.random()
    if kind < 0.45:
        return random.choice(_NUMBERS)
    if kind < 0.6:
        return random.choice(_STRINGS)
    if kind < 0.75:
        return random.choice(list(_TEXTS))
    if kind < 0.85:
        return random.choice((None, True, False))
    return json.loads(json.dumps(random.choice(_OBJECTS)))


def _field(file: _File) -> None:
    """One field of the description becomes anything."""
    fields = file.fields()
    if fields:
        place, key = file.random.choice(fields)
        place[key] = _value(file.random)
        file.done.append(f"{key} = {place[key]!r:.60}")


def _field_gone(file: _File) -> None:
    fields = file.fields()
    if fields:
        place, key = file.random.choice(fields)
        del place[key]
        file.done.append(f"without {key}")


def _field_copied(file: _File) -> None:
    """A value where another belongs."""
    fields = file.fields()
    if fields:
        (place, key), (source, name) = file.random.choice(fields), file.random.choice(fields)
        place[key] = json.loads(json.dumps(source[name]))
        file.done.append(f"{key} = {name}")


def _field_added(file: _File) -> None:
    random, fields = file.random, file.fields()
    places = [file.header, *(place for place, _ in fields if isinstance(place, dict))]
    key = random.choice([str(key) for _, key in fields] + ["new", "gpu", "prune", "__class__", "device"])
    random.choice(places)[key] = _value(random)
    file.done.append(f"new {key}")


def _number(file: _File) -> None:
    """A number that is near what is right."""
    fields = [(at, key) for at, key in file.fields() if type(at[key]) in (int, float) and abs(at[key]) < 2**64]
    if fields:
        place, key = file.random.choice(fields)
        value = place[key]
        place[key] = file.random.choice(
            (value + 1, value - 1, -value, 2 * value, float(value), value / 2, value * 1000)
        )
        file.done.append(f"{key} = {place[key]!r:.40}")


def _spec(file: _File) -> None:
    """An index that asks for much, or that the tensors are none of."""
    random = file.random
    if not isinstance(file.header.get("index"), dict):
        return
    spec = random.choice([*_SPECS, _random_spec(random)])
    file.header["index"] = {"spec": spec} if random.random() < 0.3 else {**file.header["index"], "spec": spec}
    if random.random() < 0.6:
        _without_state(file)
    file.done.append(f"index {spec!r:.40}")


def _fitting_spec(file: _File) -> None:
    """An index of any kind with tensors that fit it: what does it cost to put it together?"""
    random = file.random
    directions = file.tensors.get("direction", torch.empty(0))
    if directions.ndim != 2 or directions.numel() == 0:
        return
    n, d = directions.shape
    spec = _random_spec(random)
    state = _state_of(spec, n, d, random.randrange(2**32), random.choice((1.0, 1e-30, 1e18, 3e38)))
    if state is None:
        return
    _without_state(file)
    file.tensors |= state
    file.header["index"] = {"spec": spec, "quality_queries": random.choice((0, 1, 2**40)), "candidates": 2}
    file.header["quality"] = random.choice((None, {"recall_at_1": 1.0, "score_inflation": 1.0, "n_queries": 3}))
    file.done.append(f"{spec} with its tensors")


def _random_spec(random: Random) -> str:
    power = 2 ** random.randrange(8)
    codes = [
        *("Flat", "SQ8", "SQ4", "SQfp16"),
        f"PQ{power}x{random.choice((1, 4, 8, 10, 12))}",
        f"PQ{random.choice((1, 2, 4, 8))}x{random.choice((4, 8, 12))}",
    ]
    lists = 2 ** random.randrange(13)
    core = random.choice((f"IVF{lists},", f"IVF{lists}_HNSW{random.choice((2, 8, 128))},", f"HNSW{power},", ""))
    before = random.choice(("", "", f"PCA{power},", f"OPQ{power},", f"RR{random.choice((4, 8, power))},", "Pad80,"))
    return before + core + random.choice(codes)


def _state_of(spec: str, n: int, d: int, seed: int, size: float) -> dict[str, Tensor] | None:
    """Tensors of the types and shapes that an index has, filled at random; None if there is no such index."""
    import faiss

    from torch_grood.neighbors import faiss_state

    generator = torch.Generator().manual_seed(seed)
    try:
        index = faiss.index_factory(d, spec)
        arrays = faiss_state._arrays(faiss, index)
    except (RuntimeError, faiss_state._UnknownKindError):
        return None
    if sum(math.prod(array.shape) for array in arrays) > 2**20:
        return None

    def numbers(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(size).clamp_(-3e38, 3e38)

    def graph(graph: Any, rows: int, prefix: str) -> dict[str, Tensor]:
        # A graph of one link has no level at all.
        slots = int(faiss.vector_to_array(graph.cum_nneighbor_per_level)[:2][-1])
        return {
            f"{prefix}levels": torch.ones(rows, dtype=torch.int32),
            f"{prefix}neighbors": torch.randint(-1, rows, (rows * slots,), generator=generator, dtype=torch.int32),
            f"{prefix}entry": torch.tensor(0, dtype=torch.int32),
        }

    found = {array.name: numbers(*array.shape) for array in arrays}
    found |= {"unit": torch.tensor(-1.0, dtype=torch.float64), "centre": torch.zeros(d)}
    core = faiss_state._core(faiss, index)
    if faiss_state.has_graph(index):
        found |= graph(core.hnsw, n, "graph.")
    if hasattr(core, "nlist"):
        found["quantizer.vectors"] = numbers(core.nlist, core.d)
        found["lists"] = torch.randint(core.nlist, (n,), generator=generator, dtype=torch.int32)
        quantizer = faiss.downcast_index(core.quantizer)
        if hasattr(quantizer, "hnsw"):
            found |= graph(quantizer.hnsw, core.nlist, "quantizer.graph.")
    return {f"index.{name}": tensor for name, tensor in found.items()}


def _without_state(file: _File) -> None:
    """So that the index is built anew."""
    file.tensors = {name: tensor for name, tensor in file.tensors.items() if not name.startswith("index.")}


def _parameters(file: _File) -> None:
    random, index = file.random, file.header.get("index")
    if not isinstance(index, dict):
        return
    if random.random() < 0.3:
        index[random.choice(("candidates", "train_size", "quality_queries"))] = random.choice(_NUMBERS)
    else:
        numbers = [1, 0, -1, 4, 640, 4000, 4096, 4097, *_NUMBERS]
        index["parameters"] = {random.choice(_PARAMETERS): random.choice(numbers) for _ in range(random.choice((1, 2)))}
    if random.random() < 0.5:
        file.header["quality"] = None
    if random.random() < 0.3:
        _without_state(file)
    file.done.append(f"index {index!r:.80}")


def _tensor_type(file: _File) -> None:
    name, dtype = file.a_name(), file.random.choice(_TYPES)
    tensor = file.tensors[name]
    if file.random.random() < 0.5 and tensor.numel() and tensor.ndim and tensor.shape[-1] % 8 == 0:
        file.tensors[name] = tensor.clone().view(dtype)
    else:
        file.tensors[name] = tensor.to(dtype)
    file.done.append(f"{name} {dtype}")


def _tensor_shape(file: _File) -> None:
    random, name = file.random, file.a_name()
    tensor = file.tensors[name]
    huge = random.choice((2**40, 2**62))
    shapes: list[Callable[[], Tensor]] = [
        lambda: tensor[None],
        lambda: tensor[..., None],
        lambda: tensor.flatten(),
        lambda: tensor.flatten()[:1].reshape(()) if tensor.numel() else tensor,
        lambda: tensor[:0] if tensor.ndim else tensor,
        lambda: tensor[..., :0] if tensor.ndim else tensor,
        lambda: tensor[:-1] if tensor.ndim else tensor,
        lambda: tensor[..., 1:] if tensor.ndim else tensor,
        lambda: torch.cat([tensor, tensor]) if tensor.ndim else tensor,
        lambda: tensor.flip(0) if tensor.ndim else tensor,
        lambda: tensor.mT if tensor.ndim > 1 else tensor,
        lambda: torch.empty(huge, 0, dtype=tensor.dtype),
        lambda: torch.empty(0, huge, dtype=tensor.dtype),
        lambda: tensor[torch.randperm(len(tensor))] if tensor.ndim else tensor,
    ]
    file.tensors[name] = random.choice(shapes)()
    file.done.append(f"{name} {tuple(file.tensors[name].shape)}")


def _dimension(file: _File) -> None:
    """All tensors that share a size have another: no feature, no gradient, one of each."""
    size = file.random.choice(sorted({size for tensor in file.tensors.values() for size in tensor.shape}) or [0])
    new = file.random.choice((0, 1, size - 1))
    for name, tensor in file.tensors.items():
        for axis, length in enumerate(tensor.shape):
            if length == size > 0 <= new < size:
                tensor = tensor.narrow(axis, 0, new)
        file.tensors[name] = tensor
    file.done.append(f"sizes {size} are {new}")


def _tensor_values(file: _File) -> None:
    """Values that no fit gives: not finite, out of range, twice, all alike, a little off."""
    random, name = file.random, file.a_name()
    original = file.tensors[name]
    if original.numel() == 0 or original.is_complex():
        return
    # Not every type can be calculated with.
    floats = original.is_floating_point()
    tensor = original.to(torch.float64 if floats else torch.int64, copy=True)
    flat, rows = tensor.view(-1), tensor.view(len(tensor) if tensor.ndim else 1, -1)
    if floats:
        value = random.choice([math.nan, math.inf, -math.inf, 0.0, -1.0, 1.0, 3e38, 1e300, -1e300, 1e-300, 1e-40])
    else:
        sizes = [len(other) for other in file.tensors.values() if other.ndim]
        value = random.choice(
            [0, 1, -1, 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), *sizes, *(size - 1 for size in sizes)]
        )
    one, other = (random.randrange(len(flat)) for _ in range(2))
    match random.randrange(6):
        case 0:
            flat[one] = value
        case 1:
            flat[one:] = value
        case 2:
            flat[:] = value
        case 3:
            flat[one] = flat[other].clone()
        case 4:
            rows[random.randrange(len(rows))] = value
        case _:
            flat[:] = flat * random.choice((-1.0, 1 + 1e-6, 1.0001, 2.0, 1e30)) if floats else flat.flip(0)
    file.tensors[name] = tensor.to(original.dtype)
    file.done.append(f"{name} with {value}")


def _tensors_swapped(file: _File) -> None:
    one, other = file.a_name(), file.a_name()
    if file.tensors:
        file.tensors[one], file.tensors[other] = file.tensors[other], file.tensors[one]
    file.done.append(f"{one} and {other} swapped")


def _tensor_gone(file: _File) -> None:
    name = file.a_name()
    file.tensors.pop(name, None)
    file.done.append(f"without {name}")


def _tensor_borrowed(file: _File) -> None:
    """From another file."""
    other = file.random.choice([base for base in file.bases if base.tensors])
    name = file.random.choice(sorted(other.tensors))
    file.tensors[name] = other.tensors[name]
    file.done.append(f"{name} of {other.name}")


def _more_tensors(file: _File) -> None:
    for number in range(file.random.choice((1, 1, 1, 3000))):
        file.tensors[f"new{number}"] = torch.zeros(file.random.choice((0, 1)))
    file.tensors[file.random.choice(["index.new", "training_names", "new", "", "checksums.", "名"])] = torch.ones(2)
    file.done.append("more tensors")


def _description_borrowed(file: _File) -> None:
    file.header = json.loads(json.dumps(file.random.choice(file.bases).header))
    file.version = int(file.header["format_version"])
    file.done.append("another description")


_RESEALED: list[Callable[[_File], None]] = [
    _field,
    _field_gone,
    _field_copied,
    _field_added,
    _number,
    _spec,
    _fitting_spec,
    _parameters,
    _tensor_type,
    _tensor_shape,
    _dimension,
    _tensor_values,
    _tensors_swapped,
    _tensor_gone,
    _tensor_borrowed,
    _more_tensors,
    _description_borrowed,
]
_WEIGHTS = [25, 5, 4, 4, 5, 8, 8, 8, 5, 6, 3, 20, 2, 2, 2, 1, 1]
