"""`python -m server` / `espalier-serve`: settings, service, uvicorn."""

import json
import logging
import sys

import uvicorn
from pydantic import ValidationError
from pydantic_settings import CliApp

from adapters_store.errors import EspalierError
from server.app import make_app
from server.config import Settings, check_environment
from server.service import Service

log = logging.getLogger("espalier")


def main(arguments: list[str] | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C; exit 2 for settings that cannot be, 1 for a backbone or store that cannot."""
    settings = _settings(sys.argv[1:] if arguments is None else arguments)
    _configure_logging(settings.log_format)
    sys.setswitchinterval(0.0005)  # the forward's thread asks for the GIL between operators; 5 ms would stall it
    try:
        app = make_app(Service(settings))
    except (EspalierError, ValueError, OSError) as error:
        sys.exit(f"espalier-serve: {error}")
    uvicorn.run(
        app, host=settings.host, port=settings.port, log_config=None, access_log=False, loop="auto", http="httptools",
        timeout_graceful_shutdown=max(1, int(settings.drain_s)), lifespan="on", server_header=False,
    )  # fmt: skip


def _settings(arguments: list[str]) -> Settings:
    try:
        check_environment()
        settings = CliApp.run(Settings, cli_args=arguments)
    except (ValidationError, ValueError) as error:
        print(f"espalier-serve: {error}", file=sys.stderr)  # noqa: T201  # before logging is set up
        sys.exit(2)
    if not settings.is_loopback and settings.api_keys is None:
        print(  # noqa: T201
            f"espalier-serve: --host {settings.host} would let anyone on the network use and administer this server; "
            "give --api-keys FILE (python -m server.keys makes one), or stay on 127.0.0.1", file=sys.stderr,
        )  # fmt: skip
        sys.exit(2)
    return settings


class JsonLines(logging.Formatter):
    """One JSON object per line; `key=value` words of the message become keys."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        event, *words = record.getMessage().split(" ")
        keys = dict(word.split("=", 1) for word in words if "=" in word)
        rest = " ".join(word for word in words if "=" not in word)
        line = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name, "event": event} | keys
        if rest:
            line["detail"] = f"{line.get('detail', '')} {rest}".strip()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def _configure_logging(log_format: str) -> None:
    handler = logging.StreamHandler()
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    handler.setFormatter(JsonLines() if log_format == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for noisy in ("httpx", "huggingface_hub", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


if __name__ == "__main__":
    main()
