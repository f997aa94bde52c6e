"""Commands made from settings classes: every field becomes a flag with its description, and a config file may give any.

Flags win over the file, the file over defaults. Errors are one line on stderr: exit status 2 for a setting that cannot
be used, 1 for everything else that goes wrong, 128 + the signal's number after a signal.
"""

import inspect
import json
import signal
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from adapters_store.errors import EspalierError
from training.config import pairs, resolve
from training.errors import ConfigError, StoppedError
from training.progress import result, say

Body = Callable[..., object]
Resolve = Callable[[Path | None, dict[str, Any], dict[str, bool]], BaseModel]  # (config file, flags, switches)
_SHOWN_AS_SET = {"hyperparameters", "knobs"}  # free-form settings that `--set key=value` fills

ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML or JSON file with any of these settings; flags win.")
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved settings as JSON and stop.")]


def command(
    app: typer.Typer, model: type[BaseModel], resolver: Resolve | None = None, **switches: Any
) -> Callable[[Body], Body]:
    """Register a body(settings, **switches) as a command with a flag per setting; `switches` are its own flags by name.

    resolver: how settings come about, where it takes more than a file and flags.
    """
    resolved = resolver or (lambda file, flags, _: resolve(model, file, flags))

    def register(body: Body) -> Body:
        def run(**given: Any) -> None:
            chosen = {name: given.pop(name) for name in switches}
            file, only_print = given.pop("config_file"), given.pop("print_config")

            def call() -> None:
                settings = resolved(file, _flags(model, given), chosen)
                if only_print:
                    result(json.dumps(settings.model_dump(mode="json"), indent=1))
                else:
                    body(settings, **chosen)

            _guarded(call)

        signature = _signature(model, switches)
        run.__doc__, run.__name__ = body.__doc__, body.__name__
        run.__signature__ = signature  # type: ignore[attr-defined]  # typer reads the flags from it
        run.__annotations__ = {name: parameter.annotation for name, parameter in signature.parameters.items()}
        app.command()(run)
        return body

    return register


def _guarded(call: Callable[[], None]) -> None:
    try:
        call()
    except StoppedError as error:
        _fail(str(error), 128 + error.signum)
    except ConfigError as error:
        _fail(f"error: {error}", 2)
    except EspalierError as error:
        _fail(f"error: {error}", 1)
    except OSError as error:
        _fail(f"error: {error.filename or ''}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        _fail("stopped", 128 + signal.SIGINT)


def _fail(line: str, status: int) -> None:
    say(line)
    raise typer.Exit(status) from None


def _signature(model: type[BaseModel], switches: dict[str, Any]) -> inspect.Signature:
    keyword = inspect.Parameter.KEYWORD_ONLY
    own_first = sorted(model.model_fields.items(), key=lambda item: item[0] not in model.__annotations__)
    fields = [inspect.Parameter(name, keyword, default=None, annotation=_option(name, f)) for name, f in own_first]
    own = [
        inspect.Parameter(name, keyword, default=False, annotation=annotation) for name, annotation in switches.items()
    ]
    general = [
        inspect.Parameter("config_file", keyword, default=None, annotation=ConfigFile),
        inspect.Parameter("print_config", keyword, default=False, annotation=PrintConfig),
    ]
    return inspect.Signature(fields + own + general)


def _option(name: str, field: FieldInfo) -> Any:
    flag = "--set" if name in _SHOWN_AS_SET else f"--{name.replace('_', '-')}"
    help_text = (field.description or "").rstrip(".") + _default(field)
    kind = _plain(field.annotation)
    if kind is dict:
        return Annotated[list[str] | None, typer.Option(flag, metavar="KEY=VALUE", help=help_text)]
    if kind is tuple:
        return Annotated[str | None, typer.Option(flag, metavar="A,B,…", help=help_text)]
    if kind is bool:
        return Annotated[bool | None, typer.Option(f"{flag}/--no-{flag[2:]}", help=help_text)]
    return Annotated[kind | None, typer.Option(flag, help=help_text)]


def _plain(annotation: Any) -> Any:
    """The type of a field without `| None`; tuple and dict without their parameters."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        annotation = next(part for part in typing.get_args(annotation) if part is not types.NoneType)
    origin = typing.get_origin(annotation)
    return origin if origin in (tuple, dict) else annotation


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "  [required]"
    value = field.default
    if value is None or value in ({}, ()) or "default:" in (field.description or ""):
        return ""
    return f"  [default: {','.join(map(str, value)) if isinstance(value, tuple) else value}]"


def _flags(model: type[BaseModel], given: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, as settings."""
    flags = {name: value for name, value in given.items() if value is not None and value != []}
    for name, value in flags.items():
        kind = _plain(model.model_fields[name].annotation)
        if kind is dict:
            flags[name] = pairs(value)
        elif kind is tuple:
            flags[name] = [part.strip() for part in value.split(",") if part.strip()]
    return flags
