"""How a service is set up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch_grood.serving.limits import Limits

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """How a service is set up.

    Attributes:
        host: address to listen at.
        port: to listen at; 0: any that is free.
        allowed_hosts: names, beside the address, by which it may be asked for (without a port); "*": any. A web page
            elsewhere could otherwise let a name of its own lead here, and ask in the name of its visitor.
        token: that requests must bring, as `Authorization: Bearer TOKEN`; None: none.
        limits: of requests.
        batch_size: images that the runtime gets at a time, at most.
        threads: that decode images.
        deciders: batches that are decided about at the same time, by a runtime that can (`Runtime.concurrent`).
        drift_window: images in each test for drift.
        drift_level: chance of a false alarm in each of these tests.
        training_root: folder of the training images, which the page may then show; None: it shows none.
        facts: about the detector, JSON-able.
        log_requests: whether each request is a line of the log.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    allowed_hosts: tuple[str, ...] = ()
    token: str | None = None
    limits: Limits = field(default_factory=Limits)
    batch_size: int = 64
    threads: int = 1
    deciders: int = 1
    drift_window: int = 1000
    drift_level: float = 0.001
    training_root: Path | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    log_requests: bool = True
