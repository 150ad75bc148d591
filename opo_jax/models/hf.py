"""Reads and writes policies in Hugging Face format: config.json and safetensors.

One table maps our parameter names to theirs; import and export share it, so that they
cannot diverge.
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

# Our name -> theirs. `{i}` is the layer: our layers are stacked along a first axis.
# Kernels are [in, out] here and [out, in] there. The config decides which of them a
# model has.
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
# Old Llama files contain this table; it follows from config.json and is ignored.
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
    mesh: the devices that the parameters are sharded over; None for one device.
    dtype: of activations, float32 by default.
    param_dtype: of parameters, float32 by default.
    eos_ids: the end tokens; None: those of generation_config.json and config.json
      together.

  Raises:
    ValueError: no model at `path`, an unsupported field, or weights that do not match,
      by name.
  """
  abstract = abstract_policy(
    read_config(path),
    mesh=mesh,
    dtype=dtype or jnp.float32,
    param_dtype=param_dtype,
    eos_ids=end_tokens(path) if eos_ids is None else tuple(eos_ids),
  )
  return read_weights(path, abstract)


def abstract_policy(
  config: ModelConfig,
  *,
  mesh: Mesh | None = None,
  kind: type[Policy] = Policy,
  **options: Any,
) -> Policy:
  """Describes a policy by shapes, dtypes and shardings, without allocating it.

  Args:
    config: sizes and options of the family.
    mesh: the devices that the parameters will be sharded over.
    kind: `Policy` or a subclass.
    options: of `Policy`.
  """
  policy = jax.eval_shape(
    lambda key: kind(config, key, mesh=mesh, **options), jax.random.key(0)
  )
  if mesh is None:
    return policy
  return sharding.abstract(policy, sharding.tree_shardings(policy, mesh))


# --- reading weights ----------------------------------------------------------------


def read_weights(path: str | pathlib.Path, abstract: Policy) -> Policy:
  """Reads the parameters of a policy with known shapes and shardings.

  Every device receives its slice of a tensor as stored in the file, then transposes and
  converts it. Tensors are read one at a time, so that the host needs memory for its
  slices of one tensor, not for the model.

  Args:
    path: a directory, or a hub id, which is downloaded.
    abstract: from `abstract_policy`.

  Raises:
    ValueError: names, shapes or dtypes that do not match, all of them listed.
  """
  directory = find_directory(path, weights=True)
  files, shapes = _find_weights(directory)
  leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
  wanted = {
    theirs: _their_shape(_our_name(key), leaf)
    for key, leaf in leaves
    for theirs in _their_names(_our_name(key), abstract.config)
  }
  embedding, head = "model.embed_tokens.weight", "lm_head.weight"
  if abstract.config.tie_embeddings and head in files:
    # The file of a tied model may contain a copy of the embedding.
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
  if abstract.config.tie_embeddings and head in files:
    _check_copy(files, embedding, head, shapes[head][0])
  arrays = [_read(_our_name(key), abstract.config, leaf, files) for key, leaf in leaves]
  return jax.tree.unflatten(structure, arrays)


def _find_weights(directory):
  """Weight name -> file, and -> shape, over one file or several."""
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
        f"{directory} lacks {absent}, which {index.name} lists; download the rest."
      )
  if not found:
    raise ValueError(
      f"{directory} has no weights in *.safetensors, the only format read."
    )
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
  """Reads one of our arrays onto its devices: layers stacked, kernels transposed."""
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
    # Without waiting, tensors accumulate on the host faster than devices take them.
    jax.block_until_ready(array)
  return array


@functools.partial(jax.jit, donate_argnums=0, static_argnums=(3, 4, 5))
def _place(array, tensor, layer, dtype, layout, transposed):
  """Writes one layer into the donated stacked array, transposed and converted."""
  tensor = (tensor.T if transposed else tensor).astype(dtype)
  out = tensor if array is None else array.at[layer].set(tensor)
  return out if layout is None else jax.lax.with_sharding_constraint(out, layout)


def _tensor(file, name, shape, layout) -> jax.Array:
  """A tensor as stored in the file; each device of this host has its own slice."""
  if layout is None:
    return jnp.asarray(_slice(file, name, (slice(None),) * len(shape)))
  slices = {}  # a slice that several devices share is read once

  def read(index):
    key = str(index)
    if key not in slices:
      slices[key] = _slice(file, name, index)
    return slices[key]

  return jax.make_array_from_callback(shape, layout, read)


def _slice(file, name, index) -> np.ndarray:
  # Reopened for each slice: mapped pages count as memory until the file is closed.
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
  """Writes a directory that `transformers`, vLLM and SGLang load.

  It has config.json, generation_config.json, safetensors (with an index if there are
  several files), the tokenizer with its chat template, and a model card. The host holds
  the tensors of one file at a time. Every process takes part; the first one writes.

  Args:
    policy: parameters keep their dtype; adapters are merged into them.
    directory: created if it is missing.
    tokenizer: a `transformers` tokenizer.
    generation: further fields of generation_config.json, those of the start policy.
    card: the text of README.md.
    max_file_bytes: size limit of one file.

  Raises:
    ValueError: a policy that no family of the format can express.
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
  """Writes the adapters alone, as `peft` and vLLM load them on top of the base.

  The directory has adapter_config.json, adapter_model.safetensors, the tokenizer and a
  model card. Every process takes part; the first one writes.

  Args:
    policy: with adapters, see `models.lora`.
    directory: created if it is missing.
    base: hub id or directory of the policy without adapters.
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
  """(their name, our name, our array, layer or None) of every tensor, by file."""
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
  """Gathers one tensor on the host."""
  replicated = None
  if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
    replicated = NamedSharding(leaf.sharding.mesh, PartitionSpec())
  array = np.asarray(_take(replicated)(leaf, layer))
  return np.ascontiguousarray(array.T if transposed else array)


@functools.cache
def _take(layout):
  def take(leaf, layer):
    return (
      leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, 0, False)
    )

  return jax.jit(take, out_shardings=layout)
