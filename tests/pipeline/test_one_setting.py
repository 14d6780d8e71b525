"""`deployment: {storage: s3://bucket/prefix}` and nothing else, by the commands that a user gives."""

import json
import shutil
from pathlib import Path

import pytest

from dod_pipeline.s3 import Bucket

from .bucket import BUCKET, S3
from .project import Project


@pytest.mark.timeout(600)
def test_with_one_setting_two_clones_share_everything(
    own: Project, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")
    url = f"s3://{BUCKET}/{tmp_path.name}"
    own.write_params(own.params() | {"deployment": {"storage": {"url": url, "endpoint": s3.endpoint}}})
    own.commit("one setting")
    (own.root / "report" / "tiny.html").unlink()  # the run-time of a stage is all that it needs to be made again
    own.dod("run", "tiny")
    own.dvc("push")
    own.dod("champion", "tiny", "--set", "tiny-6")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", s3.endpoint)  # of this process
    kept = {item.name.partition("/")[0] for item in Bucket(url).objects()}
    assert kept == {"dvc", "history", "history-recent.txt", "champions"}
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3")

    other = own.clone(tmp_path / "other")
    shutil.rmtree(other.root / "history")
    other.dod("pull")
    assert "Nothing to do" in other.dod("run", "tiny").stdout
    assert other.outs() == own.outs() and (other.root / "samples" / "tiny" / "tiny-6" / "stage2").is_dir()
    histories = [json.loads(one.dod("history", "--format", "json").stdout) for one in (own, other)]
    assert histories[0] == histories[1] != []
    assert other.dod("champion", "tiny", "--format", "key").stdout == "tiny-6\n"
    assert own.run("git", "status", "--porcelain", ".dvc").stdout == ""
