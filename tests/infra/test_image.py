"""infra/Dockerfile, read and not built: there is no Docker here. hadolint reads it in `make lint`."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from .template import INFRA

TEXT = (INFRA / "Dockerfile").read_text()
STEPS = [
    (line.split(None, 1)[0], line.split(None, 1)[1])
    for line in re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    if line
]


def of(kind: str) -> list[str]:
    return [rest for name, rest in STEPS if name == kind]


def test_the_base_is_named_by_digest():
    assert of("FROM") == ["${BASE}"] and re.fullmatch(r"BASE=nvidia/cuda:\S+@sha256:[0-9a-f]{64}", of("ARG")[0])


@pytest.mark.parametrize(("base", "status"), [("nvidia/cuda:latest", 1), (of("ARG")[0].removeprefix("BASE="), 0)])
def test_a_base_without_a_digest_stops_the_build(base: str, status: int):
    check = of("RUN")[0]
    assert "@sha256:" in check
    done = subprocess.run(["sh", "-c", check], env=os.environ | {"BASE": base}, capture_output=True, text=True)
    assert done.returncode == status and ("name it by digest" in done.stderr) == bool(status)


def test_what_is_installed_and_run_is_not_roots():
    kinds = [name for name, _ in STEPS]
    assert of("USER") == ["1000"]
    assert kinds.index("USER") < kinds.index("COPY") and "make setup" in of("RUN")[2]
    assert all(rest.startswith("--chown=dod ") for rest in of("COPY"))


def test_every_package_is_pinned_by_hash():
    installs = [rest for rest in of("RUN") if "pip" in rest]
    assert installs and all(rest.count("pip install") == rest.count("--require-hashes") for rest in installs)
    for path in (INFRA.parent / "requirements").glob("*.txt"):
        pinned = re.findall(r"^[a-z0-9][^ ]*==.*(?:\n    --hash.*)*", path.read_text(), re.MULTILINE)
        assert pinned and all("--hash=sha256:" in package for package in pinned), path


def test_nothing_is_fetched_by_address_and_no_secret_is_built_in():
    assert not of("ADD") and not re.search(
        r"https?://(?!127\.0\.0\.1)|curl [^&|]*\| *(ba)?sh", TEXT.split("FROM", 1)[1]
    )
    assert not re.search(r"(SECRET|TOKEN|PASSWORD|ACCESS_KEY)", "".join(of("ENV") + of("ARG")))


def test_the_image_says_whether_it_is_well():
    assert len(of("HEALTHCHECK")) == 1 and "$DOD_HEALTH" in of("HEALTHCHECK")[0]
    assert "DOD_HEALTH=http://127.0.0.1:" in of("ENV")[0] and "curl" in of("RUN")[1]


def test_the_image_leaves_out_what_may_be_secret():
    ignored = Path(INFRA / "Dockerfile.dockerignore").read_text().splitlines()
    assert {".dvc/config.local", "**/.env*", "**/*.pem", ".state", ".venv*"} <= set(ignored) and ".git" not in ignored


def test_what_setup_needs_is_copied_before_it():
    makefile = (INFRA.parent / "Makefile").read_text()
    needed = re.findall(r"^\.venv(?:-dvc)?/\.\w+: (.*)$", makefile, re.MULTILINE)
    files = {word for line in needed for word in line.split() if word != "|" and not word.startswith(".venv")}
    copied = " ".join(of("COPY")[:-1]).split()
    assert all(file in copied or file.split("/")[0] in copied for file in files) and len(files) >= 5
