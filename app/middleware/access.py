"""Decides which clients may make a call. Reading and predicting are open; costly or changing calls need an operator.

request --> API key, or a local caller where no key is configured --> rate limit --> route
            401 wrong or none   403 not local                         429
"""

import hashlib
import hmac
import ipaddress
import math
import re
import time
from collections import OrderedDict
from typing import Annotated, Any, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from limits import RateLimitItem
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from app.clients import client_network
from app.exceptions import Forbidden, TooManyRequests, Unauthorized
from app.settings import Settings

_WRONG_KEYS = "wrong keys"
_MAX_HOLDERS = 10_000
_MAX_QUOTED = 100  # characters of a header that an error quotes

# Proxies and content delivery networks add headers. Their names contain one of these words, or end with a word for the
# client address: X-Real-IP, True-Client-IP, X-Remote-Addr.
_PROXY_WORDS = {"akamai", "arr", "azure", "cdn", "cf", "envoy", "fastly", "forward", "forwarded", "forwards", "incap"}
_PROXY_WORDS |= {"original", "proxied", "proxy", "rewrite", "sucuri", "tailscale", "varnish", "via"}
_ADDRESS_ENDINGS = ("ip", "addr", "address")

# RFC 3986, section 3.2, without user information: a name, an IPv4 address or an IPv6 address in brackets, plus a port.
_AUTHORITY = re.compile(r"(?:\[(?P<ipv6>[0-9a-fA-F:.]+)\]|(?P<name>[0-9a-zA-Z.-]+))(?::(?P<port>[1-9][0-9]{0,4}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_PORT = 65535


class Access:
    """The access rules and rate limits of one service.

    The access check comes before the rate limit, so a refused request does not use the operator's limit. A foreign web
    page in the operator's browser, or a stranger at the operator's address, cannot exhaust it. A call with a valid key
    counts for this key at this address. Any other call counts for its address.

    Wrong keys have a separate limit per address. While an address is over it, the service refuses every key from there
    without a check, so a further guess fails even if the key is valid. Keys that were valid at this address before are
    the exception: their holders are not locked out by a stranger at the same address. The cost is that this stranger
    can guess such a key without a limit. Keys have at least 16 characters for this reason. Requests without a key are
    not guesses and do not count.

    Args:
        settings: API keys, listening address and rate limits.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._keys = [_digest(key.get_secret_value()) for key in settings.api_keys]
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._holders: OrderedDict[tuple[bytes, str], None] = OrderedDict()
        """Pairs of the digest of a valid key and the client that sent it, most recent last."""

    def require_operator(self, request: Request, key: str | None) -> None:
        """Accept only operators: clients with a key or, if no key is configured, clients on this machine.

        Raises:
            Unauthorized: The key is missing or wrong.
            Forbidden: No key is configured and the request is not local.
            TooManyRequests: The client is over the rate limit of these calls or of wrong keys.
        """
        if not self._keys and (reason := self._reason_not_local(request)):
            raise Forbidden(
                f"{reason}, so this call needs an API key: start the service with CIFAR100_API_KEYS set to a secret "
                "of your own and send it as 'Authorization: Bearer SECRET'"
            )
        holder = self._authenticate(request, key) if self._keys else ""
        self._charge(self._settings.operator_rate_limit, "calls", _client(request), holder)

    def require_predictor(self, request: Request) -> None:
        """Accept only clients that may predict. By default, every client may.

        Raises:
            Unauthorized: Predictions need a key, and it is missing or wrong.
            TooManyRequests: The client is over the rate limit of predictions or of wrong keys.
        """
        if not (self._settings.predict_needs_key or self._settings.predict_rate_limit):
            return
        holder = self._authenticate(request, _bearer_key(request)) if self._settings.predict_needs_key else ""
        self._charge(self._settings.predict_rate_limit, "predictions", _client(request), holder)

    def charge_prediction(self, request: Request, units: int, remedy: str = "send fewer or smaller images") -> None:
        """Charge additional units to the prediction rate limit, because a request is more costly than a small image.

        Raises:
            TooManyRequests: The client is over the rate limit, or the request costs more than the whole limit.
        """
        limit, key = self._settings.predict_rate_limit, _bearer_key(request)
        if limit and units >= limit.amount:
            detail = f"this request costs {units + 1} units of the rate limit of {limit}"
            raise TooManyRequests(f"{detail}; {remedy}", limit.get_expiry())
        holder = _digest(key).hex() if key and self._settings.predict_needs_key else ""
        self._charge(limit, "predictions", _client(request), holder, units=units)

    @property
    def has_keys(self) -> bool:
        """True if API keys are configured."""
        return bool(self._keys)

    def is_key(self, key: str) -> bool:
        """Return whether `key` is one of the API keys."""
        given = _digest(key)
        # Every key is compared in constant time, so the response time reveals nothing about the keys.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return any(matches)

    def _authenticate(self, request: Request, key: str | None) -> str:
        """Return the digest of a valid key.

        Raises:
            Unauthorized: The key is missing or wrong.
            TooManyRequests: The client sent too many wrong keys, and it has not sent this key successfully before.
        """
        if key is None:
            raise Unauthorized("this call needs an API key: send it as 'Authorization: Bearer KEY'")
        given, client, limit = _digest(key), _client(request), self._settings.operator_rate_limit
        is_right = self.is_key(key)
        if not (is_right and (given, client) in self._holders):
            if limit and not self._limiter.test(limit, _WRONG_KEYS, client):
                raise self._too_many(limit, _WRONG_KEYS, client)
            if not is_right:
                self._charge(limit, _WRONG_KEYS, client)
                raise Unauthorized("the API key is not valid")
        self._holders[given, client] = None
        self._holders.move_to_end((given, client))
        if len(self._holders) > _MAX_HOLDERS:
            self._holders.popitem(last=False)
        return given.hex()

    def _reason_not_local(self, request: Request) -> str | None:
        """Return why a request may not come from a user of this machine, or None if it does.

        Any web page can make a browser on this machine send requests. They carry the Origin of the page or, after DNS
        rebinding, its Host. A proxy on this machine can forward requests of other machines. Headers that cannot be
        parsed count as not local.
        """
        server, client = request.scope.get("server"), request.client
        if server and server[1] is None:
            return "the request comes over a unix socket"
        if not (_is_loopback(self._settings.host) and server and _is_loopback(server[0])):
            return "the service does not listen on a loopback address only"
        if not (client and _is_loopback_address(client.host)):
            return "the request comes from another machine"
        if proxied := next(filter(_is_proxy_header, request.headers), None):
            return f"the request comes from another machine, as the header {proxied[:_MAX_QUOTED]!r} says"
        scheme = request.scope["scheme"]
        hosts = request.headers.getlist("host")
        host = _parse_authority(hosts[0], scheme) if len(hosts) == 1 else None
        if not (host and _is_loopback(host[0])):
            return f"the request is meant for the host {', '.join(hosts)[:_MAX_QUOTED]!r}"
        for origin in request.headers.getlist("origin"):
            page_scheme, _, page_authority = origin.partition("://")
            if page_scheme != scheme or _parse_authority(page_authority, scheme) != host:
                return f"the request was made by a page of {origin[:_MAX_QUOTED]!r}"
        for site in request.headers.getlist("sec-fetch-site"):
            if site not in ("same-origin", "none"):
                return f"the request was made by a page of another origin (Sec-Fetch-Site: {site[:_MAX_QUOTED]})"
        return None

    def _charge(self, limit: RateLimitItem | None, *bucket: str, units: int = 1) -> None:
        """Charge a bucket. Its name consists of the kind of call, the client and, if present, the key."""
        if limit and not self._limiter.hit(limit, *bucket, cost=units):
            raise self._too_many(limit, *bucket)

    def _too_many(self, limit: RateLimitItem, *bucket: str) -> TooManyRequests:
        counted, client, *_ = bucket
        wait_s = max(1, math.ceil(self._limiter.get_window_stats(limit, *bucket).reset_time - time.time()))
        return TooManyRequests(f"more than {limit} {counted} from {client}; try again in {wait_s} s", wait_s)


_bearer = HTTPBearer(auto_error=False, description="One of the keys in CIFAR100_API_KEYS.")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


async def _operator(request: Request, credentials: _Credentials) -> None:
    access_of(request).require_operator(request, credentials.credentials if credentials else None)


OperatorOnly: Any = Depends(_operator)


def authorize_prediction(request: Request) -> None:
    """Accept only clients that may predict. Raise the errors of `Access.require_predictor`."""
    access_of(request).require_predictor(request)


def access_of(request: Request) -> Access:
    """Return the access rules of the application that received the request."""
    return cast(Access, request.app.state.access)


def client_of(request: Request) -> str:
    """Return the name under which a client shares the decoders: its key digest, or else its address or IPv6 network."""
    access = access_of(request)
    key = _bearer_key(request) if access.has_keys else None
    return f"key {_digest(key).hex()}" if key and access.is_key(key) else _client(request)


def _bearer_key(request: Request) -> str | None:
    scheme, key = get_authorization_scheme_param(request.headers.get("authorization"))
    return key if scheme.lower() == "bearer" and key else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _parse_authority(text: str, scheme: str) -> tuple[str, int] | None:
    """Parse a Host header, or an origin without its scheme.

    Returns:
        The host and the port. The host is in lower case, an IPv6 address in its short form. If there is no port, it is
        the default port of the scheme. None if the text is not exactly a host with an optional port.
    """
    match = _AUTHORITY.fullmatch(text)
    if not match:
        return None
    host = match["name"]
    if match["ipv6"]:
        try:
            host = str(ipaddress.IPv6Address(match["ipv6"]))
        except ValueError:
            return None
    port = int(match["port"] or _DEFAULT_PORTS.get(scheme, 0))
    return (host.lower(), port) if 0 < port <= _MAX_PORT else None


def _is_proxy_header(header: str) -> bool:
    """Return whether only proxies send this header. The name is in lower case."""
    name = header.replace("_", "-")
    return name.endswith(_ADDRESS_ENDINGS) or not _PROXY_WORDS.isdisjoint(name.split("-"))


def _is_loopback(host: str) -> bool:
    """Return whether a host is a loopback address or "localhost", so that it always means this machine."""
    return host.lower() == "localhost" or _is_loopback_address(host)


def _is_loopback_address(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback and "%" not in host


def _client(request: Request) -> str:
    return client_network(request.client.host if request.client else "")
