"""An exported detector against PyTorch: is ONNX Runtime as fast, and does it say the same of real images?

    python benchmarks/exported.py r20.grood --model nets.py:resnet20 --weights r20.pt images/
    python benchmarks/exported.py r20.grood --model nets.py:resnet20 --weights r20.pt test.txt --root images --threads 2

Speed: the model alone and the whole detector, from prepared images in memory, in turns within one process and with as
many threads; the medians, and PyTorch's time divided by ONNX Runtime's, above 1 where ONNX Runtime is faster.
Equality: over all images, decided about by both in the same batches.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_grood import GROOD
from torch_grood.data import ImageTransform, read_source
from torch_grood.data.pixels import PixelLoader
from torch_grood.export import export_onnx
from torch_grood.models import load_model
from torch_grood.runtime import DetectorRuntime, OnnxRuntime
from torch_grood.runtime.onnx import INPUT, session_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", type=Path)
    parser.add_argument("images", nargs="+", help="folders, lists or files")
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--root", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model, arguments.weights, None).model
    detector = GROOD.load(arguments.detector, model)
    transform = ImageTransform.from_dict(detector.metadata["transform"])
    source = read_source(arguments.images, arguments.root, "none")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.onnx")
        start = time.perf_counter()
        export_onnx(detector, path, transform)
        print(f"exported in {time.perf_counter() - start:.1f} s, {path.stat().st_size / 1e6:.1f} MB")
        runtime = OnnxRuntime(path, threads=arguments.threads)
    runtimes = DetectorRuntime(detector, transform), runtime
    loader = PixelLoader(source, transform, batch_size=max(arguments.batches))
    first = next(iter(loader))
    session = session_of(_exported_model(model, first.shape[1:3]), "the model alone", arguments.threads)
    print(f"\n{detector.fit_info_.n_indexed:,} gradients, {arguments.threads} threads; milliseconds a batch")
    print(f"{'batch':>6} {'':>10} {'PyTorch':>10} {'ONNX':>10} {'ratio':>7}")
    for n in arguments.batches:
        pixels = first[:n]
        images = transform.normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
        inputs = {INPUT: images.numpy()}
        alone = _in_turns(_model_alone(model, images), partial(session.run, None, inputs), rounds=arguments.rounds)
        _row(n, "model", alone)
        _row(n, "detector", _in_turns(*(partial(one.decide, pixels) for one in runtimes), rounds=arguments.rounds))
    _compare(*runtimes, loader)


def _exported_model(model: nn.Module, size: tuple[int, ...]) -> bytes:
    """The classifier by itself, from prepared images to logits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        batch = {0: torch.export.Dim("batch")}
        torch.onnx.export(
            model.eval(),
            (torch.randn(2, 3, *size),),
            path,
            input_names=[INPUT],
            dynamic_shapes=(batch,),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
        return path.read_bytes()


def _model_alone(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    def run() -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(images)
        return logits

    return run


def _in_turns(one: Callable[[], Any], other: Callable[[], Any], *, rounds: int) -> tuple[float, float]:
    times: tuple[list[float], list[float]] = ([], [])
    for round_number in range(rounds + 2):
        for run, taken in zip((one, other), times, strict=True):
            start = time.perf_counter()
            run()
            if round_number >= 2:
                taken.append(1e3 * (time.perf_counter() - start))
    return median(times[0]), median(times[1])


def _row(n: int, what: str, taken: tuple[float, float]) -> None:
    print(f"{n:>6} {what:>10} {taken[0]:>10.2f} {taken[1]:>10.2f} {taken[0] / taken[1]:>7.2f}")


def _compare(torch_runtime: DetectorRuntime, onnx_runtime: OnnxRuntime, loader: PixelLoader) -> None:
    deviations, counts, total = [], {"label": 0, "neighbor": 0, "p_value": 0, "is_ood": 0}, 0
    for pixels in loader:
        expected, found = torch_runtime.decide(pixels), onnx_runtime.decide(pixels)
        deviations.append(np.abs(found.score / expected.score - 1))
        for name in counts:
            counts[name] += int((getattr(found, name) != getattr(expected, name)).sum())
        total += len(pixels)
    deviation = np.concatenate(deviations)
    largest, middle = deviation.max(), np.median(deviation)
    print(f"\n{total:,} images: scores differ by at most {largest:.2g} of themselves (median {middle:.2g})")
    print("images that differ: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
