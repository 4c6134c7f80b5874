"""Parts of the stored gradients, searched one by one: what is found is what a search through all finds, to the bit."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_grood import ExactIndex
from torch_grood.gradients import PolarGradients
from torch_grood.neighbors import StoreOptions
from torch_grood.neighbors.sharded import merged
from torch_grood.neighbors.store import GradientStore, JoinedStore, StoreWriter

DTYPES = st.sampled_from(["float32", "float16", "int8"])


def some_gradients(n: int, seed: int) -> PolarGradients:
    """Few directions and magnitudes, so that many distances are equal; the zero vector, too."""
    random = torch.Generator().manual_seed(seed)
    direction = torch.randint(-1, 2, (n, 3), generator=random).double()
    direction /= direction.norm(dim=1, keepdim=True).clamp(min=1)
    magnitude = torch.randint(-3, 1, (n,), generator=random).double() * 5
    return PolarGradients(magnitude, direction.float())


def stored(gradients: PolarGradients, dtype: str) -> GradientStore:
    writer = StoreWriter(len(gradients.log_magnitude), gradients.direction.shape[1], StoreOptions(dtype))
    writer.append(gradients)
    return writer.finish()


def split(store: GradientStore, ends: list[int]) -> list[GradientStore]:
    bounds = zip([0, *ends], [*ends, len(store)], strict=True)
    return [store.select(torch.arange(start, stop), StoreOptions()) for start, stop in bounds]


@given(
    n=st.integers(2, 40),
    seed=st.integers(0, 2**32),
    k=st.integers(1, 12),
    ends=st.lists(st.integers(1, 39), max_size=5, unique=True),
    dtype=DTYPES,
)
@settings(deadline=None)
def test_the_nearest_of_the_parts_are_the_nearest_of_all(
    n: int, seed: int, k: int, ends: list[int], dtype: str
) -> None:
    store, k = stored(some_gradients(n, seed), dtype), min(k, n)
    parts = split(store, sorted(end for end in ends if end < n))
    queries = some_gradients(9, seed + 1)
    expected = ExactIndex(prune=False).build(store).search(queries, k)
    found = [ExactIndex().build(part).search(queries, min(k, len(part))) for part in parts]
    assert all(map(torch.equal, merged(found, [len(part) for part in parts], k), expected))


@given(
    n=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    ends=st.lists(st.integers(1, 39), max_size=5, unique=True),
    dtype=DTYPES,
)
@settings(deadline=None)
def test_joined_stores_are_one(n: int, seed: int, ends: list[int], dtype: str) -> None:
    store = stored(some_gradients(n, seed), dtype)
    joined = JoinedStore(split(store, sorted(end for end in ends if end < n)))
    assert (len(joined), joined.dim, joined.dtype, joined.nbytes) == (n, 3, dtype, store.nbytes)
    assert joined.log_rounding == store.log_rounding
    rows = torch.randint(0, n, (17,), generator=torch.Generator().manual_seed(seed))
    for one in (rows, slice(n // 3, n)):
        assert all(map(torch.equal, joined.take(one), store.take(one)))
    assert torch.equal(joined.codes, store.codes)
    assert torch.equal(joined.zero_rows(), store.zero_rows())
    assert torch.equal(joined.select(rows, StoreOptions()).codes, store.codes[rows])
    more = some_gradients(3, seed + 1)
    assert torch.equal(joined.extended(more, StoreOptions()).codes, store.extended(more, StoreOptions()).codes)
