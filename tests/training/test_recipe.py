"""Recipes say what the literature says, every value can be set, and nothing else gets in."""

from __future__ import annotations

import tomllib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_grood import GroodError
from torch_grood.training import Recipe, read_recipe, recipe_names

RECIPE = Recipe("mine", "nets.py:net")

# OpenOOD v1.5: configs/pipelines/train/baseline.yml, configs/preprocessors/base_preprocessor.yml, utils/config.
OPENOOD = {
    "optimizer": "sgd",
    "final_lr": 1e-6,
    "warmup_epochs": 0,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 5e-4,
    "label_smoothing": 0.0,
    "flip": True,
    "seed": 0,
}
CIFAR = {**OPENOOD, "model": "torch_grood.training.networks:resnet18_32x32", "crop": "padded", "padding": 4}
CIFAR |= {"epochs": 100, "batch_size": 128, "lr": 0.1, "pretrained": False}
IMAGENET = {**OPENOOD, "benchmark": "imagenet", "crop": "resized", "min_area": 0.08, "pretrained": True}
IMAGENET |= {"epochs": 30, "batch_size": 256, "lr": 0.001, "transform": None}
PUBLISHED = {
    "cifar10-resnet18": {**CIFAR, "benchmark": "cifar10", "transform": "cifar10"},
    "cifar100-resnet18": {**CIFAR, "benchmark": "cifar100", "transform": "cifar100"},
    "imagenet200-resnet18": {
        **OPENOOD,
        "benchmark": "imagenet200",
        "model": "torchvision:resnet18",
        "transform": "imagenet",
        "crop": "resized",
        "min_area": 0.08,
        "pretrained": False,
        "epochs": 90,
        "batch_size": 256,
        "lr": 0.1,
    },
    "imagenet-resnet50": {**IMAGENET, "model": "torchvision:resnet50.IMAGENET1K_V1"},
    "imagenet-vit-b-16": {**IMAGENET, "model": "torchvision:vit_b_16"},
    "imagenet-swin-t": {**IMAGENET, "model": "torchvision:swin_t"},
}

# Another value of every field, as a user writes it, and what it means.
OTHER_VALUES: dict[str, tuple[str, Any]] = {
    "name": ("x", "x"),
    "model": ('"torchvision:resnet50"', "torchvision:resnet50"),
    "title": ("It's = mine", "It's = mine"),
    "reference": ("none", "none"),
    "benchmark": ("cifar10", "cifar10"),
    "pretrained": ("true", True),
    "transform": ("'imagenet'", "imagenet"),
    "crop": ("padded", "padded"),
    "padding": ("7", 7),
    "min_area": ("0.5", 0.5),
    "flip": ("false", False),
    "epochs": ("3", 3),
    "batch_size": ("1_000", 1000),
    "optimizer": ("adamw", "adamw"),
    "lr": ("1", 1.0),
    "final_lr": ("1e-3", 0.001),
    "warmup_epochs": (" 5 ", 5),
    "momentum": ("0.5", 0.5),
    "nesterov": ("false", False),
    "weight_decay": ("0", 0.0),
    "label_smoothing": ("0.1", 0.1),
    "seed": ("9223372036854775807", 2**63 - 1),
}


def test_every_built_in_recipe_is_one_and_bears_its_name() -> None:
    assert set(PUBLISHED) | {"own-images"} == set(recipe_names())
    for name in recipe_names():
        recipe = read_recipe(name)
        assert recipe.name == name
        assert recipe.title


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_recipes_of_the_literature_have_its_values(name: str) -> None:
    recipe = read_recipe(name).to_dict()
    assert {key: recipe[key] for key in PUBLISHED[name]} == PUBLISHED[name]


def test_a_network_takes_the_recipe_for_own_images() -> None:
    own = read_recipe("own-images")
    assert own.benchmark is None
    for text, model in (
        ("resnet18", "torchvision:resnet18"),
        ("swin_t", "torchvision:swin_t"),
        ("timm:vit_tiny_patch16_224.augreg_in21k", "timm:vit_tiny_patch16_224.augreg_in21k"),
        ("a folder/nets.py:net", "a folder/nets.py:net"),
    ):
        assert read_recipe(text) == replace(own, model=model)


def test_no_network_of_torchvision_is_taken_for_a_misspelt_recipe() -> None:
    models = pytest.importorskip("torchvision.models")
    for name in models.list_models(module=models):
        assert read_recipe(name).model == f"torchvision:{name}"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10-resnet", r"unknown recipe 'cifar10-resnet'; did you mean cifar10-resnet18\? Recipes: cifar10-"),
        ("two words", r"unknown recipe 'two words'\. Recipes: .*own-images; or a \.toml file"),
        ("", "unknown recipe ''"),
        ("no/such.toml", r"no/such\.toml cannot be read: No such file"),
    ],
)
def test_a_name_that_is_no_recipe_says_what_there_is(name: str, message: str) -> None:
    with pytest.raises(GroodError, match=message):
        read_recipe(name)


def test_the_title_tells_what_was_changed() -> None:
    recipe = read_recipe("cifar10-resnet18")
    assert recipe.overridden(["seed=2", "lr=0.5", "epochs=100"]).title == f"{recipe.title}, but lr=0.5, seed=2"
    assert recipe.overridden(["epochs=100"]) == recipe
    assert recipe.overridden(["title=mine", "seed=2"]).title == "mine"
    assert len(replace(recipe, title="a" * 2000).overridden(["seed=2"]).title) == 2000


def test_every_field_can_be_set() -> None:
    assert list(OTHER_VALUES) == [field.name for field in fields(Recipe)]
    for name, (text, value) in OTHER_VALUES.items():
        # Momentum is needed where nesterov is on; final_lr must not exceed lr, nor the warm-up the epochs.
        changed = RECIPE.overridden([f"{name}={text}"])
        assert changed == replace(RECIPE, **{name: value})
        assert changed != RECIPE
        assert type(getattr(changed, name)) is type(value)
    together = RECIPE.overridden(
        f"{name} = {text}" for name, (text, _) in OTHER_VALUES.items() if name not in ("epochs", "nesterov")
    )
    assert together.to_dict() == RECIPE.to_dict() | {
        name: value for name, (_, value) in OTHER_VALUES.items() if name not in ("epochs", "nesterov")
    }
    assert RECIPE.overridden(["seed=1", "seed=2"]).seed == 2
    assert RECIPE.overridden(["transform=imagenet", "transform=none"]).transform is None
    assert RECIPE.overridden([]) == RECIPE


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lr", "expected NAME=VALUE, such as lr=0.05; got 'lr'"),
        ("=3", "expected NAME=VALUE"),
        ("learning_rate=3", "a recipe has no 'learning_rate'; "),
        ("epoch=3", "a recipe has no 'epoch'; did you mean epochs?"),
        ("lr=fast", "lr must be a number, not 'fast'"),
        ("lr=true", "lr must be a number, not True"),
        ("lr=nan", "lr must be a number, not nan"),
        ("lr=1e999", "lr must be a number, not inf"),
        ("lr=[0.1]", "lr must be a number, not [0.1]"),
        ("lr=", "lr must be a number, not ''"),
        ("lr=-0.1", "lr must be between 0 and 1e+06, not -0.1"),
        ("flip=yes", "flip must be true or false, not 'yes'"),
        ("flip=1", "flip must be true or false, not 1"),
        ("epochs=100.0", "epochs must be a whole number, not 100.0"),
        ("epochs=1.0", "epochs must be a whole number, not 1.0"),
        ("epochs=true", "epochs must be a whole number, not True"),
        ("epochs=0", "epochs must be between 1 and 1e+06, not 0"),
        ("seed=2020-01-01", "seed must be a whole number"),
        ("seed=-1", "seed must be between 0"),
        ("epochs=" + "9" * 5000, "epochs must be a whole number"),
        ("epochs=0x" + "f" * 5000, "epochs must be a whole number, not one too large to be shown"),
        ("lr=1" + "0" * 400, "lr must be a number"),
        ("epochs=" + "[" * 5000, "epochs must be a whole number"),
        ("crop=random", "crop must be one of none, padded, resized, not 'random'"),
        ("optimizer=SGD", "optimizer must be one of sgd, adamw, not 'SGD'"),
        ("title=a\x00b", "title must be a text"),
        ("title=" + "a" * 2001, "title must be a text"),
        ("batch_size=0", "batch_size must be between 1"),
        ("padding=-1", "padding must be between 0"),
        ("min_area=0", "min_area must be between 0.001"),
        ("min_area=1.1", "min_area must be between"),
        ("warmup_epochs=101", "warmup_epochs must be between 0 and 100, not 101"),
        ("final_lr=0.2", "final_lr must be between 0 and 0.1, not 0.2"),
        ("momentum=1.5", "momentum must be between 0 and 1"),
        ("momentum=0", "nesterov needs a momentum above 0; set nesterov=false as well"),
        ("weight_decay=-1", "weight_decay must be between 0"),
        ("label_smoothing=2", "label_smoothing must be between 0 and 1"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting: str, message: str) -> None:
    with pytest.raises(GroodError) as caught:
        RECIPE.overridden([setting])
    assert message in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the key name is missing"),
        (b'name = "a"', "the key model is missing"),
        (b'name = "a"\nmodel = "b"\nepoch = 3', "has no 'epoch'; did you mean epochs?"),
        (b'name = "a"\nmodel = "b"\nlr = "0.1"', "lr must be a number, not '0.1'"),
        (b'name = "a"\nmodel = {b = 1}', "model must be a text"),
        (b'name = "a"\n[model]\nb = 1', "model must be a text"),
        (b'name = "a"\nmodel = "b"\nlr = inf', "lr must be a number, not inf"),
        (b'name = "a"\nmodel = "b"\nflip = 1', "flip must be true or false"),
        (b'name = "a"\nmodel = "b"\nepochs = 0x' + b"f" * 5000, "epochs must be a whole number"),
        (b'name = "a"\nmodel = "b"\nepochs = ' + b"9" * 5000, "is no TOML"),
        (b"\xff\xfe", "is no UTF-8 text"),
        (b"\x00" * 100, "is no TOML"),
        (b"a = " + b"[" * 100_000, "is no TOML"),
        (b"#" * (2**20 + 1), "is larger than 1 MiB; expected a recipe"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "mine.toml"
    file.write_bytes(content)
    with pytest.raises(GroodError) as caught:
        read_recipe(file)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)


def test_a_file_with_two_keys_is_a_recipe(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('name = "mine"\nmodel = "timm:resnet18"\n')
    assert read_recipe(file) == read_recipe(str(file)) == replace(RECIPE, model="timm:resnet18")


@pytest.mark.parametrize("model", ["posix:abort", "nets.py:net", "torch_grood.__main__:main", "runs/seed0"])
def test_a_file_starts_no_code(tmp_path: Path, model: str) -> None:
    file = tmp_path / "theirs.toml"
    file.write_text(f'name = "theirs"\nmodel = "{model}"\n')
    with pytest.raises(GroodError, match="is code that a file must not start by itself, only you"):
        read_recipe(file)


texts = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), max_size=30)
recipes = st.builds(
    Recipe,
    name=texts,
    model=texts,
    title=texts,
    benchmark=st.none() | texts,
    pretrained=st.booleans(),
    transform=st.none() | texts,
    crop=st.sampled_from(["none", "padded", "resized"]),
    padding=st.integers(0, 1000),
    min_area=st.floats(1e-3, 1),
    epochs=st.integers(10, 1_000_000),
    batch_size=st.integers(1, 1_000_000),
    optimizer=st.sampled_from(["sgd", "adamw"]),
    lr=st.floats(1e-3, 1e6),
    final_lr=st.floats(0, 1e-3),
    warmup_epochs=st.integers(0, 10),
    momentum=st.floats(1e-300, 1),
    weight_decay=st.floats(0, 1e3) | st.integers(0, 1000),
    seed=st.integers(0, 2**63 - 1),
)


@given(recipes)
def test_a_recipe_comes_back_from_its_dict_and_from_json(recipe: Recipe) -> None:
    import json

    data = recipe.to_dict()
    assert Recipe.from_dict(data) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(data))) == recipe
    numbers = {key: value for key, value in data.items() if type(value) in (int, float, bool)}
    other = replace(recipe, title="", epochs=10**6, lr=1e6, final_lr=0.0, warmup_epochs=0)
    changed = other.overridden(f"{key}={str(value).lower()}" for key, value in numbers.items())
    assert changed == replace(recipe, title="")


@given(
    st.dictionaries(
        st.sampled_from([field.name for field in fields(Recipe)]) | texts,
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
        ),
    )
)
def test_whatever_a_file_says_becomes_a_recipe_or_an_error(data: dict[str, Any]) -> None:
    try:
        recipe = Recipe.from_dict({"name": "a", "model": "b"} | data)
    except GroodError:
        return
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_built_in_files_leave_no_published_value_to_the_defaults() -> None:
    """A change of a default must not change what a published recipe means."""
    folder = Path(__import__("torch_grood.training.recipe", fromlist=["x"]).__file__).parent / "recipes"
    for name in PUBLISHED:
        written = tomllib.loads((folder / f"{name}.toml").read_text())
        needed = {
            "model",
            "crop",
            "flip",
            "epochs",
            "batch_size",
            "lr",
            "final_lr",
            "momentum",
            "nesterov",
            "weight_decay",
        }
        assert needed <= written.keys()


def test_a_number_may_begin_with_its_point() -> None:
    assert read_recipe("cifar10-resnet18").overridden(["lr=.5"]).lr == 0.5


def test_a_benchmarks_name_is_not_taken_for_a_network() -> None:
    with pytest.raises(GroodError, match=r"unknown recipe 'cifar10'; did you mean cifar10-resnet18\?"):
        read_recipe("cifar10")
    with pytest.raises(GroodError, match="did you mean imagenet-resnet50 or imagenet-swin-t or imagenet-vit-b-16"):
        read_recipe("imagenet")
