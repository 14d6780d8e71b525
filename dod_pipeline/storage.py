"""Dagster's storage: SQLite, or the PostgreSQL that the environment names (dagster.yaml can't choose), and logs."""

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dagster._config import StringSource
from dagster._config.config_schema import UserConfigSchema
from dagster._core.storage.base_storage import DagsterStorage
from dagster._core.storage.compute_log_manager import CapturedLogContext
from dagster._core.storage.local_compute_log_manager import LocalComputeLogManager
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClass, ConfigurableClassData

POSTGRES = "DAGSTER_POSTGRES_URL"  # environment: postgresql://USER:PASSWORD@HOST:5432/DATABASE


class Storage(DagsterStorage[Any], ConfigurableClass):
    """Stands for one of Dagster's own storages; has no instances."""

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        """`base_dir`: SQLite's folder."""
        return {"base_dir": StringSource}

    @classmethod
    def from_config_value(  # type: ignore[override]
        cls, inst_data: ConfigurableClassData | None, config_value: dict[str, str]
    ) -> DagsterStorage[Any]:
        """The storage that the environment asks for."""
        url = os.environ.get(POSTGRES)
        if url is None:
            return DagsterSqliteStorage(config_value["base_dir"], inst_data)
        from dagster_postgres import DagsterPostgresStorage

        return DagsterPostgresStorage(url, should_autocreate_tables=True, inst_data=inst_data)


class Logs(LocalComputeLogManager):
    """What steps print, in files and on the terminal: the processes that copy it ignore Ctrl-C, at which they would
    print a traceback each; Dagster ends them with SIGTERM."""

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]) -> "Logs":
        """`base_dir`: Dagster's folder; logs lie in its folder `storage`, where Dagster puts them by default."""
        return cls(str(Path(config_value["base_dir"], "storage")), inst_data=inst_data)

    @contextmanager
    def capture_logs(self, log_key: Sequence[str]) -> Iterator[CapturedLogContext]:
        """Start them with SIGINT blocked, which they inherit."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            with super().capture_logs(log_key) as captured:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
                yield captured
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
