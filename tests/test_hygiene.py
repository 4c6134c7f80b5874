"""What importing and using the core may load; each check runs in a child process, and is itself checked."""

from __future__ import annotations

import subprocess
import sys

# Imported where they are used, never by `import torch_grood`.
LAZY = {
    "faiss",
    "torchvision",
    "matplotlib",
    "PIL",
    "sklearn",
    "typer",
    "rich",
    "pyarrow",
    "pytorch_ood",
    "gdown",
    "timm",
    "transformers",
    "pandas",
    "mpmath",
    "safetensors",
}
# The extras: the core must do its work where none of them is installed.
OPTIONAL = ["torchvision", "timm", "PIL", "sklearn", "matplotlib", "typer", "rich", "pyarrow", "pytorch_ood", "gdown"]

BLOCK = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None

sys.meta_path.insert(0, Blocker())
"""

USE_THE_CORE = """
import pathlib, tempfile, warnings
warnings.simplefilter("error")
import torch
from torch import nn
from torch_grood import GROOD, MissingDependencyError, ood_gradient

torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
)
images = torch.randn(60, 1, 8, 8)
labels = model(images).argmax(1)
labels[:3] = torch.arange(3)
for index in ("exact", "IVF2,Flat"):
    detector = GROOD(model, index=index).fit([(images, labels)], progress=False)
    detector.calibrate([torch.randn(40, 1, 8, 8)], fpr=0.1, progress=False)
    # The first three were mislabelled, so that their gradients are not stored.
    assert detector.predict(images[3:5], progress=False).neighbor.tolist() == [3, 4]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "x.grood"
        detector.save(path)
        loaded = GROOD.load(path, model)
        assert torch.equal(loaded.score(images), detector.score(images))
        del loaded
print("done")
"""


def child(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False, encoding="utf-8"
    )


def loaded_by(statement: str, allowed_by: str = "pass") -> set[str]:
    """Top-level modules that `statement` loads, beyond those that `allowed_by` does."""
    found = child(
        f"import sys\n{allowed_by}\nbefore = set(sys.modules)\n{statement}\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    assert found.returncode == 0, found.stderr
    return set(found.stdout.split())


def with_blocked(code: str) -> subprocess.CompletedProcess[str]:
    return child(f"BLOCKED = {OPTIONAL!r}\n{BLOCK}\n{code}")


def test_the_import_loads_no_optional_or_heavy_package() -> None:
    loaded = loaded_by("import torch_grood", allowed_by="import numpy, torch")
    assert "torch_grood" in loaded
    assert loaded & LAZY == set()
    assert loaded - {"torch_grood"} - set(sys.stdlib_module_names) - {"tqdm"} == set()


def test_the_check_of_imports_can_fail() -> None:
    assert "mpmath" in loaded_by("import json, mpmath") & LAZY
    # A module that is loaded from within a function or a package counts as well.
    assert "PIL" in loaded_by("exec('import PIL.Image')") & LAZY
    assert "mpmath" not in loaded_by("import json", allowed_by="import mpmath")


def test_the_core_works_without_any_extra() -> None:
    found = with_blocked(USE_THE_CORE)
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() == "done"


def test_the_blockade_blocks() -> None:
    found = with_blocked(
        "import json\nfor name in BLOCKED:\n    try:\n        __import__(name)\n"
        "    except ModuleNotFoundError as error:\n        print(error.name)"
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == OPTIONAL
    assert "No module named 'PIL" in with_blocked("import PIL.Image").stderr


def test_a_missing_extra_is_named() -> None:
    found = with_blocked("from torch_grood._optional import require\nrequire('PIL.Image', extra='vision')")
    assert "needs the package pillow" in found.stderr
    assert "pip install 'torch-grood[vision]'" in found.stderr


def test_the_import_says_nothing() -> None:
    found = child("import warnings\nwarnings.simplefilter('error')\nimport torch_grood")
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_reading_images_needs_no_torch() -> None:
    assert "torch" in loaded_by("from torch_grood.data import image_loader")
    loaded = loaded_by("from torch_grood.data import PRESETS, ImageTransform, decode_image, load_image, read_source")
    assert "torch_grood" in loaded
    assert "torch" not in loaded


def test_a_package_has_the_names_that_it_promises_and_no_others() -> None:
    found = child(
        "import torch_grood, torch_grood.data as data\n"
        "for package in (torch_grood, data):\n"
        "    assert set(package.__all__) <= set(dir(package))\n"
        "    for name in package.__all__:\n        getattr(package, name)\n"
        "try:\n    data.nothing\nexcept AttributeError as error:\n    print(error)"
    )
    assert found.stdout.strip() == "module 'torch_grood.data' has no attribute 'nothing'"
