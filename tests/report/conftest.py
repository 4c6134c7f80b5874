"""One small world for all tests of reports."""

from __future__ import annotations

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")
pytest.importorskip("scipy")
pytest.importorskip("sklearn")

from report_world import World, make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Not to be changed."""
    return make_world(tmp_path_factory.mktemp("report"))
