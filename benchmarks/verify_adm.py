"""Our five numbers of ADM's published samples beside ADM's own: `make verify-adm`, on a machine with network access.

12 GB are fetched once, and a GPU scores the 50,000 images in minutes. Exit status 0 where all numbers agree.
"""

import argparse
import http.client
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from dod_models import artifact, inception, npz
from dod_models.evaluator import Evaluator, Gathered
from dod_models.images import BLOCK
from dod_models.reference import STATISTICS, STATISTICS_URL, published

FOLDER = Path(".state", "adm")
SAMPLES = "admnet_guided_upsampled_imagenet256.npz"  # ADM-G, ADM-U
SIZE = 256  # pixels
CHUNK = 2**20  # bytes
TIMEOUT = 60  # seconds without a byte


class File(NamedTuple):
    """What is fetched: its name here, where it is published, and about how much it is."""

    name: str
    url: str
    size: str
    role: str


FILES = (  # the README of openai/guided-diffusion's evaluations links the first two
    File(STATISTICS, STATISTICS_URL, "2.0 GB", "the reference: statistics of ImageNet, and 10,000 of its images"),
    File(SAMPLES, STATISTICS_URL.replace(STATISTICS, SAMPLES), "9.8 GB", "50,000 samples of ADM-G, ADM-U"),
    File(inception.WEIGHTS, inception.URL, "96 MB", "the Inception network, as torch-fidelity publishes it"),
)


class Expected(NamedTuple):
    """A number of ADM's, as printed by its suite, and by how much another port may differ."""

    value: float
    tolerance: float


# The README's example output. A port to PyTorch is published that differs by 0.0016, 0.0001, 0.14, 0.001 and 0.0024.
EXPECTED = {
    "fid": Expected(3.9425574129223264, 0.01),
    "sfid": Expected(6.140433703346162, 0.01),
    "inception_score": Expected(215.8370361328125, 0.5),
    "precision": Expected(0.8265, 0.005),
    "recall": Expected(0.5309, 0.005),
}


def fetch(file: File, folder: Path) -> Path:
    """The file in `folder`, fetched if it isn't there; OSError if that breaks off, and the next attempt goes on."""
    target, partial = folder / file.name, folder / f".{file.name}.partial"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    had = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={had}-"} if had else {})
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        if error.headers.get("Content-Range") != f"bytes */{had}":
            partial.unlink()
            raise ConnectionError(f"{partial}: is no part of {file.url}; removed, run it again") from None
        os.replace(partial, target)  # all had come
        return target
    with answer:
        if "Content-Length" not in answer.headers:
            raise ConnectionError(f"{file.url}: the server doesn't say how long it is; fetch it by hand")
        goes_on = answer.status == http.HTTPStatus.PARTIAL_CONTENT
        had = had if goes_on else 0
        total = had + int(answer.headers["Content-Length"])
        with (
            partial.open("ab" if goes_on else "wb") as out,
            tqdm(total=total, initial=had, desc=file.name, unit="B", unit_scale=True) as bar,
        ):
            while chunk := answer.read(CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
    if partial.stat().st_size != total:
        raise ConnectionError(f"{file.url}: {partial.stat().st_size:,} of {total:,} bytes came; run it again to go on")
    os.replace(partial, target)
    return target


def explain(error: Exception, folder: Path) -> str:
    """What lacks, where it comes from, and how to put it there by hand."""
    lines = [f"verify-adm: {error}", f"It needs three files in {folder.absolute()}:"]
    for file in FILES:
        state = "there" if (folder / file.name).exists() else "missing"
        lines.append(f"  {file.name} ({file.size}, {state}): {file.role}\n    from {file.url}")
    lines.append("Where this machine has no network, fetch them on another one, put them there under these names, and")
    lines.append("run it again. Nothing else is fetched.")
    return "\n".join(lines)


def measure(paths: dict[str, Path], *, weights_sha256: str) -> dict[str, float]:
    """Every metric of the published samples against the published reference."""
    state = inception.read_weights(paths[inception.WEIGHTS], sha256=weights_sha256)
    extractor = inception.Inception(state, weights_sha256)
    real, _ = published(extractor, paths[STATISTICS], size=SIZE)
    images = npz.find(paths[SAMPLES], "arr_0", shape=(None, SIZE, SIZE, 3), dtype=np.uint8)
    count = images.shape[0]
    blocks = tqdm(images.blocks(BLOCK), total=-(-count // BLOCK), desc="features of ADM's samples", unit="block")
    found = Gathered.of((extractor.part(pixels) for pixels in blocks), count=count)
    return Evaluator(extractor, real).score(found)


def table(found: dict[str, float]) -> tuple[list[str], bool]:
    """A line for each number, and whether all agree."""
    lines, agree = [f"{'':16} {'ours':>10} {'ADM':>10} {'within':>8}"], True
    for name, (value, tolerance) in EXPECTED.items():
        near = abs(found[name] - value) <= tolerance
        agree &= near
        lines.append(f"{name:16} {found[name]:10.4f} {value:10.4f} {tolerance:8.4f}  {'pass' if near else 'FAIL'}")
    return lines, agree


def main(arguments: list[str] | None = None) -> int:
    """Fetch, measure, compare; the numbers and the files' digests are kept beside the files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where the files lie (default: {FOLDER})")
    parser.add_argument("--weights-sha256", default=inception.SHA256, help=argparse.SUPPRESS)  # for the tests
    given = parser.parse_args(arguments)
    try:
        paths = {file.name: fetch(file, given.folder) for file in FILES}
    except (OSError, http.client.HTTPException) as error:
        print(explain(error, given.folder), file=sys.stderr)
        return 1
    try:
        found = measure(paths, weights_sha256=given.weights_sha256)
    except ValueError as error:
        print(f"verify-adm: {error}", file=sys.stderr)
        return 1
    lines, agree = table(found)
    record = {"metrics": found, "sha256": {name: artifact.sha256_file(path) for name, path in paths.items()}}
    artifact.write_json(given.folder / "result.json", record | {"torch": torch.__version__})
    print(*lines, json.dumps(record["sha256"], indent=1), sep="\n")
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
