"""docs/threat-model.md, tried: files that would run code, names that lead outside, and secrets that might be kept."""

import ast
import hashlib
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from dod_models.checkpoint import load_checkpoint
from dod_models.codec import Codec, load_vae
from dod_models.data import LatentShards
from dod_models.evaluator import Evaluator, load_extractor
from dod_models.images import ImageFolder
from dod_models.sample import Samples

from .bucket import BUCKET, S3
from .project import SOURCE, Project

CANARY = "canary-9f1c7e52d0b84a6f"
READERS: dict[str, Callable[[Path], Any]] = {
    "latents/tiny/labels.npy": lambda root: LatentShards(root / "latents/tiny"),
    "latents/tiny/shard-00000.npy": lambda root: LatentShards(root / "latents/tiny"),
    "train/tiny/step-6/ema-0.9.safetensors": lambda root: load_checkpoint(root / "train/tiny/step-6", decay=0.9),
    "reference/tiny/extractor.safetensors": lambda root: load_extractor(root / "reference/tiny"),
    "reference/tiny/moments.safetensors": lambda root: Evaluator.load(root / "reference/tiny"),
    "codec/tiny/vae/diffusion_pytorch_model.safetensors": lambda root: Codec.load(root / "codec/tiny"),
    "samples/tiny/tiny-6/stage1/samples.safetensors": lambda root: Samples.load(root / "samples/tiny/tiny-6/stage1"),
}


class Trap:
    """What a hostile file would do when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.sprung,))


def restate(root: Path, path: Path) -> None:
    """Let the manifests above a file state what is in it now, as whoever can write one can write the other."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    for folder in path.relative_to(root).parents:
        manifest = root / folder / "manifest.json"
        if manifest.is_file():
            values = json.loads(manifest.read_text())
            name = path.relative_to(root / folder).as_posix()
            assert name in values["files"]
            values["files"][name] = {"bytes": path.stat().st_size, "sha256": digest}
            manifest.write_text(json.dumps(values))


@pytest.mark.parametrize("name", READERS)
def test_a_pickle_in_the_place_of_numbers_is_refused_and_not_run(shared: Project, tmp_path: Path, name: str):
    shutil.copytree(shared.root / Path(*Path(name).parts[:2]), tmp_path / Path(*Path(name).parts[:2]))
    READERS[name](tmp_path)
    trap = pickle.dumps(Trap(tmp_path / "sprung"))
    (tmp_path / name).unlink()
    (tmp_path / name).write_bytes(trap)
    restate(tmp_path, tmp_path / name)
    with pytest.raises((ValueError, OSError, SafetensorError)):
        READERS[name](tmp_path)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()


def test_weights_of_the_codec_in_torch_s_format_are_not_taken(shared: Project, tmp_path: Path):
    shutil.copytree(shared.root / "codec/tiny", tmp_path / "codec/tiny")
    vae = tmp_path / "codec/tiny/vae"
    whole = vae / "diffusion_pytorch_model.safetensors"
    (vae / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    whole.unlink()
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.safetensors"):
        load_vae(vae)
    assert not (tmp_path / "sprung").exists()


def sources() -> Iterator[tuple[str, ast.AST]]:
    for package in ("dod_models", "dod_pipeline"):
        for path in sorted((SOURCE / package).glob("*.py")):
            yield from ((path.stem, node) for node in ast.walk(ast.parse(path.read_text())))


def test_no_module_reads_files_that_could_run_code():
    for name, node in sources():
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        unsafe = {"dill", "joblib", "marshal", "cloudpickle", "shelve"} | ({"pickle"} if name != "fitv2" else set())
        assert not unsafe & set(imported), name  # fitv2 names the error that torch.load raises
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            said = ast.unparse(node)
            assert node.func.attr != "load" or "torch.load" not in said or "weights_only=True" in said, said
            assert "allow_pickle=True" not in said and "unsafe_load" not in said and "pickle.load" not in said, said
            assert "shell=True" not in said and not re.match(r"os\.(system|popen)\(", said), said


def test_an_index_gives_only_bytes_whose_digest_it_states(shared: Project, tmp_path: Path):
    shutil.copytree(shared.root / "dataset/tiny", tmp_path / "dataset/tiny")
    (tmp_path / "private").write_text(CANARY)
    index = tmp_path / "dataset/tiny/train.jsonl"
    first, *others = index.read_text().splitlines()
    outside = {**json.loads(first), "path": str(tmp_path / "private")}
    index.unlink()
    index.write_text("\n".join([json.dumps(outside), *others]) + "\n")
    restate(tmp_path, index)
    with pytest.raises(ValueError, match="changed since it was indexed") as error:
        ImageFolder(tmp_path / "dataset/tiny", "train").read(0, size=16, channels=1)
    assert CANARY not in str(error.value)


def holding(root: Path, secret: str) -> list[str]:
    """The files below a folder in which the secret stands."""
    found = [path for path in sorted(root.rglob("*")) if path.is_file() and not path.is_symlink()]
    return [str(path) for path in found if secret.encode() in path.read_bytes()]


def test_secrets_of_the_environment_are_kept_nowhere(own: Project, s3: S3):
    """Stages run under Dagster and DVC, data go to S3 with a secret, and S3 refuses another."""
    values = own.params()
    values["sweeps"]["tiny-6"]["rows"][0]["guidance"] = 1.5
    own.write_params(values)
    secrets = dict.fromkeys(("HF_TOKEN", "GITHUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"), CANARY)
    said = [own.run("dod", "run", "tiny", status=0, **secrets)]
    own.dvc("remote", "add", "--default", "cloud", f"s3://{BUCKET}/canary")
    own.dvc("remote", "modify", "cloud", "endpointurl", s3.endpoint)
    push = ("dvc", "push", "--verbose")
    said += [own.run(*push, "report@tiny")]
    said += [own.run(*push, "latents@tiny", status=255, AWS_SECRET_ACCESS_KEY=CANARY)]
    assert "sweeps" in said[0].stdout + said[0].stderr and any((own.root / "dagster_home").rglob("*.db"))
    own.commit("after")
    for secret in (CANARY, s3.environment()["AWS_SECRET_ACCESS_KEY"]):
        assert holding(own.root, secret) == []
        assert not any(secret in done.stdout + done.stderr for done in said)


def test_a_secret_that_is_kept_would_be_found(tmp_path: Path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "log").write_bytes(b"\0x" + CANARY.encode())
    assert holding(tmp_path, CANARY) == [str(tmp_path / "a" / "b" / "log")]


def test_pages_are_served_to_this_machine_alone():
    makefile = (SOURCE / "Makefile").read_text()
    assert re.findall(r"--host (\S+)", makefile) == ["127.0.0.1"]
    assert "0.0.0.0" not in makefile + (SOURCE / "dagster_home" / "dagster.yaml").read_text()
