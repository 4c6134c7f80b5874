"""What is read of a request, and what is refused, whatever it holds."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torch_grood.serving.bodies import Held, images_of, read_body
from torch_grood.serving.limits import Limits, RefusedError

FORM = "multipart/form-data; boundary=b"
FEW = Limits(request_bytes=100, images=3, seconds=0.05)


def refused(kind: str, body: bytes, limits: Limits = FEW) -> tuple[int, str]:
    with pytest.raises(RefusedError) as found:
        images_of(kind, body, limits)
    return found.value.status, found.value.reason


def status_of(kind: str, body: bytes) -> int:
    try:
        found = images_of(kind, body, FEW)
    except RefusedError as error:
        return error.status
    return 200 if 1 <= len(found) <= FEW.images else 0


def form(*parts: bytes) -> bytes:
    return b"".join(b"--b\r\n" + part + b"\r\n" for part in parts) + b"--b--\r\n"


def part(name: bytes = b"x", content: bytes = b"1") -> bytes:
    return b'Content-Disposition: form-data; name="images"; filename="' + name + b'"\r\n\r\n' + content


@given(st.lists(st.binary(max_size=60), min_size=1, max_size=8))
def test_multipart_is_what_a_client_encoded(contents: list[bytes]) -> None:
    request = httpx.Request(
        "POST",
        "http://host/",
        files=[("images", (f"{i}.png", content, "image/png")) for i, content in enumerate(contents)],
        data={"comment": "of no use"},
    )
    found = images_of(request.headers["content-type"], request.read(), Limits())
    assert [(one.name, one.content) for one in found] == [(f"{i}.png", one) for i, one in enumerate(contents)]


@given(st.lists(st.tuples(st.none() | st.text(max_size=20), st.binary(max_size=60)), min_size=1, max_size=8))
def test_json_is_what_a_client_encoded(items: list[tuple[str | None, bytes]]) -> None:
    images = [{"name": name, "data": base64.b64encode(content).decode()} for name, content in items]
    found = images_of("application/json; charset=utf-8", json.dumps({"images": images}).encode(), Limits())
    assert [one.content for one in found] == [content for _, content in items]
    assert [one.name is None for one in found] == [name is None for name, _ in items]


def test_other_forms_of_json() -> None:
    data = base64.b64encode(b"content").decode()
    for body in ({"image": data}, {"images": [data]}, {"images": [{"data": data}]}):
        assert images_of("application/json", json.dumps(body).encode(), FEW) == [(None, b"content")]


def test_a_file_as_it_is() -> None:
    assert images_of("IMAGE/PNG", b"content", FEW) == [(None, b"content")]
    assert images_of("application/octet-stream", b"", FEW) == [(None, b"")]


PIECES = st.sampled_from(
    [b"--b", b"--b--", b"\r\n", b"\r\n--b", b"\r\n--b\r\n", b"\r\n\r\n", b"--", part(), b"Content-Disposition: ;;=\xff"]
)


@given(st.lists(PIECES | st.binary(max_size=8), max_size=12).map(b"".join))
def test_whatever_calls_itself_multipart(body: bytes) -> None:
    assert status_of(FORM, body) in (200, 400, 413, 422)


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5) | st.sampled_from(["AAAA", "A", "é"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["image", "images", "data", "name"]), inner)
    ),
)


@given(JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20))
def test_whatever_calls_itself_json(body: bytes) -> None:
    assert status_of("application/json", body) in (200, 400, 413, 422)


@pytest.mark.parametrize(
    ("kind", "body", "status", "reason"),
    [
        ("text/plain", b"", 415, "send an image file as it is"),
        ("", b"", 415, "send an image file as it is"),
        ("multipart/form-data", b"", 400, "without a boundary"),
        ("multipart/form-data; boundary=", b"", 400, "without a boundary"),
        ("multipart/form-data; boundary=" + 71 * "b", b"", 400, "without a boundary"),
        (FORM, b"", 400, "ends too early"),
        (FORM, b"--b\r\n" + part(), 400, "ends too early"),
        (FORM, b"--b--\r\n", 422, "no image"),
        (FORM, form(b'Content-Disposition: form-data; name="a"\r\n\r\n1'), 422, "no image"),
        (FORM, form(b"no header"), 400, "no header"),
        (FORM, form(b"a: " + 5000 * b"a" + b"\r\n\r\n"), 400, "too long a one"),
        (FORM, form(*[part()] * 4), 413, "at most 3 images"),
        (FORM, form(*[b"a: b\r\n\r\n"] * 100), 413, "at most 3 images"),
        ("application/json", b"{", 400, "no JSON"),
        ("application/json", b"[" * 100_000, 400, "no JSON"),
        ("application/json", b"[" + b"0," * 2000 + b"0]", 400, "more than images"),
        ("application/json", b"\xff", 400, "no JSON"),
        ("application/json", b"[]", 422, "expected"),
        ("application/json", b'{"image": "", "images": []}', 422, "expected"),
        ("application/json", b'{"images": []}', 422, "no image"),
        ("application/json", b'{"images": {}}', 422, "images is a list"),
        ("application/json", b'{"images": ["", "", "", ""]}', 413, "at most 3 images"),
        ("application/json", b'{"images": [1]}', 422, "image 0 has no data"),
        ("application/json", b'{"images": ["", {"data": 1}]}', 422, "image 1 has no data"),
        ("application/json", b'{"images": [{"data": "", "name": 1}]}', 422, "the name of image 0"),
        ("application/json", b'{"image": "A"}', 422, "no base64"),
        ("application/json", b'{"image": "AA AA"}', 422, "no base64"),
        ("application/json", '{"image": "ÄÄÄÄ"}'.encode(), 422, "no base64"),
    ],
)
def test_refused(kind: str, body: bytes, status: int, reason: str) -> None:
    found = refused(kind, body)
    assert found[0] == status
    assert reason in found[1]


def test_names_are_fit_to_be_sent_back() -> None:
    name = "a\x1b[31m\n\ud800" + 1000 * "\x00"
    found = images_of("application/json", json.dumps({"images": [{"name": name, "data": ""}]}).encode(), FEW)[0].name
    assert found is not None
    assert found.startswith("a\\x1b[31m \\ud800\\x00")
    assert len(found) == 200
    assert images_of(FORM, form(part(b"../\xff\x01")), FEW)[0].name == "../\N{REPLACEMENT CHARACTER}\\x01"


def read(*messages: dict[str, Any] | None, length: str | None = None, held: Held | None = None) -> bytes:
    """What comes of a body in such parts; None: nothing comes any more."""
    left = list(messages)

    async def receive() -> dict[str, Any]:
        message = left.pop(0)
        if message is None:
            await asyncio.sleep(60)
        assert message is not None
        return message

    return asyncio.run(read_body(receive, length, FEW, held or Held(1000)))


def sent(body: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


def test_a_body_in_parts() -> None:
    held = Held(1000)
    assert read(sent(b"a", True), sent(b"", True), sent(b"bc"), held=held) == b"abc"
    assert held.now == 3


@pytest.mark.parametrize(
    ("messages", "length", "most_held", "status"),
    [
        ([], "101", 1000, 413),
        ([], "9" * 30, 1000, 413),
        ([sent(101 * b"a")], None, 1000, 413),
        ([sent(60 * b"a", True), sent(60 * b"a")], "1", 1000, 413),
        ([sent(b"a", True), None], None, 1000, 408),
        ([sent(b"a", True), {"type": "http.disconnect"}], None, 1000, 400),
        ([sent(b"a", True), sent(10 * b"a")], None, 10, 503),
    ],
)
def test_a_body_that_is_refused(
    messages: list[dict[str, Any] | None], length: str | None, most_held: int, status: int
) -> None:
    held = Held(most_held)
    with pytest.raises(RefusedError) as found:
        read(*messages, length=length, held=held)
    assert found.value.status == status
    # The rest of the body is not read.
    assert found.value.close
    assert (found.value.retry_after is not None) == (status == 503)
    assert held.now == 0
