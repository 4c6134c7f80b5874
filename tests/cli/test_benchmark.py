"""``grood benchmark`` from images to tables, on a benchmark of one's own."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytorch_ood")

from command import PREPARED, Result, run
from safetensors.torch import load_file, save_file

SPEC = """
name = "digits"
title = "Digits 0 to 3"

[id]
train.folder = "train"
val.folder = "val"
test = {folder = "test", count = 181}

[val_ood]
folder = "tune"

[near.digits]
folder = "ood"

[far.noise]
folder = "noise"
title = "Noise"
"""
TWO_OUTPUTS = """
class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net(4)

    def forward(self, x):
        return self.net(x), 1

def pair():
    return Pair()
"""
METHODS = "grood,grood:outliers=mean,msp,energy,knn:k=10,mds,odin,knn:k=5000"


@pytest.fixture
def world(digits: Path) -> Path:
    """The digits, with two more sets of outliers and a spec."""
    from PIL import Image

    for name, n in (("tune", 12), ("noise", 15)):
        (digits / name).mkdir()
        pixels = torch.randint(0, 256, (n, 8, 8), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)
        for i, image in enumerate(pixels.numpy()):
            Image.fromarray(image).save(digits / name / f"{i}.png")
    n_test = sum(1 for _ in (digits / "test").rglob("*.png"))
    (digits / "digits.toml").write_text(SPEC.replace("181", str(n_test)))
    return digits


def bench(*arguments: object, methods: str = METHODS, output: str = "found") -> Result:
    return run(
        *(
            "benchmark",
            "digits.toml",
            "--model",
            Path("nets.py:net").absolute(),
            "--weights",
            "net.safetensors",
            *PREPARED,
        ),
        *("--methods", methods, "--bootstrap", "40", "--cache", "cache", "--workers", "0", "-o", output, *arguments),
    )


def read(output: str = "found") -> dict[str, Any]:
    return json.loads(Path(output, "results.json").read_text())


def test_the_whole_way(world: Path) -> None:
    found = bench()
    assert found.code == 0, found.err
    for name in ("GROOD", "GROOD (outliers = mean)", "MSP", "KNN (k = 10)", "ODIN"):
        assert name in found.out
    assert "ID accuracy" in found.out
    # What cannot run is said, on the way and in the result.
    assert "KNN (k = 5000) is unavailable" in found.err
    results = read()
    rows = {row["label"]: row for row in results["runs"][0]["methods"]}
    assert rows["KNN (k = 5000)"]["status"] == "unavailable"
    assert rows["KNN (k = 5000)"]["reason"] in found.out.replace("\n", " ") or "5000" in found.out
    done = [row for row in rows.values() if row["status"] == "done"]
    assert len(done) == 7
    assert all(set(row["figures"]) == {"digits", "noise"} for row in done)
    assert {one["key"]: one["n"] for one in results["sets"]}["noise"] == 15
    assert results["comparable"] == {
        "near": {"comparable": True, "reasons": []},
        "far": {"comparable": True, "reasons": []},
    }
    assert {test["method_a"] for test in results["comparisons"]} == {"GROOD"}
    assert results["runs"][0]["accuracy"]["classifier"] > 0.9
    markdown = Path("found/results.md").read_text()
    assert markdown.startswith("# Digits 0 to 3")
    with Path("found/results.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 7 * 4 + 1
    # No path of this machine is in what people pass on.
    assert str(world) not in markdown + json.dumps(results)


def test_scores_are_those_of_grood_itself(world: Path) -> None:
    """The benchmark's GROOD is what `grood fit` and `grood score` give."""
    assert bench(methods="grood").code == 0
    fitted = run(
        *("fit", "--model", "nets.py:net", "--weights", "net.safetensors", *PREPARED, "--train", "train"),
        *("--output", "again.grood", "--quiet"),
    )
    assert fitted.code == 0, fitted.err
    scored = run("score", "again.grood", "noise", "--model", "nets.py:net", "--format", "json", "--quiet")
    assert scored.code == 0, scored.err
    expected = [row["score"] for row in json.loads(scored.raw)]
    (file,) = Path("found/scores/run0").glob("grood-*.safetensors")
    torch.testing.assert_close(load_file(file)["noise"].exp(), torch.tensor(expected, dtype=torch.float64))


def test_a_second_run_computes_nothing_again(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench().code == 0
    first = read()
    monkeypatch.setattr(torch.nn.Conv2d, "forward", _refuse_many(torch.nn.Conv2d.forward))
    again = bench()
    assert again.code == 0, again.err
    second = read()
    assert [row["figures"] for row in second["runs"][0]["methods"]] == [
        row["figures"] for row in first["runs"][0]["methods"]
    ]
    assert second["runs"][0]["extraction"]["images_from_cache"] > 0.8 * second["runs"][0]["extraction"]["images"]


def _refuse_many(forward: Any) -> Any:
    def limited(self: torch.nn.Module, images: torch.Tensor) -> Any:
        # Layers are looked for, and the store is probed, with a few images.
        assert len(images) <= 8, f"{len(images)} images went through the network again"
        return forward(self, images)

    return limited


def test_several_checkpoints(world: Path) -> None:
    weights = load_file("net.safetensors")
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        save_file(
            {
                name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator) if tensor.is_floating_point()
                else tensor for name, tensor in weights.items()
            },
            f"net{seed}.safetensors",
        )  # fmt: skip
    found = run(
        *("benchmark", "digits.toml", "--model", "nets.py:net", "--weights", "net{seed}.safetensors", *PREPARED),
        *("--seeds", "1,2", "--methods", "grood,msp", "--bootstrap", "0", "--cache", "cache", "-o", "found"),
    )
    assert found.code == 0, found.err
    results = read()
    assert [run["weights"] for run in results["runs"]] == ["net1.safetensors", "net2.safetensors"]
    assert [run["seed"] for run in results["runs"]] == [1, 2]
    assert "±" in found.out
    values = [run["methods"][1]["groups"]["near"]["auroc"] for run in results["runs"]]
    mean, half = 50 * sum(values), 50 * abs(values[0] - values[1])
    assert f"{mean:.2f} ± {half:.2f}" in found.out


def test_choices_are_reported(world: Path) -> None:
    found = bench("--choose", "held-out-classes", methods="knn,gen,msp")
    assert found.code == 0, found.err
    rows = {row["name"]: row for row in read()["runs"][0]["methods"]}
    assert rows["knn"]["chosen_by"] == rows["gen"]["chosen_by"] == "held-out classes"
    assert rows["msp"]["chosen_by"] is None
    assert len(rows["knn"]["search"]) == 5
    assert "held-out classes" in found.out
    assert not rows["knn"]["uses_ood_data"]
    other = bench("--choose", "validation-ood", methods="knn", output="other")
    assert other.code == 0, other.err
    assert read("other")["runs"][0]["methods"][0]["uses_ood_data"]


def test_missing_sets(world: Path) -> None:
    shutil.rmtree("noise")
    refused = bench(methods="msp")
    assert refused.code == 1
    assert "noise" in refused.err
    assert "--allow-missing" in refused.err
    assert "\n  noise (far): absent" in refused.raw_err
    assert not Path("found").exists()
    found = bench("--allow-missing", methods="msp")
    assert found.code == 0, found.err
    assert "far" not in read()["runs"][0]["methods"][0]["groups"]
    assert "Noise: absent" in found.out


def test_an_incomplete_set_is_marked(world: Path) -> None:
    Path("digits.toml").write_text(Path("digits.toml").read_text().replace('title = "Noise"', "count = 99"))
    found = bench("--allow-missing", methods="msp")
    assert found.code == 0, found.err
    assert "15 of 99" in found.out
    assert "†" in found.out
    assert not read()["comparable"]["far"]["comparable"]
    assert read()["comparable"]["near"]["comparable"]


def test_unreadable_images(world: Path) -> None:
    Path("noise/3.png").write_bytes(b"no image")
    refused = bench(methods="msp")
    assert refused.code == 1
    assert "3.png" in refused.err
    assert "--skip-bad" in refused.err
    found = bench("--skip-bad", methods="msp")
    assert found.code == 0, found.err
    assert "left out 1 unreadable" in found.err
    noise = next(one for one in read()["sets"] if one["key"] == "noise")
    assert (noise["n"], noise["status"]) == (14, "incomplete")


def test_scores_of_other_labels_are_not_taken(world: Path) -> None:
    assert bench(methods="grood,msp").code == 0
    for old, new in (("one", "x"), ("two", "one"), ("x", "two")):
        (world / "train" / old).rename(world / "train" / new)
    assert bench(methods="grood,msp").code == 0
    again = read()["runs"][0]["methods"]
    assert bench(methods="grood,msp", output="fresh").code == 0
    assert [row["figures"] for row in again] == [row["figures"] for row in read("fresh")["runs"][0]["methods"]]


def test_a_network_that_returns_more_than_logits(world: Path) -> None:
    with Path("nets.py").open("a") as file:
        file.write(TWO_OUTPUTS)
    found = run(
        *("benchmark", "digits.toml", "--model", "nets.py:pair", *PREPARED, "--workers", "0", "--bootstrap", "0"),
        *("--methods", "odin,msp", "--cache", "cache", "-o", "found"),
    )
    assert found.code == 0, found.err
    assert "ODIN failed: TypeError" in found.err
    assert [row["status"] for row in read()["runs"][0]["methods"]] == ["failed", "done"]
    only = run(
        *("benchmark", "digits.toml", "--model", "nets.py:pair", *PREPARED, "--workers", "0", "--bootstrap", "0"),
        *("--methods", "odin", "--cache", "cache", "-o", "found"),
    )
    assert only.code == 1
    assert "no method has figures" in only.err


def test_results_can_be_shown_and_verified_again(world: Path) -> None:
    assert bench(methods="msp,energy").code == 0
    shown = run("benchmark", "found/results.json")
    assert shown.code == 0, shown.err
    assert "energy" in shown.out.lower()
    near = 100 * read()["runs"][0]["methods"][0]["groups"]["near"]["auroc"]
    figures = """
name = "ours"
benchmark = "digits"
source = "a test"
checkpoints = "its own"

[figures.msp]
near = "{near}"
"""
    Path("right.toml").write_text(figures.format(near=f"{near:.2f}"))
    Path("wrong.toml").write_text(figures.format(near=f"{near - 3:.2f}"))
    right = run("benchmark", "found/results.json", "--verify", "right.toml")
    assert right.code == 0, right.err
    wrong = run("benchmark", "found/results.json", "--verify", "wrong.toml")
    assert wrong.code == 1
    assert "3.00" in wrong.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "nearest"), "there is no method 'nearest'"),
        (("--methods", "knn:k=zero"), "knn: k is a whole number, at least 1; got 'zero'"),
        (("--seeds", "a"), "--seeds must be whole numbers"),
        (("--seeds", "1,1"), "different numbers"),
        (("--seeds", "9223372036854775808"), "from 0 to 9223372036854775807"),
        (("--weights", "none.pt"), "none.pt"),
        (("--verify", "no-such-figures"), "no-such-figures"),
        (("--root", "nowhere"), "nowhere"),
        (("--bootstrap", "39"), "needs 40 bootstrap draws at least, got 39"),
    ],
)
def test_mistakes(world: Path, arguments: tuple[str, ...], message: str) -> None:
    found = bench(*arguments)
    assert found.code == 1
    assert message in found.err
    assert not Path("found/results.json").exists()


def test_without_a_model(world: Path) -> None:
    found = run("benchmark", "digits.toml")
    assert found.code == 1
    assert "--model is missing" in found.err


def test_no_validation_images_to_choose_on(world: Path) -> None:
    spec = Path("digits.toml").read_text().replace('val.folder = "val"\n', "")
    Path("digits.toml").write_text(spec)
    found = bench("--choose", "held-out-classes", methods="knn")
    assert found.code == 1
    assert "needs ID validation images" in found.err
    assert bench(methods="knn:k=5").code == 0


def test_too_few_classes_to_hold_out(world: Path) -> None:
    for split in ("train", "val", "test"):
        shutil.rmtree(f"{split}/one")
        shutil.rmtree(f"{split}/two")
    Path("digits.toml").write_text(re.sub(r", count = \d+", "", SPEC))
    found = bench("--choose", "held-out-classes", methods="knn")
    assert found.code == 1
    assert "held-out classes need 3 classes at least" in found.err
    assert not Path("found").exists()


def test_one_class_to_validate_on(world: Path) -> None:
    only = next((world / "val/one").iterdir())
    Path("val.txt").write_text(f"val/one/{only.name} 0\n")
    Path("digits.toml").write_text(
        SPEC.replace('val.folder = "val"', 'val.list = "val.txt"').replace(", count = 181", "")
    )
    found = bench("--choose", "held-out-classes", methods="knn")
    assert found.code == 1
    assert "validation images of two classes at least" in found.err


def test_one_image_of_an_ood_set(world: Path) -> None:
    for file in sorted((world / "noise").iterdir())[1:]:
        file.unlink()
    for _ in range(2):
        found = bench(methods="knn,grood")
        assert found.code == 0, found.err
    assert [row["figures"]["noise"]["n_ood"] for row in read()["runs"][0]["methods"]] == [1, 1]


def test_a_folder_that_is_a_file(world: Path) -> None:
    Path("found").write_text("")
    found = bench(methods="msp")
    assert found.code == 1
    assert "cannot be made" in found.err


def test_other_classes_than_the_networks(world: Path) -> None:
    for split in ("train", "val", "test"):
        shutil.copytree(f"{split}/one", f"{split}/zzz")
    spec = Path("digits.toml").read_text()
    Path("digits.toml").write_text(
        "\n".join(line for line in spec.split("\n") if "count" not in line) + '\n[id.test]\nfolder = "test"\n'
    )
    found = bench(methods="msp")
    assert found.code == 1
    assert "classes, 0 to 3; got 4 for" in found.err
    assert "zzz" in found.err
