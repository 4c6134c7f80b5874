from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from torch_grood.data import PRESETS, ImageTransform
from torch_grood.errors import GroodError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = ImageTransform(None, None, "bilinear", (0, 0, 0), (1, 1, 1))


def _image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"])
@pytest.mark.parametrize(
    ("resize", "crop"), [(32, 32), (40, 33), (None, 20), (29, None), ((20, 31), (24, 18)), (15, 30)]
)
def test_equals_torchvision_bit_for_bit(interpolation: str, resize: Any, crop: Any) -> None:
    tv = pytest.importorskip("torchvision.transforms")
    steps = [
        *([] if resize is None else [tv.Resize(resize, tv.InterpolationMode(interpolation))]),
        *([] if crop is None else [tv.CenterCrop(crop)]),
        tv.ToTensor(),
        tv.Normalize(MEAN, STD),
    ]
    ours = ImageTransform(resize, crop, interpolation, MEAN, STD)
    for size in ((32, 32), (33, 47), (47, 33), (64, 21), (1, 3), (224, 223)):
        image = _image(*size)
        result = ours(image)
        assert result.dtype == torch.float32
        assert torch.equal(result, tv.Compose(steps)(image)), size


def test_from_torchvision_equals_the_preset() -> None:
    models = pytest.importorskip("torchvision.models")
    for weights in (models.ResNet50_Weights.IMAGENET1K_V2, models.Swin_T_Weights.DEFAULT):
        preset = weights.transforms()
        ours = ImageTransform.from_torchvision(preset)
        for size in ((300, 400), (257, 250)):
            assert torch.equal(ours(_image(*size)), preset(_image(*size)))


def test_from_torchvision_refuses_other_presets() -> None:
    segmentation = pytest.importorskip("torchvision.transforms._presets").SemanticSegmentation(resize_size=520)
    with pytest.raises(GroodError, match=r"ImageClassification preset .* got SemanticSegmentation"):
        ImageTransform.from_torchvision(segmentation)


TIMM = {"input_size": (3, 224, 224), "interpolation": "bicubic", "crop_pct": 0.9, "crop_mode": "center"}
TIMM |= {"mean": MEAN, "std": STD}


@pytest.mark.parametrize(
    "change", [{}, {"crop_pct": 1.0}, {"crop_mode": "squash"}, {"crop_mode": "squash", "input_size": (3, 96, 160)}]
)
def test_from_timm_equals_timm(change: dict[str, Any]) -> None:
    data = pytest.importorskip("timm.data")
    config = TIMM | change
    theirs = data.create_transform(**config)
    for size in ((300, 400), (257, 250), (100, 80)):
        assert torch.equal(ImageTransform.from_timm(config)(_image(*size)), theirs(_image(*size)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_mode": "border"}, "crop mode 'border'"),
        ({"input_size": (3, 96, 160)}, "96 × 160 cannot be written"),
        ({"input_size": (1, 28, 28)}, "1 channels"),
        ({"interpolation": "random"}, "unknown interpolation 'random'"),
    ],
)
def test_from_timm_refuses_what_it_cannot_express(change: dict[str, Any], message: str) -> None:
    with pytest.raises(GroodError, match=message):
        ImageTransform.from_timm(TIMM | change)


@pytest.mark.parametrize("transform", [*PRESETS.values(), PLAIN, ImageTransform((8, 9), (4, 5), "box", MEAN, STD)])
def test_survives_json(transform: ImageTransform) -> None:
    assert ImageTransform.from_dict(json.loads(json.dumps(transform.to_dict()))) == transform


GOOD = PRESETS["imagenet"].to_dict()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "must be an object with named fields, not list"),
        ({}, "lacks resize, crop, interpolation, mean, std"),
        (GOOD | {"flip": True}, "has flip"),
        ({k: v for k, v in GOOD.items() if k != "std"}, "lacks std"),
        (GOOD | {"resize": True}, "resize must be an int"),
        (GOOD | {"resize": 0}, "resize must be an int"),
        (GOOD | {"resize": 10**9}, "resize must be an int"),
        (GOOD | {"resize": "256"}, "resize must be an int"),
        (GOOD | {"resize": 256.0}, "resize must be an int"),
        (GOOD | {"crop": [224]}, "crop must be an int"),
        (GOOD | {"crop": [224, 224, 3]}, "crop must be an int"),
        (GOOD | {"crop": [[1, 2], 3]}, "crop must be an int"),
        (GOOD | {"crop": [None, 3]}, "crop must be an int"),
        (GOOD | {"interpolation": "eval"}, "unknown interpolation 'eval'"),
        (GOOD | {"interpolation": ["box"]}, "unknown interpolation"),
        (GOOD | {"mean": [0.5, 0.5]}, "mean must be three numbers"),
        (GOOD | {"mean": [0.5, 0.5, float("nan")]}, "mean must be three numbers"),
        (GOOD | {"mean": [0.5, 0.5, 10**400]}, "mean must be three numbers"),
        (GOOD | {"mean": "abc"}, "mean must be three numbers"),
        (GOOD | {"mean": [123.675, 116.28, 103.53]}, r"divide those of \[0, 255\] by 255"),
        (GOOD | {"std": [0.1, 0.0, 0.1]}, "std must be at least"),
        (GOOD | {"std": [0.1, -0.1, 0.1]}, "std must be at least"),
    ],
)
def test_bad_data_is_refused(data: object, message: str) -> None:
    with pytest.raises(GroodError, match=message):
        ImageTransform.from_dict(data)


def test_only_rgb_images_are_taken() -> None:
    for image in (Image.new("L", (4, 4)), Image.new("RGBA", (4, 4)), torch.zeros(3, 4, 4)):
        with pytest.raises(GroodError, match="expected a PIL image of mode RGB"):
            PLAIN(image)  # type: ignore[arg-type]


def test_an_elongated_image_does_not_fill_the_memory() -> None:
    with pytest.raises(GroodError, match=r"would make it 256 × 7680000, beyond the limit"):
        PRESETS["imagenet"](_image(1, 30_000))


def test_the_input_is_left_alone() -> None:
    image = _image(8, 8)
    before = image.tobytes()
    PLAIN(image).zero_()
    assert image.tobytes() == before


@pytest.mark.parametrize(
    ("transform", "size"),
    [(PRESETS["imagenet"], (224, 224)), (PLAIN, None), (ImageTransform(32, None, "box", MEAN, STD), None)],
)
def test_output_size(transform: ImageTransform, size: tuple[int, int] | None) -> None:
    assert transform.output_size == size
    assert ImageTransform((5, 6), None, "box", MEAN, STD).output_size == (5, 6)
    assert ImageTransform((5, 6), (3, 4), "box", MEAN, STD).output_size == (3, 4)


def test_reads_as_a_sentence() -> None:
    assert str(PRESETS["imagenet"]) == (
        "resize shorter side to 256 (bilinear), centre crop 224, mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    )
