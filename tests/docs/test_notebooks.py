"""The notebooks run from top to bottom, and are kept without what they showed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("pytorch_ood")

import nbclient
import nbformat
from doc_worlds import NETWORKS, write_openood

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
DATA = Path(os.environ.get("GROOD_DATA", "~/.cache/torch-grood/openood")).expanduser()
WEIGHTS = Path(os.environ.get("GROOD_WEIGHTS", DATA / "weights"))


def run(notebook: Any, folder: Path) -> str:
    """All that it prints.

    Raises:
        CellExecutionError: if a cell fails.
    """
    client = nbclient.NotebookClient(notebook, timeout=280, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output
    )


def read(name: str) -> Any:
    return nbformat.read(NOTEBOOKS / name, as_version=4)


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_is_valid_and_holds_no_results(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) > 4
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)


@pytest.mark.slow
def test_ten_minutes_with_your_own_classifier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = read("ten-minutes.ipynb")
    said = run(notebook, tmp_path)
    assert "of 196 flagged" in said
    assert "of 163 flagged" in said
    auroc = float(said.partition("AUROC ")[2].split()[0])
    assert auroc > 0.9
    images = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(images) == 2


@pytest.mark.slow
def test_the_papers_table_on_made_up_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    scope: dict[str, Any] = {}
    exec(NETWORKS, scope)
    write_openood(tmp_path / "openood")
    (tmp_path / "networks.py").write_text(NETWORKS, encoding="utf-8")
    torch.save(scope["net"](10).state_dict(), tmp_path / "net.pt")
    for name, value in {
        "GROOD_DATA": tmp_path / "openood",
        "GROOD_WEIGHTS": tmp_path,
        "GROOD_CHECKPOINT": "net.pt",
        "GROOD_IMAGES": "40",
        "TMPDIR": tmp_path,
    }.items():
        monkeypatch.setenv(name, str(value))
    said = run(read("paper-table.ipynb"), tmp_path)
    assert "GROOD (outliers = mixup)" in said
    assert "places365; means of their groups are not comparable" in said
    assert "nothing could be compared" in said


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.skipif(
    not (DATA / "benchmark_imglist/cifar10").is_dir() or not (WEIGHTS / "resnet20_cifar10.pt").is_file(),
    reason=f"no real images in {DATA}, or no weights in {WEIGHTS}",
)
def test_the_papers_table_on_real_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "GROOD_DATA": DATA,
        "GROOD_WEIGHTS": WEIGHTS,
        "GROOD_IMAGES": "300",
        "TMPDIR": tmp_path,
    }.items():
        monkeypatch.setenv(name, str(value))
    said = run(read("paper-table.ipynb"), tmp_path)
    row = next(line for line in said.split("\n") if line.startswith("GROOD  "))
    near, far = (float(part.split()[0]) for part in (row[34:].strip(), row.rpartition(")  ")[2].strip()))
    assert near > 80
    assert far > 90
    assert "ID CIFAR-10 train: 300 of 50,000 images" in said
    assert "nothing could be compared" in said
