"""An open-loop load generator: it sends requests on schedule, whether or not earlier requests have answers.

Independent clients behave the same way when a service is too slow for them. The requests are due at equal intervals, or
with `--poisson` at the times of a Poisson process. The generator measures every latency from the time at which the
request was due, so the latency includes any delay of the generator itself. It prints the result as JSON.

    python tests/helpers/open_loop.py HOST PORT REQUEST_FILE... --rate 1000 --seconds 10 [--poisson]
"""

import argparse
import asyncio
import itertools
import json
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast

import uvloop

CONNECTIONS = 800  # our service accepts at most 900
POLL_S = 1e-3  # time between two looks at the schedule
PATIENCE_S = 30.0  # wait for the last answers


@dataclass
class Tally:
    """The outcomes of the requests.

    Attributes:
        due: Number of requests on the schedule.
        unsent: Requests without a free connection; the generator is the cause, not the service.
        on_time: Answers with status 200 before the end of the schedule.
        accepted_ms: Latencies of all answers with status 200, in milliseconds.
        refused_ms: Latencies of the answers with status 503, in milliseconds.
        advised: Answers with status 503 and Retry-After.
        failed: Other answers, broken connections, and requests without an answer.
        seconds: Length of the schedule in seconds.
        cpu_s: CPU time of the generator during the schedule, in seconds.
        end: End of the schedule by this process's clock.
    """

    due: int = 0
    unsent: int = 0
    on_time: int = 0
    accepted_ms: list[float] = field(default_factory=list)
    refused_ms: list[float] = field(default_factory=list)
    advised: int = 0
    failed: int = 0
    seconds: float = 0.0
    cpu_s: float = 0.0
    end: float = float("inf")


class Connection(asyncio.Protocol):
    """A kept connection with at most one request in flight."""

    def __init__(self, tally: Tally, idle: list["Connection"]):
        self.tally = tally
        self.idle = idle
        self.due: float | None = None
        self._received = bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.idle.append(self)

    def send(self, request: bytes, due: float) -> None:
        self.due = due
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        if not separator or not length or len(body) < int(length[1]) or self.due is None:
            return
        now = time.perf_counter()
        latency_ms = (now - self.due) * 1000
        match head.split(b" ", 2)[1]:
            case b"200":
                self.tally.accepted_ms.append(latency_ms)
                self.tally.on_time += now < self.tally.end
            case b"503":
                self.tally.refused_ms.append(latency_ms)
                self.tally.advised += b"\r\nretry-after:" in head.lower()
            case _:
                self.tally.failed += 1
        self.due = None
        self._received.clear()
        self.idle.append(self)

    def connection_lost(self, _: Exception | None) -> None:
        if self.due is not None:
            self.tally.failed += 1
        self.due = None
        if self in self.idle:
            self.idle.remove(self)


def make_due_times(rate: float, poisson: bool) -> Iterator[float]:
    """Yield the seconds from the start at which requests are due, without an end.

    Args:
        rate: Requests per second.
        poisson: True for the times of a Poisson process, which are the same in every run. False for equal intervals.
    """
    generator, due = random.Random(0), 0.0  # noqa: S311  it is no secret
    while True:
        yield due
        due += generator.expovariate(rate) if poisson else 1 / rate


async def drive(
    host: str, port: int, requests: Sequence[bytes], due_times: Iterator[float], seconds: float, connections: int
) -> Tally:
    """Send requests on schedule for `seconds` seconds, then wait for the answers.

    Args:
        requests: Complete HTTP requests, sent in turn.
        due_times: Seconds from the start at which requests are due, see `make_due_times`.
        connections: Number of connections, and thus the largest number of requests in flight.
    """
    tally, idle = Tally(seconds=seconds), list[Connection]()
    loop = asyncio.get_running_loop()
    made = [(await loop.create_connection(lambda: Connection(tally, idle), host, port))[1] for _ in range(connections)]
    bodies = itertools.cycle(requests)
    start, cpu_before, due = time.perf_counter(), time.process_time(), next(due_times)
    tally.end = start + seconds
    while (now := time.perf_counter() - start) < seconds:
        while due < now:
            request = next(bodies)
            tally.due += 1
            if idle:
                idle.pop().send(request, start + due)
            else:
                tally.unsent += 1
            due = next(due_times)
        await asyncio.sleep(POLL_S)
    tally.cpu_s = time.process_time() - cpu_before
    while any(connection.due is not None for connection in made):
        if time.perf_counter() > tally.end + PATIENCE_S:
            break
        await asyncio.sleep(0.05)
    tally.failed += sum(connection.due is not None for connection in made)
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("requests", type=Path, nargs="+", help="files that hold whole HTTP requests")
    parser.add_argument("--rate", type=float, required=True, help="requests a second")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--poisson", action="store_true", help="requests are due at random times")
    parser.add_argument("--connections", type=int, default=CONNECTIONS)
    chosen = parser.parse_args()
    requests = [path.read_bytes() for path in chosen.requests]
    due_times = make_due_times(chosen.rate, chosen.poisson)
    tally = uvloop.run(drive(chosen.host, chosen.port, requests, due_times, chosen.seconds, chosen.connections))
    print(json.dumps(asdict(tally)))


if __name__ == "__main__":
    main()
