"""One job in one process or several that say nothing to each other: every input once, in its own batch."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("fsspec")

import pyarrow.parquet as pq
from scaled_world import Together, expected, greys, written

from grey import REFUSED, png
from torch_grood.errors import GroodError
from torch_grood.scale import Job, inputs_of, score_as_rank
from torch_grood.scale.job import Counts, score_span
from torch_grood.scale.parts import Folder
from torch_grood.scale.ranks import rank_of_process

VALUES = [(37 * place) % 240 for place in range(50)]


def job_of(tmp_path: Path, *, by: str = "a", batch_size: int = 4, span: int = 8) -> Job:
    return Job(inputs_of([str(tmp_path / "images")]), Folder(str(tmp_path / "out")), by, batch_size, span)


@pytest.mark.parametrize("world", [1, 3, 9])
def test_any_number_of_processes_gives_the_same(world: int, tmp_path: Path) -> None:
    paths = greys(tmp_path / "images", VALUES)
    job = job_of(tmp_path)
    told: list[Counts] = []
    # The first waits for the others, so it comes last here.
    for rank in reversed(range(world)):
        summary = score_as_rank(job, Together(), rank, world, tell=told.append)
        assert (summary is None) == (rank > 0)
    assert summary is not None
    rows = written(tmp_path / "out")
    assert {row["number"]: row["score"] for row in rows} == expected(VALUES, 4)
    assert [row["path"] for row in rows] == paths
    flagged = sum(row["is_ood"] for row in rows)
    assert (summary.inputs, summary.images, summary.ood, summary.bad) == (50, 50, flagged, 0)
    assert sum(counts.images for counts in told) == 50
    assert pq.read_schema(next((tmp_path / "out" / "scores").iterdir())).names == [
        *("number", "path", "score", "p_value", "is_ood", "label", "prototype_label"),
    ]
    assert Folder(str(tmp_path / "out")).read("done.json") == vars(summary)


def test_what_cannot_be_scored_is_in_the_side_table_and_its_batch_is_scored_without_it(tmp_path: Path) -> None:
    paths = greys(tmp_path / "images", VALUES)
    for number, content in ((5, b""), (6, png(9)[:20]), (17, b"no image")):
        Path(paths[number]).write_bytes(content)
    Path(paths[30]).write_bytes(png(REFUSED))
    job = job_of(tmp_path)
    summary = score_as_rank(job, Together(), 0, 1)
    assert summary is not None
    assert (summary.images, summary.bad) == (46, 4)
    bad = written(tmp_path / "out", "bad")
    assert [(row["number"], row["path"]) for row in bad] == [(n, paths[n]) for n in (5, 6, 17, 30)]
    assert bad[0]["error"] == "the file is empty"
    assert "no finite score" in bad[3]["error"]
    scores = {row["number"]: row["score"] for row in written(tmp_path / "out")}
    values = [*VALUES[:30], REFUSED, *VALUES[31:]]
    assert scores == expected(values, 4, {5, 6, 17})


def test_a_job_goes_on_where_it_was(tmp_path: Path) -> None:
    greys(tmp_path / "images", VALUES)
    score_as_rank(job_of(tmp_path), Together(), 0, 1)
    parts = sorted((tmp_path / "out" / "scores").iterdir())
    before = {part.name: part.stat().st_mtime_ns for part in parts}
    for part in parts[1:3]:
        part.unlink()
    seen: list[Counts] = []
    score_as_rank(job_of(tmp_path), Together(), 0, 1, tell=seen.append)
    assert [counts.images for counts in seen] == [8, 8]
    after = {part.name: part.stat().st_mtime_ns for part in (tmp_path / "out" / "scores").iterdir()}
    assert {name for name in before if after[name] == before[name]} == before.keys() - {
        part.name for part in parts[1:3]
    }
    assert {row["number"]: row["score"] for row in written(tmp_path / "out")} == expected(VALUES, 4)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"by": "b"}, "detector, rate or preprocessing"), ({"batch_size": 5}, "batch size")],
)
def test_a_folder_belongs_to_one_job(change: dict[str, object], named: str, tmp_path: Path) -> None:
    greys(tmp_path / "images", VALUES[:9])
    job_of(tmp_path).begin()
    with pytest.raises(GroodError, match=f"another job, which has another {named}"):
        job_of(tmp_path, **change).begin()  # type: ignore[arg-type]
    greys(tmp_path / "images" / "more", VALUES[:1])
    with pytest.raises(GroodError, match="number of images, images"):
        job_of(tmp_path).begin()


def test_a_job_that_is_not_whole_is_not_called_done(tmp_path: Path) -> None:
    greys(tmp_path / "images", VALUES)
    job = job_of(tmp_path)
    job.begin()
    with pytest.raises(GroodError, match="7 parts are missing, the first of inputs 0 to 7"):
        job.finish()
    score_as_rank(job, Together(), 0, 1)
    score_span(Together(), job.inputs.slice((4, 12)), (4, 12), job.folder, 4)
    with pytest.raises(GroodError, match="overlap"):
        job.finish()


def test_no_input_and_no_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    greys(tmp_path / "images", [1])
    with pytest.raises(GroodError, match="at least one image"):
        job_of(tmp_path, batch_size=0)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(GroodError, match="torchrun"):
        rank_of_process()
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GroodError, match="RANK is 2 of WORLD_SIZE 2"):
        rank_of_process()
