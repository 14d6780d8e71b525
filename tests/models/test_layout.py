import json
import shutil

import numpy as np
import pytest

from dod_models import layout
from dod_models.dataset import DatasetConfig, build_dataset
from dod_models.encode import EncodeConfig, build_latents
from dod_models.images import ImageFolder

from . import tiny


@pytest.fixture
def images(tmp_path):
    return tiny.write_images(tmp_path / "images", per_class=4)


def build(root, out, **changes):
    return build_dataset(DatasetConfig(root=str(root), **changes), out=out)


PACKED = {"an archive a class": tiny.pack_images, "the official archives": tiny.pack_officially}
packed = pytest.mark.parametrize("pack", [pytest.param(how, id=name) for name, how in PACKED.items()])


@packed
def test_archives_hold_the_images_that_the_folders_hold(images, tmp_path, pack):
    facts = [build(images, tmp_path / "a"), build(pack(images, tmp_path / "packed"), tmp_path / "b")]
    assert facts[0] == facts[1]
    for split in ("train", "val"):
        loose, archived = (ImageFolder(tmp_path / name, split) for name in "ab")
        assert loose.classes == archived.classes
        if split == "train" or pack is tiny.pack_images:
            assert [e[1:5] for e in loose.entries] == [e[1:5] for e in archived.entries]
        else:  # the official names of validation images are numbers
            assert {e[1:5] for e in loose.entries} == {e[1:5] for e in archived.entries}
        pixels = [np.concatenate(list(f.blocks(size=16, channels=1))) for f in (loose, archived)]
        assert np.array_equal(pixels[0], pixels[1]) or split == "val"
    assert sorted(p.name for p in (tmp_path / "packed").rglob("*.png")) == []  # nothing was extracted


def test_the_index_says_where_in_an_archive_an_image_lies(images, tmp_path):
    root = tiny.pack_images(images, tmp_path / "packed")
    build(root, tmp_path / "dataset")
    entry = json.loads((tmp_path / "dataset" / "train.jsonl").read_text().splitlines()[5])
    assert (entry["path"], entry["member"]) == ("train/pole.tar", "001.png")
    data = (root / entry["path"]).read_bytes()[entry["offset"] :][: entry["size"]]
    assert data == (images / "train" / "pole" / "001.png").read_bytes()


@packed
def test_latents_do_not_depend_on_how_the_images_are_kept(images, pipeline, tmp_path, pack):
    found = []
    for root in (images, pack(images, tmp_path / "packed")):
        place = tmp_path / f"of-{root.name}"
        build(root, place / "dataset")
        inputs = {"dataset": place / "dataset", "codec": pipeline.codec, "state": place / "state"}
        build_latents(EncodeConfig(), **inputs, out=place / "latents")
        found.append(tiny.digests(place / "latents"))
    assert found[0] == found[1]


def test_folders_and_archives_may_be_mixed_but_not_for_one_class(images, tmp_path):
    tiny.pack(images / "train" / "bar", images / "train" / "bar.tar")
    with pytest.raises(ValueError, match=r"train/bar and .*train/bar.tar: a folder and an archive of one class"):
        build(images, tmp_path / "dataset")
    shutil.rmtree(images / "train" / "bar")
    assert build(images, tmp_path / "dataset")["train"] == 12


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_that_is_there_twice_is_refused(images, tmp_path, split):
    root = tiny.pack_officially(images, tmp_path / "packed")
    shutil.copytree(images / split, root / split)
    with pytest.raises(ValueError, match=rf"ILSVRC2012_img_{split}.tar and .*/{split}: two {split} splits"):
        build(root, tmp_path / "dataset")


def test_validation_images_need_the_kit_that_says_their_classes(images, tmp_path):
    root = tiny.pack_officially(images, tmp_path / "packed")
    kit = root / layout.KIT
    kit.rename(tmp_path / "kit")
    with pytest.raises(ValueError, match=rf"its classes stand in {layout.KIT}, which is not beside it"):
        build(root, tmp_path / "dataset")
    kit.write_bytes((tmp_path / "kit").read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"{layout.KIT}: not the development kit of ILSVRC2012"):
        build(root, tmp_path / "dataset")


def test_a_kit_for_another_number_of_images_is_refused(images, tmp_path):
    root = tiny.pack_officially(images, tmp_path / "packed")
    tiny.pack(images / "val" / "bar", root / layout.VAL)
    with pytest.raises(ValueError, match=rf"{layout.VAL}: has 4 images, .* has 12; download them again"):
        build(root, tmp_path / "dataset")


def test_a_cut_archive_is_named_with_what_to_do(images, tmp_path):
    root = tiny.pack_images(images, tmp_path / "packed")
    path = root / "train" / "pole.tar"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=r"train/pole.tar: not a whole, .* after 1 files; copy or download it again"):
        build(root, tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


def test_a_broken_image_in_an_archive_is_quarantined(images, tmp_path):
    (images / "train" / "bar" / "001.png").write_text("no image")
    root = tiny.pack_images(images, tmp_path / "packed")
    assert build(root, tmp_path / "dataset", max_quarantined=0.1)["quarantined"] == 1
    reasons = json.loads((tmp_path / "dataset" / "quarantine.json").read_text())
    assert list(reasons) == ["train/bar.tar/001.png"]


def test_an_archive_changed_since_it_was_indexed_is_refused(images, tmp_path):
    root = tiny.pack_images(images, tmp_path / "packed")
    build(root, tmp_path / "dataset")
    tiny.pack(images / "train" / "spot", root / "train" / "bar.tar")
    with pytest.raises(ValueError, match=r"train/bar.tar/000.png: changed since it was indexed"):
        ImageFolder(tmp_path / "dataset", "train").read(0, size=16, channels=1)
