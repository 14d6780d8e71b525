"""S3's ETag of an object: a digest of its bytes, unless it lies encrypted under a key of its own."""

import hashlib
from typing import Any


def is_digest(etag: str) -> bool:
    """Whether an ETag looks like a digest of the bytes, or of an upload in parts."""
    digest, _, _ = etag.partition("-")
    return len(digest) == 32 and set(digest) <= set("0123456789abcdef")


def is_encrypted(answer: dict[str, Any]) -> bool:
    """Whether the object lies encrypted under a key of its own: its ETag is then no digest."""
    return str(answer.get("ServerSideEncryption", "")).startswith("aws:kms") or "SSECustomerAlgorithm" in answer


class EtagCheck:
    """S3's ETag of bytes: their md5; of an upload in parts, the md5 of the parts' md5s and how many there were."""

    def __init__(self, part_size: int | None) -> None:
        self.part_size, self.room = part_size, part_size
        self.part, self.digests = md5(), list[bytes]()

    def update(self, data: bytes) -> None:
        """Take the next bytes."""
        while self.room is not None and self.part_size is not None and len(data) >= self.room:
            self.part.update(data[: self.room])
            self.digests.append(self.part.digest())
            data, self.part, self.room = data[self.room :], md5(), self.part_size
        self.part.update(data)
        if self.room is not None:
            self.room -= len(data)

    def etag(self) -> str:
        """The ETag of what was taken."""
        if self.part_size is None:
            return str(self.part.hexdigest())
        digests = self.digests if self.room == self.part_size else [*self.digests, self.part.digest()]
        return f"{md5(b''.join(digests)).hexdigest()}-{len(digests)}"


def md5(data: bytes = b"") -> Any:
    """A hash of S3's kind."""
    return hashlib.md5(data, usedforsecurity=False)
