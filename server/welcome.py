"""What the server says once it listens: where, and one call that works as it stands."""

import json
import shlex

from server.service import Service


def welcome(service: Service, port: int) -> str:
    """A few lines for the terminal; the curl line can be pasted."""
    url = f"http://{service.settings.host}:{port}"
    tasks = [task for task in service.catalog.tasks if _answers(service, task)]
    lines = [f"Espalier is ready on {url} (console at {url}/, {len(tasks)} tasks: {', '.join(tasks[:12])})"]
    if tasks:
        body = shlex.quote(json.dumps({"inputs": [_example(service, tasks)]}))
        lines.append(f"Try:\n  curl -s {url}/v1/infer -H 'content-type: application/json' -d {body}")
    else:
        lines.append("No task is served yet: espalier-train, espalier-store import, or POST /v1/adapters bring some.")
    if service.generator:
        most = service.generator.max_length
        lines.append(f"It generates texts of up to {most} tokens; for OpenAI's clients, base_url is {url}/v1.")
    return "\n".join(lines)


def _answers(service: Service, task: str) -> bool:
    """True if the task can be asked: it has a head, or the backbone generates."""
    has_module = service.catalog.has_module(task)
    return has_module and (service.generator is not None or service.catalog.manifest_of_task(task).head is not None)


def _example(service: Service, tasks: list[str]) -> dict[str, str]:
    """A text that some task was made for: one of its golden examples where it has any."""
    for task in tasks:
        for example in service.catalog.manifest_of_task(task).golden[:1]:
            return {"task": task, "text": example.text}
    return {"task": tasks[0], "text": "Any text will do."}
