"""The study of the OOD prototype, on synthetic worlds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from torch import Tensor

from torch_grood import ood_gradient

FOLDER = Path(__file__).parents[2] / "research/ood_prototype"
sys.path.insert(0, str(FOLDER))
pytest.importorskip("scipy")
candidates = pytest.importorskip("candidates")
scoring = pytest.importorskip("scoring")
study = pytest.importorskip("study")

C, D = 4, 8


def _images(n: int, spread: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    labels = torch.arange(n) % C
    centres = 4 * torch.eye(C, D) + 1
    return (centres[labels] + spread * torch.randn(n, D, generator=generator)).clamp(min=0), labels


def _logits(features: Tensor) -> Tensor:
    return features @ (4 * torch.eye(C, D) + 1).T / 4


@pytest.fixture
def worlds(tmp_path: Path) -> Path:
    """Two split worlds and one classifier with its test sets."""
    generator = torch.Generator().manual_seed(0)

    def part(name: str, n: int, spread: float, scale: float = 1.0) -> dict[str, Tensor]:
        features, labels = _images(n, spread, generator)
        features = features * scale
        # A few samples that the classifier gets wrong.
        labels = labels.clone()
        labels[::20] = (labels[::20] + 1) % C
        return {f"{name}.features": features, f"{name}.logits": _logits(features), f"{name}.labels": labels}

    for world in ("split-0", "split-1", "resnet20"):
        found = part("train", 600, 0.7) | part("val", 80, 0.7)
        for made in [
            *candidates.MADE,
            *(f"layer{i} {lam}" for i in (1, 2, 3) for lam in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9)),
        ]:
            found |= part(f"made/{made}", 60, 1.5, 0.6)
        if world != "resnet20":
            found |= part("aside", 90, 1.5, 0.6) | part("far/clouds", 50, 3.0, 0.3)
        save_file(found, tmp_path / f"{world}.safetensors")
    tests = part("id", 90, 0.7) | part("real", 40, 1.5, 0.6)
    for name in ("cifar100", "tin", "mnist", "texture"):
        tests |= part(name, 70, 2.0, 0.5)
    save_file(tests, tmp_path / "resnet20.test.safetensors")
    return tmp_path


def test_scores_are_those_of_the_paper(worlds: Path) -> None:
    world = scoring.load_world(worlds / "split-0.safetensors")
    p_ood = world.prototypes.mean(0)
    rows = torch.arange(200)
    ours = scoring.scores(world, p_ood[None], 1.0, rows, (1, 3))
    stored, queries = (
        ood_gradient(x.double(), world.prototypes, p_ood).double() for x in (world.train[rows], world.known)
    )
    distances = torch.cdist(queries, stored).sort(1).values
    unit = torch.linalg.vector_norm(stored, dim=1).max()
    torch.testing.assert_close(ours[1]["known"], distances[:, 0] / unit, atol=2e-3, rtol=0)
    torch.testing.assert_close(ours[3]["known"], distances[:, :3].mean(1) / unit, atol=2e-3, rtol=0)


def test_several_prototypes_share_a_softmax_or_have_one_each() -> None:
    features, labels = _images(40, 0.7, torch.Generator().manual_seed(1))
    prototypes = torch.stack([features[labels == c].double().mean(0) for c in range(C)])
    p_ood = torch.stack([prototypes.mean(0), torch.zeros(D)])
    joint = scoring.Gradients.of(features, prototypes, p_ood, 2.0)
    apart = scoring.Gradients.of(features, prototypes, p_ood, 2.0, apart=True)
    one = scoring.Gradients.of(features, prototypes, p_ood[:1], 2.0)
    torch.testing.assert_close(apart.log_pi[:, :1], one.log_pi)
    assert (joint.log_pi < apart.log_pi).all()
    torch.testing.assert_close(
        joint.vectors(0.0).double().norm(dim=1), joint.log_pi.exp().norm(dim=1), atol=1e-6, rtol=0
    )


def test_auroc_and_its_bootstrap_count_ties_half() -> None:
    rng = np.random.default_rng(0)
    found = {
        "known": torch.from_numpy(rng.integers(0, 9, 300) / 9),
        "x": torch.from_numpy(rng.integers(2, 12, 200) / 9),
    }
    expected = roc_auc_score([0] * 300 + [1] * 200, torch.cat([found["known"], found["x"]]).numpy())
    assert scoring.auroc(found["known"], found["x"]) == pytest.approx(expected)
    replicates = scoring.resampled_aurocs("w", found, "x", 50)
    assert replicates.mean() == pytest.approx(expected, abs=0.01)
    known, unknown = (scoring._times_drawn(f"w {name}", len(found[name]), 50)[7] for name in ("known", "x"))
    weights = np.concatenate([known, unknown])
    values = torch.cat([found["known"], found["x"]]).numpy()
    assert replicates[7] == pytest.approx(roc_auc_score([0] * 300 + [1] * 200, values, sample_weight=weights))


def test_own_distance_of_unit_features_in_closed_form(worlds: Path) -> None:
    world = candidates.mapped(scoring.load_world(worlds / "split-0.safetensors"), "unit")
    sizes = torch.bincount(world.labels).double()
    closed = 1 - (sizes * world.prototypes.square().sum(1)).sum() / len(world.train)
    assert world.own_distance() == pytest.approx(float(closed.sqrt()), rel=1e-5)


def test_every_source_and_geometry_is_finite(worlds: Path) -> None:
    world = scoring.load_world(worlds / "split-0.safetensors")
    for geometry in candidates.GEOMETRIES:
        there = candidates.mapped(world, geometry)
        for name in candidates.SOURCES:
            if name != "real outliers":
                p_ood = candidates.SOURCES[name](there)
                assert p_ood.shape[1] == there.train.shape[1]
                assert p_ood.isfinite().all(), (geometry, name)


def test_rule_takes_the_simplest_of_the_best() -> None:
    plain = {"group": "k", "geometry": "unit", "temperature": 1.0, "source": "highest energy 2 %", "uses": "ID"}
    rows = [
        {"name": "energy", "near": 75.0, "far": 80.0},
        {"name": "KNN, k = 20", "near": 74.0, "far": 87.0},
        plain | {"name": "best, k = 50", "k": 50, "near": 75.0, "far": 88.2},
        plain | {"name": "simplest", "k": 10, "near": 75.0, "far": 88.0},
        plain | {"name": "near too low", "k": 10, "near": 74.4, "far": 95.0},
        plain | {"name": "too far off", "k": 10, "near": 75.0, "far": 87.5},
        plain | {"name": "bound", "k": 10, "near": 80.0, "far": 95.0, "uses": "OOD"},
    ]
    chosen, floor, level = study.choose_by_rule(rows)
    assert (chosen["name"], floor, level) == ("simplest", 74.5, ["simplest", "best, k = 50"])
    with pytest.raises(ValueError, match=r"no candidate has near 74\.50 or more"):
        study.choose_by_rule(rows[:2])


def test_the_choice_precedes_the_look_and_the_look_is_one(
    worlds: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "K_KNN_TEST", 5)
    output = worlds / "results"
    output.mkdir()
    with pytest.raises(SystemExit, match=r"run `study\.py choose` before"):
        study.look(worlds, output)
    few = [candidates.CHOSEN, candidates.Candidate("source, as the paper", "mean of prototypes")]
    monkeypatch.setattr(study, "MAY_LOSE_NEAR", 100.0)
    study.choose(worlds, output, few)
    choice = json.loads((output / "choice.json").read_text())
    assert choice["worlds"] == ["split-0", "split-1"]
    assert choice["chosen"] in {candidate.name for candidate in few}
    study.look(worlds, output)
    result = json.loads((output / "test.json").read_text())
    assert set(result["resnet20"]["rows"]) == {*candidates.TEST, "energy", "MSP", "KNN, k = 5"}
    assert result["resnet20"]["rows"]["energy"]["near minus energy"] == 0
    with pytest.raises(SystemExit, match="looked at already"):
        study.look(worlds, output)
    study.look(worlds, output, again=True)
    steps = [json.loads(line)["step"] for line in (output / "log.jsonl").read_text().splitlines()]
    assert steps.index("choice") < steps.index("test") < steps.index("test, again")
    assert "| mean of prototypes |" in capsys.readouterr().out
