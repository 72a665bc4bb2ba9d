"""Test that clients that hold connections without using them do not keep other clients from being served.

A real server gets 905 connections from an attacker at 127.0.0.2, who reopens each connection that the server closes.
Meanwhile 20 clients, each with its own address, open a new connection for each of their predictions. The attacker sends
nothing, sends a head or a body slowly, reads no answer, or keeps answered connections open. Each attack then comes from
16 addresses. Finally the attacker sends its bodies through a real nginx, which forwards them unbuffered.

    python tests/stress/connection_attacks.py [--sockets 905] [--workers 1]

Time: at least one minute: 14 attacks of at least 4.5 s.
Result: each of 14 attacks left 300 of 300 predictions answered, with one worker and with two (Intel Xeon, 2 cores,
2026-11-28).
Table: results/connection_attacks.md, results/connection_attacks_workers.md (`--workers 2`).
"""

import argparse
import asyncio
import contextlib
import http.client
import io
import multiprocessing
import resource
import socket
import statistics
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))

import nginx
import tiny_models
from PIL import Image
from results import Check, conclude, is_whole
from server import Server
from sockets import Address, make_head, make_upload

CLIENTS = 20
REQUESTS = 15  # per client
PAUSE_S = 0.1
TIMEOUT_S = 5.0
RAMP_S = 3.0
REOPEN_S = 0.5
BODY_BYTES_PER_S = 3500


@dataclass(frozen=True)
class Attack:
    """The bytes that each connection of an attack sends.

    Attributes:
        name: Name of the attack.
        first: Bytes that a connection sends at once.
        more: Bytes that a connection sends every second after that.
    """

    name: str
    first: bytes
    more: bytes = b""


SILENT = Attack("silent", b"")
SLOW_HEAD = Attack("slow head", make_head("POST /predict", b"X-Slow: ").removesuffix(b"\r\n\r\n"), b"a")
SLOW_BODY = Attack("slow body", make_upload(10_000_000), bytes(BODY_BYTES_PER_S))
HALF_BODY = Attack("half-sent body", make_upload(10_000_000) + b"abc")
SLOW_READER = Attack("slow reader", make_head("GET /openapi.json") * 5)
HOARDER = Attack("keep-alive hoarder", make_head("GET /health/live"))
ATTACKS = (SILENT, SLOW_HEAD, SLOW_BODY, HALF_BODY, SLOW_READER, HOARDER)


async def _hold(target: Address, source: str, attack: Attack, delay_s: float) -> None:
    """Keep one connection open, and reopen it when the server closes it."""
    loop = asyncio.get_running_loop()
    await asyncio.sleep(delay_s)
    while True:
        with socket.socket() as connection, contextlib.suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.setblocking(False)
            connection.bind((source, 0))
            await loop.sock_connect(connection, target)
            await loop.sock_sendall(connection, attack.first)
            while True:
                if attack is SLOW_READER:
                    await asyncio.sleep(1)
                    continue
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1):
                        if not await loop.sock_recv(connection, 4096):
                            break
                await loop.sock_sendall(connection, attack.more)
        await asyncio.sleep(REOPEN_S)


def _attack(target: Address, sources: list[str], attack: Attack, sockets: int, begun: Event, end: Event) -> None:
    async def run() -> None:
        each = [
            asyncio.create_task(_hold(target, sources[number % len(sources)], attack, RAMP_S * number / sockets))
            for number in range(sockets)
        ]
        await asyncio.sleep(RAMP_S + 1)
        begun.set()
        await asyncio.to_thread(end.wait)
        for task in each:
            task.cancel()

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    asyncio.run(run())


def _predict(target: Address, source: str, image: bytes) -> tuple[str, float]:
    """Return the outcome of one prediction on a new connection, and its duration in seconds."""
    started = time.monotonic()
    connection = http.client.HTTPConnection(*target, timeout=TIMEOUT_S, source_address=(source, 0))
    try:
        connection.request("POST", "/predict", image, {"Content-Type": "image/png"})
        response = connection.getresponse()
        response.read()
        outcome = str(response.status)
    except (OSError, http.client.HTTPException) as error:
        outcome = type(error).__name__
    finally:
        connection.close()
    return outcome, time.monotonic() - started


def _under_attack(target: Address, sources: list[str], attack: Attack, sockets: int, image: bytes) -> tuple[int, str]:
    """Return the number of honest predictions that the service served, and a description of all of them."""

    def client(number: int) -> list[tuple[str, float]]:
        results = []
        for _ in range(REQUESTS):
            results.append(_predict(target, f"127.0.2.{number + 1}", image))
            time.sleep(PAUSE_S)
        return results

    spawning = multiprocessing.get_context("spawn")
    begun, end = spawning.Event(), spawning.Event()
    attacker = spawning.Process(target=_attack, args=(target, sources, attack, sockets, begun, end))
    attacker.start()
    try:
        if not begun.wait(60):
            raise TimeoutError("the attack has not begun within 60 s")
        with ThreadPoolExecutor(CLIENTS) as clients:
            results = [result for each in clients.map(client, range(CLIENTS)) for result in each]
    finally:
        end.set()
        attacker.join(20)
        attacker.kill()
    outcomes = Counter(outcome for outcome, _ in results)
    times = sorted(seconds for outcome, seconds in results if outcome == "200")
    described = f"{outcomes['200']} of {len(results)}"
    if times:
        p99 = times[min(len(times) - 1, int(len(times) * 0.99))]
        described += f", p50 {statistics.median(times) * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms"
    others = ", ".join(f"{count} x {outcome}" for outcome, count in outcomes.items() if outcome != "200")
    return outcomes["200"], described + (f" ({others})" if others else "")


def main(sockets: int, workers: int, whole: bool) -> int:
    """Run all attacks and return the exit status."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(buffer, "PNG")
    image = buffer.getvalue()
    several = [f"127.0.1.{number}" for number in range(1, 17)]
    checks = []

    def check(what: str, target: Address, sources: list[str], attack: Attack, percent: int) -> None:
        served, described = _under_attack(target, sources, attack, sockets, image)
        checks.append(Check(what, described, f">= {percent} % served", served >= CLIENTS * REQUESTS * percent / 100))
        print(f"{what}: {described}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tiny_models.make_store(folder)
        with Server(folder / "models", folder / "runs", folder / "log", workers=str(workers)) as server:
            target = nginx.parse_address(server.address or "")
            for attack in ATTACKS:
                check(f"{attack.name}, 1 address", target, ["127.0.0.2"], attack, 99)
                check(f"{attack.name}, 16 addresses", target, several, attack, 90)
        if nginx.is_installed():
            trusting = {"trusted_proxies": "127.0.0.1", "workers": str(workers)}
            with (
                Server(folder / "models", folder / "runs-behind", folder / "log-behind", **trusting) as server,
                nginx.run_nginx(folder, server.address or "", "proxy_request_buffering off;") as url,
            ):
                for sources, words, percent in ((["127.0.0.2"], "1 address", 99), (several, "16 addresses", 90)):
                    check(f"slow body through nginx, {words}", nginx.parse_address(url), sources, SLOW_BODY, percent)
        traces = sum(log.read_text().count("Traceback") for log in folder.glob("log*"))
    checks.append(Check("errors with a traceback in the log", f"{traces}", "0", traces == 0))
    return conclude(
        __file__,
        f"{sockets} connections of an attacker, {CLIENTS} clients with {REQUESTS} predictions each.",
        checks,
        workers,
        whole=whole,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sockets", type=int, default=905)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    sys.exit(main(given.sockets * given.workers, given.workers, is_whole(parser, given)))
