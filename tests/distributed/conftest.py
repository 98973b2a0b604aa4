"""Jobs and a Ray cluster, shared by the tests that look at them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.distributed.engines")

from tests.distributed.engines import (  # noqa: E402
    Outcome,
    RayCluster,
    Setting,
    run_job,
)
from tests.http_server import free_port  # noqa: E402


class Runs:
    """Outcomes by setting; the cluster is started by the first that needs it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._outcomes: dict[Setting, Outcome] = {}
        self._cluster: RayCluster | None = None

    def of(self, setting: Setting) -> Outcome:
        if setting not in self._outcomes:
            cluster = self.cluster if setting.backend == "ray" else None
            folder = self._folder / f"job-{len(self._outcomes)}"
            self._outcomes[setting] = run_job(setting, folder, cluster)
        return self._outcomes[setting]

    @property
    def cluster(self) -> RayCluster:
        if self._cluster is None:
            self._cluster = RayCluster(self._folder / "ray", free_port())
        return self._cluster

    def stop_cluster(self) -> tuple[int | None, list[str]]:
        cluster, self._cluster = self.cluster, None
        return cluster.stop()

    def close(self) -> None:
        if self._cluster is not None:
            self.stop_cluster()


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    made = Runs(tmp_path_factory.mktemp("distributed"))
    yield made
    made.close()
