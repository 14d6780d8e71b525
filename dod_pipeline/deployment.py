"""The key `deployment` of params.yaml: how this installation runs things and what it keeps. No result depends on it."""

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import PositiveFloat, StringConstraints, field_validator, model_validator

from dod_models.config import S3, Frozen, place_of_copy


class Storage(Frozen):
    """The place in S3 of everything that is kept, and when DVC pushes what was computed: after each stage, at a run's
    end, or by hand. A URL alone stands for a place with the rest as it is. Credentials are found as AWS's tools do."""

    url: str | None = None  # s3://BUCKET/PREFIX; None: what is kept stays in this folder and on DVC's own remote
    endpoint: str | None = None  # http(s)://HOST:PORT of an S3 server that isn't AWS's
    push: Literal["each", "end", "never"] = "never"  # `each` where a URL is given
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


class Deployment(Frozen):
    """What changes no result, and so is no stage's parameter: how this installation runs things and what it keeps."""

    storage: Storage = Storage()
    versioning: Versioning = Versioning()
    owners: tuple[Owner, ...] = ()  # of every asset, as Dagster's pages show them
