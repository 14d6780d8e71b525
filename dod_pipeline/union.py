"""The union of everybody's records: `history/` below the place in S3 that `deployment.storage` names.

Queries read the folder here, which is brought together with it first: what lacks on either side is copied. A record is
named by its digest and never changes, so there is nothing to reconcile.

That costs one request, for the names that were added last (`RECENT`, to which whoever adds records appends), and one
for each record that lacks. All names are listed, 1,000 a request, where those last ones don't reach back far enough,
and once an hour; they are kept below `.state/history/`.
"""

import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from dod_models import artifact
from dod_pipeline import config, ledger
from dod_pipeline.catalogue import INDEXES, PATIENCE
from dod_pipeline.ledger import HISTORY
from dod_pipeline.s3 import CONNECTIONS, Bucket, ChangedError, reaching

RECENT = "history-recent.txt"  # beside the folder of records: names, the newest last
REACH = 500  # of them at most
EVERY = 3600.0  # seconds between two listings
SOON = 15.0  # seconds that a command waits for a server's first answer
RECORD = re.compile(r"([A-Za-z0-9][A-Za-z0-9_@.-]*/)+[0-9a-f]{64}\.json")

Result = TypeVar("Result")


class Known(NamedTuple):
    """What was there at the last look."""

    names: frozenset[str]
    last: str  # of `RECENT`; "": it was empty
    listed: float  # when, in Unix time


def sync() -> None:
    """Bring both together, where `deployment.storage.url` is given. What goes wrong is said on stderr and made good by
    the next call: no query fails because S3 is out of reach."""
    try:
        url = config.storage().url
        if url is not None:
            with reaching(url) as bucket:
                meet(bucket, HISTORY)
    except (ValueError, OSError) as error:
        ledger.warn(f"history/ is not brought up to date: {error}. What lacks goes with the next command")


def meet(bucket: Bucket, root: Path) -> None:
    """Copy what lacks, first to here."""
    note = INDEXES / f"{sha256(bucket.url.encode()).hexdigest()[:16]}.names"
    recent = soon(bucket, lambda: bucket.read(RECENT))
    here, there = names_in(root), look(bucket, recent[0].decode().split() if recent else [], read(note))
    write(note, there)
    each(lambda name: take(bucket, root, name), there.names - here, "fetch the history")
    if sent := each(lambda name: give(bucket, root, name), here - there.names, "upload the history"):
        last = announce(bucket, sent, there.last)
        write(note, Known(there.names.union(sent), last, there.listed))


def names_in(root: Path) -> frozenset[str]:
    """The records of a folder, with all that is named like one."""
    found = ((Path(folder).relative_to(root), files) for folder, _, files in os.walk(root))
    names = (f"{folder.as_posix()}/{name}" for folder, files in found for name in files)
    return frozenset(name for name in names if RECORD.fullmatch(name))


def soon(bucket: Bucket, ask: Callable[[], Result]) -> Result:
    """The answer to a first request; ConnectionError where it takes long, as a server that hangs would. Whoever asks is
    left to itself then, and ends with this process."""
    answer: Future[Result] = Future()

    def body() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    try:
        return answer.result(SOON)
    except TimeoutError:
        raise ConnectionError(f"{bucket.url}: no answer within {SOON:g} s") from None


def look(bucket: Bucket, recent: list[str], known: Known | None) -> Known:
    """What is there now, from the names that were added last and what was known before."""
    last = recent[-1] if recent else ""
    if known is not None and known.last in recent and time.time() - known.listed < EVERY:
        added = recent[recent.index(known.last) :]
        return Known(known.names.union(filter(RECORD.fullmatch, added)), last, known.listed)
    names, began = set(), time.time()
    for item in bucket.objects(below=HISTORY.name):
        name = item.name.removeprefix(f"{HISTORY.name}/")
        if RECORD.fullmatch(name):
            names.add(name)
        else:
            ledger.warn(f"{bucket.url}/{item.name}: no record's name; left out")
    return Known(frozenset(names), last, began)


def each(do: Callable[[str], str], names: Collection[str], title: str) -> list[str]:
    """Those of the names for which it returns "", several at a time; what it says of the others is told."""
    order, fine = sorted(names), []
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        done = tqdm(pool.map(do, order), total=len(order), desc=title, unit=" records", disable=len(order) < PATIENCE)
        for name, wrong in zip(order, done, strict=True):
            if wrong:
                ledger.warn(wrong)
            else:
                fine.append(name)
    return fine


def take(bucket: Bucket, root: Path, name: str) -> str:
    """Fetch a record; what is wrong with it."""
    place = f"{HISTORY.name}/{name}"
    found = bucket.read(place)
    wrong = ledger.wrong_with(name, found[0]) if found else "it was removed"
    if found and not wrong:
        ledger.put(root / name, found[0])
        return ""
    return f"{bucket.url}/{place}: {wrong}; left out. Where it is removed, whoever has it whole uploads it again"


def give(bucket: Bucket, root: Path, name: str) -> str:
    """Upload a record, unless it is there; what is wrong with it."""
    try:
        bucket.write(f"{HISTORY.name}/{name}", ledger.read(root / name).encode(), etag=None)
    except ChangedError:
        pass  # another one had it, too
    except artifact.DamagedError as error:
        return str(error)
    return ""


def announce(bucket: Bucket, names: list[str], last: str) -> str:
    """Append names to those that were added last; up to which of them they are known to whoever knew them up to
    `last`."""
    while True:
        found = bucket.read(RECENT)
        recent = found[0].decode().split() if found else []
        try:
            added = [*recent, *names][-REACH:]
            bucket.write(RECENT, "\n".join(added).encode(), etag=found[1] if found else None)
        except ChangedError:  # another one appended meanwhile
            continue
        return names[-1] if last == (recent[-1] if recent else "") else last


def read(note: Path) -> Known | None:
    """What was noted; None where nothing was, or what can't be read."""
    try:
        about, *names = note.read_text().splitlines()
        return Known(frozenset(names), **json.loads(about))
    except (OSError, ValueError, TypeError):
        return None


def write(note: Path, known: Known) -> None:
    """Note it for the next look."""
    note.parent.mkdir(parents=True, exist_ok=True)
    beside = note.with_name(f".{uuid.uuid4().hex}.partial")
    beside.write_text("\n".join([json.dumps({"last": known.last, "listed": known.listed}), *known.names]))
    os.replace(beside, note)
