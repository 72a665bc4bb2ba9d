"""Who may do what. Reading and predicting are open; what costs much or changes something is for operators.

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

_GUESSES = "wrong keys"
_MAX_HOLDERS = 10_000
_SHOWN = 100  # characters of a header that an error repeats

# Proxies and content delivery networks add headers with one of these words in their names, or with a name that ends
# with the kind of its value, an address of the client: X-Real-IP, True-Client-IP, X-Remote-Addr.
_PROXY_WORDS = {"akamai", "arr", "azure", "cdn", "cf", "envoy", "fastly", "forward", "forwarded", "forwards", "incap"}
_PROXY_WORDS |= {"original", "proxied", "proxy", "rewrite", "sucuri", "tailscale", "varnish", "via"}
_ADDRESS_ENDINGS = ("ip", "addr", "address")

# RFC 3986, section 3.2, without user information: a name, an IPv4 address or an IPv6 address in brackets, and a port.
_AUTHORITY = re.compile(r"(?:\[(?P<ipv6>[0-9a-fA-F:.]+)\]|(?P<name>[0-9a-zA-Z.-]+))(?::(?P<port>[1-9][0-9]{0,4}))?")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_MAX_PORT = 65535


class Access:
    """The rules of one service.

    Access is checked first and a rate is charged then, so a refused request takes nothing from the operator's rate. A
    foreign web page in the operator's browser, or a stranger at the operator's address, cannot use that rate up. A call
    with a right key is charged to this key at this address, any other call to its address.

    Wrong keys have a rate of their own at each address. While it is used up, the service refuses every key from there
    unseen, so a guess beyond the rate fails even if it is right. Keys that were right at this address before are the
    exception: their holders go on, whatever a stranger at their address sends. The price is that this stranger can
    guess the key of such a holder without a limit; keys have at least 16 characters for that. Requests without a key
    are no guesses and are not charged.

    Args:
        settings: keys, address, rate limits.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._keys = [_digest(key.get_secret_value()) for key in settings.api_keys]
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        self._holders: OrderedDict[tuple[bytes, str], None] = OrderedDict()
        """Digests of right keys with the clients that have sent them, the latest ones last."""

    def require_operator(self, request: Request, key: str | None) -> None:
        """Let only operators pass: those with a key or, where none is configured, those on this machine.

        Raises:
            Unauthorized: the key is missing or wrong.
            Forbidden: no key is configured and the request is not local.
            TooManyRequests: over the rate limit of such calls, or of wrong keys.
        """
        if not self._keys and (reason := self._not_local(request)):
            raise Forbidden(
                f"{reason}, so this call needs an API key: start the service with CIFAR100_API_KEYS set to a secret "
                "of your own and send it as 'Authorization: Bearer SECRET'"
            )
        holder = self._authenticate(request, key) if self._keys else ""
        self._charge(self._settings.operator_rate_limit, "calls", _client(request), holder)

    def require_predictor(self, request: Request, key: str | None) -> None:
        """Let those pass who may predict: by default everybody.

        Raises: as for `require_operator`, except Forbidden.
        """
        holder = self._authenticate(request, key) if self._settings.predict_needs_key else ""
        self._charge(self._settings.predict_rate_limit, "predictions", _client(request), holder)

    def charge_prediction(self, request: Request, units: int) -> None:
        """Charge a prediction's rate limit further units, because its images are costly to decode.

        Raises:
            TooManyRequests: over the rate limit, or the request costs more than the whole limit.
        """
        limit, key = self._settings.predict_rate_limit, _bearer_key(request)
        if limit and units >= limit.amount:
            detail = f"decoding the images of this request costs {units + 1} units of the rate limit of {limit}"
            raise TooManyRequests(f"{detail}; send fewer or smaller ones", limit.get_expiry())
        holder = _digest(key).hex() if key and self._settings.predict_needs_key else ""
        self._charge(limit, "predictions", _client(request), holder, units=units)

    def is_key(self, key: str) -> bool:
        """Whether this is one of the API keys."""
        given = _digest(key)
        # All are compared, each in constant time: the answer's time tells nothing about the keys.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return any(matches)

    def _authenticate(self, request: Request, key: str | None) -> str:
        """The digest of a right key.

        Raises:
            Unauthorized: the key is missing or wrong.
            TooManyRequests: too many wrong keys came from this client, and this one was not right before.
        """
        if key is None:
            raise Unauthorized("this call needs an API key: send it as 'Authorization: Bearer KEY'")
        given, client, limit = _digest(key), _client(request), self._settings.operator_rate_limit
        is_right = self.is_key(key)
        if not (is_right and (given, client) in self._holders):
            if limit and not self._limiter.test(limit, _GUESSES, client):
                raise self._too_many(limit, _GUESSES, client)
            if not is_right:
                self._charge(limit, _GUESSES, client)
                raise Unauthorized("the API key is not valid")
        self._holders[given, client] = None
        self._holders.move_to_end((given, client))
        if len(self._holders) > _MAX_HOLDERS:
            self._holders.popitem(last=False)
        return given.hex()

    def _not_local(self, request: Request) -> str | None:
        """Why a request is not trusted to come from this machine's user. Headers that cannot be parsed are not trusted.

        A browser on this machine may be made to call by any web page, with that page's Origin or, after DNS rebinding,
        with that page's Host. A proxy on this machine may pass on what others send.
        """
        server, client = request.scope.get("server"), request.client
        if not (_is_loopback(self._settings.host) and server and server[1] is not None and _is_loopback(server[0])):
            return "the service does not listen on a loopback address only"
        if not (client and _is_loopback_address(client.host)):
            return "the request comes from another machine"
        if proxied := next(filter(_is_of_proxy, request.headers), None):
            return f"the request comes from another machine, as the header {proxied[:_SHOWN]!r} says"
        scheme = request.scope["scheme"]
        hosts = request.headers.getlist("host")
        host = _authority(hosts[0], scheme) if len(hosts) == 1 else None
        if not (host and _is_loopback(host[0])):
            return f"the request is meant for the host {', '.join(hosts)[:_SHOWN]!r}"
        for origin in request.headers.getlist("origin"):
            of_page, _, place = origin.partition("://")
            if of_page != scheme or _authority(place, scheme) != host:
                return f"the request was made by a page of {origin[:_SHOWN]!r}"
        for site in request.headers.getlist("sec-fetch-site"):
            if site not in ("same-origin", "none"):
                return f"the request was made by a page of another origin (Sec-Fetch-Site: {site[:_SHOWN]})"
        return None

    def _charge(self, limit: RateLimitItem | None, *bucket: str, units: int = 1) -> None:
        """Charge a bucket, which is named by the kind of call, its client and its key if it has one."""
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


ForOperators: Any = Depends(_operator)


def let_predictor_pass(request: Request) -> None:
    """Raises what `Access.require_predictor` does."""
    access_of(request).require_predictor(request, _bearer_key(request))


def access_of(request: Request) -> Access:
    """The rules of the application that got a request."""
    return cast(Access, request.app.state.access)


def client_of(request: Request) -> str:
    """Who shares the decoders under one name: the holder of a key, or else a client address or IPv6 network."""
    key = _bearer_key(request)
    return f"key {_digest(key).hex()}" if key and access_of(request).is_key(key) else _client(request)


def _bearer_key(request: Request) -> str | None:
    scheme, key = get_authorization_scheme_param(request.headers.get("authorization"))
    return key if scheme.lower() == "bearer" and key else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _authority(text: str, scheme: str) -> tuple[str, int] | None:
    """Parse a Host header, or an origin without its scheme.

    Returns:
        The host in lower case, an IPv6 address in its short form, and the port, which the scheme may imply. None for
        text that is not exactly a host with an optional port.
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


def _is_of_proxy(header: str) -> bool:
    """Whether only proxies send a header of this name, which is in lower case."""
    name = header.replace("_", "-")
    return name.endswith(_ADDRESS_ENDINGS) or not _PROXY_WORDS.isdisjoint(name.split("-"))


def _is_loopback(host: str) -> bool:
    """Whether a host is an address of this machine only, or the one name that always means it."""
    return host == "localhost" or _is_loopback_address(host)


def _is_loopback_address(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback and "%" not in host


def _client(request: Request) -> str:
    return client_network(request.client.host if request.client else "")
