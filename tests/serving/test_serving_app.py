"""The routes, as a client sees them."""

from __future__ import annotations

import base64
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from serve_world import PNG, in_loop, served

from grey import REFUSED, Grey, png
from torch_grood.errors import GroodError
from torch_grood.runtime import Decisions
from torch_grood.serving import Limits, Settings

FIELDS = {"name", "label", "prototype_label", "score", "p_value", "is_ood", "neighbors", "error"}


@in_loop
async def test_one_image_in_each_form() -> None:
    async with served(Grey()) as client:
        data = base64.b64encode(png(120)).decode()
        answers = [
            await client.post("/v1/score", content=png(120), headers=PNG),
            await client.post("/v1/score", files={"images": ("a.png", png(120))}),
            await client.post("/v1/score", json={"image": data}),
            await client.post("/v1/score", json={"images": [{"name": "a.png", "data": data}]}),
        ]
    assert [answer.status_code for answer in answers] == [200] * 4
    rows = [answer.json()["results"] for answer in answers]
    assert [[row.pop("name") for row in found] for found in rows] == [[None], ["a.png"], [None], ["a.png"]]
    decided = {"label": "dark", "prototype_label": "dark", "score": 120.0, "p_value": 136 / 256, "is_ood": True}
    neighbors = [{"sample": 0, "name": None, "image": None}]
    assert rows == [[decided | {"neighbors": neighbors, "error": None}]] * 4


@in_loop
async def test_what_cannot_be_scored_says_why() -> None:
    async with served(Grey()) as client:
        files = [("images", (str(i), png(i))) for i in (1, REFUSED)] + [("images", ("\x1b[31m", b"no image"))]
        some = await client.post("/v1/score", files=files)
        none = await client.post("/v1/score", content=b"no image", headers=PNG)
    assert (some.status_code, none.status_code) == (200, 422)
    first, second, third = some.json()["results"]
    assert (first["score"], first["error"]) == (1.0, None)
    for row, reason in ((second, "no finite score"), (third, "not an image")):
        assert set(row) == FIELDS
        assert reason in row.pop("error")
        assert {value for name, value in row.items() if name != "name"} == {None}
    assert "\x1b" not in some.text
    assert "not an image" in none.json()["results"][0]["error"]


@pytest.mark.parametrize("wanted", ["0", "21", "-1", "x", "", "1e1", "9" * 5000])
def test_neighbors(wanted: str) -> None:
    @in_loop
    async def ask() -> None:
        async with served(Grey()) as client:
            good = await client.post("/v1/score?neighbors=3", content=png(1), headers=PNG)
            assert [one["sample"] for one in good.json()["results"][0]["neighbors"]] == [0, 1, 2]
            bad = await client.post(f"/v1/score?neighbors={wanted}", content=png(1), headers=PNG)
            assert (bad.status_code, bad.json()) == (422, {"error": "neighbors is a number from 1 to 20"})

    ask()


@in_loop
async def test_refusals_are_json() -> None:
    async with served(Grey(), Settings(limits=Limits(images=2, request_bytes=1000))) as client:
        for answer, status in [
            (await client.post("/v1/score", content=b"a" * 1001, headers=PNG), 413),
            (await client.post("/v1/score", files=[("images", ("a", b"a"))] * 3), 413),
            (await client.post("/v1/score", content=b"a", headers={"Content-Type": "text/html"}), 415),
            (await client.post("/v1/score", json=[]), 422),
            (await client.get("/v1/score"), 405),
            (await client.post("/v1/info"), 405),
            (await client.get("/v1/info/"), 404),
            (await client.get("/v1/training/0"), 404),
            (await client.get("/../../etc/passwd"), 404),
            (await client.get("/static-offline-docs/../../../../../../etc/passwd"), 404),
            (await client.get("/static-offline-docs/%2e%2e/core.py"), 404),
        ]:
            assert answer.status_code == status
            assert set(answer.json()) == {"error"}
            assert answer.headers["x-content-type-options"] == "nosniff"


class Late(Grey):
    """Fails where it must not."""

    classes = ()  # type: ignore[assignment]


@in_loop
async def test_a_fault_of_ours_is_told_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    async with served(Late()) as client:
        answer = await client.post("/v1/score", content=png(1), headers=PNG)
        assert (answer.status_code, answer.json()) == (500, {"error": "the service failed; its log says why"})
        assert (await client.get("/healthz")).status_code == 200
        assert 'grood_requests_total{route="/v1/score",status="500"} 1.0' in (await client.get("/metrics")).text
    assert "IndexError" in caplog.text


@in_loop
async def test_info_drift_and_state() -> None:
    facts = {"fit": {"n_samples": 10}, "metadata": {"training": {"paths": ["/home/somebody/images"]}}}
    async with served(Grey(), Settings(facts=facts, drift_window=20)) as client:
        info = await client.get("/v1/info")
        assert "somebody" not in info.text
        found = info.json()
        assert (found["classes"], found["fpr"], found["calibration_images"]) == (["dark", "light"], 0.1, 99)
        assert found["detector"] == {"fit": {"n_samples": 10}}
        assert (await client.get("/v1/drift")).json()["last"] is None
        for _ in range(2):
            await client.post("/v1/score", files=[("images", ("a", png(200)))] * 10)
        drift = (await client.get("/v1/drift")).json()
        assert drift["alarm"]
        assert drift["last"]["flagged"] == drift["last"]["images"] == 20
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        assert (await client.get("/readyz")).json() == {"status": "ready", "waiting": 0}


@in_loop
async def test_who_promises_nothing_tests_no_drift() -> None:
    runtime = Grey()
    runtime.fpr = None
    async with served(runtime) as client:
        answer = await client.get("/v1/drift")
        assert answer.status_code == 404
        assert "calibrate it" in answer.json()["error"]
        assert (await client.post("/v1/score", content=png(1), headers=PNG)).status_code == 200
        assert "grood_drift" not in (await client.get("/metrics")).text


@in_loop
async def test_ready_it_is_no_more_when_a_thread_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_grood.serving.scorer import Scorer

    async with served(Grey()) as client:
        monkeypatch.setattr(Scorer, "alive", False)
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert (await client.get("/healthz")).status_code == 200


class Undecided(Grey):
    def decide(self, pixels: NDArray[np.uint8]) -> Decisions:
        return super().decide(pixels)._replace(p_value=None, is_ood=None)


def metrics_of(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(text)
    return {(one.name, tuple(sorted(one.labels.items()))): one.value for family in families for one in family.samples}


@in_loop
async def test_metrics() -> None:
    runtime = Grey()
    runtime.log_tau = float(np.log(100))
    async with served(runtime, Settings(drift_window=3, drift_level=0.01)) as client:
        for grey in (50, 100, 200, REFUSED):
            await client.post("/v1/score", content=png(grey), headers=PNG)
        await client.get("/nonsense%1b[31m/" + 1000 * "a")
        await client.get("/v1/training/17")
        text = (await client.get("/metrics")).text
    found = metrics_of(text)
    assert "nonsense" not in text
    score, route = "/v1/score", "route"
    assert found["grood_requests_total", ((route, score), ("status", "200"))] == 3
    assert found["grood_requests_total", ((route, score), ("status", "422"))] == 1
    assert found["grood_requests_total", ((route, "other"), ("status", "404"))] == 1
    assert found["grood_requests_total", ((route, "/v1/training/*"), ("status", "404"))] == 1
    assert found["grood_request_seconds_count", ((route, score),)] == 4
    assert found["grood_request_seconds_bucket", (("le", "+Inf"), (route, score))] == 4
    images = {kind: found["grood_images_total", (("outcome", kind),)] for kind in ("known", "ood", "unreadable")}
    assert images == {"known": 2, "ood": 1, "unreadable": 1}
    assert found["grood_flagged_rate", ()] == pytest.approx(1 / 3)
    assert found["grood_score_sum", ()] == 350
    at_most_tau = max(value for (name, labels), value in found.items()
                      if name == "grood_score_bucket" and float(labels[0][1]) <= 100.001)  # fmt: skip
    assert at_most_tau == 2
    assert found["grood_batch_images_count", ()] == 4
    assert found["grood_images_waiting", ()] == 0
    assert found["grood_drift_windows_total", ()] == 1
    assert found["grood_drift_alarm", ()] == 0
    assert 0.1 < found["grood_drift_p_value", ()] < 0.5


@in_loop
async def test_images_without_a_decision_are_counted_apart() -> None:
    async with served(Undecided()) as client:
        row = (await client.post("/v1/score", content=png(5), headers=PNG)).json()["results"][0]
        assert (row["is_ood"], row["p_value"], row["score"]) == (None, None, 5.0)
        found = metrics_of((await client.get("/metrics")).text)
        assert found["grood_images_total", (("outcome", "undecided"),)] == 1
        assert (await client.get("/v1/drift")).json()["current"]["images"] == 0


class Named(Grey):
    """Knows what its training images were called."""

    names = ("/gone/train/cat/a.png", "/gone/../b.png", "/gone/train/cat/bad.png", "\x1b\udcff/x.png")

    def sample_name(self, sample: int) -> str | None:
        if sample >= len(self.names):
            raise GroodError("there is no such sample")
        return self.names[sample]


@in_loop
async def test_training_images_are_shown_small_from_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "shown/cat"
    folder.mkdir(parents=True)
    Image.new("RGB", (400, 200), (9, 9, 9)).save(folder / "a.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    (folder / "bad.png").write_bytes(b"no image")
    async with served(Named(), Settings(training_root=tmp_path / "shown")) as client:
        row = (await client.post("/v1/score?neighbors=4", content=png(1), headers=PNG)).json()["results"][0]
        assert row["neighbors"][0] == {"sample": 0, "name": "cat/a.png", "image": "/v1/training/0"}
        assert row["neighbors"][3]["name"] == "\\x1b\\udcff/x.png"
        shown = await client.get("/v1/training/0")
        assert shown.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(shown.content)).size == (160, 80)
        for other in ("1", "2", "3", "4", "99999999999", "9" * 50, "-1", "x", "0.0", "٣"):
            assert (await client.get(f"/v1/training/{other}")).status_code == 404


@in_loop
async def test_small_training_images_are_enlarged_by_whole_pixels(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.fromarray(np.arange(32 * 32 * 3, dtype=np.uint8).reshape(32, 32, 3)).save(tmp_path / "cat/a.png")
    async with served(Named(), Settings(training_root=tmp_path)) as client:
        shown = await client.get("/v1/training/0")
        assert Image.open(io.BytesIO(shown.content)).size == (160, 160)


@in_loop
async def test_the_page_and_the_documentation_need_nothing_from_elsewhere() -> None:
    async with served(Grey()) as client:
        for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
            answer = await client.get(path)
            assert answer.headers["content-type"].startswith(kind)
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert "unsafe-inline" not in answer.headers["content-security-policy"]
            assert "http" not in answer.text
        docs = await client.get("/docs")
        assert "cdn" not in docs.text
        script = await client.get("/static-offline-docs/swagger-ui-bundle.js")
        assert script.status_code == 200
        schema = (await client.get("/openapi.json")).json()
    paths = {"/v1/score", "/v1/info", "/v1/drift", "/v1/training/{sample}", "/healthz", "/readyz", "/metrics"}
    assert set(schema["paths"]) == paths
    content = schema["paths"]["/v1/score"]["post"]["requestBody"]["content"]
    assert set(content) == {"image/*", "multipart/form-data", "application/json"}
    row = schema["paths"]["/v1/score"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert set(row["properties"]["results"]["items"]["properties"]) == FIELDS


@in_loop
async def test_logs_say_nothing_of_the_images(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "torch_grood.serving")
    async with served(Grey()) as client:
        await client.post("/v1/score?neighbors=2", files={"images": ("secret.png", png(3))})
        await client.get("/secret")
    lines: list[dict[str, Any]] = [vars(record)["fields"] for record in caplog.records if record.msg == "request"]
    assert "secret" not in json.dumps(lines)
    assert [(one["method"], one["route"], one["status"]) for one in lines] == [
        ("POST", "/v1/score", 200),
        ("GET", "other", 404),
    ]
    assert lines[0]["images"] == 1
    assert lines[0]["bytes"] > 100
