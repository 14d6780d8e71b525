"""benchmarks/verify_adm.py against a server that has small files of the real names, keys and shapes."""

import http.server
import threading

import numpy as np
import pytest

from benchmarks import verify_adm
from dod_models import artifact, inception
from dod_models.reference import STATISTICS

from . import full_size

SMALL = 32  # pixels, in the place of 256


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder, with ranges; breaks off after `most` bytes of an answer."""

    def __init__(self, folder):
        self.folder, self.most, self.ranges = folder, 10**12, []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        data = (self.server.folder / self.path.lstrip("/")).read_bytes()
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        self.server.ranges.append(begin)
        if begin >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            return self.end_headers()
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        self.end_headers()
        self.wfile.write(data[begin:][: self.server.most])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path):
    (tmp_path / "published").mkdir()
    with Server(tmp_path / "published") as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def files(server, monkeypatch):
    url = f"http://127.0.0.1:{server.server_port}"
    found = tuple(file._replace(url=f"{url}/{file.name}") for file in verify_adm.FILES)
    monkeypatch.setattr(verify_adm, "FILES", found)
    return found


def test_offline_it_says_what_it_would_fetch_from_where_and_to_where(tmp_path, monkeypatch, capsys):
    nowhere = tuple(f._replace(url=f"http://127.0.0.1:9/{f.name}") for f in verify_adm.FILES)
    monkeypatch.setattr(verify_adm, "FILES", nowhere)
    assert verify_adm.main(["--folder", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    for file in nowhere:
        assert f"{file.name} ({file.size}, missing)" in said and f"from {file.url}" in said
    assert f"three files in {tmp_path}" in said and "put them there under these names" in said


def test_the_files_are_those_that_adm_and_torch_fidelity_publish():
    host = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    assert [file.url for file in verify_adm.FILES] == [
        host + "VIRTUAL_imagenet256_labeled.npz",
        host + "admnet_guided_upsampled_imagenet256.npz",
        inception.URL,
    ]


def test_a_fetch_that_broke_off_goes_on_where_it_was(server, files, tmp_path):
    data = np.random.default_rng(0).bytes(100_000)
    (server.folder / files[0].name).write_bytes(data)
    server.most = 30_000
    with pytest.raises(Exception, match=r"IncompleteRead|30,000 of 100,000"):
        verify_adm.fetch(files[0], tmp_path)
    assert not (tmp_path / files[0].name).exists()
    server.most = 10**12
    assert verify_adm.fetch(files[0], tmp_path).read_bytes() == data
    assert server.ranges == [0, 30_000]
    assert verify_adm.fetch(files[0], tmp_path).read_bytes() == data  # it is there
    assert len(server.ranges) == 2


def test_a_fetch_that_was_killed_before_its_end_was_noted_is_whole(server, files, tmp_path):
    (server.folder / files[0].name).write_bytes(b"0123456789")
    partial = tmp_path / f".{files[0].name}.partial"
    partial.write_bytes(b"0123456789")
    assert verify_adm.fetch(files[0], tmp_path).read_bytes() == b"0123456789" and not partial.exists()
    (tmp_path / files[0].name).unlink()
    partial.write_bytes(b"0123456789 and more")
    with pytest.raises(ConnectionError, match=r"is no part of .*; removed, run it again"):
        verify_adm.fetch(files[0], tmp_path)
    assert verify_adm.fetch(files[0], tmp_path).read_bytes() == b"0123456789"


def test_from_files_to_five_numbers_and_a_verdict(server, files, inception_weights, tmp_path, monkeypatch, capsys):
    """Few images and random weights: the numbers are others, so the verdict is that they fail."""
    full_size.write_statistics(server.folder / STATISTICS, count=5, size=SMALL)
    samples = np.random.default_rng(1).integers(0, 256, size=(12, SMALL, SMALL, 3), dtype=np.uint8)
    np.savez(server.folder / verify_adm.SAMPLES, samples, np.arange(12))
    (server.folder / inception.WEIGHTS).symlink_to(inception_weights)
    monkeypatch.setattr(verify_adm, "SIZE", SMALL)
    monkeypatch.setattr("dod_models.evaluator.check_count", lambda count, width: None)  # 12 images for 2048 features
    monkeypatch.setattr("dod_models.evaluator.JACKKNIFE_BLOCKS", 2)
    digest = artifact.sha256_file(inception_weights)
    assert verify_adm.main(["--folder", str(tmp_path / "files"), "--weights-sha256", digest]) == 1
    said = capsys.readouterr().out
    record = artifact.read_json(tmp_path / "files" / "result.json")
    for name, (value, tolerance) in verify_adm.EXPECTED.items():
        assert f"{record['metrics'][name]:10.4f} {value:10.4f} {tolerance:8.4f}  FAIL" in said
    assert record["sha256"][inception.WEIGHTS] == digest
    assert record["sha256"][STATISTICS] == artifact.sha256_file(server.folder / STATISTICS)


def test_the_verdict_is_pass_within_the_tolerances_alone():
    port = {"fid": 3.9410, "sfid": 6.1405, "inception_score": 215.98, "precision": 0.8255, "recall": 0.5285}
    assert verify_adm.table(port)[1]
    for name, (value, tolerance) in verify_adm.EXPECTED.items():
        assert not verify_adm.table(port | {name: value + 1.1 * tolerance})[1]


def test_other_weights_are_refused(files, tmp_path, capsys):
    for file in files:
        (tmp_path / file.name).write_bytes(b"other")
    assert verify_adm.main(["--folder", str(tmp_path)]) == 1
    assert "these are other weights" in capsys.readouterr().err
