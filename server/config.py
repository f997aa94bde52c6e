"""What the operator chooses: by flag (`--batch-tokens 4096`) or by variable (`ESPALIER_BATCH_TOKENS=4096`)."""

import os
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

# Read elsewhere: the kernel's switch and cache folder, and the store of the other two programs.
_OTHERS = {"ESPALIER_NATIVE", "ESPALIER_CACHE"}


class Settings(BaseSettings):
    """Serve many task adapters, composed by their relation graph, on one frozen backbone."""

    model_config = SettingsConfigDict(
        env_prefix="ESPALIER_", extra="forbid", frozen=True, cli_kebab_case=True, cli_prog_name="espalier-serve",
        cli_implicit_flags=True, cli_hide_none_type=True, cli_avoid_json=True,
    )  # fmt: skip

    store: Path = Field(Path("adapters_store/data"), description="folder of the adapter store")
    backbone: str | None = Field(None, description="hub id or folder of the model; all-MiniLM-L6-v2 if not given")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the backbone")
    device: str = Field("cpu", description="cpu, cuda or cuda:1")
    threads: int | None = Field(None, ge=1, description="CPU threads of the forward pass; all cores if not given")
    host: str = Field("127.0.0.1", description="address to listen on; others than loopback need --api-keys")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    api_keys: Path | None = Field(None, description="JSON file of hashed API keys; see python -m server.keys")
    batch_tokens: int = Field(2048, ge=16, description="tokens of one forward at most (one longer text runs alone)")
    queue_tokens: int = Field(65536, ge=16, description="tokens waiting at most; beyond, 429 at once")
    generate: bool | None = Field(None, description="answer with generated text; if not given: where the model can")
    max_length: int | None = Field(
        None, ge=16, description="tokens of prompt and text; the model's context if not given"
    )
    kv_mb: int = Field(1024, ge=1, description="MB of keys and values; texts that do not fit wait")
    step_tokens: int = Field(512, ge=1, description="tokens of one generation step: long prompts are read in chunks")
    max_sequences: int = Field(256, ge=1, description="texts generated at once at most")
    cuda_graphs: bool = Field(False, description="replay decoding steps as CUDA graphs; has not been run on a GPU yet")
    prefix_cache: bool = Field(
        False,
        description="reuse keys and values of equal prompts under equal compositions, of all API keys: usage then "
        "tells how much of a prompt somebody has asked before",
    )
    max_inputs: int = Field(1024, ge=1, description="rows of one call at most, fan-out counted")
    max_adapters: int = Field(64, ge=1, description="adapters composed for one row at most")
    slots: int = Field(1024, ge=1, description="adapters on the device at most")
    host_cache_mb: int = Field(1024, ge=0, description="MB of adapters kept in RAM behind the device")
    preload: bool = Field(True, description="load the served adapters before the server says it is ready")
    max_rank: int = Field(256, ge=1, description="largest rank that may be uploaded or loaded")
    max_upload_mb: int = Field(256, ge=1, description="MB of an uploaded adapter at most")
    allow_zero: bool = Field(False, description="accept adapters that change nothing")
    poll_s: float = Field(2.0, gt=0, description="seconds between looks at the store for what others published")
    drain_s: float = Field(30.0, ge=0, description="seconds to finish what was admitted after SIGTERM")
    log_format: Literal["text", "json"] = Field("text", description="log lines for people or for programs")

    @property
    def is_loopback(self) -> bool:
        """True if nobody outside this machine can connect."""
        return self.host in ("127.0.0.1", "localhost", "::1")


def check_environment() -> None:
    """Refuse ESPALIER_ variables that mean nothing: a typo must not become a default. Raises ValueError."""
    known = {"ESPALIER_" + name.upper() for name in Settings.model_fields} | _OTHERS
    unknown = sorted(name for name in os.environ if name.startswith("ESPALIER_") and name.upper() not in known)
    if unknown:
        raise ValueError(f"unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
