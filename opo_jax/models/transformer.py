"""The decoder. One, for every family: they differ in a `ModelConfig`.

A `Policy` is an NNX module and, as all NNX modules, a pytree: it can be passed through
`jax.jit`, differentiated and handed to Optax as it is. Layers are stacked along a first
axis and scanned, so that compile time does not grow with depth.

Sampler and learner both run `Policy.hidden`; what they share is what makes a policy
gradient exact.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from opo_jax.devices import sharding
from opo_jax.models.attention import Keys, attention, choose_backend
from opo_jax.models.config import ModelConfig
from opo_jax.models.rope import rotary, rotate


class Linear(nnx.Module):
  """`x @ kernel + bias` with logical axes for the two dimensions of the kernel.

  Attributes:
    adapter: None, or what is added to the product, see `models.lora`.
  """

  def __init__(self, key, sizes, axes, *, std, bias=False):
    self.kernel = nnx.Param(std * jax.random.normal(key, sizes), axes=axes)
    self.bias = nnx.Param(jnp.zeros(sizes[1:]), axes=axes[1:]) if bias else None
    self.adapter = nnx.data(None)

  def __call__(self, x):
    # As one matrix: XLA:CPU runs the backward pass of a batched product at half speed.
    rows = x.reshape(-1, x.shape[-1])
    y = rows @ self.kernel[...].astype(x.dtype)
    y = y if self.bias is None else y + self.bias[...].astype(x.dtype)
    y = y if self.adapter is None else y + self.adapter(rows)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class RMSNorm(nnx.Module):
  """`x / sqrt(mean(x^2) + epsilon) * scale`, in float32."""

  def __init__(self, width, epsilon):
    self.scale = nnx.Param(jnp.ones(width), axes=(None,))
    self.epsilon = epsilon

  def __call__(self, x):
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y**2, axis=-1, keepdims=True) + self.epsilon)
    return (y * self.scale[...]).astype(x.dtype)


class Attention(nnx.Module):
  """Causal attention with grouped queries; Qwen3 normalises each query and key."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    query, key_, value, out = jax.random.split(key, 4)
    D, E = config.width, config.head_dim
    H, K = config.num_heads, config.num_kv_heads
    std, bias = config.initializer_range, config.qkv_bias
    self.query = Linear(query, (D, H * E), ("embed", "heads"), std=std, bias=bias)
    self.key = Linear(key_, (D, K * E), ("embed", "kv_heads"), std=std, bias=bias)
    self.value = Linear(value, (D, K * E), ("embed", "kv_heads"), std=std, bias=bias)
    self.out = Linear(
      out, (H * E, D), ("heads", "embed"), std=std, bias=config.out_bias
    )
    self.query_norm = RMSNorm(E, config.norm_epsilon) if config.qk_norm else None
    self.key_norm = RMSNorm(E, config.norm_epsilon) if config.qk_norm else None
    self.head_dim = E

  def __call__(self, x_BTD, rotation, cache, attend):
    B, T, _ = x_BTD.shape

    def heads(projection, norm=None):
      x_BTHE = projection(x_BTD).reshape(B, T, -1, self.head_dim)
      return x_BTHE if norm is None else norm(x_BTHE)

    query_BTHE = rotate(heads(self.query, self.query_norm), rotation)
    key_BKTE = rotate(heads(self.key, self.key_norm), rotation).swapaxes(1, 2)
    value_BKTE = heads(self.value).swapaxes(1, 2)
    out_BTHE = attend(query_BTHE, [*cache, Keys(key_BKTE, value_BKTE)])
    return self.out(out_BTHE.reshape(B, T, -1)), (key_BKTE, value_BKTE)


class MLP(nnx.Module):
  """SwiGLU: `down(silu(gate(x)) * up(x))`."""

  def __init__(self, config: ModelConfig, key: jax.Array):
    gate, up, down = jax.random.split(key, 3)
    D, F = config.width, config.mlp_width
    std, bias = config.initializer_range, config.mlp_bias
    self.gate = Linear(gate, (D, F), ("embed", "mlp"), std=std, bias=bias)
    self.up = Linear(up, (D, F), ("embed", "mlp"), std=std, bias=bias)
    self.down = Linear(down, (F, D), ("mlp", "embed"), std=std, bias=bias)

  def __call__(self, x_BTD):
    return self.down(jax.nn.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nnx.Module):
  def __init__(self, config: ModelConfig, key: jax.Array):
    attention_key, mlp_key = jax.random.split(key)
    self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
    self.attention = Attention(config, attention_key)
    self.mlp_norm = RMSNorm(config.width, config.norm_epsilon)
    self.mlp = MLP(config, mlp_key)

  def __call__(self, x_BTD, *layout):
    out, key_value = self.attention(self.attention_norm(x_BTD), *layout)
    x_BTD = x_BTD + out
    return x_BTD + self.mlp(self.mlp_norm(x_BTD)), key_value


# What the backward pass computes again, from nothing to nearly everything:
#   none        nothing: every intermediate array is kept
#   attention   scores and probabilities, the arrays of tokens x tokens
#   block       all inside of a block; its input is kept
#   everything  blocks too: of some consecutive ones only the first one's input is kept
#   offload     as block, and the inputs wait in the host's memory (`pinned_host`)
REMAT = ("none", "attention", "block", "everything", "offload")


def _scan_blocks(layer: Callable, x: jax.Array, inputs: Any, remat: str) -> Any:
  """`jax.lax.scan(layer, x, inputs)`, keeping as much as `remat` says."""
  if remat == "everything":
    num_layers = jax.tree.leaves(inputs)[0].shape[0]
    root = math.isqrt(num_layers)
    size = next(n for n in range(root, 0, -1) if num_layers % n == 0)

    def blocks(x, inputs):
      return jax.lax.scan(jax.checkpoint(layer), x, inputs)

    inputs = jax.tree.map(lambda a: a.reshape(-1, size, *a.shape[1:]), inputs)
    x, new = jax.lax.scan(jax.checkpoint(blocks), x, inputs)
    return x, jax.tree.map(lambda a: a.reshape(num_layers, *a.shape[2:]), new)
  if remat == "block":
    layer = jax.checkpoint(layer)
  if remat == "offload":
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
      names_which_can_be_saved=[],
      names_which_can_be_offloaded=["block_input"],
      offload_src="device",
      offload_dst="pinned_host",
    )
    layer = jax.checkpoint(layer, policy=policy)
  return jax.lax.scan(layer, x, inputs)


def _check_remat(remat):
  if remat not in REMAT:
    raise ValueError(
      f"There is no rematerialisation {remat!r}, only {', '.join(REMAT)}."
    )


def _look_up(
  table_VD: jax.Array, tokens_BT: jax.Array, dtype: Any, mesh: Mesh | None
) -> jax.Array:
  """[B, T, D] the rows of a table, split over the batch.

  Of whole sequences each device looks the tokens of all shards up in its own part of
  the table, and what it finds goes to where the tokens are. So no device has more of
  the table's gradient than its part either: left to itself, the compiler adds it up in
  fewer and larger parts. A single column, as in decoding, is left to it, and rows that
  the shards of the batch do not divide.
  """
  B, T = tokens_BT.shape
  if mesh is None or mesh.size == 1 or T == 1 or B % sharding.batch_shards(mesh):
    return table_VD[tokens_BT].astype(dtype)
  return _look_up_in_parts(mesh, dtype)(table_VD, tokens_BT)


@functools.cache
def _look_up_in_parts(mesh: Mesh, dtype: Any) -> Callable:
  rows, vocab, width = (
    sharding.RULES.mesh_axes(axis) for axis in ("batch", "vocab", "embed")
  )

  @jax.checkpoint  # what the backward pass needs is found again in the token ids
  def part(table_VD, tokens_BT):
    tokens_BT = jax.lax.all_gather(tokens_BT, width, tiled=True)
    V = table_VD.shape[0]
    tokens_BT -= V * jax.lax.axis_index(vocab)
    here = (tokens_BT >= 0) & (tokens_BT < V)
    x_BTD = table_VD[jnp.where(here, tokens_BT, 0)].astype(dtype)
    x_BTD = jax.lax.psum(jnp.where(here[..., None], x_BTD, 0), vocab)
    return jax.lax.all_to_all(x_BTD, width, split_axis=0, concat_axis=2, tiled=True)

  return jax.shard_map(
    part,
    mesh=mesh,
    in_specs=(PartitionSpec(vocab, width), PartitionSpec(rows)),
    out_specs=PartitionSpec(rows),
  )


class Policy(nnx.Module):
  """A language model: tokens -> hidden states -> logits.

  Args:
    config: the family's numbers.
    key: random key of the fresh weights.
    eos_ids: the tokens that end a response.
    mesh: where activations lie; None for a single device.
    dtype: of activations.
    param_dtype: of parameters; float32 masters take the smallest steps.
    attention: what whole sequences go through, see `attention.choose_backend`.
  """

  # What a Hugging Face class of this kind is `For`.
  head = "CausalLM"

  def __init__(
    self,
    config: ModelConfig,
    key: jax.Array,
    *,
    eos_ids: tuple[int, ...] = (),
    mesh: Mesh | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    attention: str = "auto",
  ):
    embedding_key, unembedding_key, layers_key = jax.random.split(key, 3)
    self.config, self.eos_ids, self.mesh = config, tuple(eos_ids), mesh
    self.dtype = jnp.dtype(dtype)
    self.attention = choose_backend(
      attention,
      platform=sharding.platform(mesh),
      dtype=self.dtype,
      head_dim=config.head_dim,
    )
    shape, std = (config.vocab_size, config.width), config.initializer_range

    def table(key):
      return nnx.Param(std * jax.random.normal(key, shape), axes=("vocab", "embed"))

    self.embedding = table(embedding_key)
    self.layers = nnx.data(
      jax.vmap(lambda key: Block(config, key))(
        jax.random.split(layers_key, config.num_layers)
      )
    )
    self.final_norm = RMSNorm(config.width, config.norm_epsilon)
    self.untied = None if config.tie_embeddings else table(unembedding_key)
    # Drawn in float32, whatever they are kept in.
    state = nnx.state(self, nnx.Param)
    nnx.update(self, jax.tree.map(lambda leaf: leaf.astype(param_dtype), state))

  @property
  def unembedding(self) -> jax.Array:
    """[V, D] in the activations' dtype."""
    table = self.embedding if self.untied is None else self.untied
    return table[...].astype(self.dtype)

  def hidden(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    *,
    cache: tuple[Keys, ...] = (),
    remat: str = "none",
  ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Final hidden states, after the last norm.

    Args:
      tokens_BT: int32.
      positions_BT: int32, for the rotary embedding.
      segment_ids_BT: a token attends to earlier columns of its own segment; 0 is
        padding. All one segment where it is None.
      cache: further keys to attend to: key and value [L, C, K, S, E], mask [C, 1, S];
        positions [C, S] where the model has a sliding window.
      remat: what the backward pass computes again instead of keeping it, one of
        `REMAT`.

    Returns:
      hidden [B, T, D], and the new (keys, values), each [L, B, K, T, E].
    """
    _check_remat(remat)
    config = self.config
    rotation = rotary(
      positions_BT, config.head_dim, config.rope_theta, config.rope_scaling
    )
    x_BTD = _look_up(self.embedding[...], tokens_BT, self.dtype, self.mesh)
    x_BTD = sharding.constrain(x_BTD, self.mesh, "batch", None, None)
    attend = functools.partial(
      attention,
      positions=positions_BT,
      segment_ids=segment_ids_BT,
      window=config.sliding_window or None,
      backend=self.attention,
      mesh=self.mesh,
    )

    if remat == "attention":
      attend = jax.checkpoint(attend)

    def layer(x_BTD, inputs):
      block, keys_values, windowed = inputs
      x_BTD = checkpoint_name(x_BTD, "block_input")
      parts = [
        part._replace(key=key, value=value)
        for part, (key, value) in zip(cache, keys_values, strict=True)
      ]
      x_BTD, key_value = block(
        x_BTD, rotation, parts, functools.partial(attend, windowed=windowed)
      )
      return sharding.constrain(x_BTD, self.mesh, "batch", None, None), key_value

    keys_values = [(part.key, part.value) for part in cache]
    with self._precision():
      x_BTD, new = _scan_blocks(
        layer, x_BTD, (self.layers, keys_values, self._windowed()), remat
      )
    return self.final_norm(x_BTD), new

  def project(self, hidden: jax.Array) -> jax.Array:
    """Logits of hidden states: [..., D] -> [..., V] float32."""
    with self._precision():
      return jnp.einsum(
        "...d,vd->...v", hidden, self.unembedding, preferred_element_type=jnp.float32
      )

  def in_compute_dtype(self) -> "Policy":
    """The same function with its matrices kept in the dtype they are multiplied in.

    A decode step reads all of them; in bfloat16 that is half of what float32 masters
    take. The scales of the norms are multiplied in float32 and stay.
    """

    def cast(path, leaf):
      is_scale = any(getattr(key, "name", None) == "scale" for key in path)
      return leaf if is_scale else leaf.astype(self.dtype)

    return jax.tree_util.tree_map_with_path(cast, self)

  def _windowed(self) -> jax.Array | None:
    """[L] whether a layer's attention has the sliding window; None: none or all do."""
    config = self.config
    if not config.sliding_window or len(config.sliding_layers) == config.num_layers:
      return None
    layers = jnp.zeros(config.num_layers, bool)
    return layers.at[jnp.array(config.sliding_layers, int)].set(True)

  def _precision(self):
    """float32 means float32: accelerators would otherwise round the factors (TF32 on
    GPU, bfloat16 passes on TPU), and sampler and learner by different amounts."""
    exact = "highest" if self.dtype == jnp.float32 else None
    return jax.default_matmul_precision(exact)

  def logits(
    self,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
  ) -> jax.Array:
    """Next-token logits of whole sequences.

    Args:
      tokens: [B, T] int32.
      positions: [B, T]; 0, 1, 2, … where it is None.
      segment_ids: [B, T]; 0 is padding; one segment where it is None.

    Returns:
      [B, T, V] float32.
    """
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return self.project(self.hidden(tokens, positions, segment_ids)[0])
