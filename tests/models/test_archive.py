import io
import tarfile

import pytest

from dod_models import archive

FILES = {f"image-{i}.png": bytes([i]) * (400 * i + 1) for i in range(4)} | {30 * "long" + "/x.png": b"a long name"}


def write(path, files, **options):
    with tarfile.open(path, "w", **options) as tar:
        tar.addfile(folder("folder"))
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


def contents(path, found):
    data = path.read_bytes()
    return {m.name: data[m.offset : m.offset + m.size] for m in found}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_member_s_bytes_lie_where_it_says(tmp_path, form):
    path = write(tmp_path / "a.tar", FILES, format=form)
    assert contents(path, archive.members(path)) == FILES


def test_an_archive_in_an_archive_is_read_in_place(tmp_path):
    inner = {f"{name}.tar": write(tmp_path / f"{name}.tar", {f"{name}.png": name.encode()}) for name in ("b", "c")}
    outer = write(tmp_path / "outer.tar", {name: path.read_bytes() for name, path in inner.items()})
    found = {m.name: archive.members(outer, start=m.offset, end=m.offset + m.size) for m in archive.members(outer)}
    assert {name: contents(outer, members) for name, members in found.items()} == {
        "b.tar": {"b.png": b"b"},
        "c.tar": {"c.png": b"c"},
    }


@pytest.mark.parametrize("blocks", [3, 2, 1])  # of four: folder, header, data, end
def test_an_inner_archive_without_its_end_does_not_run_into_the_next(tmp_path, blocks):
    inner = write(tmp_path / "b.tar", {"b.png": b"b"}).read_bytes()[: blocks * 512]
    outer = write(tmp_path / "outer.tar", {"b.tar": inner, "c.tar": inner})
    first = archive.members(outer)[0]
    with pytest.raises(ValueError, match=r"outer.tar: not a whole, uncompressed tar archive"):
        archive.members(outer, start=first.offset, end=first.offset + first.size)


SMALL = {"a.png": bytes(700), "b.png": bytes(700)}  # headers at 512 and 2048, after the folder's; ends at 3584


@pytest.mark.parametrize("size", [0, 100, 512, 600, 1024, 1500, 2048, 2300, 2560, 3000, 3583, 3584, 4000])
def test_a_cut_archive_is_refused_wherever_it_was_cut(tmp_path, size):
    path = write(tmp_path / "a.tar", SMALL)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"a.tar: not a whole, uncompressed tar archive: .*download it again"):
        archive.members(path)


@pytest.mark.parametrize("place", [10, 520, 2060])
def test_a_damaged_header_is_refused_and_not_taken_for_the_end(tmp_path, place):
    path = write(tmp_path / "a.tar", SMALL)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"not a whole, uncompressed tar archive"):
        archive.members(path)


def test_a_compressed_archive_is_refused(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w:gz") as tar:
        tar.addfile(folder("x"))
    with pytest.raises(ValueError, match=r"not a whole, uncompressed tar archive"):
        archive.members(tmp_path / "a.tar")


@pytest.mark.parametrize("fault", ["/etc/a.png", "x/../../a.png", "link", "hard link", "device"])
def test_names_that_lead_outside_and_links_are_refused(tmp_path, fault):
    info = tarfile.TarInfo(fault)
    kinds = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE, "device": tarfile.CHRTYPE}
    info.type, info.linkname = kinds.get(fault, tarfile.REGTYPE), "/etc/passwd" if fault in kinds else ""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(info)
    with pytest.raises(ValueError, match=r"a.tar: member '.*' is a link, a device, a sparse file, or named"):
        archive.members(tmp_path / "a.tar")
