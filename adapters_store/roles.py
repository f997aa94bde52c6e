"""Short names for the usual places of a transformer, whatever its family calls them.

Roles: q, k, v, o (attention), gate, up, down (feed-forward), norm. A target is a role, `all-linear`, or the end of a
module path as PEFT writes `target_modules` ("query", "attention.output.dense").
"""

import re
from collections.abc import Iterable, Mapping

from adapters_store.errors import NoSiteError
from adapters_store.places import is_linear
from adapters_store.primitives.norm import is_norm
from adapters_store.sites import Sites

_ROLES = {
    "q": r"(self\.query|q_proj|q_lin|c_attn|query_key_value|qkv_proj)",
    "k": r"(self\.key|k_proj|k_lin|c_attn|query_key_value|qkv_proj)",
    "v": r"(self\.value|v_proj|v_lin|c_attn|query_key_value|qkv_proj)",
    "o": r"(attention\.output\.dense|o_proj|out_lin|attn\.c_proj|self_attention\.dense|attention\.dense)",
    "gate": r"(gate_proj|gate_up_proj)",
    "up": r"(intermediate\.dense|up_proj|gate_up_proj|ffn\.lin1|mlp\.c_fc|dense_h_to_4h|fc1)",
    "down": r"((?<!attention\.)output\.dense|down_proj|ffn\.lin2|mlp\.c_proj|dense_4h_to_h|fc2)",
}


def select(sites: Sites, targets: Iterable[str]) -> list[str]:
    """Names of the sites that the targets mean, in the backbone's order. Raises NoSiteError for one that means none."""
    chosen: set[str] = set()
    for target in targets:
        matching = [name for name in sites if _matches(sites, name, target)]
        if not matching:
            some = sorted({name.rsplit(".", 1)[-1] for name in sites})
            raise NoSiteError(
                f"target module {target!r} matches no site; use a role ({', '.join(_ROLES)}, norm), 'all-linear', "
                f"or the end of a module path such as {some}"
            )
        chosen.update(matching)
    return [name for name in sites if name in chosen]


def _matches(sites: Sites, name: str, target: str) -> bool:
    module = sites[name].place.module
    if target == "norm":
        return is_norm(module)
    if target == "all-linear":
        return is_linear(module) and not name.startswith("pooler")
    if target in _ROLES:
        return is_linear(module) and re.search(rf"(^|\.){_ROLES[target]}$", name) is not None
    return matches_suffix(name, target)


def matches_suffix(name: str, target: str) -> bool:
    """PEFT's rule for a listed target module: the whole path, or its end at a dot."""
    return name == target or name.endswith("." + target)


def by_pattern(name: str, patterns: Mapping[str, float], default: float) -> float:
    """PEFT's rank_pattern and alpha_pattern: the value of the first pattern that matches the end of the path.

    A pattern is a regular expression to PEFT; here it must be literal or anchored with ^, and it is matched as text,
    so that a hostile pattern cannot hang a server.
    """
    for pattern, value in patterns.items():
        literal = pattern.removeprefix("^").replace(r"\.", ".")
        if name == literal if pattern.startswith("^") else matches_suffix(name, literal):
            return value
    return default
