r"""adapter_config.json of a LoRA as PEFT 0.21.2 writes it, read by our own rules and never by PEFT.

PEFT's loader trusts this file: it allocates what `r` says, compiles `target_modules` as a regular expression and takes
missing keys for fresh adapters. Here every field is one of three: read (the fields of PeftConfig), harmless whatever
it says (HARMLESS), or refused by name unless it is null, false or empty. The last holds for fields that change the
mathematics and for fields nobody here has heard of.

rank_pattern and alpha_pattern are regular expressions to PEFT, `(.*\.)?(pattern)$`. We take literal text with an
optional leading ^ and `\.`, for which the two readings are the same, and refuse the rest: no regular expression of a
stranger is ever compiled.
"""

import json
import math
import re
from collections.abc import Collection
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from adapters_store.errors import FormatError, NotFiniteError, TooLargeError, UnsupportedError
from adapters_store.roles import by_pattern

CONFIG_NAME = "adapter_config.json"
ALL_LINEAR = "all-linear"
MAX_JSON_BYTES = 1 << 20
MAX_NAMES = 2048  # entries of one list or pattern table; the largest dense decoders have about a thousand linear layers
MAX_ALPHA = 1e6

# what they describe is over once the tensors are trained, or is a hint for PEFT's own loader
HARMLESS = frozenset(
    {
        *("auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out"),
        *("runtime_config", "megatron_core", "qalora_group_size"),  # the last two act with fields that are refused
        *("eva_config", "corda_config", "loftq_config", "lora_ga_config"),  # act under the init_lora_weights so named
    }
)

# initialisations that leave the backbone's weights alone, so that delta stays s * B A x; pissa, olora, corda, loftq and
# lora_ga subtract from the base weight and only serve on the backbone that they changed
_INITS = frozenset({"gaussian", "orthogonal", "mica", "eva"})

_REASONS = {
    "use_dora": "DoRA rescales the backbone's weights",
    "lora_bias": "biases of lora_B are not served",
    "layers_to_transform": "list the full module paths in target_modules instead",
    "layers_pattern": "list the full module paths in target_modules instead",
    "layer_replication": "it builds another backbone",
    "trainable_token_indices": "embeddings are not adapted here",
    "megatron_config": "Megatron's layers are not served",
    "alora_invocation_tokens": "activated LoRA acts on some tokens only",
    "use_qalora": "QALoRA pools its input",
    "monteclora_config": "it samples its weights",
    "velora_config": "it brings further tensors",
    "target_parameters": "only whole modules are adapted",
    "use_bdlora": "block-diagonal factors are not served",
    "arrow_config": "routing is decided by the relation graph",
    "kasa_config": "KaSA truncates the backbone's weights",
    "ensure_weight_tying": "tied layers are not adapted",
}
_LITERAL = re.compile(r"\^?(?:[\w.-]|\\\.)+")


class PeftConfig(BaseModel):
    """The fields of PEFT's LoraConfig that decide an answer, with PEFT's defaults."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    peft_type: str
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    r: int = Field(8, ge=1)
    lora_alpha: float = 8.0
    use_rslora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None

    @property
    def targets(self) -> frozenset[str] | None:
        """Ends of module paths, or None for all-linear."""
        return frozenset(self.target_modules) if isinstance(self.target_modules, list) else None

    @property
    def excluded(self) -> frozenset[str]:
        """Ends of module paths that are no targets."""
        return frozenset(self.exclude_modules or ())

    def rank(self, path: str) -> int:
        """R that the config promises at a full module path."""
        return int(by_pattern(path, self.rank_pattern or {}, self.r))

    def scale(self, path: str, rank: int) -> float:
        """S at a full module path: alpha / r, or alpha / sqrt(r) with rank stabilisation."""
        alpha = by_pattern(path, self.alpha_pattern or {}, self.lora_alpha)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def is_saved_whole(self, path: str) -> bool:
        """True for a module in modules_to_save and everything below it."""
        return any(f".{module}." in f".{path}." for module in self.modules_to_save or ())

    def check_patterns(self, paths: Collection[str]) -> None:
        """Refuse a pattern whose bare dots match more of these paths as a regular expression than as text."""
        for pattern in (*(self.rank_pattern or ()), *(self.alpha_pattern or ())):
            if "." not in pattern.replace(r"\.", ""):
                continue
            for path in paths:
                if _matches_with_wild_dots(path, pattern) and not by_pattern(path, {pattern: 1}, 0):
                    raise UnsupportedError(f"pattern {pattern!r} also matches {path} in PEFT; write its dots as \\\\.")


def read_config(data: bytes) -> PeftConfig:
    """The config in these bytes. Raises FormatError, TooLargeError, NotFiniteError or UnsupportedError."""
    raw = strict_json(data, CONFIG_NAME)
    if raw.get("peft_type") != "LORA":
        raise UnsupportedError(f"peft_type must be 'LORA', it is {str(raw.get('peft_type'))[:40]!r}")
    _refuse_options({name: value for name, value in raw.items() if name not in PeftConfig.model_fields})
    try:
        config = PeftConfig.model_validate({name: raw[name] for name in raw if name in PeftConfig.model_fields})
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"])
        raise FormatError(f"{CONFIG_NAME}: {where}: {first['msg']}") from None
    _check_values(config)
    return config


def strict_json(data: bytes, name: str) -> dict[str, Any]:
    """The JSON object in these bytes: UTF-8, no name twice, no NaN, not over MAX_JSON_BYTES."""
    if len(data) > MAX_JSON_BYTES:
        raise TooLargeError(f"{name} has {len(data)} bytes; at most {MAX_JSON_BYTES} are read")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_distinct, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair cannot be stored again
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{name} is not well-formed JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{name} must hold a JSON object, it holds a {type(value).__name__}")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name appears twice in one object")
    return made


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _refuse_options(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in HARMLESS or value is None or value is False or value in ([], {}, ""):  # 0 is a value: layer 0
            continue
        reason = _REASONS.get(name, "this field is unknown here, so its meaning cannot be honoured")
        raise UnsupportedError(f"{CONFIG_NAME} sets {name[:80]!r}, which cannot be served exactly: {reason}")


def _check_values(config: PeftConfig) -> None:
    if config.bias != "none":
        raise UnsupportedError(f"bias must be 'none', it is {config.bias[:40]!r}: trained biases are not served")
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in _INITS:
        raise UnsupportedError(
            f"init_lora_weights {init[:40]!r} changes the backbone's weights; save with PEFT's "
            "path_initial_model_for_weight_conversion, which turns the adapter into a plain LoRA"
        )
    _check_names(config)
    for alpha in (config.lora_alpha, *(config.alpha_pattern or {}).values()):
        if not abs(alpha) <= MAX_ALPHA:
            raise NotFiniteError(f"lora_alpha {alpha} is not a usable number (limit {MAX_ALPHA:g})")


def _check_names(config: PeftConfig) -> None:
    if not isinstance(config.target_modules, list) and str(config.target_modules).lower() != ALL_LINEAR:
        raise UnsupportedError("target_modules must be a list of module names or 'all-linear'; a pattern is not read")
    if isinstance(config.exclude_modules, str):
        raise UnsupportedError("exclude_modules must be a list of module names; a pattern is not read")
    fields = ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern")
    for field in fields:
        if len(getattr(config, field) or ()) > MAX_NAMES:
            raise TooLargeError(f"{field} has more than {MAX_NAMES} entries")
    for pattern in (*(config.rank_pattern or ()), *(config.alpha_pattern or ()), *(config.modules_to_save or ())):
        if len(pattern) > 512 or not _LITERAL.fullmatch(pattern):
            raise UnsupportedError(
                f"pattern {pattern[:80]!r} is not literal text; name modules by the end of their path, "
                r"with an optional ^ in front and dots as \."
            )


def _matches_with_wild_dots(path: str, pattern: str) -> bool:
    r"""What `(.*\.)?(pattern)$` matches: as many characters at the end of the path as the pattern has."""
    parts = re.findall(r"\\\.|.", pattern.removeprefix("^"))
    before, tail = path[: -len(parts)], path[-len(parts) :]
    starts_well = before == "" if pattern.startswith("^") else before == "" or before.endswith(".")
    same = (part == "." or part[-1] == letter for part, letter in zip(parts, tail, strict=False))
    return starts_well and len(tail) == len(parts) and all(same)


def is_target(path: str, names: Collection[str]) -> bool:
    """PEFT's rule for listed modules: the whole path, or its end at a dot."""
    return any(end in names for end in ends(path))


def ends(path: str) -> list[str]:
    """The path and each of its ends at a dot."""
    parts = path.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
