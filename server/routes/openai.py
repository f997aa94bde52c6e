"""OpenAI's endpoints that need no generation: `/v1/models`, `/v1/embeddings`."""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from server import inference
from server import openai_schema as said
from server.errors import BadInputError, ModelNotFoundError
from server.inference import Asked
from server.openai_models import ask_of, manifest_of
from server.replies import OPENAI_DOCUMENTED, reply, unless_gone
from server.routes import AllowedDep, ServiceDep
from server.schemas import EmbeddingRequest
from server.service import Service

router = APIRouter(tags=["openai"], responses=OPENAI_DOCUMENTED)


@router.get("/v1/models", summary="The backbone, the tasks and the adapters", response_model=said.Models)
async def models(service: ServiceDep, allowed: AllowedDep) -> Response:
    """What `model` may name, as far as the key may use it."""
    catalog = service.catalog
    tasks = [task for task in catalog.tasks if allowed is None or task in allowed]
    names = [name for name in sorted(catalog.manifests) if allowed is None or catalog.resolve(name).task in allowed]
    listed = dict.fromkeys([service.backbone.name, *tasks, *names])
    return reply({"object": "list", "data": [_model(service, name) for name in listed]})


@router.get("/v1/models/{name:path}", summary="One model", response_model=said.Model)
async def model(name: str, service: ServiceDep, allowed: AllowedDep) -> Response:
    """The backbone, a task, or an adapter reference such as `books@3`."""
    manifest = manifest_of(service, name)
    if allowed is not None and manifest is not None and not {name, manifest.task} & allowed:
        raise ModelNotFoundError(f"model {name!r} is not one that this key may use")
    return reply(_model(service, name))


@router.post(
    "/v1/embeddings", summary="Pooled hidden states, under a task's composition", response_model=said.Embeddings
)
async def embeddings(body: EmbeddingRequest, request: Request, service: ServiceDep, allowed: AllowedDep) -> Response:
    """`model`: the backbone (no adapters), a task (its composition), or an adapter reference (that one alone)."""
    asked = _rows(service, body, allowed)
    answered = await unless_gone(request, inference.run(service, asked))
    data = [
        {"object": "embedding", "index": i, "embedding": _encoded(answer.values, body)}
        for i, answer in enumerate(answered.answers)
    ]
    usage = {"prompt_tokens": answered.tokens, "total_tokens": answered.tokens}
    composed = asked[0].composed
    extras = {"composition": composed.explained if body.espalier.explain else composed.brief}
    return reply({"object": "list", "model": body.model, "data": data, "usage": usage, "espalier": extras})


def _model(service: Service, name: str) -> dict[str, Any]:
    manifest = manifest_of(service, name)
    kind = "backbone" if manifest is None else "task" if name in service.catalog.task_set else "adapter"
    created = int(manifest.created_at.timestamp()) if manifest else 0
    parent = service.backbone.name if manifest else None
    return {"id": name, "object": "model", "created": created, "owned_by": "espalier", "kind": kind, "parent": parent}


def _rows(service: Service, body: EmbeddingRequest, allowed: frozenset[str] | None) -> list[Asked]:
    size = service.backbone.encoder.hidden_size
    if body.dimensions not in (None, size):
        raise BadInputError(f"this backbone gives {size} dimensions, not {body.dimensions}; leave 'dimensions' out")
    composed = inference.compose(service, ask_of(service, body.model, body.espalier), allowed)
    pooling = body.espalier.pooling or service.backbone.default_pooling
    inputs = _inputs(service, body.input)
    if len(inputs) > service.settings.max_inputs:
        raise BadInputError(f"{len(inputs)} inputs, at most {service.settings.max_inputs} (--max-inputs)")
    return [Asked(text, composed, pooling, None, ids) for text, ids in inputs]


def _inputs(
    service: Service, given: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
) -> list[tuple[str, Any]]:
    """(text, None) or ("", token ids) for each input."""
    many: Any = [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given
    if not many:
        raise BadInputError("'input' is empty: send a text, a list of texts, or token ids")
    return [(one, None) if isinstance(one, str) else ("", _checked_ids(service, one)) for one in many]


def _checked_ids(service: Service, ids: Sequence[int]) -> list[int]:
    """Token ids that the backbone can take. Raises BadInputError."""
    readable = service.backbone.num_embeddings
    if not ids or len(ids) > service.backbone.max_length:
        raise BadInputError(f"token ids: 1 to {service.backbone.max_length} per input, not {len(ids)}")
    if not all(0 <= token < readable for token in ids):
        raise BadInputError(f"token ids must be between 0 and {readable - 1}")
    return list(ids)


def _encoded(values: Sequence[float], body: EmbeddingRequest) -> Any:
    vector = np.asarray(values, np.float32)
    if body.espalier.normalize:
        vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
