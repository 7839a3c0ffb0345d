"""A ``config.json`` by the names and defaults that transformers has for a Llama's."""

from collections.abc import Mapping
from typing import Any

from transformers import LlamaConfig

_OF_THE_MODEL = ("architectures", "auto_map", "model_type")  # which one it is, not what it is like


def as_llama(config: Mapping[str, Any]) -> LlamaConfig:
    """Raises Exception: of rubbish, transformers raises anything."""
    return LlamaConfig(**{name: value for name, value in config.items() if name not in _OF_THE_MODEL})
