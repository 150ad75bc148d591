"""The decoder: one implementation for all families, which differ in a `ModelConfig`.

A `Policy` is an NNX module and therefore a pytree: it passes through `jax.jit`,
`jax.grad` and Optax as it is. Layers are stacked along a first axis and scanned, so
that compile time does not grow with depth.

Sampler and learner both run `Policy.hidden` on the same parameters, so that their
log-probs agree up to float rounding.
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
  """`x @ kernel + bias`, with logical axes for both dimensions of the kernel.

  Attributes:
    adapter: None, or a module whose output is added, see `models.lora`.
  """

  def __init__(self, key, sizes, axes, *, std, bias=False):
    self.kernel = nnx.Param(std * jax.random.normal(key, sizes), axes=axes)
    self.bias = nnx.Param(jnp.zeros(sizes[1:]), axes=axes[1:]) if bias else None
    self.adapter = nnx.data(None)

  def __call__(self, x):
    # One matrix, not a batch: XLA:CPU runs the backward pass of a batched product at
    # half the speed.
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
  """Causal grouped-query attention; Qwen3 normalises each query and key."""

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
  """A pre-norm transformer layer: attention, then MLP, each with a residual."""

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


# Rematerialisation: what the backward pass recomputes instead of storing it.
#   none        nothing: every intermediate array is stored
#   attention   scores and probabilities, the arrays of tokens x tokens
#   block       everything within a block; its input is stored
#   everything  blocks as well: of a run of blocks only the first one's input is stored
#   offload     as block, with the inputs stored in host memory (`pinned_host`)
REMAT = ("none", "attention", "block", "everything", "offload")


def _scan_blocks(layer: Callable, x: jax.Array, inputs: Any, remat: str) -> Any:
  """`jax.lax.scan(layer, x, inputs)` with rematerialisation."""
  if remat == "everything":
    # Runs of about sqrt(L) blocks: L / size inputs of runs are stored, and, while a run
    # is recomputed, the inputs of its `size` blocks; the sum is least at the root.
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
  """The embeddings of tokens, [B, T, D], sharded over the batch.

  For whole sequences, each device looks up the tokens of all shards in its own part of
  the table and sends the rows it finds to the tokens' devices. Each device then
  accumulates the gradient of its own part only; the compiler's own plan would hold
  fewer and larger parts. Single columns (decoding), and batches that the shards do not
  divide, are left to the compiler.
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

  # Two shards of `vocab`, V = 4 words each, and the tokens 1 6 3 0 of one row:
  #
  #     shard 0, words 0..3     local id  1  6  3  0    here  x . x x
  #     shard 1, words 4..7     local id -3  2 -1 -4    here  . x . .
  #
  # A token is `here` on one shard only, so that the psum over shards adds zeros to its
  # row. `width` splits D and the batch alike: all_gather collects the tokens of its
  # devices, all_to_all returns to each device its own rows with the whole width.
  @jax.checkpoint  # the backward pass recomputes everything from the token ids
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
    config: sizes and options of the family.
    key: random key of the initial weights.
    eos_ids: the tokens that end a response.
    mesh: of the activations; None for a single device.
    dtype: of activations.
    param_dtype: of parameters; small steps get lost in less than float32.
    attention: the backend for whole sequences, see `attention.choose_backend`.
  """

  # The suffix `For...` of the Hugging Face class.
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
    # One Block whose arrays have a leading axis L, as `_scan_blocks` slices them.
    self.layers = nnx.data(
      jax.vmap(lambda key: Block(config, key))(
        jax.random.split(layers_key, config.num_layers)
      )
    )
    self.final_norm = RMSNorm(config.width, config.norm_epsilon)
    self.untied = None if config.tie_embeddings else table(unembedding_key)
    # Initialised in float32, then cast.
    state = nnx.state(self, nnx.Param)
    nnx.update(self, jax.tree.map(lambda leaf: leaf.astype(param_dtype), state))

  @property
  def unembedding(self) -> jax.Array:
    """The unembedding [V, D], in the dtype of activations."""
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
    """Computes the hidden states after the final norm.

    Args:
      tokens_BT: int32.
      positions_BT: int32, for the rotary embedding.
      segment_ids_BT: a token attends to earlier columns of its own segment; 0 is
        padding. None: one segment.
      cache: further keys to attend to: key and value [L, C, K, S, E], mask [C, 1, S];
        positions [C, S] if the model has a sliding window.
      remat: what the backward pass recomputes, one of `REMAT`.

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

    # The scan slices parameters, cached keys and values, and `windowed` by layer; masks
    # and positions of the cache are the same for all layers.
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
    """Casts the matrices to the dtype they are multiplied in; the function is the same.

    A decode step reads all matrices: in bfloat16 half the bytes of float32 parameters.
    The scales of norms are multiplied in float32 and stay float32.
    """

    def cast(path, leaf):
      is_scale = any(getattr(key, "name", None) == "scale" for key in path)
      return leaf if is_scale else leaf.astype(self.dtype)

    return jax.tree_util.tree_map_with_path(cast, self)

  def _windowed(self) -> jax.Array | None:
    """Whether each layer has the sliding window, [L]; None: all layers or none."""
    config = self.config
    if not config.sliding_window or len(config.sliding_layers) == config.num_layers:
      return None
    layers = jnp.zeros(config.num_layers, bool)
    return layers.at[jnp.array(config.sliding_layers, int)].set(True)

  def _precision(self):
    """Exact float32 products in a float32 model.

    Accelerators would round the factors (TF32 on GPU, bfloat16 passes on TPU), and
    differently in sampler and learner.
    """
    exact = "highest" if self.dtype == jnp.float32 else None
    return jax.default_matmul_precision(exact)

  def logits(
    self,
    tokens: jax.Array,
    *,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
  ) -> jax.Array:
    """Computes the next-token logits of whole sequences.

    Args:
      tokens: [B, T] int32.
      positions: [B, T]; None: 0, 1, 2, …
      segment_ids: [B, T]; 0 is padding. None: one segment.

    Returns:
      [B, T, V] float32.
    """
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return self.project(self.hidden(tokens, positions, segment_ids)[0])
