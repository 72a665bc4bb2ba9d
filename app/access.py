"""Who may do what. Reading and predicting are open; what costs much or changes something is for operators.

request --> rate limit --> API key            --> route
            429            401 wrong or none, 403 where no key is configured and the caller is not local
"""

import hashlib
import hmac
import ipaddress
import math
import time
from typing import Annotated, Any, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param
from limits import RateLimitItem
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from app.clients import client_network
from app.errors import Forbidden, TooManyRequests, Unauthorized
from app.settings import Settings

# Set by proxies: with one of these a request that arrives from this machine was not sent by it.
_PROXIED = ("forwarded", "via", "x-forwarded-for", "x-real-ip")


class Access:
    """The rules of one service.

    Args:
        settings: keys, address, rate limits.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._keys = [_digest(key.get_secret_value()) for key in settings.api_keys]
        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())

    def require_operator(self, request: Request, key: str | None) -> None:
        """Let only operators pass: those with a key or, where none is configured, those on this machine.

        Raises:
            Unauthorized: the key is missing or wrong.
            Forbidden: no key is configured and the request is not local.
            TooManyRequests: over the rate limit of such calls.
        """
        self._charge(request, self._settings.operator_rate_limit, "operator")
        if self._keys:
            self._require_key(key)
        elif reason := self._not_local(request):
            raise Forbidden(
                f"{reason}, so this call needs an API key: start the service with CIFAR100_API_KEYS set to a secret "
                "of your own and send it as 'Authorization: Bearer SECRET'"
            )

    def require_predictor(self, request: Request, key: str | None) -> None:
        """Let those pass who may predict: by default everybody.

        Raises: as for `require_operator`, except Forbidden.
        """
        self._charge(request, self._settings.predict_rate_limit, "predict")
        if self._settings.predict_needs_key:
            self._require_key(key)

    def _require_key(self, key: str | None) -> None:
        if key is None:
            raise Unauthorized("this call needs an API key: send it as 'Authorization: Bearer KEY'")
        given = _digest(key)
        # All are compared, each in constant time: the answer's time tells nothing about the keys.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if not any(matches):
            raise Unauthorized("the API key is not valid")

    def _not_local(self, request: Request) -> str | None:
        """Why a request cannot be trusted to come from this machine's user.

        A browser on this machine may be made to call by any web page, with that page's Origin or, after DNS rebinding,
        with that page's Host.
        """
        server, client = request.scope.get("server"), request.client
        if not (_is_loopback(self._settings.host) and server and _is_loopback(server[0])):
            return "the service does not listen on a loopback address only"
        if not (client and _is_loopback(client.host)) or any(name in request.headers for name in _PROXIED):
            return "the request comes from another machine"
        if not _is_loopback(request.url.hostname or ""):
            return f"the request is meant for the host {request.url.hostname!r}"
        origin = request.headers.get("origin")
        if origin is not None and origin != f"{request.url.scheme}://{request.url.netloc}":
            return f"the request was made by a page of {origin!r}"
        return None

    def _charge(self, request: Request, limit: RateLimitItem | None, kind: str) -> None:
        if limit is None:
            return
        client = client_network(request.client.host if request.client else "")
        if not self._limiter.hit(limit, kind, client):
            wait_s = max(1, math.ceil(self._limiter.get_window_stats(limit, kind, client).reset_time - time.time()))
            raise TooManyRequests(f"more than {limit} from {client}; try again in {wait_s} s", wait_s)


_bearer = HTTPBearer(auto_error=False, description="One of the keys in CIFAR100_API_KEYS.")
_Credentials = Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]


async def _operator(request: Request, credentials: _Credentials) -> None:
    _access(request).require_operator(request, credentials.credentials if credentials else None)


ForOperators: Any = Depends(_operator)


def let_predictor_pass(request: Request) -> None:
    """Raises what `Access.require_predictor` does."""
    scheme, key = get_authorization_scheme_param(request.headers.get("authorization"))
    _access(request).require_predictor(request, key if scheme.lower() == "bearer" and key else None)


def _access(request: Request) -> Access:
    return cast(Access, request.app.state.access)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
