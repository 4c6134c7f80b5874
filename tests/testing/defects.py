"""Detectors that are sound but for one defect, each with the clauses that must find it, and nothing else may."""

from __future__ import annotations

import base64
import contextlib
import io
import pickle
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from wrapper import Decision, Wrapper

from torch_grood import GROOD, ModelMismatchError

FEATURES, IMAGES = "features", "images"


class Defect(NamedTuple):
    """A defective detector.

    Attributes:
        make: makes it.
        use: what it is tried on.
        clause: the clause that is there to find it.
        message: what the error says, a regular expression.
        also: other clauses that find it too, and rightly.
    """

    make: Callable[[nn.Module | None], Any]
    use: str
    clause: str
    message: str
    also: frozenset[str] = frozenset()


DEFECTS: list[Defect] = []


def defect(use: str, clause: str, message: str, *also: str, into: list[Defect] = DEFECTS) -> Callable[[type], type]:
    """Enter a class into the list."""

    def enter(make: type) -> type:
        into.append(Defect(make, use, clause, message, frozenset(also)))
        return make

    return enter


# --- Making and fitting --------------------------------------------------------------------------------------------


@defect(FEATURES, "constructor_only_stores", "the constructor's argument 'temperature' is not kept as an attribute")
class HidesAnArgument(Wrapper):
    def __init__(self, model: nn.Module | None, temperature: float = 1.0) -> None:
        super().__init__(model)
        self._t = temperature


@defect(IMAGES, "constructor_only_stores", "the constructor ran the classifier 1 times; leave that to fit")
class RunsTheModelEarly(Wrapper):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if not model.training:
            model(torch.zeros(1, 2, 4, 4, dtype=model.head.weight.dtype))


@defect(FEATURES, "constructor_only_stores", "fit changed the argument 'k' from None to 90")
class FillsInAnArgument(Wrapper):
    def __init__(self, model: nn.Module | None, k: int | None = None) -> None:
        super().__init__(model)
        self.k = k

    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        super()._fit(fit, *arguments)
        self.k = len(arguments[0])
        return self


@defect(FEATURES, "fit_returns_self", "fit_features returned NoneType")
class ReturnsNothing(Wrapper):
    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Any:
        super()._fit(fit, *arguments)


@defect(IMAGES, "fit_returns_self", "calibrate returned Tensor")
class ReturnsTheScores(Wrapper):
    def _calibrate(self, score: Callable[[], Tensor], fpr: float) -> Any:
        super()._calibrate(score, fpr)
        return self._held_out


# A fit on A before that on B counts as well.
@defect(FEATURES, "fit_is_idempotent", "differs .* after a second fit on the same samples", "fit_forgets_the_last_fit")
class StartsWarm(Wrapper):
    """Its scores drift with every fit, as those of a running mean."""

    _fits = 0

    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        super()._fit(fit, *arguments)
        self._fits += 1
        return self

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return super()._score(score, inputs) * (1 + 0.01 * max(self._fits - 1, 0))


@defect(FEATURES, "fit_forgets_the_last_fit", r"differs .* after fit\(A\) and fit\(B\), compared with fit\(B\) alone")
class KeepsOldSamples(Wrapper):
    """Twice the same samples change nothing: means and nearest neighbours are the same."""

    _seen: tuple[Tensor, Tensor] | None = None

    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        features, labels = arguments
        if self._seen is not None and features.shape != self._seen[0].shape:
            features, labels = torch.cat([self._seen[0], features]), torch.cat([self._seen[1], labels])
        super()._fit(fit, features, labels)
        self._seen = features.clone(), labels.clone()
        return self


@defect(FEATURES, "fit_forgets_the_last_fit", "it still decides, by the threshold of A; fit must drop it")
class KeepsTheThreshold(Wrapper):
    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        held_out = self._held_out
        super()._fit(fit, *arguments)
        self._held_out = held_out
        return self


@defect(FEATURES, "calibrate_forgets_the_last", r"after calibrate\(A\) and calibrate\(B\), not calibrate\(B\) alone")
class PoolsCalibrations(Wrapper):
    def _calibrate(self, score: Callable[[], Tensor], fpr: float) -> Self:
        before = self._held_out
        super()._calibrate(score, fpr)
        if before is not None and self._held_out is not None:
            self._held_out = torch.cat([before, self._held_out])
        return self


@defect(FEATURES, "order_of_samples_does_not_matter", "another order changed a score by .* of the largest")
class WeighsTheFirstSample(Wrapper):
    save = load = None  # type: ignore[assignment]
    _weight = 1.0

    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        super()._fit(fit, *arguments)
        self._weight = 1 + 1e-3 * float(arguments[0][0, 0].detach())
        return self

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return super()._score(score, inputs) * self._weight


@defect(FEATURES, "same_seed_same_bits", "between two detectors made alike, under another global random state")
class DrawsGlobally(Wrapper):
    """It restores the global random state, so that only its influence shows."""

    save = load = None  # type: ignore[assignment]

    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        super()._fit(fit, *arguments)
        with torch.random.fork_rng(devices=[]):
            self._weight = 1 + float(torch.rand(())) / 1000
        return self

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return super()._score(score, inputs) * self._weight


@defect(FEATURES, "caller_keeps_the_arguments", "fit_features changed the inputs that it was given")
class ClampsInPlace(Wrapper):
    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        features = arguments[0].detach()
        features.copy_(torch.where(features.abs() < 100, features.clamp(max=6.5), features))
        return super()._fit(fit, *arguments)


@defect(IMAGES, "caller_keeps_the_arguments", "fit changed the length of the loader")
class EmptiesTheLoader(Wrapper):
    def fit(self, loader: Any) -> Self:
        super().fit(loader)
        loader.clear()
        return self


@defect(FEATURES, "caller_keeps_the_arguments", "after the caller overwrote what fit and calibrate got")
class KeepsAReference(Wrapper):
    _train: Tensor | None = None

    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        super()._fit(fit, *arguments)
        self._train, self._largest = arguments[0].detach(), arguments[0].detach().double().max()
        return self

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        scores = super()._score(score, inputs)
        return scores if self._train is None else scores + (self._train.double().max() - self._largest)


@defect(FEATURES, "caller_keeps_the_arguments", "after the caller overwrote what was returned")
class ReturnsItsCache(Wrapper):
    """The scores of the same inputs are the same tensor."""

    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        super()._fit(fit, *arguments)
        self._cache: dict[bytes, Tensor] = {}
        return self

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        if not hasattr(self, "_cache"):
            return super()._score(score, inputs)
        key = inputs.detach().float().numpy().tobytes()
        if key not in self._cache:
            self._cache[key] = super()._score(score, inputs)
        return self._cache[key]


# --- Leaving alone -------------------------------------------------------------------------------------------------


@defect(IMAGES, "model_is_left_alone", "fit changed the training mode of module 'norm' from False to True")
class TrainsTheModel(Wrapper):
    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        super()._fit(fit, *arguments)
        self.model.train()
        return self


@defect(IMAGES, "model_is_left_alone", "a fit that failed changed the training mode of module '' from True to False")
class ForgetsToRestore(Wrapper):
    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        modes = {module: module.training for module in self.model.modules()}
        self.model.eval()
        super()._fit(fit, *arguments)
        for module, mode in modes.items():
            module.training = mode
        return self


@defect(IMAGES, "model_is_left_alone", "fit changed _forward_hooks of module 'head' from 0 to 1")
class LeavesAHook(Wrapper):
    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        self.model.head.register_forward_hook(lambda *_: None)
        return super()._fit(fit, *arguments)


@defect(IMAGES, "model_is_left_alone", "the constructor changed requires_grad of 'stem.bias' from True to False")
class FreezesTheModel(Wrapper):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        for parameter in model.parameters():
            parameter.requires_grad_(False)


# A file is for the classifier as it was.
@defect(
    IMAGES,
    "model_is_left_alone",
    "score changed the weights 'norm.running_mean'",
    "loaded_is_what_was_saved",
    "same_detector_same_bytes",
)
class DriftsTheNorm(Wrapper):
    """By so little that it shows in no feature."""

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        scores = super()._score(score, inputs)
        self.model.norm.running_mean.add_(1e-30)
        return scores


@defect(IMAGES, "model_is_run_in_eval_mode", "with the classifier handed over in training mode")
class RunsItAsItIs(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        scores = super()._score(score, inputs)
        if not self.model.training:
            return scores
        with torch.no_grad():
            return scores + self.model(inputs if isinstance(inputs, Tensor) else inputs[0][0]).double().mean()


@defect(FEATURES, "process_is_left_alone", "fit changed the random state of torch")
class SeedsTorch(Wrapper):
    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        torch.manual_seed(0)
        return super()._fit(fit, *arguments)


@defect(IMAGES, "process_is_left_alone", "score changed the random state of numpy")
class DrawsFromNumpy(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        np.random.rand()  # noqa: NPY002
        return super()._score(score, inputs)


@defect(FEATURES, "process_is_left_alone", "the constructor changed the random state of Python")
class ShufflesInPython(Wrapper):
    def __init__(self, model: nn.Module | None) -> None:
        super().__init__(model)
        random.random()


@defect(FEATURES, "process_is_left_alone", r"calibrate changed torch.is_grad_enabled\(\) from True to False")
class DisablesGradients(Wrapper):
    def _calibrate(self, score: Callable[[], Tensor], fpr: float) -> Self:
        torch.set_grad_enabled(False)
        return super()._calibrate(score, fpr)


# --- Scores --------------------------------------------------------------------------------------------------------


@defect(
    FEATURES,
    "scores_are_float64_on_the_cpu",
    "the scores are torch.float32 after a fit on float32; float64 is required",
    "every_float_dtype_is_taken",
    "kind_of_tensor_does_not_matter",
)
class ScoresInFloat32(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return super()._score(score, inputs).float()


@defect(
    FEATURES, "higher_is_more_ood", "it seems to be a confidence: return its neg", "scale_of_features_does_not_matter"
)
class ReturnsConfidence(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return -super()._score(score, inputs)


@defect(FEATURES, "batch_does_not_matter", "differs .* in batches of one")
class RoundsLargeBatches(Wrapper):
    """Half precision where it pays."""

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        scores = super()._score(score, inputs)
        return scores.float().double() if len(inputs) > 32 else scores


@defect(FEATURES, "batch_does_not_matter", "differs .* among nine times as many")
class RunsOnInBlocks(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        scores = super()._score(score, inputs)
        return scores * (1 + 1e-15 * (len(inputs) > 512) * 2)


@defect(FEATURES, "every_float_dtype_is_taken", "raised .*Half.* is not supported")
class RefusesHalf(Wrapper):
    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        if arguments[0].dtype == torch.float16:
            raise TypeError("Half is not supported")
        return super()._fit(fit, *arguments)


@defect(FEATURES, "every_float_dtype_is_taken", "a score changed by .* of the largest for torch.bfloat16")
class ComputesInTheInputsDtype(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        scores = super()._score(score, inputs)
        return scores.to(inputs.dtype).double() if inputs.dtype == torch.bfloat16 else scores


@defect(FEATURES, "gpu_is_taken", "raised TypeError")
class UsesNumpy(Wrapper):
    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        features, labels = arguments
        return super()._fit(fit, torch.from_numpy(features.detach().double().numpy()), labels)


@defect(FEATURES, "kind_of_tensor_does_not_matter", r"raised RuntimeError\(.view size is not compatible")
class WantsContiguous(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        inputs.view(-1)
        return super()._score(score, inputs)


@defect(FEATURES, "kind_of_tensor_does_not_matter", "the scores carry a graph of gradients for gradient-carrying")
class KeepsTheGraph(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return super()._score(score, inputs) + 0 * inputs.double().sum(1)


@defect(FEATURES, "kind_of_tensor_does_not_matter", "raised RuntimeError.*inference tensor")
class WritesToInferenceTensors(Wrapper):
    """It updates what it made in inference mode, outside of it."""

    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        super()._fit(fit, *arguments)
        self._calls = torch.zeros(())
        return self

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        if hasattr(self, "_calls"):
            self._calls.add_(1)
        return super()._score(score, inputs)


@defect(FEATURES, "scale_of_features_does_not_matter", r"all scores are 0 with the features times 1024")
class Underflows(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return super()._score(score, inputs) * (-inputs.detach().double().norm(dim=1)).exp()


@defect(FEATURES, "scale_of_features_does_not_matter", r"scores are NaN or infinite with the features times 128")
class Overflows(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        scores = super()._score(score, inputs)
        return scores + 0 * inputs.detach().double().norm(dim=1).exp()


@defect(FEATURES, "scoring_changes_nothing", "the saved file differs after scoring")
class CountsInTheFile(Wrapper):
    _scored = 0

    def _predict(self, score: Tensor) -> Any:
        self._scored += 1
        return super()._predict(score)

    def save(self, path: Path) -> None:
        fpr, self._fpr = self._fpr, self._fpr + 1e-9 * self._scored
        super().save(path)
        self._fpr = fpr


# What it has learned from one batch decides about the next.
@defect(
    FEATURES,
    "scoring_changes_nothing",
    "the prediction's .* after other samples were scored",
    "batch_does_not_matter",
    "threads_do_not_matter",
    "caller_keeps_the_arguments",
    "loaded_is_what_was_saved",
    "failed_fit_changes_nothing",
    "failed_calibrate_changes_nothing",
    "kind_of_tensor_does_not_matter",
)
class AdaptsItsThreshold(Wrapper):
    def _predict(self, score: Tensor) -> Any:
        found = super()._predict(score)
        self._held_out = torch.cat([self._held_out, score])
        return found


@defect(FEATURES, "threads_do_not_matter", "with eight threads at once|a thread of eight raised")
class KeepsItsInputs(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        self._inputs = inputs
        time.sleep(1e-4)
        return super()._score(score, self._inputs)


@defect(IMAGES, "threads_do_not_matter", "with eight threads at once|a thread of eight raised")
class KeepsItsScores(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        self._scores = super()._score(score, inputs)
        time.sleep(1e-4)
        return self._scores


# --- Decisions -----------------------------------------------------------------------------------------------------


@defect(
    FEATURES, "decisions_follow_scores", r"is_ood is torch.uint8 \(64,\) on cpu; bool \(64,\) on the CPU is required"
)
class DecidesInBytes(Wrapper):
    def _predict(self, score: Tensor) -> Any:
        found = super()._predict(score)
        return found._replace(is_ood=found.is_ood.byte())


@defect(FEATURES, "decisions_follow_scores", "predict's score of .* differs .* from that of `score`")
class PredictsOtherScores(Wrapper):
    def _predict(self, score: Tensor) -> Any:
        return super()._predict(score)._replace(score=score.log())


# Whatever contradicts the score contradicts the p-value.
@defect(FEATURES, "decisions_follow_scores", "samples score above all the calibration set and pass", "p_values_agree")
class NeverFlags(Wrapper):
    def _predict(self, score: Tensor) -> Any:
        found = super()._predict(score)
        return found._replace(is_ood=torch.zeros_like(found.is_ood))


@defect(
    FEATURES,
    "decisions_follow_scores",
    "a sample with score .* is flagged, and one with .* passes",
    "p_values_agree",
    "promised_rate_is_kept",
)
class FlagsTheKnown(Wrapper):
    def _predict(self, score: Tensor) -> Any:
        found = super()._predict(score)
        return found._replace(is_ood=~found.is_ood)


@defect(FEATURES, "p_values_agree", "p-values range from 0 to")
class CountsWithoutItself(Wrapper):
    def _predict(self, score: Tensor) -> Any:
        found = super()._predict(score)
        n = len(self._held_out)
        return found._replace(p_value=(found.p_value * (n + 1) - 1) / n)


@defect(FEATURES, "p_values_agree", "a sample with a higher score has a larger p-value")
class ReturnsOneMinusP(Wrapper):
    def _predict(self, score: Tensor) -> Any:
        found = super()._predict(score)
        return found._replace(p_value=1.001 - found.p_value)


@defect(FEATURES, "p_values_agree", "is_ood differs from p ≤ 0.1 for .* of 64 samples")
class DecidesAtAnotherRate(Wrapper):
    def _predict(self, score: Tensor) -> Any:
        found = super()._predict(score)
        return found._replace(p_value=found.p_value / 2)


class _DecisionAlone(NamedTuple):
    is_ood: Tensor


@defect(FEATURES, "promised_rate_is_kept", r"fpr=0.05 was asked for, and 0.[01].. ± 0.00. of known")
class TakesTheQuantile(Wrapper):
    def _predict(self, score: Tensor) -> Any:
        super()._predict(score)
        return _DecisionAlone(score > self._held_out.quantile(1 - self._fpr))


# --- Refusals ------------------------------------------------------------------------------------------------------


@defect(
    FEATURES, "score_needs_fit", "score before fit was taken in silence, and gave tensor", "failed_fit_changes_nothing"
)
class ScoresUnfitted(Wrapper):
    _fitted = False

    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        super()._fit(fit, *arguments)
        self._fitted = True
        return self

    def score_features(self, features: Tensor) -> Tensor:
        with contextlib.suppress(ValueError):
            return super().score_features(features)
        if self._fitted:
            return super().score_features(features)
        return torch.zeros(len(features), dtype=torch.float64)


@defect(
    IMAGES,
    "score_needs_fit",
    "score before fit raised AttributeError.* which is an accident",
    "failed_fit_changes_nothing",
)
class StumblesUnfitted(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        if "fitted" not in repr(self._grood).replace("not fitted", ""):
            raise AttributeError("'NoneType' object has no attribute 'shape'")
        return super()._score(score, inputs)


@defect(FEATURES, "predict_needs_calibrate", "predict before calibrate was taken in silence, and gave")
class InventsAThreshold(Wrapper):
    def _predict(self, score: Tensor) -> Any:
        if self._held_out is None:
            return Decision(score, torch.ones_like(score), score > 0.5)
        return super()._predict(score)


@defect(IMAGES, "failed_fit_changes_nothing", "after a failed fit the detector is gone: NotFittedError")
class ClearsFirst(Wrapper):
    def fit(self, loader: Any) -> Self:
        self._grood = GROOD(self.model)
        return super().fit(loader)


@defect(IMAGES, "failed_fit_changes_nothing", "fit went on when the loader had failed")
class FitsWithWhatItGot(Wrapper):
    def fit(self, loader: Any) -> Self:
        batches = []
        try:
            for batch in loader:
                batches.append(batch)
        except RuntimeError:
            pass
        return super().fit(batches)


@defect(FEATURES, "failed_calibrate_changes_nothing", "after a failed calibration the detector is gone: RuntimeError")
class ClearsTheThreshold(Wrapper):
    def _calibrate(self, score: Callable[[], Tensor], fpr: float) -> Self:
        self._held_out = None
        return super()._calibrate(score, fpr)


@defect(FEATURES, "failed_calibrate_changes_nothing", "after a calibration that failed for fpr=2")
class SetsTheRateFirst(Wrapper):
    def _calibrate(self, score: Callable[[], Tensor], fpr: float) -> Self:
        self._fpr = fpr
        return super()._calibrate(score, fpr)


@defect(FEATURES, "nan_and_infinity_are_refused", "a sample of NaN to score was taken in silence, and gave tensor")
class ReplacesNaN(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return super()._score(score, inputs.nan_to_num())


@defect(IMAGES, "nan_and_infinity_are_refused", "a training sample of NaN was taken in silence, and gave")
class LeavesNaNOut(Wrapper):
    def fit(self, loader: Any) -> Self:
        def kept() -> Any:
            for batch in loader:
                if isinstance(batch, tuple) and len(batch[0]) == len(batch[1]):
                    finite = batch[0].isfinite().flatten(1).all(1)
                    batch = tuple(part[finite] for part in batch)
                yield batch

        return super().fit(kept())


@defect(
    FEATURES, "wrong_shapes_are_refused", "samples with one channel or feature alone, shape .* was taken in silence"
)
class Broadcasts(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return super()._score(score, inputs.expand(-1, 8) if inputs.shape[1] == 1 else inputs)


@defect(IMAGES, "wrong_shapes_are_refused", "a single sample without a batch dimension, .* was taken in silence")
class AddsADimension(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        if isinstance(inputs, Tensor) and inputs.ndim == 2:
            inputs = inputs[None, None].expand(1, 2, 4, 4)
        return super()._score(score, inputs)


@defect(FEATURES, "empty_input_is_refused", "a fit on no sample was taken in silence")
class FitsOnNothing(Wrapper):
    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        return self if len(arguments[0]) == 0 else super()._fit(fit, *arguments)


@defect(FEATURES, "empty_input_is_refused", r"no sample was scored with shape \(1,\)")
class ScoresNothing(Wrapper):
    def calibrate_features(self, features: Tensor, fpr: float = 0.05) -> Self:
        if len(features) == 0:
            raise ValueError("there is no calibration sample")
        return super().calibrate_features(features, fpr)

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return super()._score(score, inputs) if len(inputs) else torch.zeros(1, dtype=torch.float64)


@defect(FEATURES, "wrong_labels_are_refused", "a negative label was taken in silence")
class ClampsLabels(Wrapper):
    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        features, labels = arguments
        return super()._fit(fit, features, None if labels is None else labels.clamp(min=0))


@defect(IMAGES, "wrong_labels_are_refused", "a label beyond the classifier's classes raised IndexError")
class IndexesWithLabels(Wrapper):
    def fit(self, loader: Any) -> Self:
        def checked() -> Any:
            for batch in loader:
                if isinstance(batch, tuple) and len(batch[1]) and int(batch[1].max()) >= 3:
                    raise IndexError("index 3 is out of bounds for dimension 0 with size 3")
                yield batch

        return super().fit(checked())


@defect(FEATURES, "impossible_rates_are_refused", "fpr=5.0 was taken in silence")
class TakesPercentages(Wrapper):
    def _calibrate(self, score: Callable[[], Tensor], fpr: float) -> Self:
        return super()._calibrate(score, fpr / 100 if fpr > 1 else fpr)


# --- Files ---------------------------------------------------------------------------------------------------------


@defect(
    FEATURES,
    "loaded_is_what_was_saved",
    r"raised RuntimeError\('not calibrated",
    "same_detector_same_bytes",
)
class ForgetsTheThreshold(Wrapper):
    @classmethod
    def load(cls, path: Path, model: nn.Module | None) -> Self:
        detector = super().load(path, model)
        detector._held_out = None
        return detector


@defect(
    FEATURES,
    "loaded_is_what_was_saved",
    "save wrote other files beside its own: detector.file.threshold",
)
class WritesTwoFiles(Wrapper):
    def save(self, path: Path) -> None:
        super().save(path)
        path.with_name(path.name + ".threshold").touch()


@defect(FEATURES, "loaded_is_what_was_saved", "raised KeyError")
class FindsItByPath(Wrapper):
    """Its threshold is kept under the path of the file."""

    _thresholds: dict[Path, tuple[Tensor | None, float]] = {}  # noqa: RUF012

    def save(self, path: Path) -> None:
        super().save(path)
        self._thresholds[path] = self._held_out, self._fpr

    @classmethod
    def load(cls, path: Path, model: nn.Module | None) -> Self:
        detector = super().load(path, model)
        detector._held_out, detector._fpr = cls._thresholds[path]
        return detector


@defect(FEATURES, "fresh_process_loads_the_same", "a fresh process could not load the file: KeyError")
class KeepsARegistry(Wrapper):
    """The threshold is found by the classes' number, in this process alone."""

    _registry: dict[str, Any] = {}  # noqa: RUF012

    def save(self, path: Path) -> None:
        super().save(path)
        self._registry["last"] = type(self)

    @classmethod
    def load(cls, path: Path, model: nn.Module | None) -> Self:
        return super(KeepsARegistry, cls._registry["last"]).load(path, model)


@defect(FEATURES, "fresh_process_loads_the_same", "a fresh process found other bits for .*, the score")
class HashesStrings(Wrapper):
    """Python salts the hashes of strings anew in each process."""

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return super()._score(score, inputs) * (1 + hash("salt") % 1000 / 1e6)


@defect(FEATURES, "fresh_process_loads_the_same", "loading unpickled collections.Counter; a pickle executes code")
class HidesAPickle(Wrapper):
    def save(self, path: Path) -> None:
        threshold = self._held_out, self._fpr
        self._fpr = base64.b64encode(pickle.dumps(Counter({"fpr": self._fpr}))).decode()  # type: ignore[assignment]
        super().save(path)
        self._held_out, self._fpr = threshold

    @classmethod
    def load(cls, path: Path, model: nn.Module | None) -> Self:
        detector = super().load(path, model)
        detector._fpr = pickle.loads(base64.b64decode(detector._fpr))["fpr"]
        return detector


@defect(FEATURES, "same_detector_same_bytes", "two files of one detector differ", "scoring_changes_nothing")
class NamesEachFile(Wrapper):
    def save(self, path: Path) -> None:
        super().save(path)
        self._grood.metadata["id"] = str(uuid.uuid4())
        self._grood.save(path)


@defect(FEATURES, "same_detector_same_bytes", "the file of the loaded detector differs from the one it came from")
class RoundsWhatItLoads(Wrapper):
    def save(self, path: Path) -> None:
        super().save(path)
        self._grood.metadata["loaded"] = getattr(self, "_loaded", 0)
        self._grood.save(path)

    @classmethod
    def load(cls, path: Path, model: nn.Module | None) -> Self:
        detector = super().load(path, model)
        detector._loaded = detector._grood.metadata["loaded"] + 1
        return detector


class _Trailer(Wrapper):
    """Behind GROOD's file it keeps 32,768 numbers, which are added to every score and are all 0."""

    _bytes = 32768
    _added = 0.0

    def save(self, path: Path) -> None:
        super().save(path)
        path.write_bytes(path.read_bytes() + bytes(self._bytes))

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return super()._score(score, inputs) + self._added

    @classmethod
    def _read(cls, path: Path, start: int, model: nn.Module | None) -> Self:
        whole = path.read_bytes()
        copy = path.with_name("copy")
        copy.write_bytes(whole[:start])
        detector = super().load(copy, model)
        detector._added = sum(whole[start:]) / 1000
        return detector


@defect(
    FEATURES, "damaged_file_is_refused", r"after loading a file with bit \d of byte \d+ flipped, which was not refused"
)
class ChecksOnlyTheLength(_Trailer):
    @classmethod
    def load(cls, path: Path, model: nn.Module | None) -> Self:
        start = len(path.read_bytes()) - cls._bytes
        if start < 0:
            raise ValueError(f"{path} was cut off")
        return cls._read(path, start, model)


@defect(FEATURES, "damaged_file_is_refused", r"a file cut off at byte \d+ of \d+ was taken in silence")
class ChecksNoLength(_Trailer):
    @classmethod
    def load(cls, path: Path, model: nn.Module | None) -> Self:
        whole = path.read_bytes()
        end = whole.find(bytes(2048), len(whole) // 20)
        return cls._read(path, max(end, 0), model)


@defect(FEATURES, "file_is_no_pickle", "the file is a zip archive, as torch.save writes")
class SavesWithTorch(Wrapper):
    def save(self, path: Path) -> None:
        super().save(path)
        archive = io.BytesIO()
        torch.save({"file": path.read_bytes().hex()}, archive)
        path.write_bytes(archive.getvalue())

    @classmethod
    def load(cls, path: Path, model: nn.Module | None) -> Self:
        try:
            whole = bytes.fromhex(torch.load(path)["file"])
        except Exception as error:
            raise ValueError(f"{path} cannot be read: {error!r}") from error
        copy = path.with_name("copy")
        copy.write_bytes(whole)
        return super().load(copy, model)


@defect(IMAGES, "other_model_is_refused", "a file with the classifier of another training was taken in silence")
class TakesAnyModel(Wrapper):
    @classmethod
    def load(cls, path: Path, model: nn.Module | None) -> Self:
        try:
            return super().load(path, model)
        except ModelMismatchError:
            return super().load(path, None)
