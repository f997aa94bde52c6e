"""What the module tree of a backbone tells: which modules are linear, how wide they are, how deep they stand."""

import re

from torch import Tensor, nn

from adapters_store.primitives.norm import is_norm

_NUMBER = re.compile(r"\.(\d+)(?:\.|$)")


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear and for transformers' Conv1D (a linear layer that keeps its weight transposed)."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def widths(module: nn.Module, hidden_size: int) -> tuple[int, int]:
    """(d_in, d_out) of a module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    weight = getattr(module, "weight", None)
    if is_linear(module) and isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[1]
    if is_norm(module) and isinstance(weight, Tensor):
        return weight.shape[0], weight.shape[0]
    return hidden_size, hidden_size


def layers_by_name(backbone: nn.Module) -> dict[str, int]:
    """Depth of every module: the first number in its path.

    What stands before the first layer has depth 0, what stands behind the last one has the last depth.
    """
    names = [name for name, _ in backbone.named_modules()]
    depths = {name: int(found[1]) for name in names if (found := _NUMBER.search(name))}
    last, layers = 0, {}
    for name in names:
        last = depths.get(name, last)
        layers[name] = last
    return layers


def blocks(backbone: nn.Module) -> list[str]:
    """Names of the backbone's blocks: what stands in its lists of layers."""
    lists = [(name, module) for name, module in backbone.named_modules() if isinstance(module, nn.ModuleList)]
    return [f"{name}.{i}" for name, module in lists for i in range(len(module))]


def in_eval(backbone: nn.Module) -> nn.Module:
    """The backbone frozen and in evaluation mode: no dropout, no gradients of its own."""
    backbone.eval()
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    return backbone
