"""Decisions over HTTP: FastAPI on uvicorn in front of one `Runtime`.

    uvicorn ──▶ Guard ──▶ FastAPI's routes ──▶ bodies ──▶ Scorer ──▶ Runtime
                (who may)                     (images)    (batches)

Nothing here needs torch; a runtime may.
"""

from torch_grood.serving.app import make_app
from torch_grood.serving.drift import DriftMonitor
from torch_grood.serving.limits import Limits
from torch_grood.serving.server import run
from torch_grood.serving.settings import Settings

__all__ = ["DriftMonitor", "Limits", "Settings", "make_app", "run"]
