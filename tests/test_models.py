from __future__ import annotations

import json
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

from torch_grood.data import PRESETS
from torch_grood.errors import GroodError
from torch_grood.models import from_run as runs
from torch_grood.models import is_builtin_spec, load_model
from torch_grood.training import folder as run_files
from torch_grood.training.networks import resnet18_32x32

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
    for spec in ("torch_grood.models:load_model", "torch_grood.models.load:maker_of", "torch_grood.errors:GroodError"):
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


OWN = "torch_grood.training.networks:resnet18_32x32"
RECORD = {
    "title": "three kinds of things",
    "status": "interrupted",
    "model": {"spec": OWN, "num_classes": 3},
    "classes": ["a", "b", "c"],
    "transform": PRESETS["cifar10"].to_dict(),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder as a training leaves it."""
    path = tmp_path / "my run"
    path.mkdir()
    run_files.RunFolder(path).write(RECORD, ())
    torch.manual_seed(4)
    save_file(resnet18_32x32(3).state_dict(), run_files.RunFolder(path).weights)
    return path


def _altered(run: Path, **changes: Any) -> Path:
    (run / "run.json").write_text(json.dumps({"format": 1} | RECORD | changes))
    return run


def test_the_folder_of_a_training(run: Path) -> None:
    torch.manual_seed(4)
    expected = resnet18_32x32(3).state_dict()
    with torch.random.fork_rng():
        loaded = load_model(str(run))
    assert (loaded.spec, loaded.transform, loaded.classes) == (OWN, PRESETS["cifar10"], ("a", "b", "c"))
    assert not any(module.training for module in loaded.model.modules())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())
    assert load_model(str(run), num_classes=3).classes == ("a", "b", "c")
    _refused("my run has 3 classes, not 4; leave --num-classes out", str(run), num_classes=4)
    assert load_model(str(_altered(run, classes=None))).classes is None


def test_a_file_takes_the_place_of_a_runs_weights_only(run: Path, tmp_path: Path) -> None:
    other = resnet18_32x32(3).half()
    save_file(other.state_dict(), tmp_path / "half.safetensors")
    loaded = load_model(str(run), tmp_path / "half.safetensors")
    assert torch.equal(loaded.model.state_dict()["fc.weight"], other.fc.weight.float())
    assert (loaded.spec, loaded.transform, loaded.classes) == (OWN, PRESETS["cifar10"], ("a", "b", "c"))


def test_reader_and_writer_of_a_record_agree() -> None:
    assert (run_files.RECORD, run_files.WEIGHTS) == (runs.RECORD, runs.WEIGHTS)


def test_class_folders_whose_names_are_no_utf8(run: Path) -> None:
    names = ["a", "b", b"caf\xe9".decode("utf-8", "surrogateescape")]
    run_files.RunFolder(run).write(RECORD | {"classes": names}, ())
    assert load_model(str(run)).classes == tuple(names)


def test_a_folder_that_is_no_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = run / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    _refused("my run has no model.safetensors yet; go on with its training", str(run))
    weights.write_bytes(content[:1000])
    _refused("cannot be read as safetensors", str(run))
    weights.write_bytes(content)
    monkeypatch.chdir(run.parent)
    (run / "run.json").rename(run / "other.json")
    _refused(r"unknown model 'my run'; expected .* or the folder of a training \(with a run\.json\)", "my run")
    _refused("unknown model", "x" * 10_000)
    _refused("unknown model", "a\0b")


def test_a_package_is_not_shadowed_by_a_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent)
    run.rename("torchvision:resnet5")
    _refused("is not one of torchvision's classifiers", "torchvision:resnet5")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "no record of a training that this version reads"),
        ({"format": True}, "no record of a training that this version reads"),
        ({"model": None}, "model must be an object with spec and num_classes, not None"),
        ({"model": [OWN, 3]}, "model must be an object"),
        ({"model": {"spec": 5, "num_classes": 3}}, "spec must be a text of one line, not 5"),
        ({"model": {"spec": "\x1b[2Jnets:net", "num_classes": 3}}, "spec must be a text of one line"),
        ({"model": {"spec": "x" * 10**6, "num_classes": 3}}, "spec must be a text of one line"),
        ({"model": {"spec": OWN}}, "num_classes must be a whole number, at least 1, not None"),
        ({"model": {"spec": OWN, "num_classes": True}}, "num_classes must be a whole number"),
        ({"model": {"spec": OWN, "num_classes": 0}}, "num_classes must be a whole number"),
        ({"model": {"spec": OWN, "num_classes": 3.0}}, "num_classes must be a whole number"),
        (
            {"model": {"spec": OWN, "num_classes": 10**15}, "classes": None},
            "says 1,000,000,000,000,000 classes, and .*",
        ),
        (
            {"model": {"spec": OWN, "num_classes": 10}, "classes": None},
            "says 10 classes, and .* no tensor with as many",
        ),
        ({"model": {"spec": OWN, "num_classes": 64}, "classes": None}, r"does not fit .* 2 of another shape"),
        ({"model": {"spec": "torch_grood.models:load_model", "num_classes": 3}}, "not a network of torch_grood"),
        ({"model": {"spec": "torchvision:resnet0", "num_classes": 3}}, "not one of torchvision's classifiers"),
        ({"model": {"spec": "timm:hf-hub:x/y", "num_classes": 3}}, "was trained from timm:hf-hub:x/y, code that"),
        ({"classes": ["a", "b"]}, "classes must be the names of the 3 classes"),
        ({"classes": "abc"}, "classes must be the names of the 3 classes"),
        ({"classes": [1, 2, 3]}, "classes must be the names of the 3 classes"),
        ({"transform": None}, "its transform cannot be used: a transform must be an object"),
        ({"transform": PRESETS["cifar10"].to_dict() | {"resize": 10**9}}, "its transform cannot be used: resize"),
    ],
)
def test_a_record_from_anywhere(run: Path, changes: dict[str, Any], message: str) -> None:
    _refused(message, str(_altered(run, **changes)))


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"[" * 100_000, b"\xff\xfe\x00", b'{"format": ' + b"9" * 10_000 + b"}", b"\x00" * 100],
    ids=range(7),
)
def test_a_record_that_is_none(run: Path, content: bytes) -> None:
    (run / "run.json").write_bytes(content)
    _refused(r"run\.json is no record of a training", str(run))


def test_a_record_without_end(run: Path) -> None:
    with (run / "run.json").open("wb") as file:
        file.truncate(2**30)
    _refused(r"run\.json is larger than 64 MiB", str(run))


def test_a_row_of_no_numbers_is_no_head(run: Path) -> None:
    """A tensor without elements has any number of rows for nothing."""
    state = dict(resnet18_32x32(3).state_dict()) | {"fc.weight": torch.zeros(10**9, 0)}
    save_file(state, run / "model.safetensors")
    _refused("says 1,000,000,000 classes", str(_altered(run, model={"spec": OWN, "num_classes": 10**9}, classes=None)))
    _refused(r"does not fit .*fc\.weight \(1000000000, 0\) instead of", OWN, weights=run / "model.safetensors")


def test_a_run_of_the_users_own_code_says_what_to_type(file: Path, run: Path) -> None:
    spec = "my nets.py:net"
    file.rename("my nets.py")
    message = (
        r"my run was trained from my nets\.py:net, code that a record must not start by itself, only you; pass "
        r"--model 'my nets\.py:net' --weights '.*my run/model\.safetensors' --transform '.*my run/transform\.json'$"
    )
    _refused(message, str(_altered(run, model={"spec": spec, "num_classes": 3})))
    # A record of a record, and so on without end.
    _refused("was trained from ", str(_altered(run, model={"spec": str(run), "num_classes": 3})))
