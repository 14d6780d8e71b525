"""Attempts at S3, and what comes after one that fails: another one after a random pause, or an error that says why.

Botocore repeats requests, within a second or two and, for all threads of a client, some thirty; it neither repeats nor
wraps what goes wrong once an answer has begun.
"""

import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

TRIES = 5
PAUSE = 0.5  # seconds: the first pause lasts up to twice that, each further one up to twice the last
CHUNK = 2**20  # bytes
# S3's words for: it isn't there, or not in this version; and for what may pass, though botocore takes it for an answer.
ABSENT = {"NoSuchKey", "404", "PreconditionFailed"}
PASSING = {"NoSuchUpload", "BadDigest", "XAmzContentChecksumMismatch", "ConditionalRequestConflict"}
PASSING |= {"InternalError", "SlowDown", "ServiceUnavailable"}  # of one name among many; else they are a STATUS
STATUS = {500, 502, 503, 504}
HIDDEN = re.compile(r"(?<=Invalid header value ).*|(?<=://)[^/@\s]*@")  # a token with a line's end; user:password@

Progress = Callable[[int], Any]  # is told bytes as they pass; they are negative where an attempt failed
Result = TypeVar("Result")


class BrokenError(Exception):
    """An attempt failed for a reason that may pass; told as the others are."""


@contextmanager
def telling(place: str) -> Iterator[None]:
    """Errors of boto3 as a ConnectionError that names the place."""
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (BotoCoreError, ClientError, ResponseParserError, HTTPError, BrokenError) as error:
        raise ConnectionError(
            f"{place}: {HIDDEN.sub('...', str(error))}; look at the credentials and what they permit, the region, the "
            "clock and AWS_ENDPOINT_URL_S3: `aws s3 ls` finds them in the same places. What is whole is kept"
        ) from None


def again(place: str, attempt: Callable[[], Result]) -> Result:
    """What the attempt returns. What may pass is tried again; what fails at last is told as above."""
    with telling(place):
        for number in range(1, TRIES):
            try:
                return attempt()
            except Exception as error:
                if not passes(error):
                    raise
            time.sleep(random.uniform(0, PAUSE * 2**number))
        return attempt()


def passes(error: Exception) -> bool:
    """Whether what botocore gave up may go well later: not where S3 refuses, nor where a server was silent for long."""
    from botocore.exceptions import ConnectionClosedError, EndpointConnectionError
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    if isinstance(
        error, ConnectionClosedError | EndpointConnectionError | ResponseParserError | HTTPError | BrokenError
    ):
        return True
    return answer_of(error).get("ResponseMetadata", {}).get("HTTPStatusCode") in STATUS or refusal(error) in PASSING


@contextmanager
def counted(progress: Progress) -> Iterator[Progress]:
    """Progress of one attempt, which is taken back if it fails."""
    sizes: list[int] = []

    def tell(size: int) -> None:
        sizes.append(size)
        progress(size)

    try:
        yield tell
    except BaseException:
        progress(-sum(sizes))
        raise


def chunks(answer: dict[str, Any]) -> Iterator[bytes]:
    """An object's bytes; BrokenError where they stop coming."""
    from botocore.exceptions import BotoCoreError
    from urllib3.exceptions import HTTPError

    try:
        yield from answer["Body"].iter_chunks(CHUNK)
    except (BotoCoreError, HTTPError) as error:
        raise BrokenError(str(error)) from None


@contextmanager
def absent() -> Iterator[None]:
    """Go on after the block where S3 says that an object, or this version of it, isn't there."""
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as error:
        if refusal(error) not in ABSENT:
            raise


def refusal(error: Exception) -> str:
    """S3's code for why it refused."""
    return str(answer_of(error).get("Error", {}).get("Code", ""))


def answer_of(error: Exception) -> dict[str, Any]:
    """S3's answer, if the error is one."""
    return getattr(error, "response", None) or {}
