"""Who may ask, and by which name."""

from __future__ import annotations

import pytest
from serve_world import in_loop, served

from grey import Grey
from torch_grood.serving import Settings

TOKEN = "0123456789abcdef"


def status(settings: Settings, path: str = "/v1/info", **headers: str) -> int:
    found = []

    @in_loop
    async def ask() -> None:
        async with served(Grey(), settings) as client:
            found.append((await client.get(path, headers=headers)).status_code)

    ask()
    return int(found[0])


@pytest.mark.parametrize(
    ("settings", "host", "expected"),
    [
        (Settings(), "127.0.0.1:8000", 200),
        (Settings(), "LOCALHOST", 200),
        (Settings(), "[::1]:8000", 200),
        (Settings(), "evil.example", 400),
        (Settings(), "127.0.0.1.evil.example", 400),
        (Settings(), "localhost@evil.example", 400),
        (Settings(), "", 400),
        (Settings(allowed_hosts=("ood.example",)), "OOD.example:443", 200),
        (Settings(allowed_hosts=("ood.example",)), "other.example", 400),
        (Settings(allowed_hosts=("*",)), "other.example", 200),
        (Settings(host="0.0.0.0"), "other.example", 200),
        (Settings(host="0.0.0.0", allowed_hosts=("ood.example",)), "other.example", 400),
        (Settings(host="10.0.0.1"), "10.0.0.1", 200),
        (Settings(host="10.0.0.1"), "other.example", 400),
    ],
)
def test_hosts(settings: Settings, host: str, expected: int) -> None:
    assert status(settings, host=host) == expected
    # Also of what needs no token: a page elsewhere could read it.
    assert status(settings, "/healthz", host=host) == expected


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ("http://127.0.0.1:8000", 200),
        ("https://127.0.0.1:8000", 200),
        ("http://127.0.0.1:8001", 403),
        ("http://evil.example", 403),
        ("null", 403),
        ("http://[", 403),
        ("", 403),
    ],
)
def test_origins(origin: str, expected: int) -> None:
    assert status(Settings(), host="127.0.0.1:8000", origin=origin) == expected


def test_behind_a_proxy_that_passes_its_name_on() -> None:
    settings = Settings(allowed_hosts=("ood.example",))
    assert status(settings, host="ood.example", origin="https://ood.example") == 200
    assert status(settings, host="ood.example", origin="https://evil.example") == 403


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Bearer " + TOKEN, 200),
        ("bearer " + TOKEN, 200),
        ("Bearer " + TOKEN[:-1], 401),
        ("Bearer " + TOKEN + "x", 401),
        ("Bearer ", 401),
        ("Basic " + TOKEN, 401),
        (TOKEN, 401),
        ("", 401),
    ],
)
def test_tokens(given: str, expected: int) -> None:
    assert status(Settings(token=TOKEN), authorization=given) == expected


@pytest.mark.parametrize(
    "path", ["/v1/info", "/v1/drift", "/metrics", "/v1/training/0", "/nothing", "//v1/info", "/v1"]
)
def test_what_needs_the_token(path: str) -> None:
    assert status(Settings(token=TOKEN), path) == 401


@pytest.mark.parametrize("path", ["/", "/page.js", "/page.css", "/healthz", "/readyz", "/docs", "/openapi.json"])
def test_what_does_not(path: str) -> None:
    assert status(Settings(token=TOKEN), path) == 200


@in_loop
async def test_a_refusal_reads_no_body() -> None:
    async with served(Grey(), Settings(token=TOKEN)) as client:
        answer = await client.post("/v1/score", content=b"x" * 10**6)
        assert (answer.status_code, answer.headers["connection"]) == (401, "close")
        assert answer.headers["www-authenticate"] == "Bearer"
