import pytest
import torch

from dod_models import artifact
from dod_models.artifact import DamagedError
from dod_models.features import SCHEMA, FeatureSet, joined


def feature_set(count: int) -> FeatureSet:
    """Rows that tell their image."""
    rows = torch.arange(count * 1.0)[:, None]
    return FeatureSet(rows, 3 * rows.expand(-1, 4), 2 * rows)


def test_sets_survive_the_disk_and_damage_is_named(tmp_path):
    found = feature_set(20)
    with artifact.writing(tmp_path / "set", schema=SCHEMA, config="") as folder:
        found.save(folder.path / "val.safetensors")
    loaded = FeatureSet.load(tmp_path / "set", "val.safetensors", schema=SCHEMA)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, loaded, strict=True))
    path = tmp_path / "set" / "val.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    with pytest.raises(DamagedError, match=r"val.safetensors: sha256"):
        FeatureSet.load(tmp_path / "set", "val.safetensors", schema=SCHEMA)


def test_slices_of_a_file_are_its_rows_in_order(tmp_path, monkeypatch):
    whole = feature_set(50)
    whole.save(tmp_path / "set.safetensors")
    monkeypatch.setattr("dod_models.features.ROWS_AT_ONCE", 20)
    slices = list(FeatureSet.slices(tmp_path / "set.safetensors"))
    assert [len(part.features) for part in slices] == [20, 20, 10]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(joined(slices), whole, strict=True))


def test_parts_are_joined_in_order():
    whole = feature_set(10)
    parts = [FeatureSet(*(values[rows] for values in whole)) for rows in (slice(0, 3), slice(3, 4), slice(4, 10))]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(joined(iter(parts)), whole, strict=True))
