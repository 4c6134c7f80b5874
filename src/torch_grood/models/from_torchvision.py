"""torchvision's classifiers: `torchvision:NAME`, or `torchvision:NAME.WEIGHTS` for other weights than the default ones.

Weights, preprocessing and a few arguments of the network belong together: ResNet-50's IMAGENET1K_V1, which the OOD
literature uses, expects images resized to 256, the default IMAGENET1K_V2 to 232. So the spec names them all.
"""

from __future__ import annotations

import contextlib
import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torch_grood._optional import require
from torch_grood.errors import GroodError
from torch_grood.models.maker import ModelMaker, own_classes
from torch_grood.models.spec import one_line, unknown_name
from torch_grood.models.weights import start_from

if TYPE_CHECKING:
    from torch_grood.data.transforms import ImageTransform

__all__ = ["TorchvisionMaker"]

# They have auxiliary heads, and the published weights are of networks that undo the usual normalisation first.
_INCEPTIONS = ("googlenet", "inception_v3")
# Published files of DenseNet and ViT are older than some names of modules. torchvision renames them when it loads its
# own weights by its own names; a file of a user is not loaded so.
_OLD_NAMES = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)"), r"\1\2"),
    (re.compile(r"(encoder_layer_\d+\.mlp\.)linear_1\."), r"\g<1>0."),
    (re.compile(r"(encoder_layer_\d+\.mlp\.)linear_2\."), r"\g<1>3."),
)


class TorchvisionMaker(ModelMaker):
    """Networks of one name.

    Args:
        spec: the whole text.
        name: NAME or NAME.WEIGHTS.

    Raises:
        GroodError: if torchvision has no such classifier, or no such weights for it.
    """

    def __init__(self, spec: str, name: str) -> None:
        super().__init__(spec)
        self._models = require("torchvision.models", extra="vision")
        self._name, _, wanted = name.partition(".")
        # module=models leaves out detection, segmentation and video.
        known = self._models.list_models(module=self._models)
        if self._name not in known:
            raise unknown_name(spec, self._name, known, "torchvision's classifiers")
        weights = self._models.get_model_weights(self._name)
        # One of VGG-16's is for its feature maps only.
        tags = {entry.name: entry for entry in weights if entry.meta["categories"]}
        if wanted and wanted not in tags:
            raise GroodError(f"{spec}: torchvision's weights for {self._name} are {', '.join(tags)}; not {wanted!r}")
        self._weights = tags[wanted] if wanted else weights.DEFAULT
        self._classes = tuple(self._weights.meta["categories"])

    def make(self, num_classes: int | None = None) -> nn.Module:
        """See `ModelMaker.make`."""
        options: dict[str, Any] = {"num_classes": len(self._classes) if num_classes is None else num_classes}
        if self._name in _INCEPTIONS:
            options["transform_input"] = True
        if self._name.startswith("vit_"):
            # The position embedding is of one size, that of the weights' preprocessing.
            (options["image_size"],) = self._weights.transforms().crop_size
        with warnings.catch_warnings():
            # Two of the networks announce that a later version will draw their random weights differently.
            warnings.simplefilter("ignore", FutureWarning)
            model: nn.Module = self._models.get_model(self._name, weights=None, **options)
        return model

    def published(self, num_classes: int | None = None) -> tuple[nn.Module, tuple[str, ...] | None]:
        """See `ModelMaker.published`."""
        if num_classes is not None:
            raise own_classes(self.spec)
        return self._published(), self._classes

    def adapted(self, num_classes: int) -> tuple[nn.Module, tuple[str, ...]]:
        """See `ModelMaker.adapted`."""
        model = self.make(num_classes)
        # For use, torchvision leaves the auxiliary heads out.
        published = self._published(**({"aux_logits": True} if self._name in _INCEPTIONS else {}))
        return model, start_from(model, published.state_dict(), num_classes, self.spec, str(self._file))

    def transform_of(self, model: nn.Module) -> ImageTransform:
        """See `ModelMaker.transform_of`."""
        from torch_grood.data.transforms import ImageTransform

        return ImageTransform.from_torchvision(self._weights.transforms())

    def renamed(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """See `ModelMaker.renamed`."""
        for pattern, name_now in _OLD_NAMES:
            state = {pattern.sub(name_now, name): tensor for name, tensor in state.items()}
        return state

    def _published(self, **options: Any) -> nn.Module:
        try:
            # torch.hub says on stdout what it downloads; that is for results. GoogLeNet warns of its auxiliary heads.
            with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)
                # get_model reads the file as a pickle; that it can be read as mere weights shows that it holds no code.
                self._weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
                model: nn.Module = self._models.get_model(self._name, weights=self._weights, **options)
        except Exception as error:
            raise GroodError(
                f"{self.spec}: the pretrained weights could not be loaded ({one_line(error)}); "
                f"download {self._weights.url} to {self._file}, or pass weights of your own (--weights)"
            ) from error
        return model

    @property
    def _file(self) -> Path:
        url: str = self._weights.url
        return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
