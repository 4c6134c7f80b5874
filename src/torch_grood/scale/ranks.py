"""A job among the processes of one launcher, such as `torchrun`: each takes its share of the spans.

The processes say nothing to each other: which spans are a process' own follows from its number, and what is done is in
the folder. If one dies, the launcher ends all, and the next run does what is left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch_grood.errors import GroodError
from torch_grood.scale.job import Counts, Job, Summary, score_span
from torch_grood.scale.parts import missing

if TYPE_CHECKING:
    from torch_grood.runtime import Runtime

__all__ = ["rank_of_process", "score_as_rank"]

_LOOK_EVERY = 0.2


def rank_of_process() -> tuple[int, int]:
    """Number of this process, and how many there are, as launchers tell it.

    Raises:
        GroodError: if nothing was told.
    """
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    except (KeyError, ValueError):
        raise GroodError(
            "no launcher has told which process this is (RANK, WORLD_SIZE); run: torchrun --nproc-per-node 4 -m "
            "torch_grood score …"
        ) from None
    if not 0 <= rank < world:
        raise GroodError(f"RANK is {rank} of WORLD_SIZE {world}; expected 0 to {world - 1}")
    return rank, world


def score_as_rank(
    job: Job, runtime: Runtime, rank: int, world: int, *, tell: Callable[[Counts], None] = lambda counts: None
) -> Summary | None:
    """Score this process' share; the first process waits for the others.

    Args:
        job: the same in all processes.
        runtime: decides.
        rank: number of this process.
        world: how many there are.
        tell: is told what each part adds.

    Returns:
        What has become of all inputs, in the first process; None in the others.

    Raises:
        GroodError: if the folder is another job's, or a part cannot be written.
    """
    job.begin()
    # By its place among all spans: who comes later, when others have begun, finds the same share.
    own = missing(job.spans[rank::world], job.folder.done())
    for span in own:
        tell(score_span(runtime, job.inputs.slice(span), span, job.folder, job.batch_size))
    if rank:
        return None
    while missing(job.spans, job.folder.done()):
        time.sleep(_LOOK_EVERY)
    return job.finish()
