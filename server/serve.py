"""What `python -m server` does: settings, service, uvicorn."""

import logging
import signal
import sys
from socket import socket
from types import FrameType
from typing import Never

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp, SettingsError

from adapters_store.errors import EspalierError
from server import logs
from server.app import make_app
from server.config import Settings, check_environment
from server.protocol import BoundedHeaders
from server.service import Service
from server.welcome import welcome

log = logging.getLogger("espalier")


def serve(arguments: list[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; exit 2 for settings that cannot be, 1 for a backbone or store that cannot."""
    settings = _settings(sys.argv[1:] if arguments is None else arguments)
    logs.configure(settings.log_format)
    sys.setswitchinterval(0.00002)  # the forward asks for the GIL at every operator; 5 ms would stall it
    for stop in (signal.SIGTERM, signal.SIGINT):  # before serving, and raised again by uvicorn once it has drained
        signal.signal(stop, lambda *_: sys.exit(0))
    try:
        service = Service(settings)
        app = make_app(service)
    except (EspalierError, ValueError, OSError) as error:
        sys.exit(f"espalier-serve: {error}")
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, log_config=None, access_log=False, loop="auto",
        http=BoundedHeaders, timeout_graceful_shutdown=max(1, int(settings.drain_s)), lifespan="on",
        server_header=False,
    )  # fmt: skip
    server = Draining(config, service)
    server.run()
    if not server.started:  # uvicorn has logged why
        sys.exit(1)


class Draining(uvicorn.Server):
    """A server that tells /ready of the signal at once, while what was admitted is being finished."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def startup(self, sockets: list[socket] | None = None) -> None:
        """Listen, then say where and how to ask."""
        await super().startup(sockets)
        if self.started:
            print(welcome(self._service, self.servers[0].sockets[0].getsockname()[1]), flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """SIGTERM or SIGINT came."""
        self._service.unready = "draining"
        super().handle_exit(sig, frame)


def _settings(arguments: list[str]) -> Settings:
    try:
        check_environment()
        settings = CliApp.run(Settings, cli_args=arguments)
    except ValidationError as error:
        _refuse("; ".join(_said(one["loc"], one["msg"]) for one in error.errors()))
    except (ValueError, SettingsError) as error:
        _refuse(str(error))
    if not settings.is_loopback and settings.api_keys is None:
        _refuse(
            f"--host {settings.host} would let anyone on the network use and administer this server; "
            "give --api-keys FILE (python -m server.keys makes one), or stay on 127.0.0.1"
        )
    return settings


def _said(where: tuple[int | str, ...], message: str) -> str:
    name = str(where[0]) if where else "settings"
    return f"--{name.replace('_', '-')} (ESPALIER_{name.upper()}): {message}"


def _refuse(why: str) -> Never:
    print(f"espalier-serve: {why}", file=sys.stderr)  # before logging is set up
    sys.exit(2)
