"""What a check of this installation finds: in bounded time, whatever goes wrong, and with no secret in it."""

import os
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

LIMIT = 60.0  # seconds that a check may take; torch's import on a busy machine takes twenty
USER = re.compile(r"(?<=//)[^/\s]*@")  # USER:PASSWORD@ of a URL
SECRET = re.compile("SECRET|TOKEN|PASSWORD", re.IGNORECASE)  # names in the environment whose values are not shown
SHORTEST = 6  # characters of such a value: `yes` stands in many a text that gives nothing away


State = Literal["ok", "warn", "fail", "skipped"]


class Finding(NamedTuple):
    """The state of one thing, and how to mend it where that isn't as it should be."""

    state: State
    found: str
    remedy: str = ""


class Trouble(Exception):
    """Ends a check from below with what it finds."""

    def __init__(self, found: str, remedy: str, *, state: State = "fail") -> None:
        super().__init__(found)
        self.finding = Finding(state, found, remedy)


class Step(NamedTuple):
    """A check by name, and those that are of no use where it fails."""

    name: str
    check: Callable[[], Finding]
    then: "tuple[Step, ...]" = ()


def examine(steps: Iterable[Step], closed: str = "") -> Iterator[tuple[str, Finding]]:
    """What each step finds, in order; one that fails stops none but those that stand behind it."""
    for step in steps:
        finding = Finding("skipped", f"only after {closed!r}") if closed else within(step.check, LIMIT)
        yield step.name, finding
        yield from examine(step.then, closed or step.name * (finding.state == "fail"))


def within(check: Callable[[], Finding], seconds: float) -> Finding:
    """What the check finds, or that it raised an error, or didn't end; what hangs then ends with this process."""
    answer: queue.SimpleQueue[Finding] = queue.SimpleQueue()

    def work() -> None:
        try:
            found = check()
        except Trouble as trouble:
            found = trouble.finding
        except Exception as error:  # whatever it is, the other checks go on
            found = Finding("fail", str(error) or type(error).__name__)
        answer.put(found)

    threading.Thread(target=work, daemon=True).start()
    try:
        finding = answer.get(timeout=seconds)
    except queue.Empty:
        finding = Finding("fail", f"no end after {seconds:g} s", "look at what it waits for: a disk, a network, a GPU")
    return Finding(finding.state, shown(finding.found), shown(finding.remedy))


def shown(text: str) -> str:
    """The text as a line that may be shown: without secrets, and without what would steer a terminal."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value.strip()) >= SHORTEST:
            line = line.replace(value.strip(), "***")
    return USER.sub("", line)
