"""Listings of images: what makes another version of the data, and what does not."""

import os
import shutil
from pathlib import Path

import pytest

from dod_pipeline import cli, listing
from dod_pipeline.config import DataSet, Params, load_params

from . import project as tiny
from .bucket import S3
from .project import SOURCE, Project


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def root(images: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(images, tmp_path / "images"))


def data(root: Path | str) -> DataSet:
    """A data set of the images in that place."""
    return (
        Params.parse(tiny.params(Path("x")), place="")
        .datasets["tiny"]
        .model_copy(update={"dataset": {"source": "folder", "root": str(root)}})
    )


def digest(root: Path | str) -> str | None:
    return listing.scan("tiny", data(root)).sha256


def test_a_scan_that_finds_nothing_new_writes_nothing(root: Path):
    found, is_new = listing.update("tiny", data(root))
    assert is_new and found.files == 180 and found.root == str(root)
    assert found.bytes == sum(path.stat().st_size for path in root.rglob("*.png"))
    before = Path("listings", "tiny.json").stat()
    assert listing.update("tiny", data(root)) == (found, False)
    after = Path("listings", "tiny.json").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)


def test_times_do_not_matter_and_contents_names_and_numbers_do(root: Path):
    first, image = digest(root), root / "train" / "bar" / "000.png"
    os.utime(image, ns=(1, 1))
    shutil.rmtree(listing.CACHE)
    assert digest(root) == first
    seen = {first}
    whole = image.read_bytes()
    image.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    seen.add(digest(root))
    image.rename(image.with_name("999.png"))
    seen.add(digest(root))
    (root / "train" / "bar" / "999.png").unlink()
    seen.add(digest(root))
    assert len(seen) == 4


def test_what_is_known_is_not_read_again(root: Path):
    """A file of equal size and time counts as the same, whatever is in it: it was not opened."""
    first, image = digest(root), root / "train" / "bar" / "000.png"
    stat = image.stat()
    image.write_bytes(bytes(stat.st_size))
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert digest(root) == first
    with next(listing.CACHE.iterdir()).open("r+") as notes:  # a kill has cut off the last line
        notes.truncate(notes.seek(0, 2) - 10)
    assert digest(root) == first


def test_what_no_stage_reads_does_not_count(root: Path):
    first = digest(root)
    for name in ("README.md", "train/notes.txt", "train/bar/.001.png.partial", "other/bar/000.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    assert digest(root) == first


def test_objects_in_s3_are_known_by_their_etags(root: Path, s3: S3):
    url = s3.upload(root, "listed")
    found = listing.scan("tiny", data(url))
    assert (found.root, found.files, found.bytes) == (url, 180, sum(p.stat().st_size for p in root.rglob("*.png")))
    assert listing.scan("tiny", data(url)) == found
    s3.client().put_object(Bucket="data", Key="listed/train/bar/000.png", Body=b"other")
    assert digest(url) != found.sha256
    with pytest.raises(FileNotFoundError, match=r"no images there; put them there, or correct datasets\.tiny\.dataset"):
        digest("s3://data/empty")
    with pytest.raises(ConnectionError, match="look at the credentials"):
        digest("s3://no-such-bucket/listed")


def test_a_missing_root_and_one_without_images_are_named_with_the_remedy(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere: there is no such folder; correct datasets\.tiny\.dataset\.root"
    ):
        digest(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no images there"):
        digest(tmp_path)


def test_what_ships_with_the_repository_is_listed():
    params = load_params(SOURCE / "params.yaml")
    shipped = {path.stem: listing.Listing.load(str(path)) for path in (SOURCE / "listings").glob("*.json")}
    assert shipped.keys() == params.datasets.keys()
    assert shipped["mnist"] == listing.scan("mnist", params.datasets["mnist"])
    assert shipped["imagenet"] == listing.UNWATCHED


def test_dod_run_scans_where_no_listing_stands_or_one_of_another_place(root: Path, tmp_path: Path):
    params = Params.parse(tiny.params(root), place="")
    listing.ensure(params, ["tiny"])
    assert listing.find("tiny") == listing.scan("tiny", params.datasets["tiny"])
    (root / "train" / "bar" / "000.png").unlink()
    known = listing.find("tiny")
    listing.ensure(params, ["tiny"])
    assert listing.find("tiny") == known  # new images are looked for when asked to
    moved = Params.parse(tiny.params(root.rename(tmp_path / "moved")), place="")
    listing.ensure(moved, ["tiny"])
    assert listing.find("tiny") == listing.scan("tiny", moved.datasets["tiny"]) != known


def test_an_unwatched_data_set_is_made_and_the_stage_says_how_to_watch_it(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    project = Project(tmp_path)
    project.write_params(tiny.params(root))
    listing.file_of("tiny").parent.mkdir()
    listing.file_of("tiny").write_text(listing.UNWATCHED.model_dump_json())
    listing.ensure(load_params(), ["tiny"])
    assert cli.main(["stage", "dataset", "tiny"]) == 0
    assert "listings/tiny.json: not scanned: new images go unnoticed; `dod scan tiny`" in capsys.readouterr().out
    assert cli.main(["scan", "tiny"]) == 0
    assert capsys.readouterr().out.endswith(" bytes: written to listings/tiny.json\n")
    assert cli.main(["scan", "tiny"]) == 0
    assert capsys.readouterr().out.startswith("tiny: 180 files, ")
    assert cli.main(["scan", "tony"]) == 1
    assert "dataset: key 'tony' is not in params.yaml; it has tiny" in capsys.readouterr().err
