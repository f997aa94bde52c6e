"""What the server says once it is ready: where it listens, and one call that works as it stands."""

import json
import shlex

from server.service import Service


def welcome(service: Service) -> str:
    """A few lines for the terminal; the curl line can be pasted."""
    settings = service.settings
    url = f"http://{settings.host}:{settings.port}"
    tasks = [task for task in service.catalog.tasks if (m := service.catalog.manifest_of_task(task)) and m.head]
    lines = [f"Espalier is ready on {url} (console at {url}/, {len(tasks)} tasks: {', '.join(tasks[:12])})"]
    if tasks:
        body = json.dumps({"inputs": [{"task": tasks[0], "text": "I could not put it down, a wonderful read."}]})
        lines.append(
            "Try:\n  "
            + " ".join(
                ["curl", "-s", f"{url}/v1/infer", "-H", "'content-type: application/json'", "-d", shlex.quote(body)]
            )
        )
    else:
        lines.append(
            "The store is empty: train with espalier-train, import with espalier-store, or upload to /v1/adapters."
        )
    return "\n".join(lines)


def _example(service: Service, tasks: list[str]) -> dict[str, str]:
    """A text that some task was made for: one of its golden examples where it has any."""
    for task in tasks:
        for example in service.catalog.manifest_of_task(task).golden[:1]:
            return {"task": task, "text": example.text}
    return {"task": tasks[0], "text": "Any text will do."}
