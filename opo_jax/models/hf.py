"""Policies in and out of the Hugging Face format: config.json and safetensors.

One table says which of our parameters is which of theirs; import and export both walk
it, so that they cannot drift apart.
"""

import collections
import functools
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file

from opo_jax.devices import sharding
from opo_jax.models import lora
from opo_jax.models.config import ModelConfig
from opo_jax.models.config_json import (
  config_to,
  end_tokens,
  find_directory,
  read_config,
)
from opo_jax.models.transformer import Policy

# Ours -> theirs. `{i}` is the layer: ours are stacked along a first axis. Kernels are
# [in, out] here and [out, in] there. A family has those that its config asks for.
_NAMES = {
  ".embedding": "model.embed_tokens.weight",
  ".final_norm.scale": "model.norm.weight",
  ".untied": "lm_head.weight",
  ".score.kernel": "score.weight",
  ".layers.attention_norm.scale": "model.layers.{i}.input_layernorm.weight",
  ".layers.attention.query.kernel": "model.layers.{i}.self_attn.q_proj.weight",
  ".layers.attention.query.bias": "model.layers.{i}.self_attn.q_proj.bias",
  ".layers.attention.query_norm.scale": "model.layers.{i}.self_attn.q_norm.weight",
  ".layers.attention.key.kernel": "model.layers.{i}.self_attn.k_proj.weight",
  ".layers.attention.key.bias": "model.layers.{i}.self_attn.k_proj.bias",
  ".layers.attention.key_norm.scale": "model.layers.{i}.self_attn.k_norm.weight",
  ".layers.attention.value.kernel": "model.layers.{i}.self_attn.v_proj.weight",
  ".layers.attention.value.bias": "model.layers.{i}.self_attn.v_proj.bias",
  ".layers.attention.out.kernel": "model.layers.{i}.self_attn.o_proj.weight",
  ".layers.attention.out.bias": "model.layers.{i}.self_attn.o_proj.bias",
  ".layers.mlp_norm.scale": "model.layers.{i}.post_attention_layernorm.weight",
  ".layers.mlp.gate.kernel": "model.layers.{i}.mlp.gate_proj.weight",
  ".layers.mlp.gate.bias": "model.layers.{i}.mlp.gate_proj.bias",
  ".layers.mlp.up.kernel": "model.layers.{i}.mlp.up_proj.weight",
  ".layers.mlp.up.bias": "model.layers.{i}.mlp.up_proj.bias",
  ".layers.mlp.down.kernel": "model.layers.{i}.mlp.down_proj.weight",
  ".layers.mlp.down.bias": "model.layers.{i}.mlp.down_proj.bias",
}
# Old Llama files carry this table; it follows from config.json and is not read.
_DERIVED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
_DTYPES = ("F64", "F32", "F16", "BF16")


def load(
  path: str | pathlib.Path,
  *,
  mesh: Mesh | None = None,
  dtype: Any = None,
  param_dtype: Any = jnp.float32,
  eos_ids: tuple[int, ...] | None = None,
) -> Policy:
  """Reads a policy.

  Args:
    path: a directory, or a hub id, which is downloaded.
    mesh: where the parameters are laid out; None for one device.
    dtype: of activations, float32 by default.
    param_dtype: of parameters; float32 masters by default.
    eos_ids: the end tokens; None takes those of generation_config.json and
      config.json together.

  Raises:
    ValueError: nothing there, an unsupported field, or weights that do not match, with
      their names.
  """
  like = abstract_policy(
    read_config(path),
    mesh=mesh,
    dtype=dtype or jnp.float32,
    param_dtype=param_dtype,
    eos_ids=end_tokens(path) if eos_ids is None else tuple(eos_ids),
  )
  return read_weights(path, like)


def abstract_policy(
  config: ModelConfig,
  *,
  mesh: Mesh | None = None,
  kind: type[Policy] = Policy,
  **options: Any,
) -> Policy:
  """Shapes, dtypes and layout of a policy that is not there yet.

  Args:
    config: the family's numbers.
    mesh: where its parameters will lie.
    kind: `Policy`, or what is built on it.
    options: of `Policy`.
  """
  like = jax.eval_shape(
    lambda key: kind(config, key, mesh=mesh, **options), jax.random.key(0)
  )
  if mesh is None:
    return like
  return sharding.abstract(like, sharding.tree_shardings(like, mesh))


# --- reading weights ----------------------------------------------------------------


def read_weights(path: str | pathlib.Path, like: Policy) -> Policy:
  """Reads the parameters of a policy whose shapes and layout are known.

  Every device gets its slice of a tensor as it lies in the file, and transposes and
  converts it there. One tensor is read at a time, so the host needs the memory of one
  (of its slices on this host), not of the model.

  Args:
    path: a directory, or a hub id, which is downloaded.
    like: from `abstract_policy`.

  Raises:
    ValueError: names, shapes or dtypes that do not match, all listed.
  """
  directory = find_directory(path, weights=True)
  files, shapes = _find_weights(directory)
  leaves, structure = jax.tree_util.tree_flatten_with_path(like)
  wanted = {
    theirs: _their_shape(_our_name(key), leaf)
    for key, leaf in leaves
    for theirs in _their_names(_our_name(key), like.config)
  }
  embedding, head = "model.embed_tokens.weight", "lm_head.weight"
  if like.config.tie_embeddings and head in files:
    # A tied model may carry a copy of its embedding.
    wanted[head] = wanted[embedding]
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
  if like.config.tie_embeddings and head in files:
    _check_copy(files, embedding, head, shapes[head][0])
  arrays = [_read(_our_name(key), like.config, leaf, files) for key, leaf in leaves]
  return jax.tree.unflatten(structure, arrays)


def _find_weights(directory):
  """Where each weight lies, and its shape: one file or several, as the hub has them."""
  found = collections.defaultdict(list)
  shapes: dict[str, tuple[int, ...]] = {}
  quantised = {}
  for file in sorted(directory.glob("*.safetensors")):
    with safe_open(file, framework="numpy") as tensors:
      for name in tensors.keys():  # noqa: SIM118
        if _DERIVED.fullmatch(name):
          continue
        found[name].append(file)
        tensor = tensors.get_slice(name)
        shapes[name] = tuple(tensor.get_shape())
        if tensor.get_dtype() not in _DTYPES:
          quantised[name] = tensor.get_dtype()
  index = directory / "model.safetensors.index.json"
  if index.exists():
    named = set(json.loads(index.read_text())["weight_map"].values())
    absent = sorted(name for name in named if not (directory / name).exists())
    if absent:
      raise ValueError(
        f"{directory} lacks {absent}, which {index.name} names; download the rest."
      )
  if not found:
    raise ValueError(f"{directory} has no weights; *.safetensors is what is read.")
  twice = [
    f"{name} lies in {' and in '.join(file.name for file in files)}"
    for name, files in found.items()
    if len(files) > 1
  ]
  if twice:
    raise ValueError(
      f"Weights in {directory} are set twice: {'; '.join(twice)}. Remove the file that"
      " does not belong there."
    )
  if quantised:
    raise ValueError(
      f"Weights in {directory} are quantised: {quantised}; {', '.join(_DTYPES)} are"
      " read."
    )
  return {name: files[0] for name, files in found.items()}, shapes


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


def _read(ours: str, config: ModelConfig, leaf, files) -> jax.Array:
  """One of our arrays, where it belongs: its layers stacked, its kernels transposed."""
  stacked, transposed = "{i}" in _NAMES[ours], ours.endswith(".kernel")
  layout = leaf.sharding
  if layout is not None:
    spec = tuple(layout.spec)[1 if stacked else 0 :]
    spec = PartitionSpec(*(spec[::-1] if transposed else spec))
    layout = NamedSharding(layout.mesh, spec)
  array = None
  if stacked:
    array = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
  for layer, name in enumerate(_their_names(ours, config)):
    tensor = _tensor(files[name], name, _their_shape(ours, leaf), layout)
    array = _place(array, tensor, layer, leaf.dtype, leaf.sharding, transposed)
    # Waits: otherwise tensors of the host pile up faster than devices take them.
    jax.block_until_ready(array)
  return array


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _place(array, tensor, layer, dtype, layout, transposed):
  """Writes one layer into the stacked array that is there; converts it on the way."""
  tensor = (tensor.T if transposed else tensor).astype(dtype)
  out = tensor if array is None else array.at[layer].set(tensor)
  return out if layout is None else jax.lax.with_sharding_constraint(out, layout)


def _tensor(file, name, shape, layout) -> jax.Array:
  """A tensor as it lies in the file, every device of this host with its own slice."""
  if layout is None:
    return jnp.asarray(_slice(file, name, (slice(None),) * len(shape)))
  slices = {}  # copies on several devices are read once

  def read(index):
    key = str(index)
    if key not in slices:
      slices[key] = _slice(file, name, index)
    return slices[key]

  return jax.make_array_from_callback(shape, layout, read)


def _slice(file, name, index) -> np.ndarray:
  # Opened for each: what is mapped counts as memory until the file is closed.
  with safe_open(file, framework="numpy") as tensors:
    return tensors.get_slice(name)[index]


def _check_copy(files, embedding, head, num_rows, block=4096):
  for start in range(0, num_rows, block):
    rows = (slice(start, min(start + block, num_rows)),)
    one, other = (_slice(files[name], name, rows) for name in (embedding, head))
    if not np.array_equal(one, other):
      raise ValueError(
        f"config.json ties the embeddings, but {head} is not {embedding}; set"
        f" tie_word_embeddings to false, or drop {head}."
      )


# --- writing ------------------------------------------------------------------------


def save(
  policy: Policy,
  directory: str | pathlib.Path,
  *,
  tokenizer=None,
  generation: dict[str, Any] | None = None,
  card: str | None = None,
  max_file_bytes: int = 5_000_000_000,
) -> None:
  """Writes what `transformers`, vLLM and SGLang load.

  config.json, generation_config.json, safetensors (with an index where there are
  several files), the tokenizer with its chat template, a model card. The host holds
  one file's tensors at a time. Every process takes part, the first one writes.

  Args:
    policy: parameters are written as they are; adapters are merged into them.
    directory: made if it is missing.
    tokenizer: a `transformers` tokenizer.
    generation: further fields of generation_config.json, those of the start model.
    card: the text of README.md.
    max_file_bytes: where the next file begins.

  Raises:
    ValueError: a policy that no family of the format can tell.
  """
  policy = lora.merge(policy)
  special = {"eos_token_id": list(policy.eos_ids) or None}
  if tokenizer is not None:
    special["bos_token_id"] = tokenizer.bos_token_id
    special["pad_token_id"] = tokenizer.pad_token_id
  dtype = str(jax.tree.leaves(policy)[0].dtype)
  values = config_to(policy.config, head=policy.head)
  texts = {"config.json": values | special | {"torch_dtype": dtype}}
  if policy.head == "CausalLM":
    texts["generation_config.json"] = (generation or {}) | special
  files = _split(policy, max_file_bytes)
  names = [
    f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
  ]
  if len(files) == 1:
    names = ["model.safetensors"]
  else:
    where = {
      theirs: file
      for file, entries in zip(names, files, strict=True)
      for theirs, *_ in entries
    }
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(policy))
    texts["model.safetensors.index.json"] = {
      "metadata": {"total_size": total},
      "weight_map": where,
    }
  directory, writes = pathlib.Path(directory), jax.process_index() == 0
  if writes:
    _write_texts(directory, texts, tokenizer, card)
  for name, entries in zip(names, files, strict=True):
    tensors = {
      theirs: _gather(leaf, layer, transposed=ours.endswith(".kernel"))
      for theirs, ours, leaf, layer in entries
    }
    if writes:
      save_file(tensors, directory / name, metadata={"format": "pt"})


def save_adapter(
  policy: Policy,
  directory: str | pathlib.Path,
  *,
  base: str,
  tokenizer=None,
  card: str | None = None,
) -> None:
  """Writes the adapters alone, as `peft` and vLLM load them beside the base.

  adapter_config.json, adapter_model.safetensors, the tokenizer, a model card. Every
  process takes part, the first one writes.

  Args:
    policy: with adapters, see `models.lora`.
    directory: made if it is missing.
    base: hub id or directory of the policy without them.
    tokenizer: a `transformers` tokenizer.
    card: the text of README.md.

  Raises:
    ValueError: a policy without adapters.
  """
  found = dict(lora.adapters(policy))
  if not found:
    raise ValueError("The policy has no adapters; write it whole (--format merged).")
  adapter = next(iter(found.values()))
  config = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": base,
    "r": adapter.rank,
    "lora_alpha": adapter.alpha,
    "target_modules": [lora.LAYERS[name][1] for name in found],
    "lora_dropout": 0.0,
    "bias": "none",
    "inference_mode": True,
  }
  tensors = {}
  for name, adapter in found.items():
    kernel = f".layers.{lora.LAYERS[name][0]}.{name}.kernel"
    for layer, theirs in enumerate(_their_names(kernel, policy.config)):
      for matrix, param in (("lora_A", adapter.a), ("lora_B", adapter.b)):
        weight = theirs.replace(".weight", f".{matrix}.weight")
        array = _gather(param[...], layer, transposed=True)
        tensors[f"base_model.model.{weight}"] = array
  if jax.process_index() == 0:
    directory = pathlib.Path(directory)
    _write_texts(directory, {"adapter_config.json": config}, tokenizer, card)
    file = directory / "adapter_model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})


def _write_texts(directory, texts, tokenizer, card):
  directory.mkdir(parents=True, exist_ok=True)
  for name, values in texts.items():
    (directory / name).write_text(json.dumps(values, indent=2) + "\n")
  if card is not None:
    (directory / "README.md").write_text(card)
  if tokenizer is not None:
    tokenizer.save_pretrained(directory)


def _split(policy, max_file_bytes) -> list[list[tuple]]:
  """(their name, our name, our array, layer or None) of every tensor, file by file."""
  files, size = [[]], 0
  for entry in sorted(_entries(policy), key=lambda entry: entry[3] or 0):
    _, _, leaf, layer = entry
    num_bytes = leaf.nbytes // (1 if layer is None else leaf.shape[0])
    if files[-1] and size + num_bytes > max_file_bytes:
      files.append([])
      size = 0
    files[-1].append(entry)
    size += num_bytes
  return files


def _entries(policy) -> Iterator[tuple]:
  for key, leaf in jax.tree_util.tree_flatten_with_path(policy)[0]:
    ours = _our_name(key)
    stacked = "{i}" in _NAMES[ours]
    for layer, theirs in enumerate(_their_names(ours, policy.config)):
      yield theirs, ours, leaf, layer if stacked else None


def _gather(leaf, layer, *, transposed) -> np.ndarray:
  """One tensor on the host, whole."""
  everywhere = None
  if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
    everywhere = NamedSharding(leaf.sharding.mesh, PartitionSpec())
  array = np.asarray(_take(everywhere)(leaf, layer))
  return np.ascontiguousarray(array.T if transposed else array)


@functools.cache
def _take(layout):
  def take(leaf, layer):
    return (
      leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, 0, False)
    )

  return jax.jit(take, out_shardings=layout)
