"""Decisions about images as they come: a folder that grows, or a stream of JSON lines.

    Folder, Stream or Pipe ──▶ watch ──▶ Journal

A source hands out each input that is not in the journal, `watch` reads it and asks a runtime, and the journal, which is
the output file itself, takes the rows of a batch in one write. So a restart knows by the output alone what is done.
Nothing here needs torch; a runtime may.
"""

from torch_grood.watching.folder import Folder
from torch_grood.watching.journal import Journal, opened_journal
from torch_grood.watching.loop import Counts, watch
from torch_grood.watching.pipe import Pipe
from torch_grood.watching.rows import made_by
from torch_grood.watching.source import Item, Source
from torch_grood.watching.stream import Stream

__all__ = [
    "Counts",
    "Folder",
    "Item",
    "Journal",
    "Pipe",
    "Source",
    "Stream",
    "made_by",
    "opened_journal",
    "watch",
]
