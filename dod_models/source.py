"""What work is kept under: what it is made from, the code and torch's version among that."""

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from dod_models import artifact


@cache
def code(module: str) -> dict[str, str]:
    """sha256 of a module of this package, and of those that it imports, directly or not, by name."""
    folder, todo = Path(__file__).parent, [module]
    found: dict[str, str] = {}
    while todo:
        name = todo.pop()
        path = folder / f"{name}.py"
        if name in found or not path.is_file():
            continue
        found[name] = artifact.sha256_file(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "dod_models":
                todo += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("dod_models."):
                todo.append(node.module.removeprefix("dod_models."))
    return found


def key(module: str, config: str, inputs: Iterable[Path]) -> str:
    """Name of a module's work with this configuration on these finished folders: other code has another."""
    manifests = [artifact.digest_of(folder) for folder in inputs]
    digests = [digest for _, digest in sorted(code(module).items())]
    return hashlib.sha256("/".join([config, torch.__version__, *digests, *manifests]).encode()).hexdigest()[:32]
