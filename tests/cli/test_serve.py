"""`grood serve` as its users run it: a process that answers as the detector does, and ends when it is told to."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from command import run

from hostile import OPTIONS, hostile, main
from served import Served, served

MODEL = ("--model", "nets.py:net", "--weights", "net.safetensors")
TOKEN = "0123456789abcdef"


@pytest.fixture
def service(digits: Path) -> Iterator[Served]:
    with served("net.grood", *MODEL, "--training-root", "train") as service:
        yield service


def ended(service: Served, number: int = signal.SIGTERM) -> int:
    service.process.send_signal(number)
    return service.process.wait(60)


def scored(service: Served, paths: list[Path], **options: str) -> list[dict[str, object]]:
    files = [("images", (str(path), path.read_bytes())) for path in paths]
    answer = httpx.post(f"{service.url}/v1/score", files=files, params=options, timeout=60)
    assert answer.status_code == 200
    found: list[dict[str, object]] = answer.json()["results"]
    return found


@pytest.mark.slow
def test_decisions_are_those_of_score(service: Served, digits: Path) -> None:
    paths = sorted((digits / "ood").iterdir())[:20]
    found = scored(service, paths)
    expected = json.loads(run("score", "net.grood", "ood", *MODEL, "--format", "json", "-q").raw)
    assert len(expected) >= 20
    for row, right in zip(found, expected, strict=False):
        assert row["name"] == right["path"] or str(row["name"]).endswith(str(right["path"]))
        assert row["score"] == pytest.approx(right["score"], rel=1e-6)
        same = ("is_ood", "label", "prototype_label", "p_value")
        assert [row[name] for name in same] == [right[name] for name in same]
    near = scored(service, paths[:1], neighbors="3")[0]["neighbors"]
    assert isinstance(near, list)
    assert len(near) == 3
    shown = httpx.get(service.url + near[0]["image"])
    assert (shown.status_code, shown.headers["content-type"]) == (200, "image/webp")
    assert ended(service) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_under_way_are_answered(service: Served, digits: Path, number: int) -> None:
    """Their bodies are half there when the signal comes."""
    content = next((digits / "ood").iterdir()).read_bytes()
    head = (
        f"POST /v1/score HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\nContent-Length: {len(content)}\r\n"
    )
    waiting = [socket.create_connection(("127.0.0.1", service.port), timeout=60) for _ in range(8)]
    for one in waiting:
        one.sendall(head.encode() + b"\r\n" + content[:20])
    idle = socket.create_connection(("127.0.0.1", service.port), timeout=60)
    # An answer over the same event loop: the others were seen before it.
    assert httpx.get(f"{service.url}/healthz").status_code == 200
    service.process.send_signal(number)
    assert idle.recv(1) == b""
    # It takes no more connections, and says so to whoever asks whether it is ready.
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", service.port), timeout=5).close()
        except ConnectionRefusedError:
            break
        time.sleep(0.05)
    else:
        pytest.fail("it still listens")
    for one in waiting:
        one.sendall(content[20:])
    for one in waiting:
        answer = b""
        while more := one.recv(1 << 16):
            answer += more
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'"score"' in answer
        one.close()
    idle.close()
    assert service.process.wait(60) == 0
    assert [line["event"] for line in service.lines()][-1] == "stopped"


@pytest.mark.slow
def test_a_signal_at_the_first_word_ends_it(digits: Path) -> None:
    with served("net.grood", *MODEL) as service:
        assert ended(service) == 0


@pytest.mark.slow
def test_an_onnx_file_and_a_token(digits: Path) -> None:
    assert run("export", "net.grood", *MODEL, "-q").code == 0
    image = next((digits / "ood").iterdir())
    with served("net.onnx", "-q", environment={"GROOD_TOKEN": TOKEN}) as service:
        assert httpx.get(f"{service.url}/v1/info").status_code == 401
        assert httpx.get(f"{service.url}/healthz").status_code == 200
        head = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "image/png"}
        answer = httpx.post(f"{service.url}/v1/score", content=image.read_bytes(), headers=head)
        assert ended(service) == 0
        # Quiet: no line for a request.
        assert [line["event"] for line in service.lines()] == ["listening", "stopped"]
    expected = json.loads(run("score", "net.onnx", image, "--format", "json", "-q").raw)[0]
    assert answer.json()["results"][0]["score"] == pytest.approx(expected["score"], rel=1e-6)


@pytest.mark.slow
def test_many_clients_lose_nothing(service: Served, digits: Path) -> None:
    paths = sorted((digits / "ood").iterdir())[:10]
    expected = [row["score"] for row in scored(service, paths)]
    wrong = []

    def ask(start: int) -> None:
        with httpx.Client(timeout=60) as client:
            for i in range(start, start + 25):
                content, kind = paths[i % 10].read_bytes(), {"Content-Type": "image/png"}
                answer = client.post(f"{service.url}/v1/score", content=content, headers=kind)
                score = answer.json()["results"][0]["score"] if answer.status_code == 200 else None
                if score != pytest.approx(expected[i % 10], rel=1e-5):
                    wrong.append((answer.status_code, score))

    threads = [threading.Thread(target=ask, args=(start,)) for start in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert 'grood_requests_total{route="/v1/score",status="200"} 401.0' in httpx.get(f"{service.url}/metrics").text


@pytest.mark.slow
def test_hostile_requests(digits: Path) -> None:
    with served("net.grood", *MODEL, *OPTIONS) as service:
        good = next((digits / "ood").iterdir()).read_bytes()
        found = hostile(service, 300, good, seed=int(os.environ.get("GROOD_FUZZ_SEED", "1")))
    assert found.bad == []
    # Memory that decoders took and gave back may remain with the process.
    assert found.rss[-1] - found.rss[0] < 256 * 2**20


@pytest.mark.slow
def test_the_hostile_requests_can_fail(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served("net.grood", *MODEL, *OPTIONS) as service:
        monkeypatch.setattr("hostile._score", lambda *_: object())
        monkeypatch.setattr("hostile.send", lambda *_: [500])
        monkeypatch.setattr("hostile._PATIENCE", 0.5)
        left = []
        monkeypatch.setattr(Served, "n_files", lambda self: left.append(1) or len(left))
        found = hostile(service, 10, b"")
    for reason in ("was answered with [500]", "another answer", "remain open"):
        assert any(reason in line for line in found.bad)


@pytest.mark.slow
def test_the_hostile_command(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(next((digits / "ood").iterdir()))
    assert main(["net.grood", "--requests", "20", "--image", image, "--", *MODEL]) == 0
    assert "no 5xx, none without an end" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.grood",), "none.grood"),
        (("net.grood", *MODEL, "--host", "0.0.0.0"), "can be reached from other machines"),
        (("net.grood", *MODEL, "--host", "203.0.113.9", "--no-token"), "cannot listen at 203.0.113.9:8000"),
        (("net.grood", *MODEL, "--host", "no\nhost", "--no-token"), "cannot listen"),
        (("net.grood", *MODEL, "--token-file", "none"), "none"),
        (("net.grood", *MODEL, "--token-file", "short"), "at least 16 characters"),
        (("net.grood", *MODEL, "--token-file", "blank"), "no blank"),
        (("net.grood", *MODEL, "--training-root", "none"), "no such folder"),
        (("net.onnx", "--training-root", "train"), "does not name its training images"),
        (("net.grood", *MODEL, "--timeout", "inf"), "has no end"),
        (("net.grood", *MODEL, "--fpr", "0.1", "--tau", "1"), "give one of them"),
        (("net.grood", *MODEL, "--fpr", "0.0001"), "cannot be promised"),
        (("net.grood", *MODEL, "--drift-window", "1"), "take more images for a window"),
        (("net.grood", *MODEL, "--drift-level", "0"), "chance of a false alarm"),
        (("net.grood", *MODEL, "--drift-level", "nan"), "chance of a false alarm"),
    ],
)
def test_mistakes(digits: Path, arguments: tuple[str, ...], message: str) -> None:
    Path("short").write_text("abc")
    Path("blank").write_text("0123456789abc def")
    found = run("serve", *arguments)
    assert found.code == 1
    assert message in found.err
    assert "Traceback" not in found.err


def test_a_port_that_is_taken(digits: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        found = run("serve", "net.grood", *MODEL, "--port", taken.getsockname()[1])
    assert found.code == 1
    assert "Address already in use" in found.err
    assert "choose another --host or --port" in found.err


@pytest.mark.slow
def test_an_uncalibrated_detector_scores(digits: Path) -> None:
    fitted = run(
        *("fit", "--model", "nets.py:net", "--weights", "net.safetensors", "--mean", "0.5,0.5,0.5"),
        *("--std", "0.5,0.5,0.5", "--train", "train", "-o", "plain.grood", "-q"),
    )
    assert fitted.code == 0
    image = next((digits / "ood").iterdir())
    with served("plain.grood", *MODEL, "--tau", "0", "-q") as service:
        row = scored(service, [image])[0]
        assert (row["is_ood"], row["p_value"]) == (True, None)
        assert httpx.get(f"{service.url}/v1/drift").status_code == 404
