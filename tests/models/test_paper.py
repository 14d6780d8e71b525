"""docs/paper.md speaks of code that exists, and of defaults that hold."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from dod_models import fitv2

TEXT = (Path(__file__).parents[2] / "docs" / "paper.md").read_text()
NAME = re.compile(r"`(\w+)\.py: ([\w.]+)`")


def rows(heading: str) -> list[list[str]]:
    """Cells of the table below a heading, without its head."""
    section = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


STATED, OPEN = rows("What the paper states"), rows("What the paper leaves open")


def find(module: str, path: str) -> Any:
    """What a name stands for; of a config's field, its default."""
    found: Any = importlib.import_module(f"dod_models.{module}")
    for part in path.split("."):
        is_field = isinstance(found, type) and issubclass(found, BaseModel) and part in found.model_fields
        found = found.model_fields[part].default if is_field else getattr(found, part)
    return found


@pytest.mark.parametrize("module, path", sorted(set(NAME.findall(TEXT))))
def test_every_name_exists(module: str, path: str):
    find(module, path)


def test_every_row_says_where_and_every_equation_has_one():
    assert [row for row in STATED if not NAME.search(row[2]) and "`params.yaml`" not in row[2]] == []
    equations = {int(number) for row in STATED for number in re.findall(r"eq\. (\d+)", row[0])}
    assert equations == set(range(1, 12))


@pytest.mark.parametrize("row", OPEN, ids=[row[0] for row in OPEN])
def test_an_open_choice_has_an_option_and_the_default_given(row: list[str]):
    _, option, default, reason = row
    (name,) = NAME.findall(option)
    assert default == f"`{find(*name)}`"
    assert reason


def test_fitv2_s_names_are_those_of_the_code():
    found = {ours.strip("`"): tuple(re.findall(r"`([^`]+)`", theirs)) for ours, theirs in rows("FiTv2's weights")}
    wide = {"modulation": (*fitv2.MODULATION, fitv2.LOW_RANK)}
    assert found == fitv2.LAYERS | fitv2.BLOCK | fitv2.TABLE | wide
