"""Networks to train: random weights, published ones and files, of which a head for other classes starts anew.

The folder that torch.hub downloads to stands in for the network: what lies there under a file's name is not fetched.
"""

from __future__ import annotations

import io
import re
import urllib.error
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from models import write_patterns
from torch_grood.errors import GroodError
from torch_grood.models import load_model, new_model
from torch_grood.models.load import maker_of
from torch_grood.training import networks

tv = pytest.importorskip("torchvision.models")
timm = pytest.importorskip("timm")

Put = Callable[..., dict[str, Tensor]]
SMALL = "torch_grood.training.networks:resnet18_32x32"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty download folder, and no network."""

    def offline(*arguments: Any, **options: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def published(hub: Path) -> Put:
    """Put random weights where those of a network would be downloaded to."""

    def put(name: str, tag: str = "DEFAULT", **options: Any) -> dict[str, Tensor]:
        torch.manual_seed(12345)
        state: dict[str, Tensor] = tv.get_model(name, weights=None, **options).state_dict()
        torch.save(state, hub / tv.get_model_weights(name)[tag].url.rpartition("/")[2])
        return state

    return put


def _different(model: nn.Module, state: dict[str, Tensor]) -> set[str]:
    ours = model.state_dict()
    assert ours.keys() == state.keys()
    return {name for name, tensor in ours.items() if not torch.equal(tensor, state[name])}


def _seeded(spec: str, num_classes: int, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    made = new_model(spec, num_classes, **options)
    assert all(module.training for module in made.model.modules())
    assert made.spec == spec
    return made.model


def _refused(message: str, spec: str, num_classes: int = 5, **options: Any) -> None:
    with pytest.raises(GroodError, match=message) as caught:
        new_model(spec, num_classes, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "size", "crop"),
    [("torchvision:squeezenet1_1", 64, 224), ("timm:test_resnet", 64, (160, 160)), (SMALL, 32, None)],
)
def test_random_weights_follow_from_the_seed(spec: str, size: int, crop: Any) -> None:
    first, again, other = (_seeded(spec, 7, seed) for seed in (1, 1, 2))
    assert _different(first, again.state_dict()) == set()
    assert _different(first, other.state_dict())
    assert first(torch.zeros(2, 3, size, size)).shape == (2, 7)
    made = new_model(spec, 7)
    assert made.notes == ()
    assert (None if made.transform is None else made.transform.crop) == crop


def test_a_head_for_other_classes_starts_anew(published: Put) -> None:
    state = published("resnet18")
    torch.manual_seed(3)
    made = new_model("torchvision:resnet18", 10, pretrained=True)
    assert made.notes == ("the head (fc.weight, fc.bias) starts anew: the weights have 1,000 classes, these images 10",)
    ours = made.model.state_dict()
    assert {name for name in state if not torch.equal(ours[name], state[name])} == {"fc.weight", "fc.bias"}
    assert torch.equal(ours["fc.weight"], _seeded("torchvision:resnet18", 10, 3).state_dict()["fc.weight"])
    assert ours["fc.weight"].shape == (10, 512)
    assert made.transform is not None
    assert made.transform.resize == 256


def test_a_head_for_as_many_classes_is_kept(published: Put) -> None:
    state = published("squeezenet1_1")
    made = new_model("torchvision:squeezenet1_1", 1000, pretrained=True)
    assert (_different(made.model, state), made.notes) == (set(), ())


def test_one_training_step_learns_with_a_new_head(published: Put) -> None:
    published("squeezenet1_1")
    model = _seeded("torchvision:squeezenet1_1", 3, pretrained=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = nn.functional.cross_entropy(model(torch.randn(4, 3, 64, 64)), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert {"classifier.1.weight", "features.0.weight"} <= _different(model, before)


def test_weights_are_chosen_by_their_name_and_bring_their_preprocessing(published: Put) -> None:
    first = published("mobilenet_v2", "IMAGENET1K_V1")
    _refused(
        r"no route to host.*mobilenet_v2-7ebf99e0\.pth to .*mobilenet_v2-7ebf99e0\.pth",
        "torchvision:mobilenet_v2",
        pretrained=True,
    )
    spec = "torchvision:mobilenet_v2.IMAGENET1K_V1"
    loaded = load_model(spec)
    assert _different(loaded.model, first) == set()
    assert loaded.spec == spec
    assert loaded.classes is not None
    assert new_model(spec, 4, pretrained=True).notes
    sizes = {tag: maker_of(f"torchvision:resnet50{tag}").transform_of(nn.Identity()) for tag in ("", ".IMAGENET1K_V1")}
    assert [transform.resize for transform in sizes.values() if transform is not None] == [232, 256]


def test_weights_that_torchvision_has_not() -> None:
    _refused(
        r"torchvision's weights for resnet50 are IMAGENET1K_V1, IMAGENET1K_V2; not 'IMAGENET1K_V3'",
        "torchvision:resnet50.IMAGENET1K_V3",
    )
    # These are for feature maps only.
    _refused("weights for vgg16 are IMAGENET1K_V1; not", "torchvision:vgg16.IMAGENET1K_FEATURES")


def test_torchvision_transforms_are_those_of_the_weights() -> None:
    photo = _photo()
    presets = {
        str(weights.transforms()): (f"torchvision:{name}.{weights.name}", weights.transforms())
        for name in tv.list_models(module=tv)
        for weights in tv.get_model_weights(name)
        if weights.meta["categories"]
    }
    assert len(presets) > 10
    for spec, preset in presets.values():
        ours = maker_of(spec).transform_of(nn.Identity())
        assert ours is not None
        assert torch.equal(ours(photo), preset(photo)), spec


@pytest.mark.parametrize(
    ("name", "pattern", "old", "example"),
    [
        ("densenet121", r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", "denseblock1.denselayer1.norm.1.weight"),
        pytest.param(
            "vit_b_16", r"mlp\.([03])", "mlp.linear_{}", "encoder_layer_11.mlp.linear_2.bias", marks=pytest.mark.slow
        ),
    ],
    ids=["densenet", "vit"],
)
def test_old_names_in_published_files(
    published: Put, hub: Path, name: str, pattern: str, old: str, example: str
) -> None:
    state = published(name)

    def of_old(match: re.Match[str]) -> str:
        return old.format(1 if match[1] == "0" else 2) if "{}" in old else match.expand(old)

    # Files of that age have no counters either; here all are 0.
    renamed = {re.sub(pattern, of_old, key): tensor for key, tensor in state.items() if "num_batches" not in key}
    assert any(key.endswith(example) for key in renamed)
    file = next(hub.iterdir())
    torch.save(renamed, file)
    assert _different(load_model(f"torchvision:{name}", file).model, state) == set()
    made = new_model(f"torchvision:{name}", 1000, pretrained=True)
    assert _different(made.model, state) == set()


def test_networks_that_ask_for_the_versions_of_their_modules(published: Put, hub: Path, tmp_path: Path) -> None:
    state = published("mnasnet0_5")
    assert new_model("torchvision:mnasnet0_5", 3, pretrained=True).notes
    # Safetensors cannot say them.
    save_file(state, tmp_path / "w.safetensors")
    for file in (tmp_path / "w.safetensors", next(hub.iterdir())):
        assert _different(load_model("torchvision:mnasnet0_5", file).model, state) == set()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size", "heads"), [("googlenet", 64, 3), ("inception_v3", 96, 2)])
def test_networks_with_auxiliary_heads(published: Put, hub: Path, name: str, size: int, heads: int) -> None:
    """The published weights are of networks that undo the usual normalisation first, whoever loads them."""
    state = published(name, init_weights=False)
    spec, images = f"torchvision:{name}", torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = load_model(spec).model(images)
        assert torch.equal(load_model(spec, next(hub.iterdir())).model(images), expected)
        again = new_model(spec, 1000, pretrained=True).model
        assert torch.equal(again.eval()(images), expected)
        made = new_model(spec, 4, pretrained=True)
        outputs = made.model(torch.randn(2, 3, 299, 299))
    assert [output.shape for output in outputs] == [(2, 4)] * heads
    assert made.notes[0].startswith("the head (")
    ours = made.model.state_dict()
    anew = [key for key, tensor in state.items() if tensor.shape != ours[key].shape]
    assert len(anew) == 2 * heads
    assert anew[0] in made.notes[0]
    assert _different(_seeded(spec, 4, 1), _seeded(spec, 4, 1).state_dict()) == set()


@pytest.mark.slow
def test_a_vision_transformer_has_the_size_of_its_weights() -> None:
    model = maker_of("torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1").make(2)
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 384, 384)).shape == (1, 2)


def test_weights_that_cannot_be_downloaded(hub: Path) -> None:
    place = re.escape(str(hub / "resnet18-f37072fd.pth"))
    _refused(
        rf"no route to host.*; download https://download\.pytorch\.org/models/resnet18-f37072fd\.pth to {place}, "
        r"or pass weights of your own \(--weights\)",
        "torchvision:resnet18",
        pretrained=True,
    )


@pytest.mark.parametrize("load", [load_model, lambda spec: new_model(spec, 5, pretrained=True)], ids=["load", "new"])
def test_a_damaged_download_is_refused(
    hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], load: Callable[[str], object]
) -> None:
    content = io.BytesIO()
    torch.save(tv.squeezenet1_1().state_dict(), content)

    class Response(io.BytesIO):
        def info(self) -> Message:
            return Message()

    monkeypatch.setattr(torch.hub, "urlopen", lambda request: Response(content.getvalue()))
    with pytest.raises(GroodError, match="invalid hash value"):
        load("torchvision:squeezenet1_1")
    assert not list(hub.iterdir())
    said = capsys.readouterr()
    assert "Downloading" in said.err
    assert said.out == ""


class Evil:
    """Would create the file `hacked` if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("hacked", "w")


def test_published_weights_cannot_run_code(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Evil(), hub / tv.SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2])
    _refused("could not be loaded", "torchvision:squeezenet1_1", pretrained=True)
    torch.save(Evil(), tmp_path / "w.pt")
    _refused("could run code", "torchvision:squeezenet1_1", weights=tmp_path / "w.pt")
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("wrap", ["bare", "parallel", "nested", "half", "safetensors"])
def test_files_in_the_forms_of_openood_and_others(tmp_path: Path, wrap: str) -> None:
    torch.manual_seed(9)
    state = networks.resnet18_32x32(10).state_dict()
    file = tmp_path / ("w.safetensors" if wrap == "safetensors" else "best.ckpt")
    if wrap == "half":
        state = {name: tensor.half().float() for name, tensor in state.items()}
    forms: dict[str, Any] = {
        "parallel": {f"module.{name}": tensor for name, tensor in state.items()},
        "nested": {"state_dict": state, "epoch": 100},
        "half": {name: tensor.half() for name, tensor in state.items()},
    }
    save_file(state, file) if wrap == "safetensors" else torch.save(forms.get(wrap, state), file)
    kept = new_model(SMALL, 10, weights=file)
    assert (_different(kept.model, state), kept.notes) == (set(), ())
    assert kept.model.conv1.weight.dtype == torch.float32
    other = new_model(SMALL, 4, weights=file)
    assert other.notes == ("the head (fc.weight, fc.bias) starts anew: the weights have 10 classes, these images 4",)
    ours = other.model.state_dict()
    assert {name for name in state if not torch.equal(ours[name], state[name])} == {"fc.weight", "fc.bias"}


def test_a_file_takes_the_place_of_published_weights(tmp_path: Path) -> None:
    """So that a recipe that starts from them works where nothing can be downloaded."""
    state = tv.squeezenet1_1().state_dict()
    save_file(state, tmp_path / "w.safetensors")
    made = new_model("torchvision:squeezenet1_1", 1000, pretrained=True, weights=tmp_path / "w.safetensors")
    assert _different(made.model, state) == set()


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save(tv.squeezenet1_0().state_dict(), file)
    _refused(
        r"w\.pt does not fit torchvision:squeezenet1_1: tensors .* of another shape",
        "torchvision:squeezenet1_1",
        weights=file,
    )
    _refused(r"does not fit .*: tensors 102 missing \(conv1\.weight, .*, …\); 52 unexpected", SMALL, weights=file)
    _refused("no such weights file", SMALL, weights=tmp_path / "absent.pt")
    # A change of the first dimension that is not that of the classes.
    state = networks.resnet18_32x32(5).state_dict()
    state["bn1.weight"] = torch.zeros(65)
    torch.save(state, file)
    _refused(r"1 of another shape \(bn1\.weight \(65,\) instead of \(64,\)\); pass", SMALL, weights=file)
    # Neither is one besides the head's.
    state["fc.weight"], state["fc.bias"] = torch.zeros(10, 512), torch.zeros(10)
    torch.save(state, file)
    _refused("3 of another shape", SMALL, weights=file)
    state = networks.resnet18_32x32(5).state_dict()
    state["fc.weight"], state["fc.bias"] = torch.zeros(10, 7), torch.zeros(10)
    torch.save(state, file)
    _refused("2 of another shape", SMALL, weights=file)


def _as_hub(monkeypatch: pytest.MonkeyPatch, state: dict[str, Tensor] | None) -> None:
    from timm.models import _builder

    def fetched(*arguments: Any, **options: Any) -> dict[str, Tensor]:
        if state is None:
            raise OSError("offline mode is on")
        return dict(state)

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", fetched)


def test_timm_weights_with_another_head(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    state = timm.create_model("test_resnet").state_dict()
    _as_hub(monkeypatch, state)
    kept = new_model("timm:test_resnet", 1000, pretrained=True)
    assert (_different(kept.model, state), kept.notes) == (set(), ())
    made = new_model("timm:test_resnet", 3, pretrained=True)
    assert made.notes == ("the head (fc.weight, fc.bias) starts anew: the weights have 1,000 classes, these images 3",)
    ours = made.model.state_dict()
    assert {name for name in state if not torch.equal(ours[name], state[name])} == {"fc.weight", "fc.bias"}
    assert made.transform is not None
    assert made.transform.crop == (160, 160)
    assert (
        _different(
            _seeded("timm:test_resnet", 3, 1, pretrained=True),
            _seeded("timm:test_resnet", 3, 1, pretrained=True).state_dict(),
        )
        == set()
    )


def test_timm_weights_without_a_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-supervised networks are published without one."""
    name = "vit_tiny_patch16_224"
    state = timm.create_model(name, num_classes=0).state_dict()
    _as_hub(monkeypatch, state)
    real = timm.get_pretrained_cfg(name).to_dict() | {"num_classes": 0}
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, **options: create(*names, **options, pretrained_cfg=real))
    made = new_model(f"timm:{name}", 3, pretrained=True)
    assert made.notes == ("the head (head.weight, head.bias) starts anew: the weights have none",)
    assert torch.equal(made.model.state_dict()["cls_token"], state["cls_token"])


def test_timm_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    _as_hub(monkeypatch, None)
    _refused(
        r"offline mode is on\); download its weights from https://huggingface\.co/timm/test_resnet\.r160_in1k "
        r"and pass them as a file \(--weights\)",
        "timm:test_resnet",
        pretrained=True,
    )


FACTORIES = """
from torch import nn

def net(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, num_classes)).eval()

def anything(**options):
    return net(**options)

def fixed():
    return net(5)
"""


def test_factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_to_train.py").write_text(FACTORIES)
    for name in ("net", "anything", "fixed"):
        spec = f"nets_to_train.py:{name}"
        assert _seeded(spec, 5)(torch.zeros(2, 12)).shape == (2, 5)
        _refused(r"a factory has no published weights .*leave pretrained .* or pass a file", spec, pretrained=True)
        torch.save(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)).state_dict(), "w.pt")
        assert new_model(spec, 5, weights="w.pt").notes == ()
    _refused(
        r"no parameter num_classes, and its network no tensor of 4 rows, .*; give the factory the parameter",
        "nets_to_train.py:fixed",
        4,
    )
    (note,) = new_model("nets_to_train.py:net", 4, weights="w.pt").notes
    assert note == "the head (1.weight, 1.bias) starts anew: the weights have 5 classes, these images 4"


def test_what_cannot_be_trained(tmp_path: Path) -> None:
    _refused("num_classes must be at least 1, not 0", SMALL, 0)
    _refused("unknown model 'resnet50'", "resnet50")
    _refused("is not one of torchvision's classifiers; did you mean", "torchvision:resnet5")
    _refused("is not one of timm's models", "timm:hf-hub:somebody/model")


def test_fine_tuned_from_published_weights_to_a_model(published: Put, tmp_path: Path) -> None:
    """The published file, the training, and the folder that it leaves, together."""
    pytest.importorskip("accelerate")
    from torch_grood.training import Computation, Recipe, train

    state = published("squeezenet1_1")
    images = write_patterns(tmp_path / "images", 12, seed=0)
    recipe = Recipe("own", "torchvision:squeezenet1_1", pretrained=True, epochs=1, batch_size=4, lr=1e-3)
    train(recipe, images, tmp_path / "run", computation=Computation(device="cpu", workers=0), progress=False)
    loaded = load_model(str(tmp_path / "run"))
    assert (loaded.spec, loaded.classes) == ("torchvision:squeezenet1_1", ("a", "b", "c"))
    assert loaded.transform == maker_of(loaded.spec).transform_of(loaded.model)
    ours = loaded.model.state_dict()
    assert ours["classifier.1.bias"].shape == (3,)
    first = (ours["features.0.weight"] - state["features.0.weight"]).abs().max()
    assert 0 < first < 0.1, "the training went on from the published weights"


def _photo() -> Image.Image:
    """A photograph that scikit-learn brings."""
    datasets = pytest.importorskip("sklearn.datasets")
    return Image.fromarray(datasets.load_sample_image("flower.jpg"))
