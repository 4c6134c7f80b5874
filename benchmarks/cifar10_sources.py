"""GROOD's outlier sources, λ and early layer on CIFAR-10, beside MSP, MLS, energy and KNN.

    python benchmarks/cifar10_sources.py --model networks.py:resnet20 --weights resnet20_cifar10.pt \
        --mean .485,.456,.406 --std .229,.224,.225 --data OPENOOD_FOLDER --layers layer1,layer2,layer3 \
        --output resnet20.json

`--data` is a folder in OpenOOD's layout (benchmark_imglist/cifar10/*.txt, images_classic/). The training set, or a
seeded part of it, is read once per early layer; what was extracted is kept in `--cache`. Settings are compared twice:

- on the OOD test sets, which is what the tables report and nothing is chosen on;
- on ID validation images alone, which is what a default may be chosen on. By mistakes: are the images that the
  classifier gets wrong scored above those that it gets right? And by leaving classes out: each class in turn has no
  prototype and no stored gradient, 100 mixed samples come from the others, and its images are to be told from theirs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from torch_grood import GROOD, Mixup, PrototypeMean, UniformNoise
from torch_grood.data import ImageLoader, ImageTransform, image_loader, read_source
from torch_grood.data.sources import ImageSource
from torch_grood.evaluation.methods import Energy, Knn, Method, Mls, Msp
from torch_grood.evaluation.metrics import detection_metrics
from torch_grood.evaluation.outputs import Outputs, World
from torch_grood.features import Extraction, FeatureExtractor
from torch_grood.models import load_model
from torch_grood.outliers import OutlierContext, TrainingSamples
from torch_grood.training_pass import TrainingPass

LAMBDAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
NEAR, FAR = ("cifar100", "tin"), ("mnist", "texture")
N_OUTLIERS, N_LEFT_OUT = 1000, 100
BASELINES: dict[str, Method] = {"MSP": Msp(precision="float64"), "MLS": Mls(), "energy": Energy(), "KNN": Knn()}


def main() -> None:
    """Run the study; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--mean", required=True)
    parser.add_argument("--std", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layers", required=True, help="early layers, comma-separated")
    parser.add_argument("--n-train", type=int, default=50_000, help="training images, drawn by seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/torch-grood/study").expanduser())
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()

    model = load_model(arguments.model, arguments.weights, num_classes=10).model
    mean, std = (tuple(float(x) for x in text.split(",")) for text in (arguments.mean, arguments.std))
    transform = ImageTransform(resize=32, crop=32, interpolation="bilinear", mean=mean, std=std)  # type: ignore[arg-type]
    key = hashlib.sha256(arguments.weights.read_bytes()).hexdigest()[:12]
    cache = arguments.cache / f"{arguments.weights.stem}-{key}-{arguments.n_train}-{arguments.seed}"
    cache.mkdir(parents=True, exist_ok=True)
    lists = arguments.data / "benchmark_imglist" / "cifar10"

    def loader(name: str, n: int | None = None) -> ImageLoader:
        source = read_source(lists / f"{name}.txt", root=arguments.data / "images_classic")
        return image_loader(_subset(source, n, arguments.seed), transform, batch_size=200)

    detector = GROOD(model, outliers=PrototypeMean())
    sets = {
        name: _cached(cache / f"{name}.pt", lambda name=name: detector.extract(loader(name))._asdict())
        for name in ("test_cifar10", "val_cifar10", "val_tin", *(f"test_{name}" for name in (*NEAR, *FAR)))
    }
    passes = {
        layer: _cached(
            cache / f"pass-{layer}.pt",
            lambda layer=layer: _training_pass(
                model, layer, loader("train_cifar10", arguments.n_train), arguments.seed
            ),
        )
        for layer in arguments.layers.split(",")
    }
    first = next(iter(passes.values()))
    train = Extraction(first["features"], first["logits"], first["labels"])
    predictions = first["predictions"]

    sources: dict[str, Tensor] = {"mean of the class prototypes": _class_means(train).mean(0, keepdim=True)}
    sources["uniform noise, n = 100"] = first["noise"][:100]
    sources["uniform noise, n = 1000"] = first["noise"]
    sources["real outliers (TIN validation), n = 100 *"] = sets["val_tin"]["features"][:100]
    sources["real outliers (TIN validation), n = 1000 *"] = sets["val_tin"]["features"]
    left_out: dict[str, list[Tensor]] = {"mean of the class prototypes": [_mean_without(train, c) for c in range(10)]}
    for layer, found in passes.items():
        for lam in LAMBDAS:
            name = f"Mixup at {layer}, λ = {lam}, n = {N_OUTLIERS}"
            sources[name] = found["mixed"][str(lam)]
            left_out[name] = found["left_out"][str(lam)]
    for lam in (0.5, 0.9):
        layer = next(iter(passes))
        sources[f"Mixup at {layer}, λ = {lam}, n = 100"] = passes[layer]["mixed"][str(lam)][:100]
    left_out["uniform noise, n = 100"] = [sources["uniform noise, n = 100"]] * 10

    held_out = sets["val_cifar10"]
    wrong = held_out["logits"].argmax(1) != held_out["labels"]
    rows = {}
    for name, features in tqdm(sources.items(), desc="score"):
        scored = GROOD(None).fit_features(train.features, train.labels, predictions, ood_features=features)  # type: ignore[arg-type]
        rows[name] = _figures({set_: scored.log_score_features(data["features"]) for set_, data in sets.items()}, wrong)
        if name in left_out:
            rows[name]["left_out"] = _leave_classes_out(train, predictions, sets["val_cifar10"], left_out[name])
    for baseline, method in BASELINES.items():
        scorer = method.fit(World(Outputs(train.features, train.logits)))
        rows[baseline] = _figures(
            {set_: scorer(Outputs(data["features"], data["logits"])) for set_, data in sets.items()}, wrong
        )
    test = sets["test_cifar10"]
    result = {
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(arguments).items() if k != "cache"},
        "n_train": len(train.features),
        "sizes": {name: len(data["features"]) for name, data in sets.items()},
        "classifier_accuracy": float((test["logits"].argmax(1) == test["labels"]).double().mean()),
        "prototype_accuracy": float(
            (torch.cdist(test["features"].double(), _class_means(train)).argmin(1) == test["labels"]).double().mean()
        ),
        "feature_norm": float(train.features.norm(dim=1).mean()),
        "rows": rows,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    print(_markdown(result))


def _subset(source: ImageSource, n: int | None, seed: int) -> ImageSource:
    if n is None or n >= len(source):
        return source
    chosen = np.sort(np.random.default_rng(seed).permutation(len(source))[:n])
    assert source.labels is not None
    labels = source.labels
    return ImageSource(tuple(source.paths[i] for i in chosen), tuple(labels[i] for i in chosen), source.classes)


def _cached(path: Path, make):  # type: ignore[no-untyped-def]
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        torch.save(make(), temporary)
        temporary.replace(path)
    return torch.load(path, weights_only=True)


def _training_pass(model: torch.nn.Module, layer: str, loader: ImageLoader, seed: int) -> dict[str, object]:
    """One pass; then outliers for every λ, over all classes and with each class left out in turn."""
    extractor = FeatureExtractor(model, early_layer=layer)
    passed = TrainingPass(extractor, Mixup(n=N_OUTLIERS), seed, loader, None)
    with extractor.evaluation():
        for images, labels, _ in tqdm(loader, desc=layer):
            passed.add(images, labels)
        samples, early = passed.samples(), passed.early_prototypes
        assert samples is not None
        assert early is not None
        context = OutlierContext(
            passed.prototypes.means, extractor, early.means, samples, batch_size=200, progress=False
        )
        noise_context = OutlierContext(
            passed.prototypes.means, extractor, image_shape=passed.image_shape, channel_range=passed.channel_range,
            batch_size=100, seed=seed, progress=False,
        )  # fmt: skip
        mixed = {str(lam): Mixup(n=N_OUTLIERS, lam=lam).features(context) for lam in LAMBDAS}
        noise = UniformNoise(n=N_OUTLIERS).features(noise_context)
        sample_logits = extractor(samples.images).logits
        left_out: dict[str, list[Tensor]] = {str(lam): [] for lam in LAMBDAS}
        for c in tqdm(range(10), desc="classes left out"):
            # The samples' own labels are not kept; those that the classifier takes for class c are left out with it.
            others = (sample_logits.argmax(1) != c).nonzero().flatten()[:N_LEFT_OUT]
            masked = sample_logits[others].index_fill(1, torch.tensor([c]), -torch.inf)
            part = TrainingSamples(samples.images[others], masked.topk(2, dim=1).indices[:, 1])
            one = OutlierContext(passed.prototypes.means, extractor, early.means, part, batch_size=200, progress=False)
            for lam in LAMBDAS:
                left_out[str(lam)].append(Mixup(n=N_LEFT_OUT, lam=lam).features(one))
    features = torch.cat(list(passed.features.drain()))
    with torch.no_grad():
        logits = model.get_submodule(extractor.head or "")(features)
    return {
        "features": features, "logits": logits, "labels": torch.cat(passed.rows),
        "predictions": torch.cat(passed.predictions), "mixed": mixed, "noise": noise, "left_out": left_out,
    }  # fmt: skip


def _class_means(train: Extraction) -> Tensor:
    assert train.labels is not None
    labels = train.labels
    return torch.stack([train.features[labels == c].double().mean(0) for c in range(10)])


def _mean_without(train: Extraction, c: int) -> Tensor:
    means = _class_means(train)
    return means[torch.arange(10) != c].mean(0, keepdim=True)


def _figures(scores: dict[str, Tensor], wrong: Tensor) -> dict[str, float]:
    id_scores, held_out = scores["test_cifar10"], scores["val_cifar10"]
    found = {"mistakes": detection_metrics(held_out[~wrong], held_out[wrong]).auroc}
    for name in (*NEAR, *FAR):
        metrics = detection_metrics(id_scores, scores[f"test_{name}"])
        found[name] = metrics.auroc
        found[f"{name} fpr"] = metrics.ood_accepted_at_95_id_kept
        found[f"{name} fpr openood"] = metrics.id_flagged_at_95_ood_caught
    for group, names in (("near", NEAR), ("far", FAR)):
        for suffix in ("", " fpr", " fpr openood"):
            found[group + suffix] = float(np.mean([found[name + suffix] for name in names]))
    return found


def _leave_classes_out(train: Extraction, predictions: Tensor, held_out: dict[str, Tensor], ood: list[Tensor]) -> float:
    """Mean AUROC of telling the held-out images of each left-out class from those of the other classes."""
    assert train.labels is not None
    labels = train.labels
    found = []
    for c in range(10):
        keep = labels != c
        names = [k for k in range(10) if k != c]
        row_of = torch.zeros(10, dtype=torch.int64)
        row_of[names] = torch.arange(9)
        rows = row_of[labels[keep]]
        # A sample that is taken for the class left out stays a wrong one.
        predicted = torch.where(predictions[keep] == c, (rows + 1) % 9, row_of[predictions[keep]])
        detector = GROOD(None).fit_features(
            train.features[keep], rows, predicted, ood_features=ood[c], classes=names,
        )  # fmt: skip
        is_out = held_out["labels"] == c
        scores = detector.log_score_features(held_out["features"])
        found.append(detection_metrics(scores[~is_out], scores[is_out]).auroc)
    return float(np.mean(found))


def _markdown(result: dict) -> str:  # type: ignore[type-arg]
    lines = [
        "| method | near AUROC | CIFAR-100 | TIN | far AUROC † | MNIST | Textures | near FPR@95 "
        "| near FPR@95 (OpenOOD) | ID: mistakes | ID: classes left out |",
        "|---|" + "---|" * 10,
    ]
    for name, row in result["rows"].items():
        columns = ("near", "cifar100", "tin", "far", "mnist", "texture", "near fpr", "near fpr openood", "mistakes")
        cells = [row[column] for column in columns]
        left_out = f"{100 * row['left_out']:.2f}" if "left_out" in row else ""
        lines.append(f"| {name} | " + " | ".join(f"{100 * cell:.2f}" for cell in cells) + f" | {left_out} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
