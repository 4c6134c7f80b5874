"""Other ways to break a clause than those in `defects`; only the clause itself is asked about them."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from defects import FEATURES, IMAGES, Defect, KeepsOldSamples, defect
from torch import Tensor, nn
from wrapper import Decision, Wrapper

from torch_grood import FormatError

VARIANTS: list[Defect] = []


def variant(use: str, clause: str, message: str) -> Callable[[type], type]:
    """Enter a class into the list."""
    return defect(use, clause, message, into=VARIANTS)


# --- Making and fitting --------------------------------------------------------------------------------------------


@variant(FEATURES, "fit_forgets_the_last_fit", "the score of .* differs")
class KeepsOldSamplesAndOnlyScores(KeepsOldSamples):
    calibrate_features = predict_features = None  # type: ignore[assignment]


@variant(FEATURES, "fit_forgets_the_last_fit", "the prediction's p_value of .* differs")
class KeepsOldCalibrations(Wrapper):
    _before: Tensor | None = None

    def _calibrate(self, score: Callable[[], Tensor], fpr: float) -> Self:
        super()._calibrate(score, fpr)
        held_out = self._held_out
        if self._before is not None:
            self._held_out = torch.cat([self._before, held_out])
        self._before = held_out
        return self


@variant(FEATURES, "calibrate_forgets_the_last", "the score of .* differs .* after calibrate$|after calibrate\\.")
class ScalesByTheHeldOut(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        found = super()._score(score, inputs)
        return found if self._held_out is None else found / self._held_out.mean()


@variant(FEATURES, "caller_keeps_the_arguments", "score or predict changed the inputs that it was given")
class ScoresInPlace(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        found = super()._score(score, inputs)
        inputs.mul_(2)
        return found

    def _calibrate(self, score: Callable[[], Tensor], fpr: float) -> Self:
        self._held_out, self._fpr = torch.arange(40.0, dtype=torch.float64), fpr
        return self


@variant(FEATURES, "caller_keeps_the_arguments", "fit_features set requires_grad on the inputs that it was given")
class AsksForGradients(Wrapper):
    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        super()._fit(fit, *arguments)
        arguments[0].requires_grad_()
        return self


# --- Scores --------------------------------------------------------------------------------------------------------


@variant(FEATURES, "scores_are_float64_on_the_cpu", r"the scores of 64 samples have shape \(64, 1\)")
class ScoresInAColumn(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return super()._score(score, inputs)[:, None]


@variant(IMAGES, "scores_are_float64_on_the_cpu", r"24 of 64 scores are not finite .*: \[inf\]")
class ScoresInfinity(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        found = super()._score(score, inputs)
        return found.where(found < found.sort().values[-24], torch.inf) if len(found) == 64 else found


@variant(
    FEATURES, "every_float_dtype_is_taken", "the scores are torch.bfloat16 for torch.bfloat16; float64 is required"
)
class ScoresInTheInputsDtype(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        found = super()._score(score, inputs)
        return found.to(torch.bfloat16) if inputs.dtype == torch.bfloat16 else found


@variant(FEATURES, "kind_of_tensor_does_not_matter", "the score of .* differs .* for strided tensors")
class ReadsMemory(Wrapper):
    """It takes the numbers as they lie in memory, whatever the strides are."""

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return super()._score(score, inputs.detach().as_strided(inputs.shape, (inputs.shape[1], 1)))


@variant(FEATURES, "kind_of_tensor_does_not_matter", r"differs .* within torch.inference_mode\(\)")
class RoundsInInferenceMode(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        found = super()._score(score, inputs)
        return found.float().double() if torch.is_inference_mode_enabled() and len(inputs) == 64 else found


@variant(FEATURES, "scale_of_features_does_not_matter", r"AUROC is 0.000 with the features times 128")
class TurnsRound(Wrapper):
    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        found = super()._score(score, inputs)
        return -found if inputs.abs().max() > 200 else found


@variant(FEATURES, "threads_do_not_matter", r"a thread of eight raised \[RuntimeError\('busy'\)\]")
class IsBusy(Wrapper):
    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        self._lock = threading.Lock()
        return super()._fit(fit, *arguments)

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("busy")
        try:
            return super()._score(score, inputs)
        finally:
            self._lock.release()


@variant(FEATURES, "p_values_agree", r"p_value is torch.float32 \(64,\)")
class RoundsItsPValues(Wrapper):
    def _predict(self, score: Tensor) -> Any:
        found = super()._predict(score)
        return found._replace(p_value=found.p_value.float())


# --- Refusals ------------------------------------------------------------------------------------------------------


@variant(FEATURES, "score_needs_fit", "calibrate before fit was taken in silence")
class CalibratesUnfitted(Wrapper):
    def _calibrate(self, score: Callable[[], Tensor], fpr: float) -> Self:
        return self if "not fitted" in repr(self._grood) else super()._calibrate(score, fpr)


@variant(FEATURES, "failed_fit_changes_nothing", "score after a first fit that failed was taken in silence")
class IsHalfFitted(Wrapper):
    _began = False

    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        self._began = True
        return super()._fit(fit, *arguments)

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        if self._began and "not fitted" in repr(self._grood):
            return torch.zeros(len(inputs), dtype=torch.float64)
        return super()._score(score, inputs)


@variant(FEATURES, "failed_fit_changes_nothing", "with a failed fit before the fit, compared with the fit alone")
class RemembersAFailure(Wrapper):
    _first: int | None = None

    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        if self._first is None:
            self._first = len(arguments[0])
        return super()._fit(fit, *arguments)

    def _score(self, score: Callable[[Any], Tensor], inputs: Any) -> Tensor:
        return super()._score(score, inputs) * (self._first or 1)


@variant(FEATURES, "nan_and_infinity_are_refused", "a calibration sample of NaN was taken in silence")
class LeavesNaNOutOfTheHeldOut(Wrapper):
    def calibrate_features(self, features: Tensor, fpr: float = 0.05) -> Self:
        return super().calibrate_features(features[features.isfinite().all(1)], fpr)


@variant(FEATURES, "nan_and_infinity_are_refused", "a sample of NaN to predict was taken in silence, and gave")
class DecidesAboutNaN(Wrapper):
    def predict_features(self, features: Tensor) -> Any:
        return super().predict_features(features.nan_to_num())


@variant(FEATURES, "wrong_shapes_are_refused", "samples with one channel or feature alone to calibrate on was taken in")
class BroadcastsTheHeldOut(Wrapper):
    def calibrate_features(self, features: Tensor, fpr: float = 0.05) -> Self:
        return super().calibrate_features(features.expand(-1, 8) if features.shape[1] == 1 else features, fpr)


@variant(FEATURES, "empty_input_is_refused", "a calibration on no sample was taken in silence")
class CalibratesOnNothing(Wrapper):
    def _calibrate(self, score: Callable[[], Tensor], fpr: float) -> Self:
        self._held_out, self._fpr = score(), fpr
        return self


@variant(IMAGES, "empty_input_is_refused", "a fit on a loader whose only batch is empty was taken in silence")
class PassesOverEmptyBatches(Wrapper):
    def fit(self, loader: Any) -> Self:
        loader = list(loader)
        return self if loader and all(len(batch[0]) == 0 for batch in loader) else super().fit(loader)


@variant(FEATURES, "wrong_labels_are_refused", "a fit without labels was taken in silence")
class InventsLabels(Wrapper):
    def _fit(self, fit: Callable[..., object], *arguments: Any) -> Self:
        features, labels = arguments
        return super()._fit(fit, features, torch.zeros(len(features), dtype=torch.int64) if labels is None else labels)


# --- Files ---------------------------------------------------------------------------------------------------------


@variant(FEATURES, "loaded_is_what_was_saved", r"save\('detector.file'\) wrote no file of that name")
class AddsAnEnding(Wrapper):
    def save(self, path: Path) -> None:
        super().save(path.with_name(path.name + ".npz"))


@variant(FEATURES, "loaded_is_what_was_saved", "predict, loaded without a threshold, was taken in silence")
class LoadsAThreshold(Wrapper):
    def _predict(self, score: Tensor) -> Any:
        if self._held_out is not None and len(self._held_out) == 0:
            return Decision(score, torch.ones_like(score), score < 0)
        return super()._predict(score)

    @classmethod
    def load(cls, path: Path, model: nn.Module | None) -> Self:
        detector = super().load(path, model)
        if detector._held_out is None:
            detector._held_out = torch.empty(0, dtype=torch.float64)
        return detector


@variant(
    FEATURES, "damaged_file_is_refused", r"a file with bit \d of byte \d+ flipped raised KeyError.* is an accident"
)
class StumblesOverFiles(Wrapper):
    _size = 0

    def save(self, path: Path) -> None:
        super().save(path)
        type(self)._size = len(path.read_bytes())

    @classmethod
    def load(cls, path: Path, model: nn.Module | None) -> Self:
        try:
            return super().load(path, model)
        except FormatError:
            if len(path.read_bytes()) < cls._size:
                raise
            raise KeyError("header") from None


@variant(FEATURES, "file_is_no_pickle", "the file is a pickle")
class SavesAPickle(Wrapper):
    def save(self, path: Path) -> None:
        super().save(path)
        path.write_bytes(pickle.dumps(path.read_bytes(), protocol=0))

    @classmethod
    def load(cls, path: Path, model: nn.Module | None) -> Self:
        raise NotImplementedError
