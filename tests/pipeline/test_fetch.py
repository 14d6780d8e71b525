"""Data sets and autoencoders in S3, against a real server: the same results as from a folder, and clear errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from dod_models import artifact, stable_diffusion
from dod_models.config import place_of_copy
from dod_models.images import ImageFolder
from dod_pipeline import cli, fetch
from dod_pipeline.s3 import Bucket, Object

from . import project as tiny
from .bucket import BUCKET, S3, SECRET
from .project import Project
from .test_kill import Enter

Captured = pytest.CaptureFixture[str]
Fetched = Callable[[], list[str]]


def everything(name: str) -> bool:
    return True


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test in a folder of its own, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DOD_CACHE", raising=False)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Fetched:
    """Names of the objects that were downloaded since it was last asked."""
    names: list[str] = []
    download = Bucket.download_once

    def noted(self: Bucket, wanted: Object, *rest: Any) -> None:
        names.append(wanted.name)
        download(self, wanted, *rest)

    def take() -> list[str]:
        taken = sorted(names)
        names.clear()
        return taken

    monkeypatch.setattr(Bucket, "download_once", noted)
    return take


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Six small files, and an empty one."""
    folder = tmp_path / "files"
    (folder / "train").mkdir(parents=True)
    for name in "abcdef":
        (folder / "train" / name).write_bytes(name.encode() * 1000)
    (folder / "empty").touch()
    return folder


def same(copy: Path, files: Path) -> bool:
    """Whether the copy holds these files and no others."""
    mine = {p.relative_to(copy): p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name != fetch.JOURNAL}
    return mine == {p.relative_to(files): p.read_bytes() for p in files.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow autoencoder of Stable Diffusion's shape."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(**levels, block_out_channels=(4, 8, 8, 8), norm_num_groups=4).save_pretrained(folder)
    return folder


def make(root: str, path: str) -> dict[str, str]:
    """Run the stages of a data set on these images and this autoencoder; digests of the latents."""
    values = tiny.params(Path(root))
    settings = values["datasets"]["tiny"]
    settings["dataset"]["root"] = root
    settings["reference"] |= {"channels": 3, "epochs": 1, "num_images": 70}
    settings["codec"] = {"source": "stable-diffusion", "path": path, "image_size": tiny.SIZE, "channels": 3}
    Path("params.yaml").write_text(yaml.safe_dump(values))
    for stage in ("dataset", "reference", "codec", "latents"):
        assert cli.main(["stage", stage, "tiny"]) == 0
    return {p.name: artifact.sha256_file(p) for p in Path("latents", "tiny").glob("*.npy")}


def test_s3_gives_the_latents_that_a_folder_gives_in_any_number_of_processes(
    s3: S3, images: Path, vae: Path, tmp_path: Path, fetched: Fetched, monkeypatch: pytest.MonkeyPatch
):
    expected = make(str(images), str(vae))
    index = artifact.sha256_file(Path("dataset/tiny/train.jsonl"))
    assert fetched() == []
    for stage in ("dataset", "reference", "codec", "latents"):
        shutil.rmtree(stage)
    shutil.rmtree(".state")
    root, path = s3.upload(images, "whole/images"), s3.upload(vae, "whole/vae")
    assert make(root, path) == expected
    assert artifact.sha256_file(Path("dataset/tiny/train.jsonl")) == index
    assert artifact.read_manifest(Path("dataset/tiny"), schema="dataset/1")["about"]["root"] == root
    assert len(fetched()) == 180 + 2  # each object once, though four stages read them

    shutil.rmtree("latents")
    shutil.rmtree(".state/latents")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")  # the copy is complete: S3 is not asked again
    command = [sys.executable, "-m", "dod_pipeline.cli", "stage", "latents", "tiny"]
    done = subprocess.run(command, env=tiny.environment(DOD_PROCESSES="2"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "encode, process 1 of 2" in done.stderr
    assert {p.name: artifact.sha256_file(p) for p in Path("latents", "tiny").glob("*.npy")} == expected
    assert json.loads(Path("facts/latents/tiny.json").read_text())["count"] == 90


def test_only_what_lacks_or_changed_is_fetched(s3: S3, files: Path, fetched: Fetched):
    url = s3.upload(files, "changes")
    copy = fetch.fetch(url, everything, again=True)
    assert copy == Path(".state/s3", BUCKET, "changes") and same(copy, files)
    assert fetched() == ["empty", *(f"train/{name}" for name in "abcdef")]
    fetch.fetch(url, everything, again=True)
    assert fetched() == []
    (copy / "train" / "a").unlink()
    (copy / "train" / "b").write_text("cut off")
    (files / "train" / "c").write_bytes(b"C" * 1000)  # of the same size
    (files / "train" / "d").unlink()
    s3.client().delete_object(Bucket=BUCKET, Key="changes/train/d")
    s3.upload(files, "changes")
    fetch.fetch(url, everything, again=False)
    assert fetched() == []  # it was complete once
    fetch.fetch(url, everything, again=True)
    assert fetched() == ["train/a", "train/b", "train/c"]
    assert same(copy, files)


def test_what_a_stage_cannot_use_is_left_there(s3: S3, files: Path, fetched: Fetched):
    url = s3.upload(files, "choice")
    fetch.fetch(url, lambda name: name.endswith("/c"), again=True)
    assert fetched() == ["train/c"]
    with pytest.raises(FileNotFoundError, match=f"{url}: nothing there that a stage can use"):
        fetch.fetch(url, lambda name: False, again=True)


def test_two_settings_may_name_one_prefix(s3: S3, files: Path, fetched: Fetched):
    url = s3.upload(files, "shared")
    for name in ("train/c", "train/d"):
        copy = fetch.fetch(url, {name}.__contains__, again=True)
    assert (copy / "train" / "c").is_file() and (copy / "train" / "d").is_file()
    s3.client().delete_object(Bucket=BUCKET, Key="shared/train/d")
    fetch.fetch(url, lambda name: name != "train/e", again=True)
    assert (copy / "train" / "c").is_file() and not (copy / "train" / "d").is_file()


KILLED = """
import os, signal, sys
def die(event, details):
    if event == "os.rename" and str(details[0]).endswith("/.d.partial"):
        os.kill(os.getpid(), signal.SIGKILL)
from dod_pipeline import fetch
fetch.CONNECTIONS = 1
sys.addaudithook(die)
fetch.fetch(sys.argv[1], lambda name: True, again=True)
"""


def test_a_killed_fetch_goes_on(s3: S3, files: Path, fetched: Fetched):
    url = s3.upload(files, "killed")
    assert subprocess.run([sys.executable, "-c", KILLED, url]).returncode == -signal.SIGKILL
    copy = place_of_copy(url)
    with (copy / fetch.JOURNAL).open("a") as journal:
        journal.write('\n{"name": "tra')  # as a kill in the middle of a line leaves it
    fetch.fetch(url, everything, again=False)
    names = fetched()
    assert {"train/d", "train/e", "train/f"} <= set(names) and len(names) < 7
    assert not [p for p in copy.rglob("*.partial") if p.name != ".d.partial"]
    assert same(copy, files)


def test_an_upload_in_parts_is_checked_part_by_part(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "a.tar").write_bytes(os.urandom(6 * 2**20))
    url = s3.upload(folder, "parts")
    bucket = Bucket(url)
    (listed,) = bucket.objects()
    assert listed.etag.endswith("-2")
    bucket.download(listed, tmp_path / "copy" / "a.tar")
    assert same(tmp_path / "copy", folder)
    monkeypatch.setattr(bucket, "client", Damaging(bucket.client))
    monkeypatch.setattr("dod_pipeline.s3_attempts.TRIES", 1)
    with pytest.raises(ConnectionError, match=r"a.tar: arrived with 6291456 bytes and ETag \w+-2, listed are 6291456"):
        bucket.download(listed, tmp_path / "other" / "a.tar")
    assert list((tmp_path / "other").iterdir()) == []


class Damaging:
    """A client whose objects arrive with one bit changed, past all checks of boto3."""

    def __init__(self, client: Any) -> None:
        self.head_object, self.client = client.head_object, client

    def get_object(self, **options: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.get_object(**options)
        self.data = bytearray(answer["Body"].read())
        self.data[len(self.data) // 2] ^= 1
        return answer | {"Body": self}

    def iter_chunks(self, size: int) -> Any:
        return (bytes(self.data[i : i + size]) for i in range(0, len(self.data), size))


def test_a_damaged_copy_is_named_when_it_is_read(s3: S3, images: Path):
    url = s3.upload(images, "damaged")
    values = tiny.params(images)
    values["datasets"]["tiny"]["dataset"]["root"] = url
    Path("params.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["stage", "dataset", "tiny"]) == 0
    path = place_of_copy(url) / "train" / "bar" / "000.png"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"train/bar/000.png: changed since it was indexed; index it again"):
        ImageFolder(Path("dataset/tiny"), "train").read(0, size=16, channels=1)


@pytest.mark.parametrize("fault", ["wrong secret", "no bucket", "nobody listens", "no credentials"])
def test_what_s3_refuses_is_one_clear_line_without_secrets(
    s3: S3, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, fault: str
):
    url = "s3://nowhere/x" if fault == "no bucket" else f"s3://{BUCKET}/x"
    if fault == "wrong secret":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-secret")
    elif fault == "nobody listens":
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
        monkeypatch.setattr("dod_pipeline.s3.REQUESTS", 1)
        monkeypatch.setattr("dod_pipeline.s3_attempts.TRIES", 1)
    elif fault == "no credentials":
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    values = tiny.params(images)
    values["datasets"]["tiny"]["dataset"]["root"] = url
    Path("params.yaml").write_text(yaml.safe_dump(values))
    assert cli.main(["stage", "dataset", "tiny"]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"dod: {url}: ") and said.count("\n") == 1
    assert "AWS_ENDPOINT_URL_S3" in said
    assert SECRET not in said and "another-secret" not in said


def test_names_that_are_no_paths_are_refused(s3: S3, monkeypatch: pytest.MonkeyPatch):
    bucket = Bucket(f"s3://{BUCKET}/x")

    page = {"Contents": [{"Key": "x/../y", "Size": 1, "ETag": '"0"'}], "IsTruncated": False}
    monkeypatch.setattr(bucket.client, "list_objects_v2", lambda **options: page)
    with pytest.raises(ValueError, match=r"an object is called '\.\./y', which is no path; rename it"):
        list(bucket.objects())


def test_a_disk_that_is_too_small_is_named_before_anything_is_fetched(
    s3: S3, files: Path, monkeypatch: pytest.MonkeyPatch, fetched: Fetched
):
    url = s3.upload(files, "room")
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=5))
    with pytest.raises(OSError, match=r"6,000 bytes to fetch, 5 bytes are free; make room or set DOD_CACHE"):
        fetch.fetch(url, everything, again=True)
    assert fetched() == []


def test_without_a_copy_the_autoencoder_says_who_fetches_it():
    with pytest.raises(FileNotFoundError, match=r"s3://data/vae: no copy of it in .*; `dod stage` fetches it"):
        stable_diffusion.load("s3://data/vae")


def test_weights_to_begin_from_are_fetched_and_checked(own: Project, inside: Enter, s3: S3, capsys: Captured):
    inside(own)
    file = Path("train/tiny/step-6/ema-0.9.safetensors")
    url = f"{s3.upload(file.parent, 'warm')}/{file.name}"
    found = {}
    for path in (str(file), url):
        values = own.params()
        begin = {"path": path, "sha256": artifact.sha256_file(file)}
        values["experiments"]["tiny"]["train"] = tiny.TRAIN | {"steps": 2, "warm_start": begin}
        values["checkpoints"]["tiny-6"]["step"] = values["sweeps"]["tiny-6"]["step"] = 2
        own.write_params(values)
        kept = shutil.copy(file, own.root.parent)
        assert cli.main(["stage", "train", "tiny"]) == 0
        found[path] = artifact.sha256_file(Path("train/tiny/step-2", file.name))
        file.parent.mkdir()
        shutil.copy(kept, file)
    assert len(set(found.values())) == 1 and not Path(".state/s3/data/warm/manifest.json").exists()
    s3.client().put_object(Bucket=BUCKET, Key="warm/ema-0.9.safetensors", Body=b"other")
    shutil.rmtree(".state/train")
    assert cli.main(["stage", "train", "tiny"]) == 1
    assert "train.warm_start.sha256 says" in capsys.readouterr().err
