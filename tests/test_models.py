from __future__ import annotations

import re
import sys
import urllib.error
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from torch_grood.errors import GroodError
from torch_grood.models import is_builtin_spec, load_model

FACTORIES = """
import torch
from torch import nn

def net(num_classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Linear(5, num_classes))

def demanding(num_classes):
    return net(num_classes)

def fixed():
    return net(10)

def anything(**options):
    return net(**options)

def greedy(width, depth=1):
    return net()

def broken():
    raise RuntimeError("no luck\\nsecond line")

def tensor():
    return torch.zeros(1)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(12, 3)

ready = Net()
number = 7
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file of factories, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my_nets.py"
    path.write_text(FACTORIES)
    before, modules = list(sys.path), set(sys.modules)
    yield path
    assert sys.path == before
    for name in set(sys.modules) - modules:
        if name.startswith(("my_nets", "grood_model_")):
            del sys.modules[name]


def _net(num_classes: int = 10) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Linear(5, num_classes))


def _refused(message: str, spec: str, **options: Any) -> None:
    with pytest.raises(GroodError, match=message) as caught:
        load_model(spec, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["net", "fixed", "anything", "Net", "ready"])
def test_factories_by_module_and_by_file(file: Path, name: str) -> None:
    for spec in (f"my_nets:{name}", f"my_nets.py:{name}", f"{file}:{name}"):
        loaded = load_model(spec)
        assert isinstance(loaded.model, nn.Module)
        assert not loaded.model.training
        assert (loaded.spec, loaded.transform, loaded.classes) == (spec, None, None)


def test_a_file_may_import_its_neighbour_and_has_no_name_to_shadow(file: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "json.py").write_text("from my_nets_helper import net\n")
    (tmp_path / "deep" / "my_nets_helper.py").write_text(FACTORIES)
    model: Any = load_model("deep/json.py:net").model
    assert model[3].out_features == 10
    assert "deep" not in str(sys.modules["json"].__file__)


def test_dataclasses_work_in_a_file(file: Path) -> None:
    source = "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    file.write_text(f"{source}@dataclass\nclass C:\n    a: int = 0\n{FACTORIES}")
    load_model("my_nets.py:net")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("resnet50", "unknown model 'resnet50'; expected torchvision:NAME"),
        ("", "unknown model ''"),
        ("my_nets:", "unknown model 'my_nets:'"),
        (":net", "unknown model ':net'"),
        ("my nets:net", "unknown model 'my nets:net'"),
        ("timm:", "unknown model 'timm:'"),
        ("absent_module:net", r"no module 'absent_module' in .* or among the installed packages; .*path/to/file\.py"),
        ("my_nets.sub:net", "raised ModuleNotFoundError|no module 'my_nets.sub'"),
        ("absent.py:net", r"no such file: absent\.py"),
        ("my_nets:nett", "my_nets has no 'nett'; it has net"),
        ("my_nets:number", "number is an object of type int, not a function or class"),
        ("my_nets:tensor", r"returned an object of type Tensor, not a torch\.nn\.Module"),
        ("my_nets:broken", "the factory raised RuntimeError: no luck$"),
        ("my_nets:greedy", "the factory needs width; give these parameters defaults"),
        ("my_nets:demanding", r"needs a number of classes; pass num_classes \(--num-classes\)"),
    ],
)
def test_specs_that_cannot_be(file: Path, spec: str, message: str) -> None:
    _refused(message, spec)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import absent_thing", "importing .*my_nets.* raised ModuleNotFoundError: No module named 'absent_thing'"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("def (", "raised SyntaxError"),
        ("import sys; sys.exit(3)", "raised SystemExit: 3"),
    ],
)
def test_modules_that_fail(file: Path, source: str, message: str) -> None:
    file.write_text(source)
    for spec in ("my_nets:net", "my_nets.py:net"):
        _refused(message, spec)


def test_num_classes(file: Path) -> None:
    for name in ("net", "demanding", "anything"):
        model: Any = load_model(f"my_nets:{name}", num_classes=4).model
        assert model[3].out_features == 4
    _refused("no parameter num_classes; leave num_classes", "my_nets:fixed", num_classes=4)
    _refused("num_classes must be at least 1, not 0", "my_nets:net", num_classes=0)


Wrap = Callable[[dict[str, Any]], dict[str, Any]]

WRAPPINGS: dict[str, Wrap] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "model": lambda state: {"model": state, "optimizer": {"lr": 0.1}},
    "parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "compiled and parallel": lambda state: {"model": {f"_orig_mod.module.{k}": v for k, v in state.items()}},
    "old": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("wrap", WRAPPINGS.values(), ids=WRAPPINGS)
def test_weights_in_every_wrapping(
    file: Path, tmp_path: Path, wrap: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    original = _net()
    torch.save(wrap(dict(original.state_dict())), tmp_path / "w.pt")
    loaded = load_model("my_nets:fixed", weights=tmp_path / "w.pt").model
    for name, tensor in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


@pytest.mark.parametrize("name", ["net", "demanding"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_number_of_classes_is_taken_from_the_weights(file: Path, tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"w{suffix}"
    state = _net(7).state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model: Any = load_model(f"my_nets:{name}", weights=path).model
    assert torch.equal(model[3].weight, state["3.weight"])


def test_a_head_that_is_not_last_is_found_too(file: Path, tmp_path: Path) -> None:
    file.write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes):\n"
        "        super().__init__()\n"
        "        self.head, self.body = nn.Linear(5, num_classes), nn.Linear(12, 5)\n"
    )
    head, body = nn.Linear(5, 7), nn.Linear(12, 5)
    torch.save(nn.ModuleDict({"head": head, "body": body}).state_dict(), tmp_path / "w.pt")
    model: Any = load_model("my_nets:Net", weights=tmp_path / "w.pt").model
    assert torch.equal(model.head.weight, head.weight)


def test_weights_that_do_not_fit(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(_net(7).state_dict(), path)
    message = r"does not fit my_nets:fixed: tensors 2 of another shape \(3\.weight \(7, 5\) instead of \(10, 5\), "
    _refused(message + r".*seems to have 7 classes; .*\(--num-classes 7\)", "my_nets:fixed", weights=path)
    _refused("seems to have 7 classes", "my_nets:net", weights=path, num_classes=3)
    torch.save({f"layer{i}": torch.zeros(2) for i in range(9)}, path)
    names = "layer0, layer1, layer2, layer3, layer4, …"
    message = rf"8 missing|tensors 8 missing|missing \(1\.weight, .*, …\); 9 unexpected \({names}\)"
    _refused(message, "my_nets:net", weights=path)


class Evil:
    """Would create the file `hacked` if it were unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("hacked", "w")


def test_pickled_code_is_refused_and_not_run(file: Path, tmp_path: Path) -> None:
    for content in (Evil(), {"state_dict": _net().state_dict(), "args": Evil()}, _net()):
        torch.save(content, tmp_path / "w.pt")
        _refused(
            r"contains pickled objects, which could run code, so it is not read; save one with torch\.save",
            "my_nets:net",
            weights=tmp_path / "w.pt",
        )
    assert not (tmp_path / "hacked").exists()


def test_weights_files_that_are_none(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    _refused(r"w\.pt: no such weights file", "my_nets:net", weights=path)
    for content in (b"", b"hello", b"PK\3\4 nonsense"):
        path.write_bytes(content)
        _refused("cannot be read as PyTorch weights", "my_nets:net", weights=path)
    torch.save(_net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])
    _refused("cannot be read as PyTorch weights .* truncated", "my_nets:net", weights=path)
    for data, message in (
        ([1, 2], "holds an object of type list, not a state dict"),
        ({}, "it has no tensors"),
        ({"epoch": 3, "w": torch.zeros(1)}, "it has non-tensors under epoch"),
        ({0: torch.zeros(1)}, "it has non-tensors under 0"),
    ):
        torch.save(data, path)
        _refused(message, "my_nets:net", weights=path)
    safe = tmp_path / "w.safetensors"
    safe.write_bytes(b"\xff" * 20)
    _refused("cannot be read as safetensors", "my_nets:net", weights=safe)


def test_a_torchscript_archive_is_named(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    _refused("is a TorchScript archive, not a state dict", "my_nets:net", weights=path)


@pytest.mark.parametrize(
    ("spec", "builtin"),
    [
        ("torchvision:resnet50", True),
        ("timm:resnet18.a1_in1k", True),
        ("torch_grood.training.networks:resnet18", True),
        ("timm:hf-hub:somebody/model", False),
        ("timm:local-dir:/tmp/x", False),
        ("torchvision:../x", False),
        ("torchvision:", False),
        ("torch_grood.__main__:main", False),
        ("torch_grood._optional:require", False),
        ("torch_grood.training.networks:__builtins__", False),
        ("torch_grood:GROOD", False),
        ("torch_grood_evil.x:y", False),
        ("torch_grood.py:x", False),
        ("torch_grood.models.py:x", False),
        ("os:getcwd", False),
        ("my_nets:net", False),
        ("file.py:net", False),
        ("resnet50", False),
        ("", False),
        ("torchvision:resnet50\n", False),
    ],
)
def test_what_a_file_may_name(spec: str, builtin: bool) -> None:
    assert is_builtin_spec(spec) is builtin


def test_own_specs_return_networks_only(file: Path) -> None:
    for spec in ("torch_grood.models:load_model", "torch_grood.models:require", "torch_grood.errors:GroodError"):
        _refused("is not a network of torch_grood", spec)


def test_torchvision_with_own_weights(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.save(models.squeezenet1_1(num_classes=7).state_dict(), tmp_path / "w.pt")
    loaded = load_model("torchvision:squeezenet1_1", weights=tmp_path / "w.pt")
    assert loaded.model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert loaded.transform is not None
    assert loaded.transform.crop == 224
    assert loaded.classes is None
    _refused(r"tensors 2 of another shape", "torchvision:squeezenet1_1", weights=tmp_path / "w.pt", num_classes=3)


def test_torchvision_pretrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download folder stands in for the network: default weights that lie there are not fetched."""
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = models.SqueezeNet1_1_Weights.DEFAULT.url
    cached = tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    original = models.squeezenet1_1()
    torch.save(original.state_dict(), cached)
    loaded = load_model("torchvision:squeezenet1_1")
    assert torch.equal(loaded.model.state_dict()["classifier.1.bias"], original.state_dict()["classifier.1.bias"])
    assert loaded.classes is not None
    assert loaded.classes[:2] == ("tench", "goldfish")
    torch.save(Evil(), cached)
    monkeypatch.chdir(tmp_path)
    _refused("pretrained weights could not be loaded", "torchvision:squeezenet1_1")
    assert not (tmp_path / "hacked").exists()


def test_torchvision_download_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")

    def offline(*arguments: Any, **options: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    place = re.escape(str(tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"))
    _refused(
        rf"no route to host.*; download https://download\.pytorch\.org/models/resnet18-f37072fd\.pth to {place}, "
        r"or pass weights of your own \(--weights\)",
        "torchvision:resnet18",
    )


def test_torchvision_names() -> None:
    pytest.importorskip("torchvision")
    _refused("'resnet5' is not one of torchvision's classifiers; did you mean resnet", "torchvision:resnet5")
    _refused("not one of torchvision's classifiers", "torchvision:fasterrcnn_resnet50_fpn")
    _refused("pretrained weights have their own number of classes", "torchvision:resnet18", num_classes=3)


def test_timm_with_own_weights(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    save_file(timm.create_model("test_resnet", num_classes=7).state_dict(), tmp_path / "w.safetensors")
    loaded = load_model("timm:test_resnet", weights=tmp_path / "w.safetensors")
    assert loaded.model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert loaded.transform is not None
    assert loaded.transform.crop == (160, 160)


def test_timm_download_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    from timm.models import _builder

    def offline(*arguments: Any, **options: Any) -> None:
        raise OSError("offline mode is on")

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", offline)
    _refused(
        r"offline mode is on\); download its weights from https://huggingface\.co/timm/test_resnet\.r160_in1k "
        r"and pass them as a file \(--weights\)",
        "timm:test_resnet",
    )


def test_timm_names() -> None:
    pytest.importorskip("timm")
    _refused("'resnet5' is not one of timm's models; did you mean", "timm:resnet5")
    for name in ("hf-hub:somebody/model", "local-dir:/tmp"):
        _refused("is not one of timm's models", f"timm:{name}")
