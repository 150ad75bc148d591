"""Models: one decoder for all families, read and written in Hugging Face format."""

from opo_jax.models.config import ModelConfig
from opo_jax.models.config_json import read_config
from opo_jax.models.hf import load, save, save_adapter
from opo_jax.models.transformer import Policy

__all__ = ["ModelConfig", "Policy", "load", "read_config", "save", "save_adapter"]
