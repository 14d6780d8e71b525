"""What infra/dod.yaml promises, as functions of the parsed template: each is true of a template that keeps it.

No mock of AWS enforces policies, so the template itself is examined.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

INFRA = Path(__file__).parents[2] / "infra"
PREFIX = {"Sub": "${Bucket.Arn}/${Prefix}/*"}
STATES = {"Sub": "${Bucket.Arn}/${Prefix}/state/*"}  # superseded ones are removed
UNBOUNDED = {  # actions for which AWS knows no narrower resource
    *("ec2:DescribeInstances", "ec2:DescribeInstanceTypes", "ec2:DescribeImages", "ecr:GetAuthorizationToken"),
    *("ssm:UpdateInstanceInformation", "ssmmessages:CreateControlChannel", "ssmmessages:CreateDataChannel"),
    *("ssmmessages:OpenControlChannel", "ssmmessages:OpenDataChannel"),
}
SHOWN = {"s3:GetBucketVersioning", "s3:GetEncryptionConfiguration", "s3:GetBucketPublicAccessBlock"}  # of the bucket
Template = dict[str, Any]


class Loader(yaml.SafeLoader):
    """Reads `!GetAtt Bucket.Arn` as {"GetAtt": "Bucket.Arn"}, and so every short form."""


def short_form(loader: Loader, name: str, node: yaml.Node) -> dict[str, Any]:
    if isinstance(node, yaml.ScalarNode):
        return {name: loader.construct_scalar(node)}
    assert isinstance(node, yaml.SequenceNode)
    return {name: loader.construct_sequence(node, deep=True)}


Loader.add_multi_constructor("!", short_form)


def load() -> Template:
    """The template; every call gives a fresh one."""
    found: Template = yaml.load((INFRA / "dod.yaml").read_text(), Loader)
    return found


def of_type(template: Template, kind: str) -> list[dict[str, Any]]:
    """The properties of every resource of that type."""
    found = [resource for resource in template["Resources"].values() if resource["Type"] == f"AWS::{kind}"]
    return [resource.get("Properties", {}) for resource in found]


def properties(template: Template, name: str) -> dict[str, Any]:
    found: dict[str, Any] = template["Resources"][name]["Properties"]
    return found


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def statements(template: Template, role: str | None = None) -> Iterator[dict[str, Any]]:
    """What the policies of a role allow, or of all roles."""
    for policy in of_type(template, "IAM::ManagedPolicy"):
        if role is None or {"Ref": role} in policy["Roles"]:
            yield from policy["PolicyDocument"]["Statement"]


def actions(template: Template, role: str | None = None) -> set[str]:
    return {action for statement in statements(template, role) for action in as_list(statement["Action"])}


def allowing(template: Template, action: str) -> list[dict[str, Any]]:
    return [statement for statement in statements(template) if action in as_list(statement["Action"])]


def equals(statement: dict[str, Any], key: str) -> Any:
    return statement.get("Condition", {}).get("StringEquals", {}).get(key)


def lifecycle(template: Template, key: str) -> bool:
    rules = properties(template, "Bucket").get("LifecycleConfiguration", {}).get("Rules", [])
    return any(key in rule and rule["Status"] == "Enabled" for rule in rules)


def tls_only(template: Template) -> bool:
    for statement in properties(template, "BucketPolicy")["PolicyDocument"]["Statement"]:
        whole = {"GetAtt": "Bucket.Arn"} in statement["Resource"] and {"Sub": "${Bucket.Arn}/*"} in statement[
            "Resource"
        ]
        plain = statement.get("Condition") == {"Bool": {"aws:SecureTransport": "false"}}
        if (
            whole
            and plain
            and (statement["Effect"], statement["Principal"], statement["Action"]) == ("Deny", "*", "s3:*")
        ):
            return True
    return False


def hears(template: Template) -> list[dict[str, Any]]:
    """Every rule by which somebody may speak to one of our machines or endpoints."""
    groups = of_type(template, "EC2::SecurityGroup")
    inside = [rule for group in groups for rule in group.get("SecurityGroupIngress", [])]
    return inside + of_type(template, "EC2::SecurityGroupIngress")


def machines(template: Template) -> list[dict[str, Any]]:
    return [found["LaunchTemplateData"] for found in of_type(template, "EC2::LaunchTemplate")]


def s3_reach(template: Template) -> list[Any]:
    policy = properties(template, "EndpointS3").get("PolicyDocument", {"Statement": [{"Resource": "*"}]})
    return [resource for statement in policy["Statement"] for resource in as_list(statement["Resource"])]


def head_starts_workers_only(template: Template) -> bool:
    """Each way to start an instance names our subnets, group and template, or the instance's tag, type and role."""
    for statement in allowing(template, "ec2:RunInstances"):
        whole = [str(resource) for resource in as_list(statement["Resource"])]
        if any("instance/*" in resource for resource in whole):
            tagged = equals(statement, "aws:RequestTag/ray-cluster-name") == {"Ref": "ClusterName"}
            role = statement["Condition"].get("ArnEquals") == {"ec2:InstanceProfile": {"GetAtt": "WorkerProfile.Arn"}}
            types = equals(statement, "ec2:InstanceType") == {"Ref": "WorkerTypes"}
            if not (tagged and role and types and equals(statement, "ec2:MetadataHttpTokens") == "required"):
                return False
        elif any(f"{kind}/*" in r for r in whole for kind in ("subnet", "security-group", "image", "launch-template")):
            return False
    return True


def head_ends_its_own_only(template: Template) -> bool:
    own = {"Ref": "ClusterName"}
    ends = [s for verb in ("Start", "Stop", "Terminate") for s in allowing(template, f"ec2:{verb}Instances")]
    tags = [s for s in allowing(template, "ec2:CreateTags") if equals(s, "ec2:CreateAction") != "RunInstances"]
    return all(equals(statement, "aws:ResourceTag/ray-cluster-name") == own for statement in ends + tags)


def objects_below_the_prefix(template: Template) -> bool:
    for statement in statements(template):
        named = [action for action in as_list(statement["Action"]) if action.startswith("s3:") and action not in SHOWN]
        if "s3:ListBucket" in named:
            if statement.get("Condition") != {"StringLikeIfExists": {"s3:prefix": [{"Sub": "${Prefix}/*"}]}}:
                return False
        elif named and statement["Resource"] not in (PREFIX, STATES):
            return False
    return True


def role_is_for_machines(template: Template) -> bool:
    trusts = [s for role in of_type(template, "IAM::Role") for s in role["AssumeRolePolicyDocument"]["Statement"]]
    plain = all(set(role) == {"AssumeRolePolicyDocument"} for role in of_type(template, "IAM::Role"))
    return plain and all(s["Principal"] == {"Service": "ec2.amazonaws.com"} for s in trusts)


PUBLIC_ACCESS = ("BlockPublicAcls", "BlockPublicPolicy", "IgnorePublicAcls", "RestrictPublicBuckets")
WAYS_OUT = ("EC2::InternetGateway", "EC2::NatGateway", "EC2::EIP", "EC2::EgressOnlyInternetGateway", "EC2::Route")
SERVICES = ("ec2", "ecr.api", "ecr.dkr", "ssm", "ssmmessages")

PROMISES: dict[str, Callable[[Template], bool]] = {
    "the bucket is versioned": lambda t: (
        properties(t, "Bucket").get("VersioningConfiguration") == {"Status": "Enabled"}
    ),
    "the bucket is encrypted": lambda t: "BucketEncryption" in properties(t, "Bucket"),
    "the bucket is private": lambda t: (
        properties(t, "Bucket").get("PublicAccessBlockConfiguration") == dict.fromkeys(PUBLIC_ACCESS, True)
    ),
    "the bucket has no lists of access": lambda t: (
        properties(t, "Bucket").get("OwnershipControls") == {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]}
    ),
    "the bucket outlives the stack": lambda t: (
        [t["Resources"]["Bucket"].get(f"{key}Policy") for key in ("Deletion", "UpdateReplace")] == ["Retain"] * 2
    ),
    "old versions go": lambda t: lifecycle(t, "NoncurrentVersionExpiration"),
    "aborted uploads go": lambda t: lifecycle(t, "AbortIncompleteMultipartUpload"),
    "the bucket speaks TLS only": tls_only,
    "a tag of an image stays": lambda t: properties(t, "Repository").get("ImageTagMutability") == "IMMUTABLE",
    "images are scanned": lambda t: (
        properties(t, "Repository").get("ImageScanningConfiguration") == {"ScanOnPush": True}
    ),
    "subnets are private": lambda t: (
        not any(of_type(t, kind) for kind in WAYS_OUT)
        and not any(subnet.get("MapPublicIpOnLaunch") for subnet in of_type(t, "EC2::Subnet"))
        and not any("NetworkInterfaces" in machine for machine in machines(t))
    ),
    "S3 is reached inside": lambda t: (
        properties(t, "EndpointS3")["VpcEndpointType"] == "Gateway"
        and properties(t, "EndpointS3").get("RouteTableIds") == [{"Ref": "Routes"}]
    ),
    "no other bucket is reached": lambda t: all(
        "${Bucket" in str(r) or "starport-layer-bucket" in str(r) or "Bucket.Arn" in str(r) for r in s3_reach(t)
    ),
    "services are reached inside": lambda t: (
        {str(found["ServiceName"]) for found in of_type(t, "EC2::VPCEndpoint") if found.get("PrivateDnsEnabled")}
        == {str({"Sub": "com.amazonaws.${AWS::Region}." + name}) for name in SERVICES}
    ),
    "nothing is open to the world": lambda t: (
        bool(hears(t)) and all(rule.get("SourceSecurityGroupId") == {"Ref": "MachineGroup"} for rule in hears(t))
    ),
    "what leaves is bounded": lambda t: (
        all(group.get("SecurityGroupEgress") for group in of_type(t, "EC2::SecurityGroup"))
        and all(r.get("ToPort") == 443 for g in of_type(t, "EC2::SecurityGroup") for r in g["SecurityGroupEgress"])
    ),
    "metadata wants a token": lambda t: all(
        machine.get("MetadataOptions", {}).get("HttpTokens") == "required" for machine in machines(t)
    ),
    "containers reach the metadata": lambda t: all(
        machine.get("MetadataOptions", {}).get("HttpPutResponseHopLimit") == 2 for machine in machines(t)
    ),
    "disks are encrypted": lambda t: all(
        disk["Ebs"].get("Encrypted") is True for machine in machines(t) for disk in machine["BlockDeviceMappings"]
    ),
    "no static keys": lambda t: not any(of_type(t, kind) for kind in ("IAM::AccessKey", "IAM::User", "EC2::KeyPair")),
    "roles are for machines": role_is_for_machines,
    "no action is a wildcard": lambda t: not any("*" in action for action in actions(t)),
    "no resource is a wildcard": lambda t: all(
        set(as_list(s["Action"])) <= UNBOUNDED for s in statements(t) if "*" in as_list(s["Resource"])
    ),
    "objects lie below the prefix": objects_below_the_prefix,
    "no version can be destroyed": lambda t: (
        not any("Version" in name or "Bucket" in name for name in actions(t) - SHOWN - {"s3:ListBucket"})
    ),
    "one repository": lambda t: all(
        s["Resource"] == {"GetAtt": "Repository.Arn"} for s in allowing(t, "ecr:BatchGetImage")
    ),
    "the head starts workers only": head_starts_workers_only,
    "the head ends its own only": head_ends_its_own_only,
    "the head hands over one role": lambda t: (
        [s["Resource"] for s in allowing(t, "iam:PassRole")] == [{"GetAtt": "WorkerRole.Arn"}]
        and all(equals(s, "iam:PassedToService") == "ec2.amazonaws.com" for s in allowing(t, "iam:PassRole"))
    ),
    "workers only move data and pull images": lambda t: (
        {name.split(":")[0] for name in actions(t, "WorkerRole")} == {"s3", "ecr"}
        and all(
            s["Resource"] == STATES for s in statements(t, "WorkerRole") if "s3:DeleteObject" in as_list(s["Action"])
        )
    ),
    "spending is watched": lambda t: (
        bool(of_type(t, "Budgets::Budget"))
        and len(of_type(t, "Budgets::Budget")[0].get("NotificationsWithSubscribers", [])) == 2
    ),
}


def broken(template: Template) -> set[str]:
    """The promises that a template doesn't keep."""
    return {promise for promise, kept in PROMISES.items() if not kept(template)}
