"""`python -m server.keys NAME [--scope infer --scope admin] [--task books …] --file keys.json`: makes an API key.

The key itself is printed once and kept nowhere; the file gets its hash.
"""

import hashlib
import secrets
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError

from server.security import KeyFile


def make(
    name: Annotated[str, typer.Argument(help="what the key is called in logs")],
    file: Annotated[Path, typer.Option(help="key file to add it to")] = Path("keys.json"),
    scope: Annotated[list[str] | None, typer.Option(help="infer, admin; default infer")] = None,
    task: Annotated[list[str] | None, typer.Option(help="tasks the key may use; default all")] = None,
) -> None:
    """Make a key, add its hash to the file, print the key."""
    key = "esp-" + secrets.token_urlsafe(32)
    digest = hashlib.sha256(key.encode()).hexdigest()
    entry = {"name": name, "sha256": digest, "scopes": scope or ["infer"], "tasks": task}
    try:
        known = KeyFile.model_validate_json(file.read_bytes()).model_dump()["keys"] if file.exists() else []
        checked = KeyFile.model_validate({"keys": [*known, entry]})
    except ValidationError as error:
        first = error.errors()[0]
        raise typer.BadParameter(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    beside = file.with_suffix(".tmp")
    beside.touch(mode=0o600)
    beside.write_text(checked.model_dump_json(indent=2, exclude_none=True))
    beside.replace(file)
    typer.echo(key)


if __name__ == "__main__":
    typer.run(make)
