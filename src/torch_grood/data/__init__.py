"""Image files for a detector: which files and labels, how they are read, and the preprocessing bound to a model."""

from torch_grood.data.cache import FeatureCache
from torch_grood.data.dataset import ImageDataset, ImageLoader, image_loader
from torch_grood.data.images import BadImageError, load_image
from torch_grood.data.sources import ImageSource, read_source
from torch_grood.data.transforms import PRESETS, ImageTransform

__all__ = [
    "PRESETS",
    "BadImageError",
    "FeatureCache",
    "ImageDataset",
    "ImageLoader",
    "ImageSource",
    "ImageTransform",
    "image_loader",
    "load_image",
    "read_source",
]
