"""The pointer to the checkpoint in use: its history, its weights, and several that decide at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dod_models import artifact
from dod_models.artifact import DamagedError
from dod_pipeline import champion, cli
from dod_pipeline.champion import Champion, Holder
from dod_pipeline.config import load_params
from dod_pipeline.s3 import Bucket

from . import project as tiny
from .bucket import BUCKET, S3
from .processes import wait_for
from .project import Project, environment
from .test_kill import Enter

CODEC = "c" * 64


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def weights(name: str) -> Holder:
    """A checkpoint whose file has its name for content."""
    path = Path("train", name, "step-2", "ema-0.9.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
    return Holder(f"{name}-2", str(path), artifact.sha256_file(path), CODEC)


def story() -> Champion:
    """Set a, promote b, keep c out, promote d."""
    champion.decide("e", "set", weights("a"), why="first")
    champion.decide("e", "promoted", weights("b"), why="PASS", data="1" * 64, verdict="v1")
    champion.decide("e", "kept", weights("c"), why="FAIL", data="2" * 64, verdict="v2")
    return champion.decide("e", "promoted", weights("d"), why="PASS", verdict="v3")


def test_a_promotion_moves_the_champion_and_a_refusal_does_not():
    found = story()
    assert found == champion.read("e") and found.champion.checkpoint == "d-2"
    assert [event.event for event in found.history] == ["set", "promoted", "kept", "promoted"]
    assert found.decided == {"a-2", "b-2", "c-2", "d-2"} and found.data == "2" * 64
    champion.decide("other", "set", weights("a"), why="another experiment's")
    assert champion.read("e") == found


def test_each_roll_back_goes_one_champion_further():
    story()
    assert champion.roll_back("e", why="worse in use").champion.checkpoint == "b-2"
    assert champion.roll_back("e", why="worse, too").champion.checkpoint == "a-2"
    with pytest.raises(ValueError, match=r"champions/e\.json: a-2 is the first champion.*--set CHECKPOINT"):
        champion.roll_back("e", why="")
    assert champion.decide("e", "promoted", weights("f"), why="PASS").champion.checkpoint == "f-2"
    found = champion.roll_back("e", why="not that one either")
    assert found.champion.checkpoint == "a-2" and len(found.history) == 8


def test_weights_that_were_made_anew_are_not_gone_back_to():
    story()
    Path("train", "b", "step-2", "ema-0.9.safetensors").write_text("other")
    with pytest.raises(ValueError, match=r"train/b/step-2/ema-0\.9\.safetensors: has sha256 .*`dvc checkout --force "):
        champion.roll_back("e", why="")
    Path("train", "b", "step-2", "ema-0.9.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing, and b-2 was put in use"):
        champion.roll_back("e", why="")
    assert champion.read("e").champion.checkpoint == "d-2"


def test_without_a_champion_the_error_says_how_to_begin():
    with pytest.raises(
        ValueError, match=r"champions/e\.json: e has no champion yet; `dod champion e --set CHECKPOINT`"
    ):
        champion.read("e")
    assert champion.find("e") is None


def test_no_decision_of_several_processes_at_once_is_lost():
    code = """
import sys
from dod_pipeline import champion
for index in range(10):
    one = champion.Holder(f"{sys.argv[1]}-{index}", "p", "0" * 64, "c" * 64)
    champion.decide("e", "promoted", one, why="PASS")
"""
    command = [sys.executable, "-c", code]
    running = [subprocess.Popen([*command, str(number)], env=environment()) for number in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    found = champion.read("e")
    assert {event.checkpoint for event in found.history} == {f"{n}-{i}" for n in range(4) for i in range(10)}
    assert len(found.history) == 40 and found.champion == found.history[-1]
    assert not list(Path("champions").glob(".*"))


def test_a_finished_checkpoint_is_put_in_use(shared: Project, inside: Enter, capsys: pytest.CaptureFixture[str]):
    inside(shared)
    before = shared.dvc("status", "--json").stdout
    assert cli.main(["champion", "tiny", "--set", "tiny-6", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)["champion"]
    assert found["path"] == "train/tiny/step-6/ema-0.9.safetensors"
    assert found["sha256"] == artifact.sha256_file(shared.root / found["path"])
    assert found["codec"] == artifact.sha256_file(shared.root / "codec" / "tiny" / champion.VAE)
    assert found["data"] == artifact.read_json(Path("listings", "tiny.json"))["sha256"]
    assert shared.dvc("status", "--json").stdout == before
    assert cli.main(["champion", "tiny"]) == 0
    assert "in use: tiny-6, train/tiny/step-6" in capsys.readouterr().out
    assert cli.main(["champion", "tony", "--set", "tiny-6"]) == 1
    assert "'tony' is not in params.yaml; it has tiny" in capsys.readouterr().err


def test_damaged_weights_and_another_model_are_not_put_in_use(own: Project, inside: Enter):
    inside(own)
    values = own.params()
    values["experiments"]["wide"] = json.loads(json.dumps(values["experiments"]["tiny"]))
    values["experiments"]["wide"]["train"]["model"]["width"] = 32
    values["checkpoints"]["wide-6"] = {"experiment": "wide", "data": "tiny", "step": 6}
    own.write_params(values)
    with pytest.raises(ValueError, match=r"wide-6: its experiment wide has another data set or another train\.model"):
        champion.check_fits(load_params(), "tiny", "wide-6")
    file = Path("train", "tiny", "step-6", "ema-0.9.safetensors")
    data = file.read_bytes()
    file.unlink()  # it may be a link into DVC's cache
    file.write_bytes(data[:-1] + b"x")
    with pytest.raises(DamagedError, match="the file was changed or damaged"):
        champion.holder(load_params(), "tiny-6")


@pytest.fixture
def shared_place(s3: S3, tmp_path: Path) -> Bucket:
    """One place in S3, which the params.yaml of both `here` and `there` name; `here` is the current folder."""
    bucket = Bucket(f"s3://{BUCKET}/{tmp_path.parent.name}/{tmp_path.name}")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        values = tiny.params(Path("/")) | {"deployment": {"storage": bucket.url}}
        (tmp_path / name / "params.yaml").write_text(yaml.safe_dump(values))
    os.chdir(tmp_path / "here")
    return bucket


def test_two_machines_have_one_champion(shared_place: Bucket, tmp_path: Path):
    written = champion.decide("e", "set", weights("a"), why="first")
    assert Champion.load("champions/e.json") == written  # the copy that git keeps
    os.chdir(tmp_path / "there")
    assert champion.read("e") == written and not Path("champions").exists()
    there = champion.decide("e", "promoted", weights("b"), why="PASS")
    os.chdir(tmp_path / "here")
    assert champion.read("e") == there and Champion.load("champions/e.json") == written
    assert champion.roll_back("e", why="worse").champion.checkpoint == "a-2"
    assert Champion.load("champions/e.json") == champion.read("e")
    assert [event.event for event in champion.read("e").history] == ["set", "promoted", "rolled back"]
    assert [item.name for item in shared_place.objects()] == ["champions/e.json"]


def test_the_champion_that_stood_in_git_alone_is_where_the_place_begins(shared_place: Bucket):
    before = Path("params.yaml").read_text()
    Path("params.yaml").unlink()
    alone = champion.decide("e", "set", weights("a"), why="before there was S3")
    Path("params.yaml").write_text(before)
    assert champion.read("e") == alone
    found = champion.decide("e", "promoted", weights("b"), why="PASS")
    assert found.history[0] == alone.champion and len(found.history) == 2
    Path("champions/e.json").unlink()
    assert champion.read("e") == found


def test_no_decision_of_several_machines_at_once_is_lost(shared_place: Bucket, tmp_path: Path):
    code = """
import sys, time
from pathlib import Path
from dod_pipeline import champion
champion.read("e")
Path("..", f"ready-{sys.argv[1]}").touch()
while not Path("..", "go").exists():
    time.sleep(0.001)
for index in range(5):
    one = champion.Holder(f"{sys.argv[1]}-{index}", "p", "0" * 64, "c" * 64)
    champion.decide("e", "promoted", one, why="PASS")
"""
    champion.decide("e", "set", weights("a"), why="first")
    command = [sys.executable, "-c", code]
    machines = [tmp_path / name for name in ("here", "here", "there", "there")]
    running = [
        subprocess.Popen([*command, str(number)], env=environment(), cwd=machine)
        for number, machine in enumerate(machines)
    ]
    assert wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 4, 120)
    (tmp_path / "go").touch()
    assert [process.wait() for process in running] == [0] * 4
    found = champion.read("e")
    assert {event.checkpoint for event in found.history[1:]} == {f"{n}-{i}" for n in range(4) for i in range(5)}
    assert len(found.history) == 21 and found.champion == found.history[-1]


def test_a_place_out_of_reach_is_named_and_nothing_is_decided(shared_place: Bucket, monkeypatch: pytest.MonkeyPatch):
    champion.decide("e", "set", weights("a"), why="first")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    before = Path("champions/e.json").read_bytes()
    with pytest.raises(ConnectionError, match=f"{shared_place.url}/champions/e.json: .*credentials"):
        champion.read("e")
    with pytest.raises(ConnectionError, match=shared_place.url):
        champion.decide("e", "promoted", weights("b"), why="PASS")
    assert Path("champions/e.json").read_bytes() == before


def test_an_object_that_is_no_champion_is_named(shared_place: Bucket):
    shared_place.write("champions/e.json", b"{")
    with pytest.raises(ValueError, match=f"{shared_place.url}/champions/e.json: not JSON .* put an older version"):
        champion.read("e")
