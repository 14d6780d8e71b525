"""What S3 lets these credentials do, and how it keeps the bucket; of the probe, an old version may be left there."""

import time
import uuid
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

from dod_models.config import S3
from dod_pipeline.finding import Finding, Step, Trouble

TIMEOUTS = {"connect_timeout": 5, "read_timeout": 5}  # seconds
SKEW, MOST_SKEW = 60, 300  # seconds; S3 refuses requests that are 900 off
LOOPBACK = ("localhost", "127.0.0.1", "::1")
BYTES = b"dod doctor\n"
BLOCKS = ("BlockPublicAcls", "IgnorePublicAcls", "BlockPublicPolicy", "RestrictPublicBuckets")

# What S3 answers, by what it means.
REFUSED = ("AccessDenied", "AllAccessDisabled", "403")
UNKNOWN = ("NotImplemented", "MethodNotAllowed", "UnsupportedOperation", "501", "405")
CHANGED = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
NONE = ("ServerSideEncryptionConfigurationNotFoundError", "NoSuchPublicAccessBlockConfiguration")
AGAIN = "set the credentials anew, or log in again"
REMEDIES = {
    "NoSuchBucket": "make the bucket, or correct its name in params.yaml",
    "SignatureDoesNotMatch": f"the secret is wrong: {AGAIN}",
    "InvalidAccessKeyId": f"the key is unknown there: {AGAIN}",
    "ExpiredToken": f"they have expired: {AGAIN}",
    "InvalidToken": f"the session's token is wrong: {AGAIN}",
    "RequestTimeTooSkewed": "set this machine's clock",
    "PermanentRedirect": "AWS_DEFAULT_REGION must be the bucket's region",
    "AuthorizationHeaderMalformed": "AWS_DEFAULT_REGION must be the bucket's region",
    **dict.fromkeys(UNKNOWN, "this server can't do it: use another, as AWS's"),
}


def steps(storage: str | None, reads: list[str]) -> tuple[Step, ...]:
    """All checks of the bucket that holds this installation's storage, and of what stages read from S3."""
    places = [Place(url) for url in ([storage] if storage else []) + reads]
    if not places:
        return ()
    first = places[0]
    inside = tuple(Step(f"S3: {place.url}", place.reading) for place in places[bool(storage) :])
    if storage:
        inside = (
            Step("S3: bucket", first.listing, (Step("S3: write", first.write, first.written()), *first.kept())),
            *inside,
        )
    inside = (Step("S3: clock", first.clock), *inside)
    return (Step("S3: credentials", first.credentials, (Step("S3: transport", first.transport, inside),)),)


class Place:
    """s3://BUCKET/PREFIX; credentials, region and endpoint are found as boto3 and the aws command find them."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.bucket, _, prefix = self.url.removeprefix(S3).partition("/")
        self.prefix = f"{prefix}/" if prefix else ""
        self.probe = f"{self.prefix}.doctor/{uuid.uuid4().hex}"

    @cached_property
    def session(self) -> Any:
        """A session of its own, which reads the environment and files anew."""
        import boto3

        return boto3.session.Session()

    @cached_property
    def client(self) -> Any:
        """One that asks once and doesn't wait long."""
        from botocore.config import Config

        config = Config(retries={"total_max_attempts": 1}, **TIMEOUTS)
        return self.session.client("s3", config=config)

    def ask(self, right: str, operation: str, **request: Any) -> dict[str, Any]:
        """S3's answer; Trouble with its words, the right that the request needs, and what to do."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer: dict[str, Any] = getattr(self.client, operation)(Bucket=self.bucket, **request)
        except ClientError as error:
            word, text = code(error), error.response["Error"].get("Message", "")
            allow = f"allow {right}" if word in REFUSED else "try again; look at the server's log"
            raise Trouble(f"{right}: {word}: {text}", REMEDIES.get(word, allow)) from error
        except BotoCoreError as error:
            raise Trouble(str(error), "look at the network, the region and AWS_ENDPOINT_URL_S3") from error
        return answer

    def list(self) -> dict[str, Any]:
        """One name below the prefix. Asking for the bucket as such wants rights beyond that."""
        return self.ask("s3:ListBucket", "list_objects_v2", Prefix=self.prefix, MaxKeys=1)

    def credentials(self) -> Finding:
        """Where they come from; never what they are."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            found = self.session.get_credentials()
            parts = () if found is None else found.get_frozen_credentials()
        except (BotoCoreError, ClientError) as error:
            return Finding("fail", str(error), "look at AWS_PROFILE and ~/.aws/config, or log in again")
        if found is None:
            remedy = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or use a machine with a role"
            return Finding("fail", "none: neither in the environment, nor in AWS's files, nor from a role", remedy)
        if any(set(part or "") & set(" \t\r\n") for part in parts):  # boto3's error would show them
            return Finding("fail", f"from {found.method}, with a space or a line break in them", "copy them again")
        return Finding("ok", f"from {found.method}")

    def transport(self) -> Finding:
        """Whether others on the way can read along."""
        url = str(self.client.meta.endpoint_url)
        parts = urlsplit(url)
        if parts.scheme == "https":
            return Finding("ok", url)
        if parts.hostname in LOOPBACK:
            return Finding("ok", f"{url}, on this machine")
        return Finding("warn", f"{url}: whoever is on the way reads along", "name an https:// endpoint")

    def clock(self) -> Finding:
        """This machine's beside the server's, which says the time also where it refuses."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            answer = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)
        except ClientError as error:
            answer = error.response
        except BotoCoreError:
            return Finding("skipped", "no answer")
        stated = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date")
        if stated is None:
            return Finding("skipped", "the server doesn't say what time it is")
        skew = time.time() - parsedate_to_datetime(stated).timestamp()
        found = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the server's"
        if abs(skew) <= SKEW:
            return Finding("ok", found)
        remedy = "set it and keep it so: `timedatectl set-ntp true`; S3 refuses what is 15 minutes off"
        return Finding("fail" if abs(skew) > MOST_SKEW else "warn", found, remedy)

    def listing(self) -> Finding:
        """The bucket is there, and its names may be listed."""
        self.list()
        return Finding("ok", f"{self.url} can be listed")

    def reading(self) -> Finding:
        """Something is there, and it may be read."""
        names = self.list().get("Contents", [])
        if not names:
            return Finding("fail", "nothing is there", "correct it in params.yaml, or upload it")
        self.ask("s3:GetObject", "head_object", Key=names[0]["Key"])
        return Finding("ok", "can be listed and read")

    def write(self) -> Finding:
        """A new object may be written, on the condition that there is none of its name."""
        self.ask("s3:PutObject", "put_object", Key=self.probe, Body=BYTES, IfNoneMatch="*")
        return Finding("ok", f"{self.probe} was written")

    def written(self) -> tuple[Step, ...]:
        """What can be asked once there is a probe."""
        checks = {"read": self.read, "conditional put": self.condition, "delete": self.delete}
        return tuple(Step(f"S3: {name}", check) for name, check in checks.items())

    def read(self) -> Finding:
        """What was written comes back."""
        found = self.ask("s3:GetObject", "get_object", Key=self.probe)["Body"].read(len(BYTES) + 1)
        if found != BYTES:
            return Finding("fail", f"{found!r} came back for {BYTES!r}", "no data are safe there: use another server")
        return Finding("ok", "it came back")

    def condition(self) -> Finding:
        """The server refuses a put whose condition doesn't hold: or else two champions could be chosen at once."""
        for condition in ({"IfNoneMatch": "*"}, {"IfMatch": '"another"'}):
            try:
                self.ask("s3:PutObject", "put_object", Key=self.probe, Body=BYTES, **condition)
            except Trouble as trouble:
                if code(trouble.__cause__) not in CHANGED:
                    raise
            else:
                found = f"the server wrote against {next(iter(condition))}"
                return Finding("fail", found, "champions need conditional writes, as AWS's S3 has: use another server")
        return Finding("ok", "refused where the condition doesn't hold")

    def delete(self) -> Finding:
        """The probe goes. A machine that only computes needs no right to that, so it is no failure."""
        try:
            self.ask("s3:DeleteObject", "delete_object", Key=self.probe)
        except Trouble as trouble:
            return trouble.finding._replace(state="warn")
        return Finding("ok", "it is gone again")

    def kept(self) -> tuple[Step, ...]:
        """The bucket's own settings."""
        checks = {"versioning": self.versioning, "encryption": self.encryption, "public access block": self.privacy}
        return tuple(Step(f"S3: {name}", check) for name, check in checks.items())

    def setting(self, right: str, operation: str) -> dict[str, Any]:
        """One of the bucket's settings, empty where S3 says that there is none; Trouble where it doesn't say."""
        try:
            return self.ask(right, operation)
        except Trouble as trouble:
            word = code(trouble.__cause__)
            if word in NONE:
                return {}
            if word in REFUSED:
                raise Trouble("these credentials may not ask", f"allow {right}", state="skipped") from None
            if word in UNKNOWN:
                raise Trouble(f"the server doesn't say ({word})", "", state="skipped") from None
            raise

    def versioning(self) -> Finding:
        """What was replaced or deleted can be brought back."""
        if self.setting("s3:GetBucketVersioning", "get_bucket_versioning").get("Status") == "Enabled":
            return Finding("ok", "on")
        how = self.command("put-bucket-versioning", "versioning-configuration", "Status=Enabled")
        return Finding("warn", "off: what is replaced or deleted is lost", how)

    def encryption(self) -> Finding:
        """How objects lie there, unless somebody says otherwise."""
        answer = self.setting("s3:GetEncryptionConfiguration", "get_bucket_encryption")
        rules = answer.get("ServerSideEncryptionConfiguration", {}).get("Rules", [])
        kinds = [rule["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] for rule in rules]
        if kinds:
            return Finding("ok", f"by default {', '.join(kinds)}")
        rule = "'Rules=[{ApplyServerSideEncryptionByDefault={SSEAlgorithm=AES256}}]'"
        how = self.command("put-bucket-encryption", "server-side-encryption-configuration", rule)
        return Finding("warn", "none by default", how)

    def privacy(self) -> Finding:
        """Nobody opens the bucket to the world by mistake."""
        answer = self.setting("s3:GetBucketPublicAccessBlock", "get_public_access_block")
        found = answer.get("PublicAccessBlockConfiguration", {})
        off = [name for name in BLOCKS if not found.get(name)]
        if not off:
            return Finding("ok", "on")
        all_on = ",".join(f"{name}=true" for name in BLOCKS)
        how = self.command("put-public-access-block", "public-access-block-configuration", all_on)
        return Finding("warn", f"off: {', '.join(off)}", how)

    def command(self, name: str, option: str, value: str) -> str:
        """What mends a setting of the bucket."""
        return f"`aws s3api {name} --bucket {self.bucket} --{option} {value}`"


def code(error: Any) -> str:
    """S3's word for what is wrong; "" where it said nothing."""
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))
