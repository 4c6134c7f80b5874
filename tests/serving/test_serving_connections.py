"""What clients can do to a connection: send slowly or without end, not read, crowd, or go."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
from grey import Grey
from torch_grood import serving
from torch_grood.serving import server
server._HEAD_SECONDS = server._READ_SECONDS = 0.5
server._KEEP_ALIVE_SECONDS = 1
limits = serving.Limits(connections=4, seconds=1.0)
serving.run(Grey(), serving.Settings(port=0, limits=limits), ready=lambda url: print(url, flush=True))
"""
HEALTHZ = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """Of a service with short times. It must end well, and without a word about an error."""
    log = tmp_path / "log"
    command = [sys.executable, "-c", SERVER, str(Path(__file__).parent.parent)]
    with log.open("wb") as stderr, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline().decode().rstrip("/\n").rpartition(":")[2])
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line for line in lines if line["level"] == "error"] == []
    assert lines[-1]["event"] == "stopped"


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def rest(connection: socket.socket) -> bytes:
    """Until it ends."""
    found = b""
    try:
        while more := connection.recv(1 << 16):
            found += more
    except ConnectionResetError:
        pass
    return found


def ask(port: int) -> bytes:
    with connect(port) as connection:
        connection.sendall(HEALTHZ.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        return rest(connection)


@pytest.mark.slow
def test_who_sends_no_head_is_sent_away(port: int) -> None:
    # Nothing, a part of a head, and after an answer what is no head.
    waiting = [connect(port) for _ in range(3)]
    waiting[1].sendall(HEALTHZ[:20])
    waiting[2].sendall(HEALTHZ)
    answer = b""
    while not answer.endswith(b"}"):
        answer += waiting[2].recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 200")
    waiting[2].sendall(b"\r\n")
    assert [rest(one) for one in waiting] == [b"", b"", b""]
    for one in waiting:
        one.close()
    assert ask(port).startswith(b"HTTP/1.1 200")


@pytest.mark.slow
def test_an_endless_head_is_refused(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(HEALTHZ[:-2] + b"a: b\r\n" * 10_000)
        answer = rest(connection)
    # Who is still sending when the connection ends may not hear why.
    assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert ask(port).startswith(b"HTTP/1.1 200")


@pytest.mark.slow
def test_a_slow_body_is_refused(port: int) -> None:
    with connect(port) as connection:
        head = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\nContent-Length: 9\r\n\r\n"
        connection.sendall(head + b"1")
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"did not arrive within 1 seconds" in answer


@pytest.mark.slow
def test_who_does_not_read_is_sent_away(port: int) -> None:
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", port))
        script = b"GET /static-offline-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.sendall(script * 20)
        time.sleep(2)
        assert len(rest(connection)) < 20 * 2**20
    assert ask(port).startswith(b"HTTP/1.1 200")


@pytest.mark.slow
def test_a_crowd_is_told_when_to_come_again(port: int) -> None:
    crowd = [connect(port) for _ in range(4)]
    answer = ask(port)
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"retry-after: 1\r\n" in answer
    for one in crowd:
        one.close()
    until = time.monotonic() + 30
    while not ask(port).startswith(b"HTTP/1.1 200"):
        assert time.monotonic() < until


@pytest.mark.slow
def test_requests_in_a_row_are_answered_in_their_order(port: int) -> None:
    with connect(port) as connection:
        info = HEALTHZ.replace(b"healthz", b"v1/info")
        connection.sendall(HEALTHZ + info + HEALTHZ.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        answers = rest(connection).split(b"HTTP/1.1 ")[1:]
    assert [answer[:3] for answer in answers] == [b"200"] * 3
    assert [b"classes" in answer for answer in answers] == [False, True, False]


@pytest.mark.slow
def test_who_goes_before_the_answers_disturbs_nobody(port: int) -> None:
    for _ in range(20):
        with connect(port) as connection:
            connection.sendall(HEALTHZ * 50)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    until = time.monotonic() + 30
    while not ask(port).startswith(b"HTTP/1.1 200"):
        assert time.monotonic() < until


@pytest.mark.slow
def test_head_leaves_the_body_out(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(HEALTHZ.replace(b"GET", b"HEAD").replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        answer = rest(connection)
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"\r\n\r\n")
