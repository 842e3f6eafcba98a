"""What a model's ``config.json`` says of its shape: the one place that reads it.

The file may be a stranger's, so every key is checked before its value is used. A key that is absent has the default of
the model's own class in transformers, and a family's own name for a number (GPT-2's ``n_embd``) is that class's too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import EdgekdError
from .files import read_json

Size = Annotated[int, Field(gt=0, lt=2**31)]
Count = Annotated[int, Field(gt=0, le=2**16)]
"""Of what transformers, or one of our tables, holds something in memory for each."""
Id = Annotated[int, Field(ge=-1, lt=2**31)]  # -1 is some files' word for "none"
Positive = Annotated[float, Field(gt=0, lt=1e30)]


class Rope(BaseModel):
    """``rope_parameters``, or ``rope_scaling`` as it was called. What is not named here stays in ``model_extra``."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="allow")

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Positive | None = None
    partial_rotary_factor: Positive | None = None
    factor: Positive | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Positive | None = None


class Decoder(BaseModel):
    """The language model's part of a ``config.json``, under the names that most families use."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    model_type: str = ""
    architectures: list[str] | None = None
    vocab_size: Size | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | list[Size] | None = None
    num_hidden_layers: Count | None = None
    num_attention_heads: Count | list[Count] | None = None
    num_key_value_heads: Count | list[Count] | None = None
    head_dim: Count | None = None
    max_position_embeddings: Size | None = None
    rms_norm_eps: Annotated[float, Field(ge=0, lt=1)] | None = None
    rope_theta: Positive | None = None
    rope_parameters: Rope | None = None
    rope_scaling: Rope | None = None
    partial_rotary_factor: Positive | None = None
    tie_word_embeddings: bool | None = None
    hidden_act: str | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    layer_types: list[str] | None = None
    bos_token_id: Id | list[Id] | None = None
    eos_token_id: Id | list[Id] | None = None
    pad_token_id: Id | list[Id] | None = None
    quantization_config: dict[str, Any] | None = None
    transformers_weights: str | None = None
    num_labels: Count | None = None

    def size(self, key: str) -> int:
        """A number that has to be there.

        Raises:
            EdgekdError: it is absent, or differs from layer to layer.
        """
        value = getattr(self, key)
        if isinstance(value, int):
            return value
        what = "is missing" if value is None else "differs from layer to layer"
        raise EdgekdError(f"config.json: key {key!r} {what}.", "Save the model again, or use another one.")

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; as many as of queries where the file names none."""
        return self.size("num_attention_heads" if self.num_key_value_heads is None else "num_key_value_heads")

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.head_dim or max(1, self.size("hidden_size") // self.size("num_attention_heads"))


def read_config(path: Path) -> dict[str, Any]:
    """A ``config.json`` as it stands, once it has been checked.

    Raises:
        EdgekdError: it cannot be read, or a key holds what no model could have.
    """
    config = read_json(path, remedy="Save the model again.")
    read_decoder(config, str(path))
    return config


def read_decoder(config: Mapping[str, Any], subject: str = "config.json") -> Decoder:
    """Check a ``config.json`` and read it.

    Args:
        subject: the file, for messages.

    Raises:
        EdgekdError: a key holds what no model could have.
    """
    nested = config.get("text_config") or {}
    if not isinstance(nested, dict):
        raise EdgekdError(f"{subject}: key 'text_config' is no object.", "Save the model again.")
    own = {**config, **nested}
    values = {key: own[name] for key, name in _names(own.get("model_type")).items() if name in own}
    try:
        return Decoder.model_validate({**_defaults(own.get("model_type")), **values})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, found = first["loc"][0], repr(first["input"])
        raise EdgekdError(
            f"{subject}: key {key!r}: {first['msg']}, not {found:.80}.", "Save the model again."
        ) from error


def _names(model_type: Any) -> dict[str, str]:
    """The name that a family gives each key of ``Decoder``."""
    aliases = getattr(_class(model_type), "attribute_map", {})
    return {key: aliases.get(key, key) for key in Decoder.model_fields}


def _defaults(model_type: Any) -> dict[str, Any]:
    """The numbers and switches that a model class takes where the file is silent. The ids are never among them: those
    of a class are another vocabulary's."""
    kind, names = _class(model_type), _names(model_type)
    found = {key: getattr(kind, name, None) for key, name in names.items() if not key.endswith("_token_id")}
    return {key: value for key, value in found.items() if type(value) in (int, float, bool, str)}


def _class(model_type: Any) -> Any:
    """The class of configurations in transformers, or None for a family that it does not know."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type] if isinstance(model_type, str) and model_type in CONFIG_MAPPING else None
