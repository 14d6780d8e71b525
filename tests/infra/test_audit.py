"""The audit of `make lint`: the real pip-audit, asking a service of the test's, or nobody."""

import json
import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from .template import INFRA

BIN = Path(sys.executable).parent
HASH = "0" * 64
RANGES = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "1.5"}]}]
HOLE = {
    "id": "TEST-2026-1",
    "summary": "a hole",
    "affected": [{"package": {"name": "holey", "ecosystem": "PyPI"}, "ranges": RANGES}],
}


class Service(BaseHTTPRequestHandler):
    """Advisories as OSV gives them: one package has a hole."""

    status: ClassVar[int] = 200
    body: ClassVar[str | None] = None
    asked: ClassVar[list[str]] = []
    url: ClassVar[str]

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(name := query["package"]["name"])
        answer = json.dumps({"vulns": [HOLE]} if name == "holey" else {}) if self.body is None else self.body
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *parts: Any) -> None:
        pass


@pytest.fixture
def service() -> Iterator[type[Service]]:
    class Own(Service):
        asked: ClassVar[list[str]] = []

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    Own.url = f"http://127.0.0.1:{server.server_address[1]}/"
    yield Own
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Two lists, the shorter one's package first, and no exceptions."""
    (tmp_path / "requirements").mkdir()
    write(tmp_path, "long", "sound==2.0", "holey==1.0", "third==3.0")
    write(tmp_path, "short", "probe==1.0")
    accept(tmp_path, "# none")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "pip-audit").symlink_to(BIN / "pip-audit")
    return tmp_path


def write(root: Path, name: str, *pins: str) -> None:
    lines = [f"{pin} \\\n    --hash=sha256:{HASH}\n" for pin in pins]
    (root / "requirements" / f"{name}.txt").write_text("".join(lines))


def accept(root: Path, text: str) -> None:
    (root / "requirements" / "accepted-advisories").write_text(f"{text}\n")


def audit(root: Path, url: str | None, *options: str) -> tuple[int, list[str]]:
    """The script's exit status, and the lines that it prints."""
    where = () if url is None else ("--vulnerability-service", "osv", "--osv-url", url)
    cache = ("--cache-dir", str(root / "cache")) if url else ()
    done = subprocess.run(
        ["sh", str(INFRA / "audit.sh"), *where, *cache, *options],
        cwd=root,
        env=os.environ | {"NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
    )
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_a_hole_fails_with_package_version_advisory_and_the_version_that_mends_it(
    project: Path, service: type[Service]
):
    status, said = audit(project, service.url)
    assert status == 1 and service.asked[0] == "probe" and set(service.asked) == {"probe", "sound", "holey", "third"}
    assert said[0] == "audit: requirements/short.txt: no known vulnerabilities"
    assert "Found 1 known vulnerability in 1 package" in said
    assert [line.split() for line in said if line.startswith("holey")] == [["holey", "1.0", "TEST-2026-1", "1.5"]]


def test_what_is_accepted_with_a_reason_passes(project: Path, service: type[Service]):
    accept(project, "# why not\nTEST-2026-1 dod never calls it; until 2027")
    assert audit(project, service.url) == (
        0,
        [f"audit: requirements/{name}.txt: no known vulnerabilities" for name in ("short", "long")],
    )
    accept(project, "TEST-2026-1")
    status, said = audit(project, service.url)
    assert status == 1 and said == ["audit: requirements/accepted-advisories: give a reason behind: TEST-2026-1"]


def test_where_nobody_listens_it_says_so_and_passes(project: Path):
    status, said = audit(project, "http://127.0.0.1:9/")
    assert (status, len(said)) == (0, 1)
    assert said[0].startswith("audit: NOT DONE from requirements/short.txt on, nobody has advisories: requests.exc")


def test_where_nobody_answers_it_says_so_and_passes(project: Path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        status, said = audit(project, f"http://127.0.0.1:{silent.getsockname()[1]}/", "--timeout", "1")
    assert (status, len(said)) == (0, 1) and "NOT DONE" in said[0] and "ReadTimeout" in said[0]


@pytest.mark.parametrize(("code", "body"), [(503, None), (200, "<html>log in</html>")])
def test_a_service_that_fails_is_no_finding(project: Path, service: type[Service], code: int, body: str | None):
    service.status, service.body = code, body
    status, said = audit(project, service.url)
    assert (status, len(said)) == (0, 1) and "NOT DONE" in said[0]
    assert service.asked == ["probe"]


def test_a_list_that_is_broken_fails(project: Path, service: type[Service]):
    (project / "requirements" / "long.txt").write_text("sound==2.0\n" * 20)
    status, said = audit(project, service.url)
    assert status == 1 and "requirements/long.txt: pip-audit failed" in " ".join(said)


UNKNOWN = "{0}  Dependency not found on PyPI and could not be audited: {0} (1.0)"
FEED = "ERROR:pip_audit._cli:{} PyPI's vulnerability feed"
NOT_DONE = "audit: NOT DONE from requirements/short.txt on, nobody has advisories: "


def pretend(root: Path, code: int, *lines: str) -> None:
    """Let pip-audit say what version 2.10.1 says in a case that no service of a test's can bring about."""
    tool = root / ".venv" / "bin" / "pip-audit"
    tool.unlink()
    tool.write_text("\n".join(["#!/bin/sh", *(f"echo {shlex.quote(line)}" for line in lines), f"exit {code}"]))
    tool.chmod(0o755)


@pytest.mark.parametrize(
    ("code", "line"),
    [
        (0, UNKNOWN.format("probe")),  # pip-audit takes it for well
        (1, FEED.format("Could not connect to")),
        (1, "ERROR:pip_audit._cli:PyPI is not redirecting properly"),
    ],
)
def test_an_index_without_advisories_is_asked_once(project: Path, code: int, line: str):
    pretend(project, code, "No known vulnerabilities found", line)
    assert audit(project, None) == (0, [NOT_DONE + line])


def test_packages_that_the_index_does_not_know_hide_no_finding(project: Path):
    write(project, "short", "probe==1.0", "own==1.0")
    pretend(project, 0, "No known vulnerabilities found", UNKNOWN.format("own"))
    status, said = audit(project, None)
    assert status == 0 and said[0].startswith("audit: requirements/short.txt: 1 packages are not known to the index")
    assert len(said) == 2
    pretend(project, 1, "Found 1 known vulnerability in 1 package", "holey 1.0 TEST-2026-1 1.5", UNKNOWN.format("own"))
    status, said = audit(project, None)
    assert status == 1 and said.count("holey 1.0 TEST-2026-1 1.5") == 2


def test_a_pip_audit_that_is_missing_fails(project: Path):
    (project / ".venv" / "bin" / "pip-audit").unlink()
    status, said = audit(project, None)
    assert status == 1 and "pip-audit failed" in said[0]


def test_lint_runs_it():
    hooks = (INFRA.parent / ".pre-commit-config.yaml").read_text()
    assert "entry: sh infra/audit.sh" in hooks and "verbose: true" in hooks.split("audit.sh", 1)[1]
