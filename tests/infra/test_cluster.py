"""The Ray cluster files fit Ray's schema, Kubernetes', the stack and the image, and keep what they promise.

ray-schema.json is the file of that name in Ray 2.60.0 (ray/autoscaler), unchanged; Apache-2.0, the Ray authors.
"""

import json
import re
from pathlib import Path
from string import Template
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from .template import INFRA, load

SCHEMA = json.loads((Path(__file__).parent / "ray-schema.json").read_text())
ROOT = INFRA.parent
OPEN = re.compile(r"\$\{(DOD_[A-Z_]+)\}")


def names(text: str) -> set[str]:
    return set(OPEN.findall(text))


def filled(name: str) -> Any:
    """A cluster file as `envsubst` would fill it in."""
    text = (INFRA / name).read_text()
    return yaml.safe_load(Template(text).safe_substitute({name: name.lower() for name in names(text)}))


@pytest.fixture
def ray() -> dict[str, Any]:
    found: dict[str, Any] = filled("ray-aws.yaml")
    return found


def workers(ray: dict[str, Any]) -> list[dict[str, Any]]:
    return [kind for name, kind in ray["available_node_types"].items() if name != ray["head_node_type"]]


def test_ray_accepts_the_file_and_would_refuse_another(ray: dict[str, Any]):
    jsonschema.validate(ray, SCHEMA)
    ray["idle_timeout"] = 5
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        jsonschema.validate(ray, SCHEMA)


def test_the_stack_has_what_the_file_leaves_open():
    text = (INFRA / "ray-aws.yaml").read_text()
    outputs = {re.sub(r"(?<!^)([A-Z])", r"_\1", name).upper() for name in load()["Outputs"]}
    assert names(text) - {"DOD_IMAGE"} <= outputs
    assert names(text) >= {"DOD_HEAD_TEMPLATE", "DOD_WORKER_TEMPLATE", "DOD_SUBNET_A", "DOD_SUBNET_B"}


def test_the_guide_fills_in_all_of_it():
    guide = (ROOT / "docs" / "deploy.md").read_text()
    for file in ("ray-aws.yaml", "kuberay.yaml"):
        assert f"infra/{file}" in guide
        assert names((INFRA / file).read_text()) <= set(re.findall(r"\$(DOD_[A-Z_]+)", guide)), file


def test_the_head_may_start_every_kind_of_worker(ray: dict[str, Any]):
    allowed = load()["Parameters"]["WorkerTypes"]["Default"].split(",")
    assert sorted(kind["node_config"]["InstanceType"] for kind in workers(ray)) == sorted(allowed)


def test_workers_are_spot_instances_from_zero_that_end_when_idle(ray: dict[str, Any]):
    assert len(workers(ray)) >= 3
    assert all(kind["min_workers"] == 0 and kind["resources"]["GPU"] > 0 for kind in workers(ray))
    assert all(kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for kind in workers(ray))
    assert 0 < ray["idle_timeout_minutes"] <= 15 and ray["provider"]["cache_stopped_nodes"] is False


def test_machines_are_private_and_hold_no_key_of_aws(ray: dict[str, Any]):
    assert ray["provider"]["use_internal_ips"] is True and "ssm start-session" in ray["auth"]["ssh_proxy_command"]
    for kind in ray["available_node_types"].values():
        config = kind["node_config"]
        assert config["MetadataOptions"] == {"HttpTokens": "required", "HttpPutResponseHopLimit": 2}
        assert "LaunchTemplate" in config and "NetworkInterfaces" not in config
    assert not re.search(r"AKIA|SECRET|aws_credentials", (INFRA / "ray-aws.yaml").read_text())


def test_work_is_taken_from_holders_of_a_token_alone(ray: dict[str, Any]):
    assert "--env RAY_AUTH_MODE=token" in ray["docker"]["run_options"]
    assert ray["file_mounts"] == {"/home/dod/.ray/auth_token": "~/.ray/auth_token"}
    assert filled("kuberay.yaml")["spec"]["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("file", ["ray-aws.yaml", "kuberay.yaml"])
def test_pages_stay_on_loopback(file: str):
    text = (INFRA / file).read_text()
    hosts = re.findall(r"(?:dashboard-host[=:]|--host,?) *([0-9.]+)", text)
    assert len(hosts) == 2 and set(hosts) == {"127.0.0.1"} and "0.0.0.0" not in text


def pods() -> dict[str, dict[str, Any]]:
    spec = filled("kuberay.yaml")["spec"]
    groups = {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in groups.items()}


def pod(spec: dict[str, Any]) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "dod"}, "spec": spec}


def test_kubernetes_accepts_the_pods_and_would_refuse_others():
    for spec in pods().values():
        kubernetes_validate.validate(pod(spec), "1.33", strict=True)
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(pod(spec | {"serviceAcountName": "dod"}), "1.33", strict=True)


def test_pods_run_without_root_or_privileges():
    for spec in pods().values():
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            secrets = [variable for variable in container.get("env", []) if "valueFrom" in variable]
            if container["name"] != "dagster":
                assert secrets == []
            else:  # whose commands give Ray work: KubeRay hands its token to Ray's own containers alone
                token = {"secretKeyRef": {"name": filled("kuberay.yaml")["metadata"]["name"], "key": "auth_token"}}
                assert secrets == [{"name": "RAY_AUTH_TOKEN", "valueFrom": token}]


def test_containers_of_the_cluster_know_their_region_and_ask_for_a_token(ray: dict[str, Any]):
    options = " ".join(ray["docker"]["run_options"])
    assert "--env AWS_DEFAULT_REGION=dod_region" in options and "--env RAY_AUTH_MODE=token" in options


def test_kubernetes_workers_start_from_zero():
    spec = filled("kuberay.yaml")["spec"]
    assert spec["enableInTreeAutoscaling"] is True and spec["autoscalerOptions"]["idleTimeoutSeconds"] == 600
    assert all(group["minReplicas"] == group["replicas"] == 0 for group in spec["workerGroupSpecs"])


def test_both_run_the_locked_version_of_ray():
    locked = re.search(r"^ray==(\S+)", (ROOT / "requirements" / "ray.txt").read_text(), re.MULTILINE)
    assert locked and filled("kuberay.yaml")["spec"]["rayVersion"] == locked[1]
