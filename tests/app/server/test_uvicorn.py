"""Test the installed uvicorn: it has the methods and attributes that our subclasses override and read.

An update of uvicorn that changes one of them fails here.
"""

import ast
import asyncio
import inspect
import textwrap
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from app.server.connections import ConnectionTable
from app.server.http_parser import RequestParser
from app.server.protocol import BoundedHttp
from app.server.serve import DrainingServer

_CLASSES: dict[type, type] = {BoundedHttp: HttpToolsProtocol, DrainingServer: uvicorn.Server}


def methods(kind: type) -> dict[str, Any]:
    return {name: each for name, each in vars(kind).items() if inspect.isfunction(each)}


@pytest.mark.parametrize("kind", _CLASSES)
def test_methods_marked_as_override_are_methods_of_uvicorn(kind: type) -> None:
    base = methods(_CLASSES[kind])
    marked = {name for name, method in methods(kind).items() if getattr(method, "__override__", False)}
    assert marked, "nothing is marked"
    assert marked <= base.keys()
    for name in marked:
        assert list(inspect.signature(vars(kind)[name]).parameters) == list(inspect.signature(base[name]).parameters)


@pytest.mark.parametrize("kind", _CLASSES)
def test_methods_not_marked_as_override_hide_none_of_uvicorn(kind: type) -> None:
    marked = {name for name, method in methods(kind).items() if getattr(method, "__override__", False)}
    assert not (vars(kind).keys() - marked - {"__init__"}) & methods(_CLASSES[kind]).keys()


def reads(kind: type) -> set[str]:
    """Return the attributes that the source of a class reads, such as `transport` and `cycle.more_body`."""
    found = set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind)))):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id == "self":
            found |= {parts[0], ".".join(parts[:2])}
    return found


async def instances() -> dict[type, Any]:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    config = uvicorn.Config(app, log_config=None)
    config.load()
    table = ConnectionTable(1, "")
    plain = HttpToolsProtocol(config, ServerState(), {})
    plain.on_message_begin()
    ours = BoundedHttp(config, ServerState(), {}, should_shed=lambda *_: False, table=table)
    ours.flow = FlowControl(cast(Any, None))
    parameters = inspect.signature(RequestResponseCycle.__init__).parameters
    given = dict.fromkeys(list(parameters)[1:])
    ours.cycle = RequestResponseCycle(**cast(Any, given))
    services = SimpleNamespace(state=SimpleNamespace(services=None))
    server = DrainingServer(cast(Any, services), config, 0, link=None)
    return {HttpToolsProtocol: plain, BoundedHttp: ours, uvicorn.Server: uvicorn.Server(config), DrainingServer: server}


@pytest.mark.parametrize("kind", _CLASSES)
def test_attributes_that_are_read_exist(kind: type) -> None:
    made = asyncio.run(instances())
    own = set(dir(kind)) - set(dir(_CLASSES[kind])) | (vars(made[kind]).keys() - vars(made[_CLASSES[kind]]).keys())
    inherited = {name for name in reads(kind) if name.partition(".")[0] not in own}
    missing = []
    for name in inherited - {"lifespan", "lifespan.state", "servers"}:  # uvicorn sets these at startup
        owner, _, attribute = name.partition(".")
        if not hasattr(made[_CLASSES[kind]], owner):
            missing.append(owner)
        elif attribute and (value := getattr(made[kind], owner)) is not None and not hasattr(value, attribute):
            missing.append(name)
    assert not missing
    assert len(inherited) > 3


def test_parser_is_called_by_the_name_that_uvicorn_uses() -> None:
    assert "self.parser.feed_data(" in inspect.getsource(HttpToolsProtocol.data_received)
    assert getattr(RequestParser.feed_data, "__override__", False)
