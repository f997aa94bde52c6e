"""What an OpenAI body asks for: `model`, our field `espalier`, and the names that SGLang and llama.cpp have for it.

`model` is the backbone (no adapters), a task (its composition), an adapter reference such as `books@3` (that one
alone), or SGLang's `backbone:reference`. `espalier.adapters`, `espalier.mix` and llama.cpp's `lora` say more than
`model` can, and win over it.
"""

import hashlib
from collections.abc import Sequence

from adapters_store.composition import Overrides
from adapters_store.errors import InvalidCompositionError, InvalidNameError, NotFoundError
from adapters_store.manifest import Manifest
from server.completions_schema import LoraScale
from server.compose import Ask
from server.errors import BadInputError, ModelNotFoundError
from server.inference import freeze
from server.schemas import CompositionOptions
from server.service import Service


def manifest_of(service: Service, model: str) -> Manifest | None:
    """The version that a model's name means now; None for the backbone. Raises ModelNotFoundError."""
    if model == service.backbone.name:
        return None
    try:
        if model in service.catalog.task_set:
            return service.catalog.manifest_of_task(model)
        return service.catalog.resolve(_without_base(service, model))
    except (NotFoundError, InvalidNameError) as error:
        raise ModelNotFoundError(
            f"model {model!r} is neither the backbone, nor a task, nor an adapter: {error}"
        ) from error


def _without_base(service: Service, model: str) -> str:
    """`books@3` of `backbone:books@3`. Other colons belong to digests."""
    return model.removeprefix(f"{service.backbone.name}:")


def ask_of(service: Service, model: str, extras: CompositionOptions, lora: Sequence[LoraScale] | None = None) -> Ask:
    """The question of a body. Raises ModelNotFoundError, BadInputError or InvalidCompositionError."""
    given = {"adapters": extras.adapters, "mix": extras.mix, "lora": lora}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise BadInputError(f"{' and '.join(named)} each say what to compose; give one of them")
    if lora is not None:
        return _explicit(_scales(service, lora), extras, "'lora'")
    if extras.adapters is not None:
        return _explicit({ref: freeze(weight) for ref, weight in extras.adapters.items()}, extras, "'adapters'")
    overrides = Overrides(extras.temperature, extras.threshold, extras.top_k)
    if extras.mix is not None:
        return Ask(extras.mode or "prior", mix=tuple(extras.mix.items()), needs_head=False, overrides=overrides)
    if extras.mode == "explicit":
        raise InvalidCompositionError("mode 'explicit' needs 'adapters', for example {'books@3': 0.8, 'music': 0.2}")
    if manifest_of(service, model) is None:
        return _explicit({}, extras, f"model {model!r}")
    if model in service.catalog.task_set:
        return Ask(extras.mode or "prior", task=model, needs_head=False, overrides=overrides)
    return _explicit({_without_base(service, model): 1.0}, extras, f"model {model!r}")


def _explicit(weights: dict[str, float | tuple[float, ...]], extras: CompositionOptions, said_by: str) -> Ask:
    """These weights and nothing else; none at all: the bare backbone."""
    if extras.mode not in (None, "explicit", "none"):
        raise InvalidCompositionError(f"{said_by} says what to compose; mode {extras.mode!r} goes with a task or a mix")
    if not weights or extras.mode == "none":
        return Ask("none", needs_head=False)
    return Ask("explicit", adapters=tuple(weights.items()), needs_head=False)


def _scales(service: Service, lora: Sequence[LoraScale]) -> dict[str, float | tuple[float, ...]]:
    """llama.cpp's list by reference; what it does not list has scale 0."""
    references = [one.id if isinstance(one.id, str) else _name_of(service, one.id) for one in lora]
    if len(set(references)) < len(references):
        raise BadInputError(f"lora names an adapter twice: {', '.join(references)}")
    return {reference: one.scale for reference, one in zip(references, lora, strict=True)}


def lora_id(name: str) -> int:
    """The number of an adapter's name: the same on every server and for ever, whatever else comes and goes."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1  # it fits a C int


def _name_of(service: Service, number: int) -> str:
    """The adapter that a number means. Raises BadInputError if none does, or two do."""
    found = [name for name in service.catalog.manifests if lora_id(name) == number]
    if len(found) != 1:
        why = f"means {' and '.join(found)}; give a name instead" if found else "is none that GET /lora-adapters lists"
        raise BadInputError(f"lora: id {number} {why}")
    return found[0]
