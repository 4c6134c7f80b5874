"""eq. 8: each source of the OOD prototype against a plain re-implementation, and how training samples are drawn."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from models import batches, patterns, taught_cnn, taught_mlp
from torch_grood import GROOD, Mixup, OutlierSamples, PrototypeMean, UniformNoise
from torch_grood.errors import GroodError
from torch_grood.features import FeatureExtractor
from torch_grood.outliers import (
    OutlierContext,
    OutlierSource,
    SampleReservoir,
    TrainingSamples,
    _gaussian_blur,
    outlier_source,
)

# --- Mixup ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def mixup_by_hand(model: nn.Sequential, inputs: Tensor, labels: Tensor, lam: float, classes: int) -> Tensor:
    """p_ood of the paper, one sample at a time; the early layer is model[1], the head the last layer."""
    early = [model[1](model[0](x[None]))[0].double() for x in inputs]
    prototypes = []
    for c in range(classes):
        of_class = [e for e, label in zip(early, labels.tolist(), strict=True) if label == c]
        prototypes.append(sum(of_class) / len(of_class))  # type: ignore[call-overload]
    total = 0.0
    for x, e in zip(inputs, early, strict=True):
        logits = model(x[None])[0]
        order = sorted(range(classes), key=lambda c: -float(logits[c]))
        mixed = lam * e + (1 - lam) * prototypes[order[1]]
        h = mixed.float()[None]
        for layer in model[2:-1]:
            h = layer(h)
        total = total + h[0].double()
    return total / len(inputs)


@pytest.mark.parametrize("lam", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_mixup_is_the_papers(lam: float, classes: int) -> None:
    model = taught_cnn(classes)
    inputs, labels = patterns(6 * classes, classes)
    detector = GROOD(model, outliers=Mixup(n=1000, lam=lam), early_layer="1").fit(batches(inputs, labels, 7))
    expected = mixup_by_hand(model, inputs, labels, lam, classes)
    torch.testing.assert_close(detector.ood_prototype_, expected, rtol=1e-5, atol=1e-6)
    assert detector.fit_info_.n_outliers == 6 * classes
    if lam < 0.95:
        # The test can fail: another λ, or another runner-up, is outside the tolerance.
        other = mixup_by_hand(model, inputs, labels, lam + 0.05, classes)
        assert not torch.allclose(detector.ood_prototype_, other, rtol=1e-5, atol=1e-6)


def test_mixup_partner_is_the_runner_up_even_where_the_classifier_is_wrong() -> None:
    """The labels shape the early prototypes; the partner comes from the logits alone."""
    model = taught_cnn()
    inputs, labels = patterns(30)
    wrong = (labels + (torch.arange(30) % 5 == 0)) % 3
    detector = GROOD(model, outliers=Mixup(n=30, lam=0.3), early_layer="1").fit(batches(inputs, wrong, 8))
    torch.testing.assert_close(
        detector.ood_prototype_, mixup_by_hand(model, inputs, wrong, 0.3, 3), rtol=1e-5, atol=1e-6
    )


def test_mixup_partner_is_among_the_classes_that_take_part() -> None:
    model = taught_cnn(4)
    inputs, labels = patterns(40, 4)
    seen = Recorder(n=40)
    GROOD(model, outliers=seen).fit(batches(inputs, labels, 8), classes=[1, 3])
    assert seen.samples is not None
    assert len(seen.samples.images) == 20
    taking_part = labels % 2 == 1
    with torch.no_grad():
        logits = model(inputs[taking_part])[:, [1, 3]]
    expected = {image.numpy().tobytes(): int(z.argmin()) for image, z in zip(inputs[taking_part], logits, strict=True)}
    for image, row in zip(seen.samples.images, seen.samples.runner_up.tolist(), strict=True):
        assert expected[image.numpy().tobytes()] == row


def test_mixup_with_lam_1_gives_the_samples_own_features() -> None:
    model = taught_mlp()
    inputs, labels = patterns(30, shape=(6,))
    detector = GROOD(model, outliers=Mixup(n=30, lam=1.0)).fit(batches(inputs, labels, 10))
    with torch.no_grad():
        own = model.second(model.first(inputs).relu()).relu().double().mean(0)
    torch.testing.assert_close(detector.ood_prototype_, own, rtol=1e-6, atol=1e-7)


def test_mixup_of_one_class() -> None:
    inputs, labels = patterns(30)
    with pytest.raises(
        GroodError, match=r"second most likely class and there is one class only; use PrototypeMean\(\)"
    ):
        GROOD.paper(taught_cnn()).fit(batches(inputs, labels, 10), classes=[1])
    detector = GROOD(taught_cnn(), outliers=UniformNoise(10)).fit(batches(inputs, labels, 10), classes=[1])
    assert detector.fit_info_.n_classes == 1


# --- The sample is drawn over the whole set ------------------------------------------------------------------------


class Recorder(Mixup):
    """Mixup that keeps what it was given."""

    samples: TrainingSamples | None = None

    def features(self, context: OutlierContext) -> Tensor:
        object.__setattr__(self, "samples", context.samples)
        return super().features(context)


def drawn(inputs: Tensor, labels: Tensor, size: int, n: int = 12, seed: int = 0) -> tuple[list[bytes], GROOD]:
    source = Recorder(n=n, lam=0.5)
    detector = GROOD(taught_cnn(), outliers=source, seed=seed).fit(batches(inputs, labels, size))
    assert source.samples is not None
    return [image.numpy().tobytes() for image in source.samples.images], detector


@pytest.mark.parametrize("size", [1, 7, 60, 1000])
def test_order_and_batch_size_do_not_matter(size: int) -> None:
    inputs, labels = patterns(60)
    first, detector = drawn(inputs, labels, 10)
    for order in (torch.arange(60), torch.arange(60).flip(0), torch.randperm(60), labels.argsort(stable=True)):
        again, other = drawn(inputs[order], labels[order], size)
        assert again == first, "the same samples, in the same order"
        torch.testing.assert_close(other.ood_prototype_, detector.ood_prototype_, rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_sample() -> None:
    inputs, labels = patterns(60)
    first, detector = drawn(inputs, labels, 10, seed=3)
    again, same = drawn(inputs, labels, 10, seed=3)
    assert first == again
    assert torch.equal(detector.ood_prototype_, same.ood_prototype_)
    other, different = drawn(inputs, labels, 10, seed=4)
    assert set(other) != set(first)
    assert not torch.equal(detector.ood_prototype_, different.ood_prototype_)


def test_a_class_sorted_loader_gives_samples_of_all_classes() -> None:
    inputs, labels = patterns(300, 3)
    order = labels.argsort(stable=True)
    class_of = {image.numpy().tobytes(): label for image, label in zip(inputs, labels.tolist(), strict=True)}
    sample, _ = drawn(inputs[order], labels[order], 50, n=60)
    counts = Counter(class_of[image] for image in sample)
    # Hypergeometric, mean 20, standard deviation 3.3: 5 would be 4.5 deviations off.
    assert set(counts) == {0, 1, 2}
    assert min(counts.values()) > 5


def offered(images: Tensor, n: int, seed: int, size: int = 50) -> list[float]:
    reservoir = SampleReservoir(n, seed)
    for start in range(0, len(images), size):
        part = images[start : start + size]
        reservoir.offer(part, torch.zeros(len(part), dtype=torch.int64))
    found = reservoir.samples()
    assert found is not None
    return found.images.flatten(1)[:, 0].tolist()


def test_reservoir_is_uniform_over_the_positions() -> None:
    n, k, draws, bins = 200, 20, 400, 20
    images = torch.arange(float(n)).view(-1, 1, 1).expand(-1, 2, 3).contiguous()
    counts = torch.zeros(n)
    for seed in range(draws):
        chosen = offered(images, k, seed)
        assert len(set(chosen)) == k
        for value in chosen:
            counts[int(value)] += 1
    assert counts.sum() == k * draws
    in_bins = counts.view(bins, -1).sum(1)
    expected = k * draws / bins
    chi2 = float(((in_bins - expected).square() / expected).sum())
    # 19 degrees of freedom: P(chi2 > 43.8) = 0.001, P(chi2 < 5.4) = 0.001; without replacement it is a bit narrower.
    assert 4 < chi2 < 43.8
    # Each sample alone: mean 40, standard deviation 6; 5.5 deviations would be one in 10⁷.
    assert float((counts - 40).abs().max()) < 33


def test_reservoir_of_more_than_the_set_keeps_all() -> None:
    images = torch.arange(7.0).view(-1, 1, 1).expand(-1, 2, 2).contiguous()
    assert sorted(offered(images, 50, seed=0)) == list(range(7))


def test_reservoir_with_duplicates() -> None:
    images = torch.zeros(30, 2, 2)
    assert len(offered(images, 10, seed=0)) == 10
    images[::2] = 1
    values = offered(images, 20, seed=0)
    assert len(values) == 20
    assert Counter(values) == Counter(offered(images.flip(0), 20, seed=0, size=7))


def test_reservoir_keeps_the_runner_up_with_its_image() -> None:
    images = torch.arange(100.0).view(-1, 1, 1)
    reservoir = SampleReservoir(10, 0)
    for start in range(0, 100, 9):
        part = images[start : start + 9]
        reservoir.offer(part, part.flatten().long() * 3)
    found = reservoir.samples()
    assert found is not None
    assert found.runner_up.tolist() == (3 * found.images.flatten()).long().tolist()


def test_reservoir_keeps_copies_not_views_of_the_batch() -> None:
    buffer = torch.zeros(5, 2, 2)
    reservoir = SampleReservoir(20, 0)
    for i in range(4):
        buffer.copy_(torch.arange(5.0).view(-1, 1, 1) + 5 * i)
        reservoir.offer(buffer, torch.zeros(5, dtype=torch.int64))
    found = reservoir.samples()
    assert found is not None
    assert sorted(found.images[:, 0, 0].tolist()) == list(range(20))


def test_reservoir_of_nothing() -> None:
    assert SampleReservoir(10, 0).samples() is None
    reservoir = SampleReservoir(0, 0)
    reservoir.offer(torch.zeros(3, 2, 2), torch.zeros(3, dtype=torch.int64))
    assert reservoir.samples() is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float64, torch.int64], ids=str)
def test_reservoir_takes_images_of_any_dtype(dtype: torch.dtype) -> None:
    images = torch.arange(40).view(-1, 1, 1).to(dtype).expand(-1, 3, 3)
    assert offered(images, 15, 0) == offered(images.flip(0), 15, 0, size=11)


def test_images_that_differ_in_a_corner_alone_are_told_apart() -> None:
    """A 28 x 28 digit on a 512 x 512 sheet: the sample must not be the head of a class-sorted loader."""
    images = torch.zeros(40, 1, 512, 512)
    images[:, :, 4:32, 4:32] = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images[:, 0, 10, 10] = torch.arange(40.0)

    def sample(order: Tensor) -> set[float]:
        reservoir = SampleReservoir(8, 0)
        reservoir.offer(images[order], order)
        found = reservoir.samples()
        assert found is not None
        return set(found.images[:, 0, 10, 10].tolist())

    assert sample(torch.arange(40)) == sample(torch.arange(40).flip(0))


def test_large_images_are_told_apart_by_few_bytes() -> None:
    images = torch.rand(30, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    assert len(set(offered(images, 10, 0))) == 10
    assert offered(images, 10, 0) == offered(images.flip(0), 10, 0, size=4)


# --- UniformNoise --------------------------------------------------------------------------------------------------


class Watch(nn.Module):
    """Records what the model is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return self.model(x)


def noise_seen(model: nn.Module, loader: Any, n: int = 10, seed: int = 0) -> tuple[Tensor, GROOD]:
    watch = Watch(model)
    reference = Watch(model)
    GROOD(reference, outliers=PrototypeMean()).fit(loader)
    detector = GROOD(watch, outliers=UniformNoise(n), seed=seed).fit(loader)
    return torch.cat(watch.seen[len(reference.seen) :]), detector


def test_noise_spans_the_range_of_the_training_images_channel_by_channel() -> None:
    inputs, labels = patterns(30)
    inputs = inputs * torch.tensor([1.0, 0.1, 5.0]).view(3, 1, 1) + torch.tensor([0.0, 10.0, -20.0]).view(3, 1, 1)
    noise, _ = noise_seen(taught_cnn(), batches(inputs, labels, 10), n=10, seed=2)
    assert noise.shape == (100, 3, 8, 8)
    for channel in range(3):
        low, high = float(inputs[:, channel].min()), float(inputs[:, channel].max())
        values = noise[:, channel]
        assert low <= float(values.min()) < float(values.max()) <= high
        middle = (low + high) / 2
        assert abs(float(values.mean()) - middle) < 0.05 * (high - low)


def test_noise_keeps_the_ten_of_a_hundred_with_the_least_log_sum_exp() -> None:
    model = taught_cnn()
    inputs, labels = patterns(30)
    noise, detector = noise_seen(model, batches(inputs, labels, 10), n=25)
    assert len(noise) == 300
    kept: list[Tensor] = []
    with torch.no_grad():
        for hundred in noise.split(100):
            features, logits = model[:-1](hundred).double(), model(hundred).double()
            order = sorted(range(100), key=lambda i: float(logits[i].logsumexp(0)))
            kept += [features[i] for i in sorted(order[:10])]
    assert detector.fit_info_.n_outliers == 25
    torch.testing.assert_close(detector.ood_prototype_, torch.stack(kept[:25]).mean(0), rtol=1e-5, atol=1e-6)


def test_noise_is_seeded_and_does_not_depend_on_order_or_batch_size() -> None:
    inputs, labels = patterns(30)
    found = [
        GROOD(taught_cnn(), outliers=UniformNoise(10), seed=seed).fit(loader).ood_prototype_
        for seed, loader in [
            (0, batches(inputs, labels, 10)),
            (0, batches(inputs, labels, 10)),
            (0, batches(inputs.flip(0), labels.flip(0), 7)),
            (1, batches(inputs, labels, 10)),
        ]
    ]
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[0], found[3], rtol=1e-5, atol=1e-6)


def test_noise_for_tabular_data_spans_each_column() -> None:
    inputs, labels = patterns(30, shape=(6,))
    inputs = inputs * torch.logspace(-1, 1, 6)
    noise, detector = noise_seen(taught_mlp(), batches(inputs, labels, 10))
    assert noise.shape == (100, 6)
    low, high = inputs.amin(0), inputs.amax(0)
    assert (noise >= low).all()
    assert (noise <= high).all()
    assert (noise.amax(0) - noise.amin(0) > 0.9 * (high - low)).all()
    assert detector.ood_prototype_.shape == (12,)


@pytest.mark.parametrize("size", [(4, 4), (1, 1), (4, 20), (20, 4), (5, 7), (7, 5)])
@pytest.mark.parametrize("channels", [1, 3])
def test_noise_for_small_and_grey_images(size: tuple[int, int], channels: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    inputs = torch.randn(12, channels, *size)
    labels = torch.arange(12) % 3
    with torch.no_grad():
        model[4].weight.zero_()
    detector = GROOD(model, outliers=UniformNoise(10)).fit(batches(inputs, labels, 5))
    assert detector.ood_prototype_.isfinite().all()


def test_noise_for_images_without_a_channel_axis() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 6), nn.ReLU(), nn.Linear(6, 3))
    inputs, labels = torch.randn(12, 4, 5), torch.arange(12) % 3
    with torch.no_grad():
        labels[3:] = model(inputs[3:]).argmax(1)
        model[3].weight.zero_()
    assert GROOD(model, outliers=UniformNoise(10)).fit(batches(inputs, labels, 5)).fit_info_.n_outliers == 10


def test_blur_of_a_constant_is_the_constant_and_blur_smooths() -> None:
    flat = torch.full((2, 3, 12, 12), 0.7)
    torch.testing.assert_close(_gaussian_blur(flat, 1.5), flat)
    noise = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blurred = _gaussian_blur(noise, 2.0)
    assert blurred.shape == noise.shape
    torch.testing.assert_close(blurred.mean((2, 3)), noise.mean((2, 3)), rtol=0, atol=0.02)
    assert (blurred.std((2, 3)) < 0.5 * noise.std((2, 3))).all()


@pytest.mark.parametrize("sigma", [0.2, 1.0, 5.0])
def test_blur_equals_a_loop_over_pixels(sigma: float) -> None:
    image = torch.rand(1, 2, 9, 8, generator=torch.Generator().manual_seed(0))
    blurred = _gaussian_blur(image, sigma)

    def weights(length: int) -> list[float]:
        raw = [2.718281828459045 ** (-0.5 * ((i - length // 2) / sigma) ** 2) for i in range(length)]
        return [w / sum(raw) for w in raw]

    def mirrored(i: int, length: int) -> int:
        i = abs(i)
        return i if i < length else 2 * (length - 1) - i

    rows, columns = weights(7), weights(5)
    for c in range(2):
        for y in range(9):
            for x in range(8):
                expected = sum(
                    rows[a] * columns[b] * float(image[0, c, mirrored(y + a - 3, 9), mirrored(x + b - 2, 8)])
                    for a in range(7)
                    for b in range(5)
                )
                assert float(blurred[0, c, y, x]) == pytest.approx(expected, abs=1e-5)


# --- OutlierSamples and PrototypeMean ------------------------------------------------------------------------------


def outlier_images(n: int = 25) -> Tensor:
    return 3 * torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("n", [None, 1, 10, 12, 25, 1000])
@pytest.mark.parametrize("labelled", [False, True])
def test_outlier_samples_are_the_mean_of_the_first_n(n: int | None, labelled: bool) -> None:
    model = taught_cnn()
    inputs, labels = patterns(30)
    outliers = outlier_images()
    parts = list(outliers.split(10))
    loader = [(part, torch.full((len(part),), -1)) for part in parts] if labelled else parts
    detector = GROOD(model, outliers=OutlierSamples(loader, n=n)).fit(batches(inputs, labels, 10))
    with torch.no_grad():
        expected = model[:-1](outliers[: n or 25]).double().mean(0)
    torch.testing.assert_close(detector.ood_prototype_, expected, rtol=1e-5, atol=1e-6)
    assert detector.fit_info_.n_outliers == min(n or 25, 25)


def test_outlier_samples_read_no_more_batches_than_needed() -> None:
    read: list[int] = []

    def loader() -> Iterator[Tensor]:
        for i, part in enumerate(outlier_images().split(5)):
            read.append(i)
            yield part

    inputs, labels = patterns(30)
    GROOD(taught_cnn(), outliers=OutlierSamples(loader(), n=10)).fit(batches(inputs, labels, 10))
    assert read == [0, 1]


def test_use_of_ood_data_shows_everywhere(tmp_path: Any) -> None:
    inputs, labels = patterns(30)
    loader = batches(inputs, labels, 10)
    source = OutlierSamples([outlier_images()])
    assert source.uses_ood_data
    model = taught_cnn()
    detector = GROOD(model, outliers=source).fit(loader)
    detector.save(tmp_path / "d.grood")
    for fitted in (detector, GROOD.load(tmp_path / "d.grood", model), GROOD.load(tmp_path / "d.grood")):
        assert fitted.fit_info_.uses_ood_data is True
        assert "uses OOD data" in repr(fitted)
        assert "OutlierSamples" in repr(fitted)
        assert fitted.fit_info_.outlier_source == {"name": "OutlierSamples", "n": None}
    loaded = GROOD.load(tmp_path / "d.grood", model)
    with pytest.raises(GroodError, match="loader of outliers gave no image"):
        loaded.fit(loader)
    for other in (Mixup(10), UniformNoise(10), PrototypeMean()):
        fitted = GROOD(model, outliers=other).fit(loader)
        assert fitted.fit_info_.uses_ood_data is False
        assert "OOD data" not in repr(fitted)


@pytest.mark.parametrize("loader", [[], [torch.zeros(0, 3, 8, 8)]], ids=["empty", "empty-batch"])
def test_no_outliers(loader: list[Tensor]) -> None:
    inputs, labels = patterns(30)
    with pytest.raises(GroodError, match="loader of outliers gave no image"):
        GROOD(taught_cnn(), outliers=OutlierSamples(loader)).fit(batches(inputs, labels, 10))


def test_a_tensor_of_outliers_is_not_read_as_a_loader_of_unbatched_images() -> None:
    """A convolution takes (c, h, w) for one image without a word."""
    model = taught_cnn()
    inputs, labels = patterns(30)
    outliers = outlier_images(6)
    try:
        detector = GROOD(model, outliers=OutlierSamples(outliers)).fit(batches(inputs, labels, 10))
    except GroodError:
        return
    with torch.no_grad():
        expected = model[:-1](outliers).double().mean(0)
    torch.testing.assert_close(detector.ood_prototype_, expected, rtol=1e-5, atol=1e-6)


def test_outliers_with_nan_are_an_error() -> None:
    inputs, labels = patterns(30)
    bad = outlier_images()
    bad[7, 0, 0, 0] = torch.nan
    with pytest.raises(GroodError, match="OOD prototype is not finite"):
        GROOD(taught_cnn(), outliers=OutlierSamples([bad])).fit(batches(inputs, labels, 10))


def test_prototype_mean() -> None:
    inputs, labels = patterns(31)
    detector = GROOD(taught_cnn(), outliers=PrototypeMean()).fit(batches(inputs, labels, 10))
    torch.testing.assert_close(detector.ood_prototype_, detector.class_prototypes_.mean(0), rtol=1e-14, atol=0)
    assert detector.fit_info_.early_layer is None


# --- Configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [Mixup(), Mixup(n=7, lam=0.25), UniformNoise(), UniformNoise(n=3), PrototypeMean()],
    ids=str,
)
def test_config_round_trips(source: OutlierSource) -> None:
    assert outlier_source(json.loads(json.dumps(source.config()))) == source


def test_config_of_outlier_samples_leaves_the_images_out() -> None:
    source = outlier_source(json.loads(json.dumps(OutlierSamples([outlier_images()], n=5).config())))
    assert isinstance(source, OutlierSamples)
    assert source.n == 5
    assert source.uses_ood_data


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "an outlier source has a name, known are HighEnergy"),
        ({"name": 5}, "an outlier source has a name"),
        ({"name": "Mixup", "lambda": 0.5}, "bad arguments of outlier source Mixup"),
        ({"name": "Mixup", "lam": 7}, "between 0 and 1; got 7"),
        ({"name": "Mixup", "lam": "0.5"}, "between 0 and 1; got '0.5'"),
        ({"name": "OutlierSamples", "m": 3}, "bad arguments of outlier source OutlierSamples"),
    ],
)
def test_bad_configs(config: dict[str, Any], said: str) -> None:
    with pytest.raises(GroodError, match=said):
        outlier_source(config)


@pytest.mark.parametrize("name", ["Mixdown", "__import__"])
def test_a_foreign_source_is_known_by_name_and_runs_nothing(name: str) -> None:
    source = outlier_source({"name": name, "strength": 3})
    assert source.config() == {"name": name, "strength": 3}
    with pytest.raises(GroodError, match=f"'{name}' is not part of torch-grood; pass outliers="):
        source.features(OutlierContext(torch.zeros(2, 3)))


@pytest.mark.parametrize("n", [0, -1, 2.5, "10"])
@pytest.mark.parametrize("source", [Mixup, UniformNoise, lambda n: OutlierSamples([], n=n)])
def test_bad_n(source: Any, n: Any) -> None:
    with pytest.raises(GroodError, match="n is a number of outliers, at least 1; got"):
        source(n=n)


@pytest.mark.parametrize("lam", [-0.01, 1.01, float("nan"), float("inf")])
def test_bad_lam(lam: float) -> None:
    with pytest.raises(GroodError, match="lam is the weight of the sample in the mix, between 0 and 1; got"):
        Mixup(lam=lam)


@pytest.mark.parametrize("source", [Mixup(), UniformNoise(), OutlierSamples([])], ids=str)
def test_sources_that_need_a_model_say_so(source: OutlierSource) -> None:
    with pytest.raises(GroodError, match=r"runs the model, and there is none; pass ood_features=.*PrototypeMean\(\)"):
        GROOD(None, outliers=source).fit_features(torch.randn(6, 3), [0, 1, 2] * 2)


def test_sources_used_alone_say_how_to_use_them() -> None:
    context = OutlierContext(torch.zeros(3, 12), FeatureExtractor(taught_mlp()))
    with pytest.raises(GroodError, match=r"Mixup needs training samples.*GROOD\.fit"):
        Mixup().features(context)
    with pytest.raises(GroodError, match=r"UniformNoise needs the range.*GROOD\.fit"):
        UniformNoise().features(context)


def test_outliers_must_be_a_source() -> None:
    with pytest.raises(GroodError, match=r"outliers must be a source such as Mixup\(\).*got 'mixup'"):
        GROOD(taught_mlp(), outliers="mixup")  # type: ignore[arg-type]
    with pytest.raises(GroodError, match="outliers must be a source"):
        GROOD(taught_mlp(), outliers=Mixup)  # type: ignore[arg-type]


def test_sources_are_immutable() -> None:
    with pytest.raises(AttributeError):
        Mixup().lam = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(("n_all", "mixed"), [(30, 30), (4_000, 100), (5_050, 101), (200_000, 1_000)])
def test_by_default_a_fiftieth_of_the_training_set_is_mixed(n_all: int, mixed: int) -> None:
    assert min(n_all, Mixup().n_training_samples(n_all)) == mixed


def test_the_default_number_needs_no_length_of_the_loader() -> None:
    model, inputs, labels = taught_mlp(), *patterns(150, shape=(6,))
    inputs, labels = inputs.repeat(40, 1) + 0.01 * torch.randn(6_000, 6), labels.repeat(40)
    known = GROOD(model, outliers=Mixup()).fit(DataLoader(TensorDataset(inputs, labels), 500))
    unknown = GROOD(model, outliers=Mixup()).fit(iter(batches(inputs, labels, 500)))
    assert known.fit_info_.n_outliers == unknown.fit_info_.n_outliers == 120
    assert torch.equal(known.ood_prototype_, unknown.ood_prototype_)
