"""A classifier from one line of text, with the preprocessing that belongs to it.

    torchvision:resnet50        torchvision's networks; without `weights`, their default pretrained weights
    torchvision:resnet50.IMAGENET1K_V1      the same with other ones of torchvision's weights, and their preprocessing
    timm:convnext_tiny.in12k    timm's networks, likewise
    package.module:factory      your function or class that returns the network; the current folder is importable
    path/to/file.py:factory     the same from a file
    path/to/run                 the folder of a training: its network, weights, preprocessing and classes

Weights are safetensors or a state dict; both are data, neither can run code (``torch.load(…, weights_only=True)``). A
spec, on the other hand, can: `package.module:factory` imports the module. Therefore a spec that comes out of a *file*
must pass `is_builtin_spec` first; what it admits runs only code that is installed as torchvision, timm or torch_grood.
"""

from __future__ import annotations

from torch_grood.models.load import LoadedModel, load_model
from torch_grood.models.new import NewModel, new_model
from torch_grood.models.spec import is_builtin_spec

__all__ = ["LoadedModel", "NewModel", "is_builtin_spec", "load_model", "new_model"]
