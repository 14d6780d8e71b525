"""`make demo-ray`: the demo on this machine, and through S3 on a Ray cluster of two nodes, and the digests of both.

The nodes are network namespaces with addresses of their own, S3 is a SeaweedFS server: the harness of the tests. One
thread everywhere, for sums depend on their number; one worker trains. Two clones below `.state/`, which are kept: a
second call has nothing to do. Writes Markdown to stdout. Wants root, for the namespaces.
"""

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks import clone
from dod_pipeline import costs, stages
from dod_pipeline.config import load_params

EXPERIMENT = "mnist"

# The tests' servers and hosts, under the name that pytest gives them: another package `tests` may be installed.
sys.path.append(str(clone.ROOT / "tests"))
bucket, network, ray_nodes = (
    importlib.import_module(f"pipeline.{name}") for name in ("bucket", "network", "ray_nodes")
)


def repository(name: str, deployment: dict[str, Any]) -> Path:
    """A clone with a cache of its own, and this deployment."""
    root = clone.at_this_commit(name, apart=True)
    clone.write_params(root, clone.read_params(root) | {"deployment": deployment})
    return root


def run(root: Path, variables: dict[str, str]) -> None:
    """`dod run`, its output on stderr."""
    environment = clone.environment(root) | {"OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).parent / "dod"), "run", EXPERIMENT]
    subprocess.run(command, cwd=root, env=environment | variables, stdout=sys.stderr, check=True)


def outputs(root: Path) -> dict[str, str]:
    """md5 of each output, by path."""
    locked = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in locked.values() for out in stage["outs"]}


def seconds(root: Path, stage: str, key: str) -> float:
    """What a stage took when it was last made."""
    found = costs.known(stage, key, root / costs.COSTS)
    return max(found, key=lambda cost: cost.time).seconds


def compared(here: Path, there: Path) -> list[str]:
    """Lines of two tables: digests, and times."""
    ours, theirs = outputs(here), outputs(there)
    lines = ["| output | here | on the cluster | |", "|---|---|---|---|"]
    for path in sorted(ours):
        if not path.startswith("report"):  # it shows the seconds
            same = "equal" if ours[path] == theirs.get(path) else "DIFFERENT"
            lines.append(f"| {path} | `{ours[path][:12]}` | `{theirs.get(path, 'none')[:12]}` | {same} |")
    lines += ["", "| stage | s here | s on the cluster |", "|---|---:|---:|"]
    params = load_params(here / "params.yaml")
    for stage, key in stages.instances(params, EXPERIMENT, "metrics"):
        lines.append(f"| {stage} | {seconds(here, stage, key):.0f} | {seconds(there, stage, key):.0f} |")
    return lines


def main() -> int:
    """Run both, print both; exit status 1 where they differ."""
    if (why := network.lacks()) is not None:
        sys.exit(f"demo-ray: {why}")
    here = repository("demo-here", {})
    run(here, {})
    with tempfile.TemporaryDirectory() as folder, network.network() as net:
        store, nodes = clone.ROOT / ".state" / "demo-s3", Path(folder, "nodes")
        store.mkdir(parents=True, exist_ok=True)
        nodes.mkdir()
        with bucket.serve(store, address=network.HUB) as s3:
            found = ray_nodes.Cluster(net, nodes, s3)
            found.add_node()
            found.add_node()
            ray = {"address": found.address, "gpus": 0, "cpus": 1}
            storage = {"url": f"s3://{bucket.BUCKET}/demo", "endpoint": s3.endpoint}
            there = repository("demo-there", {"compute": "ray", "ray": ray, "storage": storage})
            run(there, s3.environment() | found.environment)
            found.end()
    lines = compared(here, there)
    print("\n".join(lines))
    return 1 if any("DIFFERENT" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
