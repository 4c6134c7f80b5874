"""Requests that mean harm, or are damaged, sent to the real service by the hundred.

    python tests/hostile.py r20.grood --requests 2000 -- --model networks.py:resnet20 --weights r20.pt

Request i of a seed is always the same. None may be answered with 5xx, none may remain without an end; memory and open
connections must be what they were, and a good image must have the same answer as before.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import socket
import struct
import sys
import time
import urllib.request
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from served import Served, served

__all__ = ["KINDS", "Found", "attack", "hostile", "main"]

# The service's: slow requests end sooner than by default, and none is refused because the machine has other work.
SECONDS = 10
OPTIONS = ("--timeout", SECONDS, "--max-request", 1)
_AT_ONCE = 16
_PATIENCE = 30.0
# After an answer, whether there is another one.
_LINGER = 0.2
_PATHS = ("../../etc/passwd", "/etc/passwd", "..\\..\\boot.ini", "file:///etc/passwd", "\x00", "a" * 5000, "%2e%2e%2f")

Pieces = list[bytes | float]
"""What is sent; a number is a pause in seconds, below 0 the end of the connection."""


def _image(chance: random.Random, kind: str | None = None, size: tuple[int, int] = (32, 32)) -> bytes:
    pixels = np.frombuffer(chance.randbytes(size[0] * size[1] * 3), np.uint8).reshape(size[1], size[0], 3)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, kind or chance.choice(("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")))
    return content.getvalue()


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _png(width: int, height: int, *more: bytes, colour: int = 2, depth: int = 8, data: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = b"".join(more) + _chunk(b"IDAT", data or zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + body + _chunk(b"IEND", b"")


def _http(
    body: bytes,
    kind: str = "image/png",
    *,
    line: str = "POST /v1/score HTTP/1.1",
    length: object = None,
    more: str = "",
    host: str = "127.0.0.1",
) -> bytes:
    count = len(body) if length is None else length
    head = f"{line}\r\nHost: {host}\r\nContent-Type: {kind}\r\nContent-Length: {count}\r\n{more}\r\n"
    return head.encode("utf-8", "surrogateescape") + body


def truncated(chance: random.Random) -> Pieces:
    image = _image(chance)
    return [_http(image[: chance.randrange(len(image))])]


def damaged(chance: random.Random) -> Pieces:
    image = bytearray(_image(chance))
    for _ in range(chance.randint(1, 30)):
        image[chance.randrange(len(image))] = chance.randrange(256)
    return [_http(bytes(image))]


def declares_too_much(chance: random.Random) -> Pieces:
    large = chance.choice((20_000, 65_535, 2**31 - 1))
    bmp = bytearray(_image(chance, "BMP"))
    bmp[18:26] = struct.pack("<ii", large, chance.choice((large, -large)))
    gif = bytearray(_image(chance, "GIF"))
    gif[6:10] = struct.pack("<HH", 65_535, 65_535)
    jpeg = _image(chance, "JPEG")
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg = jpeg[:at] + struct.pack(">HH", 65_535, 65_535) + jpeg[at + 4 :]
    ppm = b"P6 %d %d 255\n" % (large, large)
    return [_http(chance.choice((_png(large, large), _png(large, 1), bytes(bmp), bytes(gif), jpeg, ppm)))]


def bomb(chance: random.Random) -> Pieces:
    side = chance.choice((3000, 6900, 9000))
    rows = zlib.compress(bytes(side * side // 8 + side), 9)
    text = _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**20 - 1), 9))
    profile = _chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(50 * 2**20), 9))
    content = chance.choice((
        _png(side, side, colour=0, depth=1, data=rows),
        _png(8, 8, *[text] * 70),
        _png(8, 8, profile),
        _png(32, 32, data=zlib.compress(bytes(50 * 2**20), 9)),
    ))  # fmt: skip
    return [_http(content)]


def no_numbers(chance: random.Random) -> Pieces:
    pixels = np.full((32, 32), chance.choice((np.nan, np.inf, -np.inf, 3e38)), np.float32)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "TIFF")
    return [_http(chance.choice((content.getvalue(), b"PF\n32 32\n-1.0\n" + pixels.tobytes())), "image/tiff")]


def wrong_type(chance: random.Random) -> Pieces:
    kinds = ("text/html", "application/json", "multipart/form-data", "multipart/form-data; boundary=x", "", "a" * 3000)
    body = chance.choice((b"<html>", b"%PDF-1.7", b"MZ" + bytes(100), b"PK\3\4", b"<svg/>", _image(chance), b""))
    return [_http(body, chance.choice((*kinds, "image/png")))]


def bad_json(chance: random.Random) -> Pieces:
    data = base64.b64encode(_image(chance)).decode()
    path = chance.choice(_PATHS)
    body: bytes = chance.choice((
        b"[" * 500_000,
        b'{"images": [' + b"[]," * 200_000 + b"[]]}",
        b'{"image": 1' + b"0" * 100_000 + b"}",
        b'{"image": NaN}',
        b'{"image": "' + b"\\ud800" * 1000 + b'"}',
        b"\xff\xfe" + b'{"image": ""}',
        json.dumps({"image": data[:-1]}).encode(),
        json.dumps({"images": [data] * 65}).encode(),
        json.dumps({"image": path}).encode(),
        json.dumps({"path": path}).encode(),
        json.dumps({"images": [{"path": path, "url": path}]}).encode(),
        json.dumps({"images": [{"name": path, "data": data}]}).encode(),
        json.dumps({"__proto__": {"image": data}, "image": {"image": data}}).encode(),
    ))  # fmt: skip
    return [_http(body, "application/json")]


def bad_multipart(chance: random.Random) -> Pieces:
    part = b'Content-Disposition: form-data; name="images"; filename="%s"\r\n\r\n'
    name = chance.choice(_PATHS).encode()
    body: bytes = chance.choice((
        b"--b\r\n" + part % name + _image(chance) + b"\r\n--b--\r\n",
        b"--b\r\n" + part % b"x" + _image(chance),
        b"--b\r\n" + b"a: b\r\n" * 100_000 + b"\r\n\r\n--b--",
        b"\r\n--b" * 100_000,
        b"--b\r\n\r\n\r\n" * 50_000 + b"--b--",
        b"\r\n-" * 200_000,
        b"--b\r\n" + part % (b'"' * 500 + b";=" * 500) + b"\r\n--b--",
        b"",
    ))  # fmt: skip
    kind = chance.choice(("b", "b", "b", "", '"', "b" * 500, "\\", "-"))
    return [_http(body, f"multipart/form-data; boundary={kind}")]


def bad_http(chance: random.Random) -> Pieces:
    image = _image(chance, "PNG")
    return [chance.choice((
        chance.randbytes(200),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + chance.randbytes(100),
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET http://evil.example/ HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
        b"GET /healthz HTTP/1.0\r\n\r\n",
        b"GET /%s HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % (b"a" * 50_000),
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        b"POST /v1/score HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\nabc",
        b"POST /v1/score HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/score HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 2000,
        _http(image, length=-1),
        _http(image, length="1, 2"),
        _http(image, length=10**18),
        _http(image, length=len(image) - 5),
        _http(image, host="evil.example"),
        _http(image, more="Origin: null\r\n"),
        _http(image, more="Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"),
        _http(image, more="Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAAA\r\n"),
        _http(image, more="Expect: 100-continue\r\nContent-Encoding: gzip\r\n"),
        _http(bytes(2**20 + 1)),
        _http(image) * 20,
    ))]  # fmt: skip


def paths(chance: random.Random) -> Pieces:
    target = chance.choice((
        *("/../../etc/passwd", "/v1/training/../../../etc/passwd", "/v1/training/%2e%2e%2fetc", "*"),
        *("/static-offline-docs/", "/static-offline-docs/../core.py", "/static-offline-docs/%2e%2e/core.py"),
        *("/v1/training/99999999999", "/v1/training/" + "9" * 400, "/v1/score?neighbors=1e9", "/%00", "/%ff", "//"),
        *("/v1/training/-1", "/v1/score/"),
        *("/v1/score?" + "&".join(f"a{i}=1" for i in range(2000)), "/docs/oauth2-redirect"),
    ))  # fmt: skip
    method = chance.choice(("GET", "POST", "HEAD", "OPTIONS", "TRACE", "DELETE", "CONNECT", "BREW"))
    return [_http(_image(chance, "PNG"), line=f"{method} {target} HTTP/1.1")]


def gone(chance: random.Random) -> Pieces:
    """The client leaves before its answer."""
    whole = _http(_image(chance, "PNG"))
    return [whole[: chance.randint(1, len(whole))], -1.0]


def slow(chance: random.Random) -> Pieces:
    whole = _http(_image(chance, "PNG"))
    start = whole.index(b"\r\n\r\n") + 5
    if chance.random() < 0.2:
        start = chance.randint(1, start - 5)
    return [whole[:start], *[piece for byte in whole[start : start + 8] for piece in (0.4, bytes([byte]))]]


Kind = Callable[[random.Random], Pieces]
KINDS: tuple[Kind, ...] = (
    *(truncated, damaged, declares_too_much, bomb, no_numbers, wrong_type, bad_json, bad_multipart, bad_http, paths),
    gone,
)
# One in so many; each takes seconds.
_SLOW_EVERY = 25


def attack(seed: int, number: int) -> tuple[str, Pieces]:
    """Its kind, and what is sent."""
    chance = random.Random(f"{seed} {number}")
    kind = slow if number % _SLOW_EVERY == 0 else chance.choice(KINDS)
    return kind.__name__, kind(chance)


def send(port: int, pieces: Pieces) -> list[int]:
    """Statuses of the answers, of which there may be none.

    Raises:
        TimeoutError: if the connection is neither answered nor ended.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE) as connection:
        received = bytearray()
        try:
            for piece in pieces:
                if not isinstance(piece, bytes):
                    if piece < 0:
                        return []
                    time.sleep(piece)
                    continue
                connection.sendall(piece)
            while True:
                connection.settimeout(_LINGER if b"\r\n\r\n" in received else _PATIENCE)
                more = connection.recv(1 << 16)
                if not more:
                    break
                received += more
        except TimeoutError:
            if b"\r\n\r\n" not in received:
                raise
        except OSError:
            # It has ended the connection, and may have said why.
            pass
    return [int(line[9:12]) for line in bytes(received).split(b"HTTP/1.1 ")[1:] for line in [b"HTTP/1.1 " + line]]


class Found(NamedTuple):
    """What came of them; `bad` says what must not be."""

    statuses: Counter[str]
    rss: list[int]
    bad: list[str]


def hostile(service: Served, requests: int, good: bytes, seed: int = 0) -> Found:
    """Send so many to a service that was started with `OPTIONS`, and before and after them an image that it knows."""
    statuses: Counter[str] = Counter()
    before, bad, rss = _score(service, good), [], []

    def one(number: int) -> tuple[int, str, list[int] | None]:
        kind, pieces = attack(seed, number)
        try:
            return number, kind, send(service.port, pieces)
        except TimeoutError:
            return number, kind, None

    n_files = service.n_files()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for part in np.array_split(np.arange(requests), 5):
            for number, kind, found in pool.map(one, part.tolist()):
                statuses.update(map(str, found or ["no answer"]))
                if found is None:
                    bad.append(f"request {number} ({kind}) has no end")
                elif any(status >= 500 for status in found):
                    bad.append(f"request {number} ({kind}) was answered with {found}")
            rss.append(service.rss())
    if _score(service, good) != before:
        bad.append("a good image has another answer than before")
    until = time.monotonic() + _PATIENCE
    while service.n_files() > n_files and time.monotonic() < until:
        time.sleep(0.2)
    if service.n_files() > n_files:
        bad.append(f"{service.n_files() - n_files} connections remain open")
    errors = [line for line in service.lines() if line["level"] == "error"]
    bad += [f"its log: {line}" for line in errors[:5]]
    return Found(statuses, rss, bad)


def _score(service: Served, image: bytes) -> object:
    request = urllib.request.Request(f"{service.url}/v1/score", image, {"Content-Type": "image/png"})
    with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
        return json.load(answer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if the service stands it."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    at = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector")
    parser.add_argument("--image", type=Path, help="that it can score; default: noise of 32 × 32 pixels")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(given[:at])
    with served(options.detector, *given[at + 1 :], *OPTIONS) as service:
        start = time.monotonic()
        good = options.image.read_bytes() if options.image else _image(random.Random(0), "PNG")
        found = hostile(service, options.requests, good, options.seed)
        seconds = time.monotonic() - start
    print(f"{options.requests:,} hostile requests in {seconds:.0f} s, seed {options.seed}; answers by status:")
    print("  " + ", ".join(f"{status}: {count:,}" for status, count in sorted(found.statuses.items())))
    print("  memory after each fifth, MiB: " + ", ".join(f"{rss / 2**20:.0f}" for rss in found.rss))
    print("\n".join(found.bad) or "  no 5xx, none without an end, no connection left open; then a good answer")
    return bool(found.bad)


if __name__ == "__main__":
    sys.exit(main())
