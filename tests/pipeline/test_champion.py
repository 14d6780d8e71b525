"""The pointer to the checkpoint in use: its history, its weights, and several that decide at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dod_models import artifact
from dod_models.artifact import DamagedError
from dod_pipeline import champion, cli
from dod_pipeline.champion import Champion, Holder
from dod_pipeline.config import load_params

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
