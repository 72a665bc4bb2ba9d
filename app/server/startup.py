"""Checks the settings, the model store and the listening address before any model is loaded.

Output: `Settings` and listening sockets, or a `StartupError` whose text is one line for the operator.
"""

import errno
import ipaddress
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, cast

from pydantic import ValidationError

from app.settings import Settings
from training.errors import WRONG_USAGE, ReportedError
from training.store import LocalStore, StoreError, make_store

BACKLOG = 2048
"""Maximum number of connections that wait to be accepted."""

_LOCALHOST = ("127.0.0.1", "::1")  # RFC 6761, whatever the hosts file of the machine says
_ANY_IPV4, _ANY_IPV6 = "0.0.0.0", "::"  # noqa: S104
_ATTEMPTS = 20  # attempts to find a port that is free at every address
_ADDRESS_MISSING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class StartupError(ReportedError):
    """A setting that prevents the start. The text names the setting, the reason and the remedy."""


def read_settings(options: Mapping[str, str] | None = None) -> Settings:
    """Read the settings from options and, for others, from the environment.

    Args:
        options: Values by the names of the settings, as texts.

    Raises:
        StartupError: An option or a variable has an invalid value, or a variable has an unknown name.
    """
    options = options or {}
    try:
        return Settings(**cast(dict[str, Any], options))
    except ValidationError as error:
        faults = error.errors()
        refused = StartupError("; ".join(_describe_fault(fault, options) for fault in faults))
        if all(fault["loc"] and fault["loc"][0] in options for fault in faults):
            refused.exit_status = WRONG_USAGE
        raise refused from None


def _describe_fault(error: Any, options: Mapping[str, str]) -> str:
    name = "_".join(map(str, ("CIFAR100", *error["loc"]))).upper()
    if error["loc"] and error["loc"][0] in options:
        name = "--" + error["loc"][0].replace("_", "-")
    message = error["msg"].removeprefix("Value error, ")
    return f"{name}: {message}" if error["loc"] else message


def check_store(settings: Settings) -> None:
    """Check that the model store is readable and contains the default model.

    An empty store or one that does not exist yet is not an error, because training jobs can fill it.

    Raises:
        StartupError: The store cannot be read, or it has models but not the default one.
    """
    try:
        store = make_store(settings.models)
        if not (isinstance(store, LocalStore) and _can_be_created(store.root)):
            store.require_access()
        names = store.names()
    except StoreError as error:
        raise StartupError(f"CIFAR100_MODELS: {error}") from None
    except OSError as error:
        raise StartupError(
            f"CIFAR100_MODELS: the model store {settings.models} cannot be read: {error.strerror}"
        ) from None
    wanted = settings.default_model
    if names and wanted and wanted not in names:
        raise StartupError(
            f"CIFAR100_DEFAULT_MODEL: there is no model {wanted!r} in {store.location}, give one of {', '.join(names)}"
        )


def _can_be_created(folder: Path) -> bool:
    return not os.path.lexists(folder) and folder.parent.is_dir()


def listen(host: str, port: int) -> list[socket.socket]:
    """Listen on every address of a host, so that no other process can. Connections wait until they are accepted.

    Args:
        host: An address, or a name that may have several addresses. localhost has 127.0.0.1 and ::1. The address ::
            stands for all addresses of the machine, IPv6 and IPv4.
        port: Port number. 0 takes a free port, the same for all addresses.

    Returns:
        One nonblocking listening socket per address.

    Raises:
        StartupError: The port is in use, or the host is not an address of this machine.
    """
    try:
        addresses = _find_addresses(host, port)
        for _ in range(0 if port else _ATTEMPTS):
            with suppress(OSError):  # a port that is free at one address may be taken at another
                return _listen_on_all(addresses)
        return _listen_on_all(addresses)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise StartupError(
            f"cannot listen on {format_authority(host, port)}: {reason}; choose a free address of this machine by "
            "CIFAR100_HOST and CIFAR100_PORT"
        ) from None


def _find_addresses(host: str, port: int) -> list[tuple[int, Any]]:
    """Return the socket family and the address of every address of a host.

    Raises:
        OSError: The host has no address.
    """
    addresses: dict[tuple[int, Any], None] = {}
    for name in _LOCALHOST if host.lower() == "localhost" else (host,):
        for family, _, _, _, address in socket.getaddrinfo(name, port, type=socket.SOCK_STREAM):
            if family == socket.AF_INET6 and (mapped := _mapped_ipv4(str(address[0]))):
                addresses[socket.AF_INET, (mapped, port)] = None
                continue
            addresses[family, address] = None
            if address[0] == _ANY_IPV6:
                addresses[socket.AF_INET, (_ANY_IPV4, port)] = None
    return list(addresses)


def _mapped_ipv4(address: str) -> str | None:
    """Return the IPv4 address of an IPv4-mapped IPv6 address, or None for other IPv6 addresses."""
    mapped = ipaddress.IPv6Address(address).ipv4_mapped
    return str(mapped) if mapped else None


def _listen_on_all(addresses: Iterable[tuple[int, Any]]) -> list[socket.socket]:
    """Listen on one port at every available address. For port 0, the first address determines the port."""
    with ExitStack() as on_error:
        sockets: list[socket.socket] = []
        absent: OSError | None = None
        for family, address in addresses:
            if sockets:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sockets.append(on_error.enter_context(_listen_at(family, address)))
            except OSError as error:  # a name may have an IPv6 address although the machine has no IPv6
                if error.errno not in _ADDRESS_MISSING:
                    raise
                absent = error
        if absent and not sockets:
            raise absent
        on_error.pop_all()
        return sockets


def _listen_at(family: int, address: Sequence[Any]) -> socket.socket:
    listening = socket.socket(family)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # IPv4 has a socket of its own, so that clients have plain IPv4 addresses
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listening.bind(tuple(address))
        listening.listen(BACKLOG)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening


def format_authority(host: str, port: int) -> str:
    """Format host and port as in a URL, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def format_address(address: Any) -> str:
    """Format the address of a listening socket for the log.

    Args:
        address: Path of a unix socket, or a tuple that begins with host and port.
    """
    return f"unix:{address}" if isinstance(address, str) else f"http://{format_authority(*address[:2])}"
