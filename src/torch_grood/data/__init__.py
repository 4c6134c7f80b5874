"""Image files for a detector: which files and labels, how they are read, and the preprocessing bound to a model.

What reads and prepares images needs no torch; what makes batches of them is imported when it is first used.
"""

from typing import TYPE_CHECKING

from torch_grood._lazy import importer
from torch_grood.data.images import BadImageError, decode_image, load_image
from torch_grood.data.parquet import ParquetColumns
from torch_grood.data.sources import ImageSource, read_source
from torch_grood.data.transforms import PRESETS, ImageTransform

if TYPE_CHECKING:
    from torch_grood.data.cache import FeatureCache
    from torch_grood.data.dataset import ImageDataset, ImageLoader, image_loader

__all__ = [
    "PRESETS",
    "BadImageError",
    "FeatureCache",
    "ImageDataset",
    "ImageLoader",
    "ImageSource",
    "ImageTransform",
    "ParquetColumns",
    "decode_image",
    "image_loader",
    "load_image",
    "read_source",
]

__getattr__ = importer(
    __name__,
    {"FeatureCache": "cache", "ImageDataset": "dataset", "ImageLoader": "dataset", "image_loader": "dataset"},
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
