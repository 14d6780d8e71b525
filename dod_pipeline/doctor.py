"""`dod doctor`: what this installation needs, what it has of that, and how to mend what is missing."""

import os
import re
import shutil
import sys
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from dod_models.config import S3
from dod_pipeline import doctor_s3, dvc_repo, ledger, stages
from dod_pipeline.config import PARAMS_FILE, Params, load_params
from dod_pipeline.finding import Finding, State, Step, examine
from dod_pipeline.storage import POSTGRES

GIB = 2**30
ROOM = {"project": 10, ".state": 10, "DVC's cache": 10, "temporary files": 1}  # GiB that should be free
TOO_LITTLE = 0.1  # of that
SHOWN = 3  # packages
REQUIREMENTS = Path("requirements")
DEVICES, DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")  # where Linux shows NVIDIA's
HIDDEN = "CUDA_VISIBLE_DEVICES"
SETUP = "run `make setup`"


def findings() -> Iterator[tuple[str, Finding]]:
    """What each check finds, by name, in the folder where the command was called."""
    try:
        params = load_params()
    except (ValueError, OSError):  # the check of the settings says why
        yield from examine(Installation(None).steps())
        yield "S3", Finding("skipped", f"only with a {PARAMS_FILE} that loads")
        return
    url = getattr(params.deployment.storage, "url", None)
    yield from examine(Installation(url).steps())
    asked = doctor_s3.steps(url, reads(params))
    if not asked:
        yield "S3", Finding("skipped", f"nothing in {PARAMS_FILE} names {S3}")
    yield from examine(asked)


def reads(params: Params) -> list[str]:
    """The prefixes in S3 that stages read."""
    places = {"dataset": ("root",), "codec": ("path",), "reference": ("weights", "statistics")}
    named = [(stage, name) for stage, names in places.items() for name in names]
    found = [getattr(data, stage).get(name) for data in params.datasets.values() for stage, name in named]
    return list(dict.fromkeys(url for url in found if isinstance(url, str) and url.startswith(S3)))


class Installation:
    """The project in the current folder, and the machine that it is on; `storage`: where in S3 its things lie."""

    def __init__(self, storage: str | None) -> None:
        self.storage = storage and storage.rstrip("/")
        self.dvc_settings: dict[str, str] = {}  # from all of DVC's files; secrets may be among them

    def steps(self) -> tuple[Step, ...]:
        """The checks that need no settings."""
        return (
            Step("Python", self.python),
            Step("DVC", self.dvc, (Step("DVC's remote", self.remote),)),
            Step("git", self.git),
            Step("Dagster", self.dagster),
            Step("PostgreSQL", self.postgres),
            Step("settings", self.settings),
            Step("disk", self.disk),
            Step("GPUs", self.gpus),
        )

    def python(self) -> Finding:
        """This Python, and its packages beside those that were locked."""
        version = ".".join(map(str, sys.version_info[:3]))
        return packages(f"Python {version}", Path(sysconfig.get_path("purelib")), REQUIREMENTS / "project.txt")

    def dvc(self) -> Finding:
        """The launcher reaches DVC, and its packages are those that were locked."""
        lines = dvc_repo.text("config", "--list").splitlines()
        self.dvc_settings = dict(line.split("=", 1) for line in lines if "=" in line)
        place = sysconfig.get_path("purelib", vars={"base": str(Path(sys.prefix).parent / ".venv-dvc")})
        return packages(dvc_repo.executable(), Path(place), REQUIREMENTS / "dvc.txt")

    def git(self) -> Finding:
        """Numbers are recorded with the commit of the code that made them."""
        commit = ledger.current_commit()
        if commit is None:
            return Finding("warn", "no repository: records will name no commit", "install git; `git init` and commit")
        if commit.endswith("-dirty"):
            found = f"{', '.join(ledger.CODE)} differ from commit {commit[: ledger.SHORT]}: records will say -dirty"
            return Finding("warn", found, "commit them")
        return Finding("ok", f"commit {commit[: ledger.SHORT]}, code and settings are its own")

    def dagster(self) -> Finding:
        """Dagster's folder."""
        from dod_pipeline import runs

        return Finding("ok", f"{runs.HOME}={runs.home(Path())}")

    def postgres(self) -> Finding:
        """The server that holds Dagster's storage, where there is one; neither user nor password is shown."""
        stated = os.environ.get(POSTGRES)
        if stated is None:
            return Finding("skipped", f"{POSTGRES} isn't set: Dagster's storage is SQLite")
        import sqlalchemy
        from sqlalchemy.exc import SQLAlchemyError

        form = f"{POSTGRES} must be postgresql://USER:PASSWORD@HOST:5432/DATABASE, special characters as %40"
        try:
            url = sqlalchemy.make_url(stated)
        except (SQLAlchemyError, ValueError):  # whose text may hold the password
            return Finding("fail", "not the URL of a database", form)
        if url.get_backend_name() != "postgresql" or "@" in (url.host or ""):  # part of a password, then
            return Finding("fail", "not the URL of a PostgreSQL database", form)
        name = f"{url.host or 'a socket'}, database {url.database}"
        engine = sqlalchemy.create_engine(url, connect_args={"connect_timeout": 5})
        try:
            with engine.connect() as connection:
                version = connection.exec_driver_sql("show server_version").scalar_one()
        except SQLAlchemyError as error:
            cause = str(getattr(error, "orig", None) or error)  # libpq names no password
            return Finding("fail", f"{name}: {cause}", "start the server, or correct the URL")
        finally:
            engine.dispose()
        return Finding("ok", f"{name}: PostgreSQL {version}")

    def settings(self) -> Finding:
        """params.yaml, and the settings of every stage; the first that is wrong is named."""
        params = load_params()
        jobs = [(stage, key) for stage in stages.ORDER for key in stages.keys_of(params, stage)]
        for stage, key in jobs:
            stages.resolve(params, stage, key)
        return Finding("ok", f"{PARAMS_FILE}: {len(params.experiments)} experiments, {len(jobs)} stages")

    def disk(self) -> Finding:
        """Room where files are written, once for each file system."""
        cache = self.dvc_settings.get("cache.dir", ".dvc/cache")
        places = zip(ROOM, map(Path, (".", ".state", cache, tempfile.gettempdir())), strict=True)
        shared: dict[int, dict[str, Path]] = {}
        for name, path in places:
            there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
            shared.setdefault(there.stat().st_dev, {})[name] = there
        lines, lack = [], 1.0
        for names in shared.values():
            free = shutil.disk_usage(next(iter(names.values()))).free / GIB
            lines.append(f"{', '.join(names)}: {free:.1f} GiB free")
            lack = min(lack, free / max(ROOM[name] for name in names))
        state: State = "ok" if lack >= 1 else "warn" if lack >= TOO_LITTLE else "fail"
        remedy = (
            ""
            if state == "ok"
            else "make room: `dvc gc --workspace` drops what no present stage names; or a larger disk"
        )
        return Finding(state, "; ".join(lines), remedy)

    def gpus(self) -> Finding:
        """The GPUs that torch can use; it is no failure if there are none."""
        import torch

        with warnings.catch_warnings(record=True) as said:  # why torch can't use what is there
            warnings.simplefilter("always")
            count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        driver = version_of_driver()
        if count:
            known = [torch.cuda.get_device_properties(index) for index in range(count)]
            kinds = Counter(f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB" for gpu in known)
            found = "; ".join(f"{number} x {kind}" for kind, number in kinds.items())
            hint = f"DOD_PROCESSES={count} trains, encodes and scores on all of them" if count > 1 else ""
            return Finding("ok", f"{found}; driver {driver or 'unknown'}, CUDA {torch.version.cuda}", hint)
        if driver is None and not list(DEVICES.glob("nvidia[0-9]*")):
            return Finding("ok", "none: everything runs on the CPU", "the paper's models want GPUs; the demo doesn't")
        if HIDDEN in os.environ:
            return Finding("warn", f"{HIDDEN}={os.environ[HIDDEN]!r} hides NVIDIA's devices", f"unset {HIDDEN}")
        why = "; ".join(str(one.message) for one in said) or f"torch {torch.__version__} says nothing of why"
        remedy = f"install a driver that can do CUDA {torch.version.cuda} or newer, and see that `nvidia-smi` works"
        return Finding(
            "fail", f"NVIDIA's devices are there (driver {driver or 'unknown'}), torch sees none: {why}", remedy
        )

    def remote(self) -> Finding:
        """DVC's default remote: it lies with the rest of the storage, and what comes from it is checked."""
        name = self.dvc_settings.get("core.remote")
        if name is None:
            where = f"{self.storage or 's3://BUCKET/PREFIX'}/dvc"
            return Finding("warn", "none by default: nothing can be pushed", f"`dvc remote add --default team {where}`")
        url = self.dvc_settings.get(f"remote.{name}.url", "")
        if self.dvc_settings.get(f"remote.{name}.verify", "").lower() != "true":
            found = f"{name}, {url}: what is pulled from it isn't checked"
            return Finding("fail", found, f"`dvc remote modify {name} verify true`")
        if self.storage and not f"{url}/".startswith(f"{self.storage}/"):
            found = f"{name}, {url}: not below deployment.storage.url, {self.storage}"
            return Finding(
                "warn", found, f"`dvc remote add --default storage {self.storage}/dvc`, and `verify true` for it"
            )
        return Finding("ok", f"{name}, {url}; what is pulled is checked")


def packages(title: str, place: Path, locked: Path) -> Finding:
    """Whether the packages that are installed in a folder are those of a locked list."""
    if not locked.is_file():
        return Finding("skipped", f"{title}: no {locked} here")
    here = {canonicalize_name(one.name): one.version for one in distributions(path=[str(place)])}
    wrong, count = [], 0
    for line in re.findall(r"^[A-Za-z0-9].*?(?= *\\?$)", locked.read_text(), re.MULTILINE):
        wanted = Requirement(line)
        if wanted.marker is None or wanted.marker.evaluate():
            version = here.get(canonicalize_name(wanted.name))
            count += 1
            if version is None or not wanted.specifier.contains(version, prereleases=True):
                wrong.append(f"{wanted} (here: {version or 'none'})")
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" * (len(wrong) > SHOWN)
        return Finding("fail", f"{title}: {place} lacks {', '.join(wrong[:SHOWN])}{more}", SETUP)
    return Finding("ok", f"{title}, {count} packages as in {locked}")


def version_of_driver() -> str | None:
    """Of NVIDIA's driver, where the system shows one."""
    found = re.search(r"Module.*?\s(\d+\.[\d.]+)", DRIVER.read_text()) if DRIVER.is_file() else None
    return found[1] if found else None
