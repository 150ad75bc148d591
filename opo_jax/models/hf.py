"""Policies in and out of the Hugging Face format: config.json and safetensors.

One table says which of our parameters is which of theirs; import and export both walk
it, so that they cannot drift apart. The Qwen2 family (Qwen2, Qwen2.5, the R1
distillations of Qwen) is read; any other is refused by name.
"""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import save_file

from opo_jax import sharding
from opo_jax.models.config import ModelConfig
from opo_jax.models.transformer import Policy

# Ours -> theirs. `{i}` is the layer: ours are stacked along a first axis. Kernels are
# [in, out] here and [out, in] there.
_NAMES = {
  ".embedding": "model.embed_tokens.weight",
  ".final_norm.scale": "model.norm.weight",
  ".untied": "lm_head.weight",
  ".layers.attention_norm.scale": "model.layers.{i}.input_layernorm.weight",
  ".layers.attention.query.kernel": "model.layers.{i}.self_attn.q_proj.weight",
  ".layers.attention.query.bias": "model.layers.{i}.self_attn.q_proj.bias",
  ".layers.attention.key.kernel": "model.layers.{i}.self_attn.k_proj.weight",
  ".layers.attention.key.bias": "model.layers.{i}.self_attn.k_proj.bias",
  ".layers.attention.value.kernel": "model.layers.{i}.self_attn.v_proj.weight",
  ".layers.attention.value.bias": "model.layers.{i}.self_attn.v_proj.bias",
  ".layers.attention.out.kernel": "model.layers.{i}.self_attn.o_proj.weight",
  ".layers.mlp_norm.scale": "model.layers.{i}.post_attention_layernorm.weight",
  ".layers.mlp.gate.kernel": "model.layers.{i}.mlp.gate_proj.weight",
  ".layers.mlp.up.kernel": "model.layers.{i}.mlp.up_proj.weight",
  ".layers.mlp.down.kernel": "model.layers.{i}.mlp.down_proj.weight",
}

# Fields of config.json that change the output, with the one value understood.
_FIXED = {
  "model_type": "qwen2",
  "hidden_act": "silu",
  "use_sliding_window": False,
  "rope_scaling": None,
}

# Fields of config.json without which there is no model.
_NEEDED = (
  "model_type",
  "vocab_size",
  "hidden_size",
  "intermediate_size",
  "num_hidden_layers",
  "num_attention_heads",
  "num_key_value_heads",
)


def load(
  path: str | pathlib.Path,
  *,
  mesh: Mesh | None = None,
  dtype: Any = None,
  eos_ids: tuple[int, ...] | None = None,
) -> Policy:
  """Reads a policy.

  Args:
    path: a directory, or a hub id, which is downloaded.
    mesh: where the parameters are laid out; None for one device.
    dtype: of activations, float32 by default. Parameters are float32 masters.
    eos_ids: the end tokens; None takes those of generation_config.json and
      config.json together.

  Raises:
    ValueError: nothing there, an unsupported field, or weights that do not match, with
      their names.
  """
  config = read_config(path)
  if eos_ids is None:
    eos_ids = end_tokens(path)
  options = dict(eos_ids=tuple(eos_ids), mesh=mesh, dtype=dtype or jnp.float32)
  like = jax.eval_shape(lambda key: Policy(config, key, **options), jax.random.key(0))
  if mesh is not None:
    like = sharding.abstract(like, sharding.tree_shardings(like, mesh))
  return read_weights(path, like)


def read_config(path: str | pathlib.Path) -> ModelConfig:
  """What config.json says.

  Raises:
    ValueError: a field whose value is not supported, by name.
  """
  return _config_from(json.loads((_directory(path) / "config.json").read_text()))


def read_weights(path: str | pathlib.Path, like: Policy) -> Policy:
  """Reads the parameters of a policy whose shapes and layout are known.

  Raises:
    ValueError: names or shapes that do not match, listed.
  """
  directory = _directory(path)
  files, shapes = _find_weights(directory)
  leaves, structure = jax.tree_util.tree_flatten_with_path(like)
  wanted = {
    theirs: _their_shape(_our_name(key), leaf)
    for key, leaf in leaves
    for theirs in _their_names(_our_name(key), like.config)
  }
  if like.config.tie_embeddings and "lm_head.weight" in files:
    # A tied model may carry a copy of its embedding.
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    wanted[head] = wanted[embedding]
    if embedding in files and not np.array_equal(
      _tensor(files, embedding), _tensor(files, head)
    ):
      raise ValueError(
        f"{directory}/config.json ties the embeddings, but {head} is not"
        f" {embedding}; set tie_word_embeddings to false, or drop {head}."
      )
  unknown, missing = files.keys() - wanted.keys(), wanted.keys() - files.keys()
  misshaped = {
    name: f"{shapes[name]} instead of {wanted[name]}"
    for name in sorted(files.keys() & wanted.keys())
    if shapes[name] != wanted[name]
  }
  if unknown or missing or misshaped:
    raise ValueError(
      f"The weights in {directory} do not match its config.json: missing"
      f" {sorted(missing)}, unknown {sorted(unknown)}, of another shape {misshaped}."
    )
  arrays = [
    jax.device_put(_read(_our_name(key), like.config, files), leaf.sharding)
    for key, leaf in leaves
  ]
  return jax.tree.unflatten(structure, arrays)


def save(policy: Policy, directory: str | pathlib.Path, *, tokenizer=None) -> None:
  """Writes config.json, generation_config.json, model.safetensors and the tokenizer.

  Args:
    policy: parameters are written as they are, float32.
    directory: made if it is missing.
    tokenizer: a `transformers` tokenizer, written beside with its chat template.

  Raises:
    ValueError: a policy that the format cannot tell (Qwen2 has query, key and value
      biases).
  """
  if not policy.config.qkv_bias:
    raise ValueError(
      "A Qwen2 model has biases on query, key and value; this policy has none and"
      " cannot be exported as one. Make it with ModelConfig(qkv_bias=True)."
    )
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  tensors = {}
  for key, leaf in jax.tree_util.tree_flatten_with_path(policy)[0]:
    ours, array = _our_name(key), np.asarray(leaf)
    layers = array if "{i}" in _NAMES[ours] else [array]
    for theirs, layer in zip(_their_names(ours, policy.config), layers, strict=True):
      layer = layer.T if ours.endswith(".kernel") else layer
      tensors[theirs] = np.ascontiguousarray(layer)
  save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
  eos = {"eos_token_id": list(policy.eos_ids)}
  for name, values in (
    ("config.json", _config_to(policy.config) | eos),
    ("generation_config.json", eos),
  ):
    (directory / name).write_text(json.dumps(values, indent=2) + "\n")
  if tokenizer is not None:
    tokenizer.save_pretrained(directory)


def _directory(path) -> pathlib.Path:
  directory = pathlib.Path(path)
  if (directory / "config.json").is_file():
    return directory
  if directory.exists():
    raise ValueError(f"{directory} has no config.json; give a Hugging Face directory.")
  import huggingface_hub

  try:
    return pathlib.Path(
      huggingface_hub.snapshot_download(
        str(path), allow_patterns=["*.json", "*.safetensors"]
      )
    )
  except Exception as error:
    raise ValueError(
      f"No policy at {str(path)!r}: no such directory, and the hub did not give it"
      f" ({type(error).__name__}); give a directory, or a hub id and a network"
      " (--model.path)."
    ) from error


def _config_from(values: dict[str, Any]) -> ModelConfig:
  for field, understood in _FIXED.items():
    if values.get(field, understood) != understood:
      raise ValueError(
        f"config.json has {field} = {values[field]!r}; only {understood!r} is"
        " supported."
      )
  missing = [field for field in _NEEDED if field not in values]
  if missing:
    raise ValueError(f"config.json lacks {missing}; give a Hugging Face config.")
  # Newer files keep the rotary settings together.
  rope = values.get("rope_parameters") or {}
  others = rope.keys() - {"rope_type", "rope_theta"}
  if others or rope.get("rope_type", "default") != "default":
    raise ValueError(
      f"config.json has rope_parameters = {rope!r}; only rope_type 'default' with a"
      " rope_theta is supported."
    )
  heads = values["num_attention_heads"]
  return ModelConfig(
    vocab_size=values["vocab_size"],
    width=values["hidden_size"],
    mlp_width=values["intermediate_size"],
    num_layers=values["num_hidden_layers"],
    num_heads=heads,
    num_kv_heads=values["num_key_value_heads"],
    head_dim=values.get("head_dim") or values["hidden_size"] // heads,
    rope_theta=rope.get("rope_theta") or values.get("rope_theta", 10_000.0),
    norm_epsilon=values.get("rms_norm_eps", 1e-6),
    tie_embeddings=values.get("tie_word_embeddings", False),
    initializer_range=values.get("initializer_range", 0.02),
  )


def _config_to(config: ModelConfig) -> dict[str, Any]:
  return {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "vocab_size": config.vocab_size,
    "hidden_size": config.width,
    "intermediate_size": config.mlp_width,
    "num_hidden_layers": config.num_layers,
    "num_attention_heads": config.num_heads,
    "num_key_value_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
    "rope_theta": config.rope_theta,
    "rms_norm_eps": config.norm_epsilon,
    "tie_word_embeddings": config.tie_embeddings,
    "initializer_range": config.initializer_range,
    "use_sliding_window": False,
    "torch_dtype": "float32",
  }


def end_tokens(path: str | pathlib.Path) -> tuple[int, ...]:
  """The end tokens of config.json and generation_config.json, as one set."""
  directory, ids = _directory(path), set()
  for name in ("config.json", "generation_config.json"):
    file = directory / name
    listed = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    ids.update(listed if isinstance(listed, list) else [listed])
  return tuple(sorted(ids - {None}))


def _find_weights(directory):
  """Where each weight lies, and its shape: one file or several, as the hub has them."""
  files: dict[str, pathlib.Path] = {}
  shapes: dict[str, tuple[int, ...]] = {}
  for file in sorted(directory.glob("*.safetensors")):
    with safe_open(file, framework="numpy") as tensors:
      for name in tensors.keys():  # noqa: SIM118
        if name in files:
          raise ValueError(
            f"{name} lies in {files[name].name} and in {file.name} of {directory};"
            " remove the one that does not belong there."
          )
        files[name] = file
        shapes[name] = tuple(tensors.get_slice(name).get_shape())
  if not files:
    raise ValueError(f"{directory} has no weights; *.safetensors is what is read.")
  return files, shapes


def _our_name(key) -> str:
  return jax.tree_util.keystr(key).removesuffix(".value")


def _their_names(ours: str, config: ModelConfig) -> list[str]:
  theirs = _NAMES[ours]
  if "{i}" not in theirs:
    return [theirs]
  return [theirs.format(i=i) for i in range(config.num_layers)]


def _their_shape(ours: str, leaf) -> tuple[int, ...]:
  shape = leaf.shape[1:] if "{i}" in _NAMES[ours] else leaf.shape
  return shape[::-1] if ours.endswith(".kernel") else shape


def _read(ours, config, files) -> np.ndarray:
  """One of our arrays, float32: its layers stacked, its kernels transposed."""
  parts = [_tensor(files, theirs) for theirs in _their_names(ours, config)]
  if ours.endswith(".kernel"):
    parts = [part.T for part in parts]
  return np.stack(parts) if "{i}" in _NAMES[ours] else parts[0]


def _tensor(files, name) -> np.ndarray:
  # Through JAX, because NumPy has no bfloat16.
  with safe_open(files[name], framework="flax") as tensors:
    return np.asarray(tensors.get_tensor(name).astype(jnp.float32))
