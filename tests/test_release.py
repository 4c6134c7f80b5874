"""What is released: wheel and sdist have all that they need, and the same version and licence are named everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_bytes
from importlib.metadata import version
from pathlib import Path

import pytest

pytest.importorskip("build")

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "torch_grood"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    # From a copy: setuptools writes beside what it builds.
    source = tmp_path_factory.mktemp("source") / "project"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", ROOT.as_uri(), source], check=True, capture_output=True)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    return folder


def files_of_package() -> set[str]:
    tracked = subprocess.run(
        ["git", "ls-files", "src/torch_grood"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    return {path.removeprefix("src/") for path in tracked if path}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        described = message_from_bytes(archive.read(metadata))
    assert {name for name in names if ".dist-info/" not in name} == files_of_package()
    assert described["License-Expression"] == "Apache-2.0"
    assert described["Requires-Python"] == ">=3.11"
    extras = set(described.get_all("Provides-Extra"))
    assert {"all", "bench", "cli", "export", "onnx", "report", "serve", "sklearn", "train", "vision"} <= extras
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_the_sdist_holds_the_tests_and_the_documents(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    wanted = {path for path in tracked.split("\n") if path and not path.startswith((".ci/", ".github/", ".gitignore"))}
    assert wanted - names == set()


def test_one_version_and_one_licence() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert version("torch-grood") == project["version"]
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == project["version"]  # type: ignore[index]
    assert f"\nlicense: {project['license']}\n" in citation
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_all_holds_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = set(re.search(r"\[(.*)\]", extras["all"][0])[1].split(","))  # type: ignore[index]
    assert named == set(extras) - {"all", "dev", "docs"}


def test_extras_that_the_code_names_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {
        name
        for path in PACKAGE.rglob("*.py")
        for name in re.findall(r'extra="([a-z]+)"', path.read_text(encoding="utf-8"))
    }
    assert len(named) > 3
    assert named <= set(extras)
