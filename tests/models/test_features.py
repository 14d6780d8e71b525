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


def test_mixing_keeps_what_belongs_to_an_image_together_and_loses_none():
    sorted_set = feature_set(50)
    mixed = sorted_set.mixed()
    assert torch.equal(mixed.logits, 2 * mixed.features)
    assert torch.equal(mixed.spatial, 3 * mixed.features.expand(-1, 4))
    assert torch.equal(mixed.features.sort(dim=0).values, sorted_set.features)
    assert not torch.equal(mixed.features, sorted_set.features)
    assert torch.equal(sorted_set.mixed(20).features, mixed.features[:20])  # the order is fixed


def test_parts_are_joined_in_order():
    whole = feature_set(10)
    parts = [FeatureSet(*(values[rows] for values in whole)) for rows in (slice(0, 3), slice(3, 4), slice(4, 10))]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(joined(iter(parts)), whole, strict=True))
