"""Entries of retrains in params.yaml: what is added, and that nothing else changes."""

import difflib
import shutil
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from dod_pipeline import candidates, ledger, retrain, stages
from dod_pipeline.candidates import Candidate
from dod_pipeline.champion import Champion, Event
from dod_pipeline.config import load_params

from .project import SOURCE

EVENT = Event(
    time=datetime(2026, 1, 1, tzinfo=UTC),
    event="set",
    checkpoint="mnist-1500",
    path="train/mnist/step-1500/ema-0.999.safetensors",
    sha256="a" * 64,
    codec="c" * 64,
    data=None,
    verdict=None,
    why="first",
    commit=None,
)
KNOWN = Champion(experiment="mnist", champion=EVENT, history=(EVENT,))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the repository's params.yaml in the current folder."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(SOURCE / "params.yaml", tmp_path))


def added(before: str, after: str) -> list[str]:
    """The new lines; AssertionError if an old one is gone or has moved."""
    changes = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    assert not [line for line in changes if line.startswith("- ")]
    return [line[2:] for line in changes if line.startswith("+ ")]


def test_a_candidate_is_its_experiment_from_the_champion_s_weights_and_every_other_byte_stays(file: Path):
    before = file.read_text()
    file.write_text(
        before.replace(
            "    evaluation: {num_samples: 1500}\n",
            "    evaluation: {num_samples: 1500}\n    retrain: {cron: 0 3 * * 0, steps: 500, learning_rate: 0.0005}\n",
            1,
        )
    )
    before = file.read_text()
    assert candidates.add("mnist", KNOWN) == Candidate("mnist-r1", "mnist-r1-500")
    lines = added(before, file.read_text())
    assert lines[0] == "  mnist-r1:" and lines[-1].startswith("  mnist-r1-500: {experiment: mnist-r1, data: mnist, ")
    params = load_params()
    names = list(params.experiments)
    assert names[:3] == ["mnist", "mnist-r1", "dod-s"]  # below it: `dvc repro` makes the weights first
    base, new = (params.experiments[name].model_dump(exclude_unset=True) for name in names[:2])
    assert base.pop("retrain") and base.pop("gate") and not new.keys() & {"retrain", "gate"}
    changed = {"steps": 500, "save_every": 500, "learning_rate": 0.0005, "seed": 1}
    warm = {"path": EVENT.path, "sha256": EVENT.sha256}
    assert new == base | {"train": base["train"] | changed | {"warm_start": warm}}
    assert stages.resolve(params, "train", "mnist-r1").config.model_dump()["warm_start"] == warm


def test_comments_stay_where_they_are_and_the_next_one_comes_below(file: Path):
    candidates.add("mnist", KNOWN)
    before = file.read_text()
    assert candidates.add("mnist", KNOWN) == Candidate("mnist-r2", "mnist-r2-1500")
    added(before, file.read_text())
    text = file.read_text()
    assert (
        text.index("  mnist-r1:")
        < text.index("  mnist-r2:")
        < text.index("  # The paper's three")
        < text.index("dod-s:")
    )
    assert text.index("  mnist-1500:") < text.index("  mnist-r1-1500:") < text.index("  mnist-r2-1500:")
    assert load_params().experiments["mnist-r2"].train["seed"] == 2


@pytest.mark.parametrize("experiment", ["dod-s", "dod-b", "dod-xl"])
def test_the_last_entries_of_a_mapping_have_a_place_below_them(file: Path, experiment: str):
    before = file.read_text()
    candidates.add(experiment, KNOWN)
    assert "# " not in "".join(added(before, file.read_text()))


def test_several_at_once_get_a_number_each(file: Path):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: candidates.add("mnist", KNOWN), range(8)))
    assert {one.experiment for one in found} == {f"mnist-r{n}" for n in range(1, 9)} < load_params().experiments.keys()


def test_settings_that_do_not_hold_are_refused_and_nothing_is_written(file: Path):
    text = file.read_text().replace(
        "    stage1: {guidance: 1.0}\n", "    stage1: {guidance: 1.0}\n    retrain: {steps: 7}\n", 1
    )
    file.write_text(text)
    with pytest.raises(ValueError, match="save_every 7 is not a multiple of log_every 50"):
        candidates.add("mnist", KNOWN)
    assert file.read_text() == text


@pytest.mark.parametrize(
    "text, said",
    [("m: {a: {x: 1}}\n", "stands in braces"), ("o: {b: &b {x: 1}}\nm:\n  a: *b\n", "take its anchors away")],
)
def test_yaml_without_a_place_for_a_line_is_refused(text: str, said: str):
    with pytest.raises(ValueError, match=said):
        candidates.inserted(text, "m", "a", {"c": {"d": 1}})


@pytest.mark.parametrize(
    "text",
    [
        "m:\n  a: 1",
        "m:\n  a: 1\n# end\n",
        "m:\n    a:\n    - 1\n    - {x: 2,\n       y: 3}\n\nn: 1\n",
        "m:\n  a: |\n    text\n\n  b: 2\n",
        'm:\n  a: "x\n    y"\n  b:\n',
    ],
)
def test_any_block_of_yaml_takes_an_entry(text: str):
    found = candidates.inserted(text, "m", "a", {"c": {"d": 1}})
    assert list(yaml.safe_load(found)["m"])[:2] == ["a", "c"]


def test_only_the_newest_retrain_can_be_pending_and_only_undecided(file: Path):
    assert candidates.pending(load_params(), "mnist", KNOWN) is None
    candidates.add("mnist", KNOWN)
    two = candidates.add("mnist", KNOWN)
    assert candidates.pending(load_params(), "mnist", KNOWN) == two
    kept = EVENT.model_copy(update={"event": "kept", "checkpoint": two.checkpoint})
    over = Champion(experiment="mnist", champion=EVENT, history=(EVENT, kept))
    assert candidates.pending(load_params(), "mnist", over) is None
    file.write_text((SOURCE / "params.yaml").read_text())  # somebody has deleted the entries
    assert candidates.add("mnist", over).experiment == "mnist-r3"


def test_where_runs_commit_a_candidate_is_committed_before_it_runs(file: Path, monkeypatch: pytest.MonkeyPatch):
    for role in ("AUTHOR", "COMMITTER"):
        for what in ("NAME", "EMAIL"):
            monkeypatch.setenv(f"GIT_{role}_{what}", "tiny@example.org")
    for words in (("init", "-q"), ("add", "params.yaml"), ("commit", "-q", "-m", "first")):
        assert ledger.git(*words).returncode == 0
    candidates.add("mnist", KNOWN)
    params = load_params()
    retrain.commit(params, ["params.yaml", "listings"], "Candidate mnist-r1-1500")
    assert str(ledger.current_commit()).endswith("-dirty")  # it was not asked for
    versioning = params.deployment.versioning.model_copy(update={"git_commit": True})
    deployment = params.deployment.model_copy(update={"versioning": versioning})
    asked = params.model_copy(update={"deployment": deployment})
    retrain.commit(asked, ["params.yaml", "listings"], "Candidate mnist-r1-1500")
    assert not str(ledger.current_commit()).endswith("-dirty")
    assert ledger.git("log", "-1", "--format=%s").stdout == "Candidate mnist-r1-1500\n"
