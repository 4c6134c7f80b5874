"""The service under load, beside the bare model on batches that lie in memory.

    python benchmarks/serving.py r20.onnx --model networks.py:resnet20 --weights r20.pt --images test/

Starts `grood serve` and 64 clients that send one image after another and check every answer against the detector's own.
Bare model and service take turns, since machines are noisy; the figure is the median of their ratios. Rounds in which
other processes took more than a twentieth of the machine's time are left out, whatever their ratio. Then so many
requests are sent that one that is lost would show: each must have its answer, and the service must have counted them.

Bare model, detector, HTTP and clients share the machine's cores. With --threads, the model has so many of them in both;
what HTTP needs then comes from the others.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from torch_grood import GROOD
from torch_grood.data import ImageTransform, load_image, read_source
from torch_grood.models import load_model
from torch_grood.runtime import DetectorRuntime, OnnxRuntime, Runtime

CLIENTS = 64
BATCH = 64
TOLERANCE = 1e-4
MOST_ELSEWHERE = 0.05
BOUNDARY = "next-image"


@dataclass
class Load:
    """What clients saw."""

    images: int = 0
    wrong: int = 0
    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return self.images / self.seconds


class Work(NamedTuple):
    """Images with their scores, and the bare model with a batch of them."""

    paths: Sequence[str]
    scores: Sequence[float]
    model: torch.nn.Module
    batch: torch.Tensor


class Client:
    """One connection that sends a request as soon as it has its answer."""

    def __init__(self, address: tuple[str, int], start: int) -> None:
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.next = start
        self.sent = 0.0
        self.buffer = b""

    def send(self, requests: Sequence[bytes]) -> None:
        self.sent = time.perf_counter()
        self.socket.sendall(requests[self.next % len(requests)])

    def receive(self) -> bytes | None:
        """The body of an answer, if all of it is there."""
        more = self.socket.recv(1 << 16)
        if not more:
            raise ConnectionError("the service closed a connection")
        self.buffer += more
        head, found, body = self.buffer.partition(b"\r\n\r\n")
        if not found:
            return None
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        if len(body) < length:
            return None
        if not head.startswith(b"HTTP/1.1 200"):
            raise ConnectionError(f"an answer was {head[:40]!r}")
        self.buffer = b""
        return body


def load(
    address: tuple[str, int], requests: Sequence[bytes], expected: Sequence[Sequence[float]], until: float, most: float
) -> Load:
    """All clients at work for so many seconds, or requests."""
    found, began = Load(), time.perf_counter()
    selector = selectors.DefaultSelector()
    clients = [Client(address, i * len(requests) // CLIENTS) for i in range(CLIENTS)]
    left = most
    for one in clients:
        one.send(requests)
        left -= 1
        selector.register(one.socket, selectors.EVENT_READ, one)
    open_clients = len(clients)
    while open_clients:
        ready = selector.select(timeout=60)
        if not ready:
            raise TimeoutError(f"{open_clients} clients wait for an answer")
        for key, _ in ready:
            client: Client = key.data
            body = client.receive()
            if body is None:
                continue
            now = time.perf_counter()
            found.latencies.append(now - client.sent)
            scores = [row["score"] for row in json.loads(body)["results"]]
            right = expected[client.next % len(requests)]
            found.images += len(right)
            found.wrong += len(scores) != len(right) or any(
                abs(one - other) > TOLERANCE * other for one, other in zip(scores, right, strict=True)
            )
            client.next += 1
            if now - began < until and left > 0:
                left -= 1
                client.send(requests)
            else:
                selector.unregister(client.socket)
                client.socket.close()
                open_clients -= 1
    found.seconds = time.perf_counter() - began
    return found


def requests_of(paths: Sequence[str], scores: Sequence[float], at_once: int) -> tuple[list[bytes], list[list[float]]]:
    """Requests with so many images each, and the scores of each."""
    requests, expected = [], []
    for start in range(0, len(paths) - at_once + 1, at_once):
        files = [Path(path).read_bytes() for path in paths[start : start + at_once]]
        if at_once == 1:
            kind, body = "image/png", files[0]
        else:
            kind = f"multipart/form-data; boundary={BOUNDARY}"
            part = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n'.encode()
            body = b"".join(part + file + b"\r\n" for file in files) + f"--{BOUNDARY}--\r\n".encode()
        head = (
            f"POST /v1/score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        requests.append(head.encode() + body)
        expected.append(list(scores[start : start + at_once]))
    return requests, expected


def bare(model: torch.nn.Module, batch: torch.Tensor, seconds: float) -> float:
    """Images a second of the network alone."""
    with torch.inference_mode():
        model(batch)
        count, began = 0, time.perf_counter()
        while time.perf_counter() - began < seconds:
            model(batch)
            count += len(batch)
        return count / (time.perf_counter() - began)


@contextmanager
def served(arguments: Sequence[str]) -> Iterator[tuple[tuple[str, int], int]]:
    """A service in a process of its own: its address, and the process."""
    command = [sys.executable, "-c", "from torch_grood.cli import main; main()", "serve", *arguments, "--port", "0"]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            yield ("127.0.0.1", port_of(process, log)), process.pid
        finally:
            process.terminate()
            process.wait(60)


def port_of(process: subprocess.Popen[bytes], log: IO[str]) -> int:
    """Where a service listens, as its log says."""
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None:
        log.seek(0)
        found = re.search(r'"url": "http://[^"]*:(\d+)/"', log.read())
        if found is not None:
            return int(found.group(1))
        time.sleep(0.1)
    log.seek(0)
    raise SystemExit(f"the service did not start: {log.read()}")


def opened(arguments: argparse.Namespace) -> tuple[Runtime, torch.nn.Module]:
    """The detector, and its network alone."""
    path = Path(arguments.detector)
    if path.suffix == ".onnx":
        runtime = OnnxRuntime(path)
        return runtime, load_model(arguments.model, arguments.weights, len(runtime.classes)).model.eval()
    model = load_model(arguments.model, arguments.weights).model.eval()
    detector = GROOD.load(path, model)
    return DetectorRuntime(detector, ImageTransform.from_dict(detector.metadata["transform"])), model


def pixels_of(runtime: Runtime, paths: Sequence[str]) -> NDArray[np.uint8]:
    """Images (n, H, W, 3), as the runtime wants them."""
    return np.stack([runtime.transform.pixels(load_image(path)) for path in paths])


def elsewhere(service: int) -> tuple[float, float]:
    """Seconds that all processors were busy for, so far, but for this process and the service; and the time (Linux)."""
    tick = os.sysconf("SC_CLK_TCK")
    numbers = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    # All but idle and waiting for disks.
    busy = sum(numbers) - numbers[3] - numbers[4]
    own = 0
    for process in (os.getpid(), service):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        own += int(fields[11]) + int(fields[12])
    return (busy - own) / tick, time.perf_counter()


def compare(
    address: tuple[str, int], service: int, work: Work, at_once: int, rounds: int, seconds: float, tries: int
) -> None:
    """Print the throughput of the service beside that of the bare model."""
    requests, expected = requests_of(work.paths, work.scores, at_once)
    load(address, requests, expected, 2.0, np.inf)
    ratios: list[float] = []
    rates, latencies = [], []
    left_out = 0
    while len(ratios) < rounds and len(ratios) + left_out < tries:
        others, began = elsewhere(service)
        before = bare(work.model, work.batch, seconds / 2)
        found = load(address, requests, expected, seconds, np.inf)
        after = bare(work.model, work.batch, seconds / 2)
        if found.wrong:
            raise SystemExit(f"{found.wrong} wrong answers")
        others_now, now = elsewhere(service)
        # The bare model's threads wait for one another: who takes one's time takes that of all.
        if (others_now - others) / ((now - began) * (os.cpu_count() or 1)) > MOST_ELSEWHERE:
            left_out += 1
            continue
        ratios.append(found.rate / ((before + after) / 2))
        rates.append(found.rate)
        latencies += found.latencies
    if not ratios:
        print(f"{at_once:>2} images a request: other processes were at work in all of {left_out} rounds", flush=True)
        return
    print(
        f"{at_once:>2} images a request: {statistics.median(rates):,.0f} images/s, service / bare model "
        f"{statistics.median(ratios):.2f} (rounds: {', '.join(f'{ratio:.2f}' for ratio in ratios)}; "
        f"{left_out} left out); {milliseconds(latencies)}",
        flush=True,
    )


def count(address: tuple[str, int], work: Work, requests: int) -> None:
    """Send so many requests, and print how many were answered."""
    before = counted(address)
    found = load(address, *requests_of(work.paths, work.scores, 1), np.inf, requests)
    print(
        f"{requests:,} requests of {CLIENTS} clients: {len(found.latencies):,} answers, {found.wrong} wrong; the "
        f"service counted {counted(address) - before:,}; {milliseconds(found.latencies)}, "
        f"max {1000 * max(found.latencies):.0f} ms"
    )


def milliseconds(latencies: Sequence[float]) -> str:
    """Two quantiles."""
    p50, p99 = (1000 * np.quantile(latencies, level) for level in (0.5, 0.99))
    return f"p50 {p50:.0f} ms, p99 {p99:.0f} ms"


def counted(address: tuple[str, int]) -> int:
    """Images that the service says it has answered about."""
    with urllib.request.urlopen(f"http://{address[0]}:{address[1]}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return sum(int(float(count)) for count in re.findall(r"^grood_images_total\{.*\} (\S+)$", text, re.MULTILINE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", help="an .onnx or .grood file")
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--images", required=True)
    parser.add_argument("--at-once", type=int, nargs="+", default=[1, 4, 16], help="images in a request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tries", type=int, default=20, help="rounds at most, with those that are left out")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--requests", type=int, default=50_000, help="of the run that counts them")
    parser.add_argument("--threads", type=int, help="of the model, bare and served; default: one a CPU")
    parser.add_argument("--parallel", type=int, default=1, help="batches at the same time; see grood serve --help")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    paths = list(read_source([arguments.images], None, "none").paths)[:6400]
    runtime, model = opened(arguments)
    pixels = pixels_of(runtime, paths)
    scores = [
        score for start in range(0, len(pixels), BATCH) for score in runtime.decide(pixels[start : start + BATCH]).score
    ]
    batch = runtime.transform.normalise(torch.from_numpy(pixels[:BATCH]).permute(0, 3, 1, 2).contiguous())
    work = Work(paths, scores, model, batch)
    options = [arguments.detector]
    if not arguments.detector.endswith(".onnx"):
        options += ["--model", arguments.model]
        options += [] if arguments.weights is None else ["--weights", str(arguments.weights)]
    options += [] if arguments.threads is None else ["--threads", str(arguments.threads)]
    options += [] if arguments.parallel == 1 else ["--parallel", str(arguments.parallel)]
    with served(options) as (address, service):
        for at_once in arguments.at_once:
            compare(address, service, work, at_once, arguments.rounds, arguments.seconds, arguments.tries)
        count(address, work, arguments.requests)


if __name__ == "__main__":
    main()
