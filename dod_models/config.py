"""The frozen base of every config class: load, validate, digest.

A config class stands beside the function that it configures; this file holds only what they share.
"""

import hashlib
import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

Config = TypeVar("Config", bound="Frozen")  # typing.Self is beyond beartype in a class it doesn't decorate


class Frozen(BaseModel):
    """A small, closed, immutable config: an unknown key is an error that names it."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def parse(cls: type[Config], values: object, *, place: str) -> Config:
        """Validate `values`; a ValueError names `place`, each bad key, its value and what was expected."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ValueError(explain(error, place=place)) from None

    @classmethod
    def load(cls: type[Config], text_or_path: str) -> Config:
        """Read a config from a JSON file, or from the JSON text itself."""
        is_text = text_or_path.lstrip().startswith("{")
        place = "the command line" if is_text else text_or_path
        text = text_or_path if is_text else Path(text_or_path).read_text()
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{place}: not JSON ({error}); write an object such as {{}}") from None
        return cls.parse(values, place=place)

    def canonical(self) -> str:
        """JSON with sorted keys: equal configs give equal text."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)

    @property
    def digest(self) -> str:
        """sha256 of the canonical JSON, in hexadecimal."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()


def explain(error: ValidationError, *, place: str) -> str:
    """Turn a pydantic error into lines of `place: key: what is wrong (value)`."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"]) or "(the whole)"
        if item["type"] == "extra_forbidden":
            lines.append(f"{place}: {key}: unknown key; remove it or correct its spelling")
        elif item["type"] == "missing":
            lines.append(f"{place}: {key}: missing; add it")
        else:
            lines.append(f"{place}: {key}: {item['msg'].removeprefix('Value error, ')} (got {item['input']!r})")
    return "\n".join(lines)
