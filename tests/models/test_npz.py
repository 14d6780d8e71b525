import io
import zipfile

import numpy as np
import pytest

from dod_models import npz

IMAGES = np.random.default_rng(0).integers(0, 256, size=(23, 4, 4, 3), dtype=np.uint8)
LABELS = np.arange(23)


def halves(array):
    return iter(np.array_split(array, 2))


@pytest.fixture
def path(tmp_path):
    columns = {
        "arr_0": npz.Column(IMAGES.shape, np.uint8, halves(IMAGES)),
        "arr_1": npz.Column((23,), np.int64, halves(LABELS)),
    }
    npz.write(tmp_path / "file.npz", columns)
    return tmp_path / "file.npz"


def test_numpy_reads_what_was_written_in_blocks_without_pickle(path):
    with np.load(path, allow_pickle=False) as found:
        assert found.files == ["arr_0", "arr_1"]
        assert np.array_equal(found["arr_0"], IMAGES) and found["arr_0"].dtype == np.uint8
        assert np.array_equal(found["arr_1"], LABELS) and found["arr_1"].dtype == np.int64
    assert [p.name for p in path.parent.iterdir()] == ["file.npz"]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("count", [1, 5, 23, 100])
def test_blocks_are_numpy_s_own_rows(tmp_path, save, count):
    save(
        tmp_path / "theirs.npz",
        IMAGES,
        mu=np.array([1, 2], dtype=np.float32),
        sigma=np.asfortranarray([[1.0, 2.0], [3.0, 4.0]]),
    )
    arrays = npz.arrays_in(tmp_path / "theirs.npz")
    blocks = list(arrays["arr_0"].blocks(count))
    assert {len(block) for block in blocks[:-1]} <= {count}
    assert np.array_equal(np.concatenate(blocks), IMAGES)
    assert arrays["mu"].read().tolist() == [1, 2]
    assert arrays["sigma"].read().tolist() == [[1, 2], [3, 4]]
    with pytest.raises(ValueError, match="sigma is stored by columns; write it in C order"):
        next(arrays["sigma"].blocks(1))


def test_objects_are_refused_before_anything_is_executed(tmp_path):
    np.savez(tmp_path / "evil.npz", arr_0=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ValueError, match=r"evil\.npz: arr_0 holds Python objects"):
        npz.arrays_in(tmp_path / "evil.npz")


def test_a_pickle_in_the_place_of_an_array_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"\x80\x04N.")
    with pytest.raises(ValueError, match=r"arr_0: not a \.npy file of version 1 or 2"):
        npz.arrays_in(tmp_path / "evil.npz")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_cut_off_file_is_refused(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r"not a whole npz file .*fetch it again"):
        npz.arrays_in(path)


def test_an_array_with_less_data_than_it_says_is_refused(tmp_path):
    file = io.BytesIO()
    np.save(file, IMAGES)
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", file.getvalue()[:-1])
    with pytest.raises(ValueError, match="arr_0 has less data than its header says"):
        list(npz.arrays_in(tmp_path / "short.npz")["arr_0"].blocks(10))


def test_a_changed_byte_is_noticed(path):
    data = bytearray(path.read_bytes())
    data[data.index(IMAGES.tobytes()) + 7] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="Bad CRC-32"):
        list(npz.arrays_in(path)["arr_0"].blocks(10))
    with pytest.raises(ValueError, match="Bad CRC-32"):
        npz.arrays_in(path)["arr_0"].read()


def test_other_names_shapes_and_kinds_are_named(path):
    shape = (None, 4, 4, 3)
    assert npz.find(path, "arr_0", shape=shape, dtype=np.uint8).shape == IMAGES.shape
    with pytest.raises(ValueError, match="no array mu; it has arr_0, arr_1"):
        npz.find(path, "mu", shape=(2048,), dtype=np.floating)
    with pytest.raises(ValueError, match=r"arr_0 is uint8 \(23, 4, 4, 3\), expected uint8 \(any, 8, 8, 3\)"):
        npz.find(path, "arr_0", shape=(None, 8, 8, 3), dtype=np.uint8)
    with pytest.raises(ValueError, match="expected floating"):
        npz.find(path, "arr_0", shape=shape, dtype=np.floating)


def test_equal_arrays_give_equal_bytes_and_what_stood_there_survives_a_failure(path):
    before = path.read_bytes()
    npz.write(path, {n: npz.Column(a.shape, a.dtype.type, [a]) for n, a in (("arr_0", IMAGES), ("arr_1", LABELS))})
    assert path.read_bytes() == before

    def broken():
        yield IMAGES[:5]
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        npz.write(path, {"arr_0": npz.Column(IMAGES.shape, np.uint8, broken())})
    assert path.read_bytes() == before
