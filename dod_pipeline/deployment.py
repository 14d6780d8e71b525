"""The key `deployment` of params.yaml: how this installation runs things and what it keeps. No result depends on it."""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    field_validator,
    model_validator,
)

from dod_models.config import S3, Frozen, place_of_copy

Push = Literal["each", "end", "never"]


class Storage(Frozen):
    """The place in S3 of everything that is kept, and when DVC pushes what was computed: after each stage, at a run's
    end, or by hand. A URL alone stands for a place with the rest as it is. Credentials are found as AWS's tools do."""

    url: str | None = None  # s3://BUCKET/PREFIX; None: what is kept stays in this folder and on DVC's own remote
    endpoint: str | None = None  # http(s)://HOST:PORT of an S3 server that isn't AWS's
    push: Push = "never"  # `each` where a URL is given
    push_of: dict[str, Push] = Field(default_factory=dict)  # of a stage, or of STAGE@KEY: {latents: never}
    timeout: PositiveFloat = 600  # seconds that one `dvc push` or `dvc pull` may take

    @model_validator(mode="before")
    @classmethod
    def fill_in(cls, values: object) -> object:
        """The short form, and what follows from a URL."""
        found = {"url": values} if isinstance(values, str) else values
        return {"push": "each"} | found if isinstance(found, dict) and found.get("url") is not None else found

    @field_validator("url")
    @classmethod
    def check_url(cls, url: str | None) -> str | None:
        """It names a bucket, and folders that are no detours."""
        if url is None:
            return None
        if not url.startswith(S3):
            raise ValueError("not of the form s3://BUCKET/PREFIX")
        place_of_copy(url)
        return url.rstrip("/")

    @field_validator("endpoint")
    @classmethod
    def check_endpoint(cls, endpoint: str | None) -> str | None:
        """A server's address, and no secret: this file belongs to git."""
        if endpoint is None:
            return None
        parts = urlsplit(endpoint)
        if "@" in parts.netloc:
            raise ValueError("holds a user or a password; give these to AWS's tools (environment, ~/.aws, roles)")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ValueError("not of the form http://HOST:PORT or https://HOST")
        return endpoint

    @model_validator(mode="after")
    def check_place(self) -> Self:
        """An endpoint is one of a place."""
        if self.endpoint is not None and self.url is None:
            raise ValueError("endpoint: of no use without url; give storage.url, or take it away")
        return self


class Versioning(Frozen):
    """What git keeps of a run."""

    git_commit: bool = False  # each run ends in a commit of dvc.lock and the small files beside it


# Dagster takes an e-mail address, or team:NAME.
Owner = Annotated[str, StringConstraints(pattern=r"^(team:.+|[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,7})$")]


class Ray(Frozen):
    """A Ray cluster: where its job server is, and what it gives a training's worker or another stage's task."""

    address: str = Field("http://127.0.0.1:8265", pattern=r"^https?://[^\s@]+$")  # forwarded from the head
    training_workers: PositiveInt = 1
    gpus: NonNegativeInt = 1  # 0: the CPU computes
    cpus: PositiveInt = 4
    interface: str | None = (
        None  # by which a training's workers reach each other, as eth0; None: as their names resolve
    )
    shared: tuple[str, ...] = ()  # folders that every machine has under the same path, a network's file system
    losses: NonNegativeInt = 20  # of nodes, after which a stage is given up
    patience: PositiveFloat = 90  # seconds without an answer of the head, after which it is given up


class Deployment(Frozen):
    """What changes no result, and so is no stage's parameter: how this installation runs things and what it keeps."""

    storage: Storage = Storage()
    versioning: Versioning = Versioning()
    compute: Literal["local", "ray"] = "local"  # where stages with a network in them run
    ray: Ray = Ray()
    owners: tuple[Owner, ...] = ()  # of every asset, as Dagster's pages show them

    @model_validator(mode="after")
    def check_compute(self) -> Self:
        """A cluster's machines meet in the bucket."""
        if self.compute == "ray" and self.storage.url is None:
            raise ValueError("compute: ray wants storage.url, through which inputs and results travel; give it")
        return self
