"""infra/dod.yaml keeps its promises, and an edit that breaks one is noticed."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .template import INFRA, PROMISES, as_list, broken, load, statements

GONE = object()
P = "Properties"
STATEMENTS = (P, "PolicyDocument", "Statement")
DATA = (P, "LaunchTemplateData")
BY_ROLE = ("Condition", "StringEquals")
WORLD = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "CidrIp": "0.0.0.0/0"}

EDITS: list[tuple[str, tuple[str | int, ...], Any]] = [
    ("the bucket is versioned", ("Bucket", P, "VersioningConfiguration"), GONE),
    ("the bucket is versioned", ("Bucket", P, "VersioningConfiguration", "Status"), "Suspended"),
    ("the bucket is encrypted", ("Bucket", P, "BucketEncryption"), GONE),
    ("the bucket is private", ("Bucket", P, "PublicAccessBlockConfiguration"), GONE),
    *(
        ("the bucket is private", ("Bucket", P, "PublicAccessBlockConfiguration", key), False)
        for key in ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets")
    ),
    ("the bucket has no lists of access", ("Bucket", P, "OwnershipControls"), GONE),
    ("the bucket outlives the stack", ("Bucket", "DeletionPolicy"), GONE),
    ("the bucket outlives the stack", ("Bucket", "UpdateReplacePolicy"), GONE),
    ("old versions go", ("Bucket", P, "LifecycleConfiguration", "Rules", 0), GONE),
    ("aborted uploads go", ("Bucket", P, "LifecycleConfiguration", "Rules", 1, "Status"), "Disabled"),
    ("the bucket speaks TLS only", ("BucketPolicy", *STATEMENTS, 0), GONE),
    ("the bucket speaks TLS only", ("BucketPolicy", *STATEMENTS, 0, "Resource", 1), GONE),
    ("the bucket speaks TLS only", ("BucketPolicy", *STATEMENTS, 0, "Effect"), "Allow"),
    ("a tag of an image stays", ("Repository", P, "ImageTagMutability"), GONE),
    ("images are scanned", ("Repository", P, "ImageScanningConfiguration"), GONE),
    ("subnets are private", ("SubnetA", P, "MapPublicIpOnLaunch"), True),
    ("subnets are private", ("Out",), {"Type": "AWS::EC2::InternetGateway"}),
    ("subnets are private", ("WorkerTemplate", *DATA, "NetworkInterfaces"), [{"AssociatePublicIpAddress": True}]),
    ("S3 is reached inside", ("EndpointS3", P, "RouteTableIds"), GONE),
    ("no other bucket is reached", ("EndpointS3", P, "PolicyDocument"), GONE),
    ("no other bucket is reached", ("EndpointS3", *STATEMENTS, 0, "Resource"), "*"),
    ("services are reached inside", ("EndpointSsm",), GONE),
    ("nothing is open to the world", ("MachinesHear", P, "SourceSecurityGroupId"), GONE),
    ("nothing is open to the world", ("MachineGroup", P, "SecurityGroupIngress"), [WORLD]),
    ("nothing is open to the world", ("Open",), {"Type": "AWS::EC2::SecurityGroupIngress", P: WORLD}),
    ("what leaves is bounded", ("MachineGroup", P, "SecurityGroupEgress"), GONE),
    ("what leaves is bounded", ("MachineGroup", P, "SecurityGroupEgress", 0, "ToPort"), 65535),
    ("metadata wants a token", ("HeadTemplate", *DATA, "MetadataOptions"), GONE),
    ("metadata wants a token", ("WorkerTemplate", *DATA, "MetadataOptions", "HttpTokens"), "optional"),
    ("containers reach the metadata", ("WorkerTemplate", *DATA, "MetadataOptions", "HttpPutResponseHopLimit"), GONE),
    ("disks are encrypted", ("WorkerTemplate", *DATA, "BlockDeviceMappings", 0, "Ebs", "Encrypted"), GONE),
    ("no static keys", ("Key",), {"Type": "AWS::IAM::AccessKey", P: {"UserName": "dod"}}),
    ("roles are for machines", ("HeadRole", P, "ManagedPolicyArns"), ["arn:aws:iam::aws:policy/AmazonEC2FullAccess"]),
    (
        "roles are for machines",
        ("WorkerRole", P, "AssumeRolePolicyDocument", "Statement", 0, "Principal"),
        {"AWS": "*"},
    ),
    ("no action is a wildcard", ("MachinePolicy", *STATEMENTS, "Objects", "Action"), "s3:*"),
    ("no resource is a wildcard", ("MachinePolicy", *STATEMENTS, "Images", "Resource"), "*"),
    ("objects lie below the prefix", ("MachinePolicy", *STATEMENTS, "Objects", "Resource"), {"Sub": "${Bucket.Arn}/*"}),
    ("objects lie below the prefix", ("MachinePolicy", *STATEMENTS, "Listing", "Condition"), GONE),
    ("no version can be destroyed", ("HeadPolicy", *STATEMENTS, "Deletion", "Action"), "s3:DeleteObjectVersion"),
    ("one repository", ("MachinePolicy", *STATEMENTS, "Images", "Resource"), {"Sub": "arn:aws:ecr:::repository/*"}),
    *(
        ("the head starts workers only", ("HeadPolicy", *STATEMENTS, "StartWorker", *BY_ROLE, key), GONE)
        for key in ("aws:RequestTag/ray-cluster-name", "ec2:MetadataHttpTokens", "ec2:InstanceType")
    ),
    ("the head starts workers only", ("HeadPolicy", *STATEMENTS, "StartWorker", "Condition", "ArnEquals"), GONE),
    ("the head starts workers only", ("HeadPolicy", *STATEMENTS, "StartWith", "Resource", 1), "arn:aws:ec2:::subnet/*"),
    ("the head ends its own only", ("HeadPolicy", *STATEMENTS, "OwnInstances", "Condition"), GONE),
    ("the head ends its own only", ("HeadPolicy", *STATEMENTS, "TagNewWorker", "Condition"), GONE),
    (
        "the head hands over one role",
        ("HeadPolicy", *STATEMENTS, "HandOverRole", "Resource"),
        {"GetAtt": "HeadRole.Arn"},
    ),
    ("the head hands over one role", ("HeadPolicy", *STATEMENTS, "HandOverRole", "Condition"), GONE),
    (
        "workers only move data and pull images",
        ("HeadPolicy", P, "Roles"),
        [{"Ref": "HeadRole"}, {"Ref": "WorkerRole"}],
    ),
    ("spending is watched", ("Budget",), GONE),
    ("spending is watched", ("Budget", P, "NotificationsWithSubscribers", 0), GONE),
]


def edit(value: Any, path: tuple[str | int, ...], to: Any) -> None:
    """Change or remove what lies at a path; in a list of statements a name is a Sid."""
    for depth, key in enumerate(path):
        if isinstance(value, list) and isinstance(key, str):
            key = [statement["Sid"] for statement in value].index(key)
        if depth < len(path) - 1:
            value = value[key]
        elif to is GONE:
            del value[key]
        else:
            value[key] = to


def test_the_template_keeps_every_promise():
    assert broken(load()) == set()


@pytest.mark.parametrize(("promise", "path", "to"), EDITS, ids=lambda v: None if not isinstance(v, str) else v)
def test_an_edit_that_breaks_a_promise_is_noticed(promise: str, path: tuple[str | int, ...], to: Any):
    template = load()
    edit(template["Resources"], path, to)
    assert promise in broken(template)


def test_every_promise_is_seen_to_break():
    assert {promise for promise, _, _ in EDITS} == set(PROMISES)


def test_cfn_lint_has_no_complaint_and_would_have_one(tmp_path: Path):
    lint = [str(Path(sys.executable).parent / "cfn-lint"), "--format", "parseable"]
    bad = tmp_path / "bad.yaml"
    bad.write_text((INFRA / "dod.yaml").read_text().replace("ImageTagMutability: IMMUTABLE", "ImageTagMutability: NO"))
    runs = [subprocess.run([*lint, str(path)], capture_output=True, text=True) for path in (INFRA / "dod.yaml", bad)]
    assert (runs[0].returncode, runs[0].stdout) == (0, "")
    assert runs[1].returncode != 0 and "not one of" in runs[1].stdout


def test_the_head_may_ask_all_that_the_doctor_asks():
    source = (INFRA.parent / "dod_pipeline" / "doctor_s3.py").read_text()
    asked = set(re.findall(r'"(s3:\w+)"', source))
    allowed = {action for one in statements(load(), "HeadRole") for action in as_list(one["Action"])}
    assert {"s3:PutObject", "s3:GetBucketVersioning"} <= asked <= allowed
