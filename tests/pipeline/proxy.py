"""A TCP proxy between a client and the S3 server, on loopback: it does harm when it is told to, and counts that it did.

Each connection carries one request, which the server is asked to end with the connection.
"""

import os
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ALWAYS = 10**9
STATUS = {
    "SlowDown": (503, "Please reduce your request rate."),
    "InternalError": (500, "We encountered an internal error. Please try again."),
}
# What else it does: RESET before the server sees the request; LOST, a reset once the server has answered; HANG, nothing
# at all; and an answer's or request's body that ends too early.
RESET, LOST, HANG, CUT_ANSWER, CUT_REQUEST = "reset", "answer lost", "hang", "answer cut", "request cut"
TABLE = "DOD_FAULT_TABLE"  # environment: a file to which tests add what they saw


@dataclass
class Fault:
    """Harm to requests whose first line matches `on`, so many times."""

    kind: str
    on: str
    times: int
    share: float  # of the body that passes


class Proxy:
    """Listens on a port of its own; `fired` counts faults by kind, `requests` are first lines."""

    def __init__(self, upstream: str) -> None:
        self.upstream = upstream  # http://HOST:PORT; may be changed
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.lock, self.healed = threading.Lock(), threading.Event()
        self.plan: list[Fault] = []
        self.fired: Counter[str] = Counter()
        self.requests: list[str] = []
        threading.Thread(target=self.accept, daemon=True).start()

    def fail(self, kind: str, *, on: str = "", times: int = 1, share: float = 0.5) -> None:
        """Plan a fault."""
        with self.lock:
            self.healed = threading.Event()
            self.plan.append(Fault(kind, on, times, share))

    def heal(self) -> None:
        """Do no more harm; let go what hangs; count from nothing."""
        with self.lock:
            self.plan, self.fired, self.requests = [], Counter(), []
            self.healed.set()

    def close(self) -> None:
        """End it."""
        self.heal()
        self.listener.close()

    def accept(self) -> None:
        """Give each connection a thread."""
        with suppress(OSError):  # closed
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def take(self, line: str, length: int) -> Fault | None:
        """What is planned for this request; without a body it can't be cut."""
        with self.lock:
            self.requests.append(line)
            for fault in self.plan:
                if fault.times > 0 and re.search(fault.on, line) and (length or fault.kind != CUT_REQUEST):
                    fault.times -= 1
                    return fault
        return None

    def count(self, fault: Fault) -> None:
        """Note that a fault fired."""
        with self.lock:
            self.fired[fault.kind] += 1

    def serve(self, client: socket.socket) -> None:
        """One request."""
        with client, suppress(OSError):
            client.settimeout(60)
            head, rest = read_head(client)
            line = head.partition(b"\r\n")[0].decode()
            if not line:
                return
            fault = self.take(line, content_length(head))
            if fault is None or fault.kind in (LOST, CUT_ANSWER, CUT_REQUEST):
                self.relay(client, head, rest, fault)
                return
            if fault.kind == HANG:
                self.count(fault)
                self.healed.wait(300)
            elif fault.kind == RESET:
                self.count(fault)
                reset(client)
            else:
                self.count(fault)
                refuse(client, fault.kind)

    def relay(self, client: socket.socket, head: bytes, rest: bytes, fault: Fault | None) -> None:
        """Pass a request on and its answer back, with what is to go wrong on the way."""
        host, _, port = self.upstream.removeprefix("http://").rpartition(":")
        try:
            server = socket.create_connection((host, int(port)), timeout=60)
        except OSError:  # no server: as it says so itself
            reset(client)
            return
        with server:
            length = content_length(head)
            passed = int(length * fault.share) if fault and fault.kind == CUT_REQUEST else length
            there = threading.Thread(target=send, args=(client, server, head, rest, passed), daemon=True)
            there.start()
            if fault is None:
                pump(server, client)
            elif fault.kind == CUT_REQUEST:
                back = threading.Thread(target=pump, args=(server, client), daemon=True)
                back.start()  # "100 Continue", without which there is no body
                there.join()
                self.count(fault)
                reset(client)
                server.shutdown(socket.SHUT_RDWR)
                back.join()
            else:
                self.harm_answer(client, server, fault)

    def harm_answer(self, client: socket.socket, server: socket.socket, fault: Fault) -> None:
        """Cut or lose what the server says, once it has said it all."""
        head, rest = read_head(server)
        while head.startswith(b"HTTP/1.1 100"):
            client.sendall(head)
            head, rest = read_head(server, rest)
        body = rest + b"".join(iter(lambda: server.recv(2**16), b""))
        if fault.kind == LOST:
            self.count(fault)
            reset(client)
            return
        if body:
            self.count(fault)
        client.sendall(head + body[: int(len(body) * fault.share)])


def read_head(sock: socket.socket, data: bytes = b"") -> tuple[bytes, bytes]:
    """A head with its empty line, and what came after it; nothing where the other side has left."""
    while b"\r\n\r\n" not in data:
        more = sock.recv(2**16)
        if not more:
            return b"", b""
        data += more
    head, _, rest = data.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


def content_length(head: bytes) -> int:
    """How long a request's body will be."""
    found = re.search(rb"\r\ncontent-length: *(\d+)", head, re.IGNORECASE)
    return int(found[1]) if found else 0


def send(client: socket.socket, server: socket.socket, head: bytes, rest: bytes, length: int) -> None:
    """Pass on a request, with so much of its body."""
    with suppress(OSError):
        server.sendall(head[:-2] + b"Connection: close\r\n\r\n" + rest[:length])
        left = length - len(rest)
        while left > 0 and (data := client.recv(min(left, 2**16))):
            server.sendall(data)
            left -= len(data)


def pump(source: socket.socket, target: socket.socket) -> None:
    """Pass on what comes until no more does."""
    with suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)


def reset(client: socket.socket) -> None:
    """Close without a farewell: the other side gets an RST."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def refuse(client: socket.socket, code: str) -> None:
    """Answer with one of S3's errors, then read what still comes: to close with unread bytes would be a reset."""
    status, message = STATUS[code]
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{message}</Message></Error>"
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    client.sendall(f"{head}Connection: close\r\n\r\n{body}".encode())
    client.shutdown(socket.SHUT_WR)
    client.settimeout(5)
    while client.recv(2**16):
        pass


@contextmanager
def proxied(upstream: str) -> Iterator[Proxy]:
    """A proxy for the block."""
    proxy = Proxy(upstream)
    try:
        yield proxy
    finally:
        proxy.close()


def note(fault: str, operation: str, outcome: str, fired: int) -> None:
    """Add a line to the table, if there is one."""
    if os.environ.get(TABLE):
        with Path(os.environ[TABLE]).open("a") as file:
            file.write(f"| {fault} | {operation} | {outcome} | {fired} |\n")
