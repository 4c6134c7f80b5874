"""timm's models: `timm:NAME`, where NAME may name the weights too (vit_tiny_patch16_224.augreg_in21k_ft_in1k)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from torch_grood._optional import require
from torch_grood.errors import GroodError
from torch_grood.models.maker import ModelMaker, own_classes
from torch_grood.models.spec import NAME, one_line, unknown_name
from torch_grood.models.weights import head_note

if TYPE_CHECKING:
    from torch_grood.data.transforms import ImageTransform

__all__ = ["TimmMaker"]

_DEFAULT_CLASSES = 1000


class TimmMaker(ModelMaker):
    """Networks of one name.

    Args:
        spec: the whole text.
        name: as timm knows it.

    Raises:
        GroodError: if timm has no such model.
    """

    def __init__(self, spec: str, name: str) -> None:
        super().__init__(spec)
        self._timm = require("timm", extra="vision")
        self._name = name
        # The hub's own forms (hf-hub:…, local-dir:…) name files of anybody, timm's names only those of its makers.
        if not NAME.fullmatch(name) or not self._timm.is_model(name):
            known = [*self._timm.list_models(), *self._timm.list_pretrained()]
            raise unknown_name(spec, name, known, "timm's models")

    def make(self, num_classes: int | None = None) -> nn.Module:
        """See `ModelMaker.make`."""
        # timm's own default may be no head at all, which weights with one could not be compared with.
        n = _DEFAULT_CLASSES if num_classes is None else num_classes
        model: nn.Module = self._timm.create_model(self._name, pretrained=False, num_classes=n)
        return model

    def published(self, num_classes: int | None = None) -> tuple[nn.Module, tuple[str, ...] | None]:
        """See `ModelMaker.published`."""
        if num_classes is not None:
            raise own_classes(self.spec)
        return self._pretrained(), None

    def adapted(self, num_classes: int) -> tuple[nn.Module, tuple[str, ...]]:
        """See `ModelMaker.adapted`."""
        # timm itself leaves the head out where the number differs, and knows which weights have none.
        model = self._pretrained(num_classes=num_classes)
        config: Any = model.pretrained_cfg
        if config["num_classes"] == num_classes:
            return model, ()
        layers = config["classifier"]
        head = [
            f"{layer}.{name}"
            for layer in ([layers] if isinstance(layers, str) else layers or [])
            for name, _ in model.get_submodule(layer).named_parameters()
        ]
        return model, (head_note(head, config["num_classes"], num_classes),)

    def transform_of(self, model: nn.Module) -> ImageTransform:
        """See `ModelMaker.transform_of`."""
        from torch_grood.data.transforms import ImageTransform

        return ImageTransform.from_timm(self._timm.data.resolve_model_data_config(model))

    def _pretrained(self, **options: int) -> nn.Module:
        try:
            model: nn.Module = self._timm.create_model(self._name, pretrained=True, **options)
        except Exception as error:
            config = self._timm.get_pretrained_cfg(self._name)
            hub = getattr(config, "hf_hub_id", None)
            source = f"https://huggingface.co/{hub}" if hub else getattr(config, "url", None)
            remedy = f"download its weights from {source} and" if source else "timm has no weights for it;"
            raise GroodError(
                f"{self.spec}: the pretrained weights could not be loaded ({one_line(error)}); {remedy} pass them "
                "as a file (--weights)"
            ) from error
        return model
