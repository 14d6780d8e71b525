"""What a killed dvc, a merge or a careless hand leaves behind: put right, or named with its remedy."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from dod_pipeline import dvc_repo

from .project import STAGES, Project
from .test_blows import cached, content, history

ENTRIES: dict[str, Any] = {
    f"{name}@tiny": {
        "cmd": f"dod stage {name} tiny",
        "deps": [{"path": "dod_models/artifact.py", "hash": "md5", "md5": 8 * "0123", "size": 5}],
        "outs": [{"path": f"{name}/tiny", "hash": "md5", "md5": 8 * "4567", "size": 70, "nfiles": 4}],
    }
    for name in ("dataset", "codec", "train", "metrics")
}


def folder(root: Path, copied: str, stage: str, present: str) -> Path:
    """A folder in which dvc was killed while it made the stage; returns its dvc.lock."""
    copies = root / dvc_repo.COPIES
    copies.mkdir(parents=True, exist_ok=True)
    (copies / f"{stage}.yaml").write_text(copied)
    (root / "dvc.lock").write_text(present)
    return root / "dvc.lock"


def text_of(entries: dict[str, Any]) -> str:
    return yaml.safe_dump({"schema": "2.0", "stages": entries}, sort_keys=False)


@pytest.mark.parametrize("stage", ["dataset@tiny", "train@tiny", "metrics@tiny"])
def test_whatever_part_of_dvc_lock_was_written_no_other_stage_is_lost(tmp_path: Path, stage: str):
    before = text_of(ENTRIES)
    outs = [{"path": "new", "hash": "md5", "md5": 8 * "89ab", "size": 1}]
    after = text_of(ENTRIES | {stage: ENTRIES[stage] | {"outs": outs}})
    others = {name: entry for name, entry in ENTRIES.items() if name != stage}
    for end in range(0, len(after) + 1, 3):
        lock = folder(tmp_path, before, stage, after[:end])
        dvc_repo.mend(tmp_path)
        found = yaml.safe_load(lock.read_text())["stages"]
        assert {name: entry for name, entry in found.items() if name != stage} == others, after[:end]
        assert stage not in found or "cmd" in found[stage]  # or dvc would refuse the file
        assert not list((tmp_path / dvc_repo.COPIES).iterdir())
    lock = folder(tmp_path, before, stage, after)
    dvc_repo.mend(tmp_path)
    assert lock.read_text() == after


def test_a_dvc_lock_that_was_changed_on_purpose_stays(tmp_path: Path):
    older = {name: entry | {"cmd": f"dod stage {name} --older"} for name, entry in list(ENTRIES.items())[:2]}
    lock = folder(tmp_path, text_of(ENTRIES), "train@tiny", text_of(older))
    dvc_repo.mend(tmp_path)
    assert lock.read_text() == text_of(older)


def test_the_dvc_lock_of_a_commit_stays(tmp_path: Path):
    """After `git checkout` of an older one, which may be a part of what was there before."""
    lock = folder(tmp_path, text_of(ENTRIES), "train@tiny", text_of(dict(list(ENTRIES.items())[:2])))
    project = Project(tmp_path)
    project.run("git", "init", "--quiet")
    project.commit()
    before = lock.read_text()
    dvc_repo.mend(tmp_path)
    assert lock.read_text() == before


def test_a_dvc_lock_with_conflict_markers_is_named_and_stays(tmp_path: Path):
    marked = f"<<<<<<< HEAD\n{text_of(ENTRIES)}=======\n>>>>>>> other\n"
    lock = folder(tmp_path, text_of(ENTRIES), "train@tiny", marked)
    with pytest.raises(ValueError, match=r"dvc\.lock, line 1: git left a conflict here"):
        dvc_repo.mend(tmp_path)
    assert lock.read_text() == marked


def locks(number: int) -> str:
    return json.dumps({"write": {"train/tiny": {"pid": number, "cmd": "dvc repro"}}, "read": {}})


@pytest.mark.parametrize(
    "text, kept",
    [
        ("", False),
        ('{"write": {"train/ti', False),
        ('{"write": {}}', True),
        (locks(2**30), False),  # larger than any pid
        (locks(1), False),  # the number was given again, to a process that is no dvc
    ],
    ids=["empty", "cut off", "nobody", "no such process", "another process"],
)
def test_a_table_of_locks_that_nobody_holds_goes(tmp_path: Path, text: str, kept: bool):
    table = tmp_path / ".dvc" / "tmp" / "rwlock"
    table.parent.mkdir(parents=True)
    table.write_text(text)
    dvc_repo.mend(tmp_path)
    assert table.exists() == kept


def test_a_lock_that_a_running_dvc_holds_stays(own: Project):
    table = own.root / ".dvc" / "tmp" / "rwlock"
    sleeper = own.start("sh", "-c", "kill -STOP $$", "dvc")
    table.write_text(locks(sleeper.pid))
    dvc_repo.mend(own.root)
    assert table.exists()
    sleeper.kill()
    sleeper.communicate()


def test_conflict_markers_in_dvc_lock_are_named_with_a_remedy_that_works(own: Project):
    lock = own.root / "dvc.lock"
    mine = lock.read_text()
    own.run("git", "checkout", "--quiet", "-b", "other")
    lock.write_text(mine.replace("cmd: exec dod stage train tiny", "cmd: exec dod stage train other"))
    own.commit("other")
    own.run("git", "checkout", "--quiet", "main")
    lock.write_text(mine.replace("cmd: exec dod stage train tiny", "cmd: exec dod stage train main"))
    own.commit("main")
    own.run("git", "merge", "other", status=1)
    marked = lock.read_text()
    line = marked.splitlines().index("<<<<<<< HEAD") + 1
    for command in (["run", "tiny"], ["status"]):
        said = own.dod(*command, status=1).stderr
        assert re.search(rf"^dod: .*dvc.lock, line {line}: git left a conflict here\. .*`git checkout --ours dvc", said)
        assert len(said.splitlines()) == 1 and lock.read_text() == marked
    assert "tiny-6" in own.dod("history").stdout
    own.run("git", "checkout", "--ours", "dvc.lock")
    lock.write_text(lock.read_text().replace("cmd: exec dod stage train main", "cmd: exec dod stage train tiny"))
    own.dod("run", "tiny")
    own.dvc("status", "-q")


@pytest.mark.parametrize("gone", [False, True], ids=["output there", "output gone"])
def test_an_object_deleted_from_the_cache_is_made_again(own: Project, built: Project, gone: bool):
    samples = {path: md5 for path, md5 in own.outs().items() if path.startswith("samples/tiny/tiny-6/stage")}
    for path, md5 in samples.items():
        cached(own, md5).unlink()
        if gone:
            shutil.rmtree(own.root / path)
    own.dod("run", "tiny")
    assert own.outs() == built.outs() and content(own) == content(built)
    assert len(samples) == 2 and all(cached(own, md5).exists() for md5 in samples.values())
    assert history(built).items() <= history(own).items()
    own.dvc("status", "-q", *STAGES)


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "broken", "unknown"])
def test_a_wrong_dagster_home_is_named_and_nothing_changes(own: Project, tmp_path: Path, kind: str):
    home = tmp_path / "home"
    if kind == "file":
        home.write_text("")
    elif kind != "missing":
        home.mkdir()
    if kind in ("broken", "unknown"):
        (home / "dagster.yaml").write_text("storage: [" if kind == "broken" else "stroage: {}")
    before = own.files()
    said = own.run("dod", "run", "tiny", status=1, DAGSTER_HOME=str(home)).stderr.splitlines()
    assert said[0].startswith(f"dod: DAGSTER_HOME={home}: ") and "Traceback" not in said, said
    assert len(said) == 1, said
    assert own.files() == before
