import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dod_models import artifact
from dod_models.artifact import DamagedError

from . import tiny

KIND: dict[str, Any] = {"schema": "thing/1", "config": "0" * 64}


def make(target, text: str = "one", **about):
    with artifact.writing(target, **KIND) as folder:
        (folder.path / "sub").mkdir()
        (folder.path / "sub" / "a.txt").write_text(text)
        (folder.path / "b.txt").write_text("b")
        folder.about = about
    return target


def test_the_manifest_states_schema_config_facts_and_every_file(tmp_path):
    manifest = artifact.verify(make(tmp_path / "thing", count=2), schema="thing/1")
    assert manifest["about"] == {"count": 2}
    assert (manifest["schema"], manifest["config"]) == ("thing/1", "0" * 64)
    sha_of_b = "3e23e8160039594a33894f6564e1b1348bbd7a0088d42c4acb73eeaed59c009d"
    assert manifest["files"]["b.txt"] == {"bytes": 1, "sha256": sha_of_b}
    assert set(manifest["files"]) == {"b.txt", "sub/a.txt"}


def test_equal_runs_make_folders_equal_to_the_bit(tmp_path):
    assert tiny.digests(make(tmp_path / "a")) == tiny.digests(make(tmp_path / "b"))
    assert tiny.digests(make(tmp_path / "a")) != tiny.digests(make(tmp_path / "c", "two"))


def test_an_interrupted_run_leaves_the_old_folder_whole(tmp_path):
    target = make(tmp_path / "thing")
    before = tiny.digests(target)
    with pytest.raises(KeyboardInterrupt), artifact.writing(target, **KIND) as folder:
        (folder.path / "half.txt").write_text("half")
        raise KeyboardInterrupt
    assert tiny.digests(target) == before
    make(target, "two")  # and the next run begins anew
    assert set(artifact.verify(target, schema="thing/1")["files"]) == {"b.txt", "sub/a.txt"}
    assert (target / "sub" / "a.txt").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_a_first_run_that_is_interrupted_leaves_no_target(tmp_path):
    with pytest.raises(OSError, match="disk"), artifact.writing(tmp_path / "thing", **KIND):
        raise OSError("disk full")
    with pytest.raises(DamagedError, match=r"thing: no manifest\.json, so this is not a finished output"):
        artifact.verify(tmp_path / "thing", schema="thing/1")


def test_a_published_folder_is_a_second_name_for_the_same_files(tmp_path):
    work = make(tmp_path / "state" / "key" / "out")
    target = make(tmp_path / "thing", "older")
    artifact.publish(work, target)
    artifact.verify(target, schema="thing/1")
    assert (target / "sub" / "a.txt").samefile(work / "sub" / "a.txt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state", "thing"]


def test_finished_work_is_forgotten_and_work_in_progress_is_not(tmp_path):
    for key in ("done", "kept"):
        make(tmp_path / key / "out")
    (tmp_path / "going" / "out").mkdir(parents=True)
    artifact.forget_finished(tmp_path, but="kept")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["going", "kept"]


def test_what_a_killed_process_left_half_written_is_no_part_of_an_output(tmp_path):
    work = make(tmp_path / "work")
    (work / f".{artifact.MANIFEST}.partial").write_text('{"half')
    (work / ".step-1.partial").mkdir()
    artifact.describe(work, schema="thing/1", config="", about={})
    assert set(artifact.verify(work, schema="thing/1")["files"]) == {"b.txt", "sub/a.txt"}
    assert sorted(p.name for p in work.iterdir()) == ["b.txt", artifact.MANIFEST, "sub"]


def test_a_kill_between_the_two_renames_is_survived(tmp_path):
    """The old folder stands aside, the new one isn't there yet: the next run puts all in order."""
    make(tmp_path / "thing").rename(tmp_path / ".thing.old.partial")
    make(tmp_path / "thing", "two")
    assert (tmp_path / "thing" / "sub" / "a.txt").read_text() == "two"
    assert not (tmp_path / ".thing.old.partial").exists()


@pytest.mark.parametrize("name", ["b.txt", "sub/a.txt"])
def test_a_changed_file_is_named(tmp_path, name):
    target = make(tmp_path / "thing")
    (target / name).write_text("x")
    with pytest.raises(DamagedError, match=f"thing/{name}: sha256 is .*, its manifest says .*dvc checkout --force"):
        artifact.verify(target, schema="thing/1")


def test_a_missing_file_is_named_and_the_others_can_still_be_checked(tmp_path):
    target = make(tmp_path / "thing")
    (target / "b.txt").unlink()
    with pytest.raises(DamagedError, match=r"thing/b.txt: missing"):
        artifact.verify(target, schema="thing/1")
    artifact.verify(target, schema="thing/1", only="sub/a.txt")
    with pytest.raises(DamagedError, match=r"no file c.txt; it has b.txt, sub/a.txt"):
        artifact.verify(target, schema="thing/1", only="c.txt")


def test_another_schema_is_refused(tmp_path):
    with pytest.raises(DamagedError, match="schema is 'thing/1', expected 'thing/2'"):
        artifact.verify(make(tmp_path / "thing"), schema="thing/2")


@pytest.mark.parametrize("name", ["../secret", "sub/../../secret", "/etc/hostname"])
def test_a_manifest_that_names_a_file_outside_of_its_folder_is_refused(tmp_path, name):
    folder = make(tmp_path / "out")
    manifest = artifact.read_json(folder / artifact.MANIFEST)
    manifest["files"][name] = {"bytes": 1, "sha256": "0"}
    artifact.write_json(folder / artifact.MANIFEST, manifest)
    with pytest.raises(DamagedError, match="a file outside of its folder"):
        artifact.read_manifest(folder, schema=manifest["schema"])


def test_a_manifest_that_is_not_json_is_named(tmp_path):
    target = make(tmp_path / "thing")
    (target / "manifest.json").write_text("{")
    with pytest.raises(DamagedError, match=r"thing/manifest.json: not JSON"):
        artifact.verify(target, schema="thing/1")


HOLD = """
import sys, pathlib
from dod_models import artifact
with artifact.writing(pathlib.Path(sys.argv[1]), schema="thing/1", config=""):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_processes_cannot_write_one_output_and_a_lock_dies_with_its_process(tmp_path):
    target = tmp_path / "thing"
    command = [sys.executable, "-c", HOLD, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BlockingIOError, match=r"thing.partial: another process is writing here"):
            make(target)
        other.kill()
    make(target)
    artifact.verify(target, schema="thing/1")


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "sub" / "facts.json"
    artifact.write_json(path, {"b": 1, "a": [1.5]})
    text = path.read_text()
    assert json.loads(text) == {"a": [1.5], "b": 1}
    assert text.index('"a"') < text.index('"b"')
    with pytest.raises(ValueError, match="JSON compliant"):
        artifact.write_json(path, {"fid": math.nan})
    assert path.read_text() == text


def test_missing_and_broken_json_are_named_with_a_remedy(tmp_path):
    path = tmp_path / "facts.json"
    with pytest.raises(FileNotFoundError, match=f"{path} does not exist; run the stage that makes it"):
        artifact.read_json(path)
    path.write_text("[1,")
    with pytest.raises(DamagedError, match=f"{path}: not JSON"):
        artifact.read_json(path)


def test_the_disk_has_everything_before_a_folder_takes_its_name(tmp_path, monkeypatch):
    """What a loss of power would leave: each file and folder is flushed first, the manifest last; then the new name."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        events.append(f"{Path(source).name} -> {Path(target).name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", renamed)
    with artifact.writing(tmp_path / "folder", schema="test/1", config="") as output:
        (output.path / "inner").mkdir()
        (output.path / "inner" / "file").write_text("x")
    manifest = [".manifest.json.partial", ".manifest.json.partial -> manifest.json", ".folder.partial"]
    assert sorted(events[:3]) == [".folder.partial", "file", "inner"]
    assert events[3:] == [*manifest, ".folder.partial -> folder", tmp_path.name]
