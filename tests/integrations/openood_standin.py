"""What OpenOOD v1.5 does with a postprocessor, written from its interface, since it is not on PyPI.

Facts (its evaluation_api/evaluator.py): the postprocessor must be an instance of `BasePostprocessor`; its `setup` gets
the network and two dicts of loaders, whose batches are dicts; if `APS_mode` is set and `hyperparam_search_done` is not,
every combination of `args_dict` goes through `set_hyperparam`, later names varying slowest, and the best validation
AUROC wins; `inference(net, loader, progress)` gives numpy classes, confidences and labels; labels of OOD sets are then
set to −1.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

__all__ = ["BasePostprocessor", "DictImages", "Evaluator"]


class BasePostprocessor:
    def __init__(self, config: Any) -> None:
        self.config = config


class DictImages(Dataset[dict[str, Any]]):
    """Images as OpenOOD's data sets give them; `order` sorts them by class, as its CIFAR training lists are."""

    def __init__(self, images: Tensor, labels: Tensor, order: bool = False) -> None:
        rows = labels.argsort(stable=True) if order else torch.arange(len(labels))
        self.images, self.labels = images[rows], labels[rows]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict[str, Any]:
        image, label = self.images[i], int(self.labels[i])
        soft = torch.full((3,), 1 / 3)
        return {
            "image_name": f"{i}.png",
            "data": image,
            "data_aux": image,
            "label": label,
            "soft_label": soft,
            "index": i,
        }


class Evaluator:
    def __init__(
        self,
        net: nn.Module,
        loaders: Mapping[str, Any],
        postprocessor: Any,
        base: type = BasePostprocessor,
    ) -> None:
        if not isinstance(postprocessor, base):
            raise TypeError("postprocessor should inherit BasePostprocessor in OpenOOD")
        self.net, self.loaders, self.postprocessor = net, loaders, postprocessor
        postprocessor.setup(net, loaders["id"], loaders["ood"])
        if postprocessor.APS_mode and not postprocessor.hyperparam_search_done:
            self.search()
        self.net.eval()

    def search(self) -> None:
        lists = list(self.postprocessor.args_dict.values())
        self.tried = [list(reversed(values)) for values in itertools.product(*reversed(lists))]
        self.found = []
        for values in self.tried:
            self.postprocessor.set_hyperparam(values)
            known = self.postprocessor.inference(self.net, self.loaders["id"]["val"])
            unknown = self.postprocessor.inference(self.net, self.loaders["ood"]["val"])
            self.found.append(self.metrics(known, unknown)["AUROC"])
        self.postprocessor.set_hyperparam(self.tried[int(np.argmax(self.found))])
        print("Final hyperparam:", self.postprocessor.get_hyperparam())
        self.postprocessor.hyperparam_search_done = True

    def eval_ood(self, progress: bool = True) -> dict[str, dict[str, float]]:
        self.net.eval()
        known = self.postprocessor.inference(self.net, self.loaders["id"]["test"], progress)
        found = {}
        for split in ("near", "far"):
            for name, loader in self.loaders["ood"][split].items():
                found[name] = self.metrics(known, self.postprocessor.inference(self.net, loader, progress))
            rows = [found[name] for name in self.loaders["ood"][split]]
            found[f"{split}ood"] = {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}
        return found

    @staticmethod
    def metrics(known: Any, unknown: Any) -> dict[str, float]:
        """ID is the positive class, so that infinite and NaN confidences are refused as scikit-learn does it."""
        prediction, confidence, label = (np.concatenate(pair) for pair in zip(known, unknown, strict=True))
        label[len(known[0]) :] = -1
        is_id = (label != -1).astype(int)
        precision, recall, _ = precision_recall_curve(1 - is_id, 1 - confidence)
        return {
            "AUROC": float(roc_auc_score(is_id, confidence)),
            "AUPR_OUT": float(auc(recall, precision)),
            "ACC": float((prediction[is_id == 1] == label[is_id == 1]).mean()),
        }


def loader(images: Tensor, labels: Tensor, order: bool = False, batch_size: int = 16) -> DataLoader[dict[str, Any]]:
    """As OpenOOD makes its loaders, without worker processes."""
    return DataLoader(DictImages(images, labels, order), batch_size=batch_size, shuffle=False)
