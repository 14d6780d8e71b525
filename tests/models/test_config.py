import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from dod_models.config import Frozen, local_copy, place_of_copy, this_process


class Inner(Frozen):
    width: int = Field(4, ge=1)


class Outer(Frozen):
    name: str
    scale: float = 1.0
    inner: Inner = Inner()


def test_every_fault_is_named_with_its_place_key_and_value():
    with pytest.raises(ValueError) as caught:
        Outer.parse({"inner": {"width": 0, "widht": 3}, "scale": "wide"}, place="params.yaml")
    lines = str(caught.value).splitlines()
    assert "params.yaml: name: missing; add it" in lines
    assert "params.yaml: inner.widht: unknown key; remove it or correct its spelling" in lines
    assert any(line.startswith("params.yaml: inner.width:") and line.endswith("(got 0)") for line in lines)
    assert any(line.startswith("params.yaml: scale:") and line.endswith("(got 'wide')") for line in lines)
    assert len(lines) == 4


def test_a_value_that_is_no_mapping_is_named_as_a_whole():
    with pytest.raises(ValueError, match=r"^params.yaml: \(the whole\): .*\(got \[1\]\)"):
        Outer.parse([1], place="params.yaml")


def test_a_config_cannot_be_changed():
    config = Outer(name="a")
    with pytest.raises(ValidationError, match="frozen"):
        config.scale = 2.0  # type: ignore[misc]


@given(name=st.text(), scale=st.floats(allow_nan=False, allow_infinity=False), width=st.integers(1))
def test_text_and_file_round_trips_keep_config_and_digest(name, scale, width):
    config = Outer(name=name, scale=scale, inner=Inner(width=width))
    again = Outer.load(config.canonical())
    assert again == config
    assert again.digest == config.digest


def test_the_digest_ignores_key_order_and_spelled_out_defaults_but_no_value():
    digest = Outer.load('{"name": "a", "scale": 2}').digest
    assert Outer.load('{"scale": 2.0, "inner": {"width": 4}, "name": "a"}').digest == digest
    assert Outer.load('{"name": "a", "scale": 2.5}').digest != digest
    assert Outer.load('{"name": "a", "scale": 2, "inner": {"width": 5}}').digest != digest


def test_a_config_is_read_from_a_file_too(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"name": "a"}))
    assert Outer.load(str(path)) == Outer(name="a")
    path.write_text("{]")
    with pytest.raises(ValueError, match=rf"^{path}: not JSON"):
        Outer.load(str(path))


def test_text_that_is_not_json_is_refused():
    with pytest.raises(ValueError, match=r"^the command line: not JSON"):
        Outer.load("{'name': 'a'}")


@pytest.mark.parametrize(
    "url", ["s3://", "s3:///x", "s3://b", "s3://data/a//b", "s3://data/../x", "s3://key:secret@data/x"]
)
def test_what_is_no_prefix_in_s3_is_refused(url):
    with pytest.raises(ValueError, match="not of the form s3://BUCKET/PREFIX"):
        place_of_copy(url)


def test_a_copy_lies_below_the_cache_and_a_folder_where_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv("DOD_CACHE", str(tmp_path))
    copy = tmp_path / "s3" / "data" / "a" / "b"
    with pytest.raises(FileNotFoundError, match=rf"s3://data/a/b/: no copy of it in {copy}; `dod stage` fetches it"):
        local_copy("s3://data/a/b/")
    copy.mkdir(parents=True)
    assert local_copy("s3://data/a/b/") == local_copy("s3://data/a/b") == copy
    assert local_copy("images") == Path("images")


def test_a_process_knows_its_place_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert this_process() == (0, 1, 0)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert this_process() == (5, 8, 1)
