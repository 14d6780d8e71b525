"""What `dod doctor` says of S3: a real server, its refusals, and what only a stub can answer."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import yaml

from dod_pipeline import cli, doctor, doctor_s3
from dod_pipeline.config import Params
from dod_pipeline.finding import Finding, Step, examine

from . import project as tiny
from .bucket import BUCKET, READER, READER_SECRET, S3, SECRET

Captured = pytest.CaptureFixture[str]
CANARY = "canary-9f1c7e52d0b84a6f"
STORAGE = f"s3://{BUCKET}/doctor"
NAMES = (
    *("credentials", "transport", "clock", "bucket", "write", "read", "conditional put", "delete"),
    *("versioning", "encryption", "public access block"),
)


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_s3, "TIMEOUTS", {"connect_timeout": 1, "read_timeout": 1})


def look(storage: str | None = STORAGE, reads: tuple[str, ...] = ()) -> dict[str, Finding]:
    """Findings by name, without the common beginning; no secret stands in any."""
    found = dict(examine(doctor_s3.steps(storage, list(reads))))
    said = str(found)
    assert not any(secret in said for secret in (SECRET, READER_SECRET, CANARY))
    return {name.removeprefix("S3: "): finding for name, finding in found.items()}


def states(found: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.state for name, finding in found.items()}


def leftovers(s3: S3) -> list[str]:
    answer = s3.client().list_objects_v2(Bucket=BUCKET, Prefix="doctor/")
    return [item["Key"] for item in answer.get("Contents", [])]


def test_a_server_that_is_well_passes_and_keeps_nothing_of_it(s3: S3):
    found = look()
    assert tuple(found) == NAMES
    off = dict.fromkeys(("versioning", "encryption"), "warn") | {"public access block": "skipped"}
    assert states(found) == dict.fromkeys(NAMES, "ok") | off
    assert found["credentials"].found == "from env"
    assert found["transport"].found == f"{s3.endpoint}, on this machine"
    assert found["public access block"].found == "the server doesn't say (NotImplemented)"
    assert leftovers(s3) == []


def test_the_bucket_s_settings_are_told_once_they_are_on(s3: S3):
    s3.client().create_bucket(Bucket="kept")
    url, client = "s3://kept/x", s3.client()
    found = look(url)
    assert states(found)["versioning"] == states(found)["encryption"] == "warn"
    assert "put-bucket-versioning --bucket kept --versioning-configuration Status=Enabled" in found["versioning"].remedy
    client.put_bucket_versioning(Bucket="kept", VersioningConfiguration={"Status": "Enabled"})
    rule = {"ApplyServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
    client.put_bucket_encryption(Bucket="kept", ServerSideEncryptionConfiguration={"Rules": [rule]})
    found = look(url)
    assert (found["versioning"], found["encryption"]) == (Finding("ok", "on"), Finding("ok", "by default AES256"))
    assert client.list_objects_v2(Bucket="kept")["KeyCount"] == 0


def test_a_wrong_secret_is_named_and_what_depends_on_it_skipped(s3: S3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    found = look()
    assert found["bucket"].state == "fail" and "SignatureDoesNotMatch" in found["bucket"].found
    assert found["bucket"].remedy.startswith("the secret is wrong")
    assert found["clock"].state == "ok"  # the server says the time where it refuses, too
    assert {found[name].state for name in NAMES[4:]} == {"skipped"}


def test_who_may_only_read_is_told_so(s3: S3, monkeypatch: pytest.MonkeyPatch):
    s3.client().put_object(Bucket=BUCKET, Key="read-only/object", Body=b"x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
    found = look(reads=(f"s3://{BUCKET}/read-only",))
    assert (found["bucket"].state, found["write"].state) == ("ok", "fail")
    assert found["write"].found.startswith("s3:PutObject: AccessDenied")
    assert found["write"].remedy == "allow s3:PutObject"
    assert {found[name].state for name in ("read", "conditional put", "delete")} == {"skipped"}
    assert found[f"s3://{BUCKET}/read-only"] == Finding("ok", "can be listed and read")


def test_a_bucket_or_prefix_that_is_not_there_is_named(s3: S3):
    found = look("s3://nowhere/x", (f"s3://{BUCKET}/empty",))
    assert found["bucket"].state == "fail" and "NoSuchBucket" in found["bucket"].found
    assert found["bucket"].remedy == "make the bucket, or correct its name in params.yaml"
    assert found[f"s3://{BUCKET}/empty"].found == "nothing is there"


def test_without_credentials_nothing_is_asked(s3: S3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    found = look()
    assert found["credentials"].state == "fail" and "AWS_PROFILE" in found["credentials"].remedy
    assert {found[name].state for name in NAMES[1:]} == {"skipped"}


def test_credentials_that_boto3_s_error_would_show_are_not_sent(s3: S3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", f"{CANARY}\nmore")
    found = look()
    assert found["credentials"] == Finding("fail", "from env, with a space or a line break in them", "copy them again")
    assert {found[name].state for name in NAMES[1:]} == {"skipped"}


def test_a_profile_that_is_not_there_is_a_finding(s3: S3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    found = look()
    assert found["credentials"].state == "fail" and "nobody" in found["credentials"].found


def test_credentials_come_from_a_file_too(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    keys = f"[team]\naws_access_key_id = {READER}\naws_secret_access_key = {READER_SECRET}\n"
    (tmp_path / "credentials").write_text(keys)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert look()["credentials"] == Finding("ok", "from shared-credentials-file")


@pytest.mark.timeout(60)
def test_a_dead_and_a_silent_endpoint_end_in_bounded_time(s3: S3, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        for port, said in ((9, "Could not connect"), (silent.getsockname()[1], "Read timeout")):
            monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{port}")
            found = look()
            assert found["clock"] == Finding("skipped", "no answer")
            assert found["bucket"].state == "fail" and said in found["bucket"].found
            assert {found[name].state for name in NAMES[4:]} == {"skipped"}


def test_a_password_in_the_endpoint_is_not_shown(s3: S3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://user:{CANARY}@127.0.0.1:9")
    assert look()["transport"].found.startswith("http://127.0.0.1:9")


class Stub(BaseHTTPRequestHandler):
    """A server that does what it is asked, whatever the condition; its clock and its settings are the test's."""

    skew: ClassVar[float] = 0  # seconds
    settings: ClassVar[dict[str, tuple[int, str]]] = {}
    body: ClassVar[bytes] = doctor_s3.BYTES

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        query = self.path.partition("?")[2].rstrip("=")
        status, text = self.settings.get(query, (200, "<x/>" if "list-type" in query else ""))
        body = text.encode() or (self.body if self.command == "GET" else b"")
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_DELETE = do_HEAD = answer

    def date_time_string(self, timestamp: float | None = None) -> str:
        return formatdate(time.time() - self.skew, usegmt=True)

    def log_message(self, *parts: Any) -> None:
        pass


@pytest.fixture
def stub(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Stub]]:
    """The stub in the real server's place."""

    class Own(Stub):
        settings: ClassVar[dict[str, tuple[int, str]]] = {}

    server = ThreadingHTTPServer(("127.0.0.1", 0), Own)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{server.server_address[1]}")
    yield Own
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("skew", "state", "said"),
    [
        (30, "ok", "s ahead of the server's"),
        (-30, "ok", "s behind the server's"),
        (90, "warn", "s ahead of the server's"),
        (-90, "warn", "s behind the server's"),
        (400, "fail", "s ahead of the server's"),
    ],
)
def test_the_clock_is_compared_with_the_server_s(stub: type[Stub], skew: int, state: str, said: str):
    stub.skew = skew
    found = look()["clock"]
    assert (found.state, found.found[-len(said) :]) == (state, said)
    assert abs(int(found.found.split()[0]) - abs(skew)) <= 5
    assert ("set-ntp" in found.remedy) == (state != "ok")


def test_a_server_that_ignores_conditions_is_not_taken(stub: type[Stub]):
    found = look()["conditional put"]
    assert (found.state, found.found) == ("fail", "the server wrote against IfNoneMatch")
    assert "champions need conditional writes" in found.remedy


@pytest.mark.parametrize(
    ("statuses", "name", "remedy"),
    [
        ([501], "write", "this server can't do it: use another, as AWS's"),
        ([200, 412, 501], "conditional put", "this server can't do it: use another, as AWS's"),
        ([200, 412, 500], "conditional put", "try again; look at the server's log"),
    ],
)
def test_a_server_that_knows_no_conditions_is_not_taken(
    stub: type[Stub], monkeypatch: pytest.MonkeyPatch, statuses: list[int], name: str, remedy: str
):
    def refuse(self: Stub) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(statuses.pop(0))
        self.send_header("Content-Length", "0")
        self.end_headers()

    monkeypatch.setattr(stub, "do_PUT", refuse)
    found = look()[name]
    assert (found.state, found.remedy) == ("fail", remedy)


def test_a_server_that_gives_other_bytes_back_is_not_taken(stub: type[Stub]):
    stub.body = b"something else"
    assert look()["read"].state == "fail"


BLOCK = "".join(f"<{name}>true</{name}>" for name in doctor_s3.BLOCKS)


def error(word: str) -> str:
    return f"<Error><Code>{word}</Code><Message>words</Message></Error>"


@pytest.mark.parametrize(
    ("status", "text", "state", "said"),
    [
        (200, f"<PublicAccessBlockConfiguration>{BLOCK}</PublicAccessBlockConfiguration>", "ok", "on"),
        (
            200,
            f"<PublicAccessBlockConfiguration>{BLOCK.replace('true', 'false', 1)}</PublicAccessBlockConfiguration>",
            "warn",
            "off: BlockPublicAcls",
        ),
        (404, error("NoSuchPublicAccessBlockConfiguration"), "warn", f"off: {', '.join(doctor_s3.BLOCKS)}"),
        (403, error("AccessDenied"), "skipped", "these credentials may not ask"),
        (405, error("MethodNotAllowed"), "skipped", "the server doesn't say (MethodNotAllowed)"),
        (500, error("InternalError"), "fail", "s3:GetBucketPublicAccessBlock: InternalError: words"),
    ],
)
def test_the_public_access_block_is_on_off_or_not_told(stub: type[Stub], status: int, text: str, state: str, said: str):
    stub.settings["publicAccessBlock"] = (status, text)
    found = look()["public access block"]
    assert (found.state, found.found) == (state, said)
    assert ("put-public-access-block" in found.remedy) == (state == "warn")


def test_a_network_without_tls_is_a_warning(s3: S3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://192.0.2.1:1")
    assert doctor_s3.Place(STORAGE).transport().state == "warn"
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "https://192.0.2.1:1")
    assert doctor_s3.Place(STORAGE).transport() == Finding("ok", "https://192.0.2.1:1")


def test_the_command_looks_at_what_the_settings_name(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    values = tiny.params(tmp_path)
    values["datasets"]["tiny"]["dataset"]["root"] = url = f"s3://{BUCKET}/nothing"
    Path("params.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["doctor", "--json"]) == 1
    out = capsys.readouterr().out
    found = {one["name"]: one for one in json.loads(out)}
    assert found[f"S3: {url}"]["state"] == "fail" and "SignatureDoesNotMatch" in found[f"S3: {url}"]["found"]
    assert "S3: write" not in found and CANARY not in out


def test_the_place_of_all_that_is_kept_is_looked_at_first(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values = tiny.params(tmp_path)
    values["datasets"]["tiny"]["codec"]["path"] = f"s3://{BUCKET}/nothing"
    params = SimpleNamespace(
        datasets=Params.model_validate(values).datasets,
        deployment=SimpleNamespace(storage=SimpleNamespace(url=STORAGE)),
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "load_params", lambda: params)
    monkeypatch.setattr(doctor.Installation, "steps", lambda self: (Step(self.storage, lambda: Finding("ok", "")),))
    found = [name for name, _ in doctor.findings()]
    assert found == [STORAGE, *(f"S3: {name}" for name in NAMES), f"S3: s3://{BUCKET}/nothing"]
