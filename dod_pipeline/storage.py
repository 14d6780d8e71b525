"""Dagster's storage: SQLite, or the PostgreSQL that the environment names. dagster.yaml itself can't choose."""

import os
from typing import Any

from dagster._config import StringSource
from dagster._config.config_schema import UserConfigSchema
from dagster._core.storage.base_storage import DagsterStorage
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
