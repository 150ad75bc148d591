"""Flash attention of whole sequences: kernels that never store all scores.

Both kernels equal the einsum of `models/attention.py`: causal, within segments, within
a sliding window, with grouped queries. `attend` runs one on each device's own rows and
heads.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from opo_jax.devices import sharding


def attend(
  name: str,
  query_BTHE: jax.Array,
  key_BKTE: jax.Array,
  value_BKTE: jax.Array,
  segment_ids_BT: jax.Array | None,
  *,
  window: int | None,
  windowed: jax.Array | None,
  mesh: Mesh | None,
) -> jax.Array:
  """`attention` over the queries' own columns, by a kernel.

  Args:
    name: one of `KERNELS`.
    query_BTHE: [B, T, H, E].
    key_BKTE, value_BKTE: [B, K, T, E].
    segment_ids_BT: int32, or None for one segment.
    window, windowed: as in `attention`.
    mesh: the devices; None for one. A device computes its rows and heads if they divide
      over the mesh, else all of them. On a CPU the kernel is simulated, for tests.

  Returns:
    [B, T, H, E].
  """
  kernel = functools.partial(KERNELS[name], simulate=sharding.platform(mesh) == "cpu")
  operands = query_BTHE, key_BKTE, value_BKTE, segment_ids_BT
  if mesh is not None:
    rows, heads = _rows_and_heads(mesh, query_BTHE)
    # Key-value heads are repeated until they divide over the devices that split the
    # query heads: of 4 key-value heads and 8 devices, each device gets a copy of one.
    repeats = math.lcm(key_BKTE.shape[1], heads.parts) // key_BKTE.shape[1]
    key_BKTE, value_BKTE = (
      jnp.repeat(x, repeats, axis=1) for x in (key_BKTE, value_BKTE)
    )
    operands = query_BTHE, key_BKTE, value_BKTE, segment_ids_BT

  def run(window, *operands):
    function = functools.partial(kernel, window=window)
    if mesh is None:
      return function(*operands)
    of_keys = PartitionSpec(rows.axes, heads.axes)
    of_queries = PartitionSpec(rows.axes, None, heads.axes)
    return jax.shard_map(
      function,
      mesh=mesh,
      in_specs=(of_queries, of_keys, of_keys, PartitionSpec(rows.axes)),
      out_specs=of_queries,
      check_vma=False,
    )(*operands)

  if window is None or windowed is None:
    return run(window, *operands)
  # A kernel's window is static, and one scanned program serves all layers: it has both
  # kernels, and each layer chooses.
  return jax.lax.cond(
    windowed,
    functools.partial(run, window),
    functools.partial(run, None),
    *operands,
  )


class _Split(NamedTuple):
  """The mesh axes that split a dimension, and the number of parts."""

  axes: tuple[str, ...] | None
  parts: int


def _rows_and_heads(mesh, query_BTHE):
  def split(size, axis):
    axes = sharding.RULES.mesh_axes(axis)
    parts = math.prod(mesh.shape[name] for name in axes)
    return _Split(axes, parts) if size % parts == 0 else _Split(None, 1)

  B, _, H, _ = query_BTHE.shape
  return split(B, "batch"), split(H, "heads")


# --- NVIDIA -------------------------------------------------------------------------


def cudnn(
  query_BTHE: jax.Array,
  key_BKTE: jax.Array,
  value_BKTE: jax.Array,
  segment_ids_BT: jax.Array | None,
  *,
  window: int | None,
  simulate: bool,
) -> jax.Array:
  """cuDNN's flash attention, through `jax.nn.dot_product_attention`.

  JAX's public function supports causality, windows and lengths, but not segments: they
  are passed as a mask, which becomes a bias [B, 1, T, T] in the queries' dtype: 128 MiB
  for a row of 8,192 tokens, where float32 scores of 28 heads would take 7 GiB.
  """
  T = query_BTHE.shape[1]
  # With a bias cuDNN requires an even length; a multiple of 8 also aligns its rows.
  length = -(-T // 8) * 8

  def fill(x_BT):
    return jnp.pad(x_BT, [(0, 0), (0, length - T)] + [(0, 0)] * (x_BT.ndim - 2))

  options = {}
  if segment_ids_BT is not None:
    ids_BT = fill(segment_ids_BT)
    mask_BTT = ids_BT[:, :, None] == ids_BT[:, None]
    if window is not None:  # cuDNN accepts a bias or a window, not both
      columns = jnp.arange(length)
      mask_BTT &= columns[:, None] - columns < window
    options["mask"] = mask_BTT[:, None]
  elif window is not None:
    options["local_window_size"] = (window - 1, 0)
  out_BTHE = jax.nn.dot_product_attention(
    fill(query_BTHE),
    fill(key_BKTE.swapaxes(1, 2)),
    fill(value_BKTE.swapaxes(1, 2)),
    is_causal=True,
    implementation="xla" if simulate else "cudnn",
    **options,
  )
  return out_BTHE[:, :T]


# --- TPU ----------------------------------------------------------------------------

# Tiles of the kernels are whole vectors of 128 lanes.
_LANES = 128


class Blocks(NamedTuple):
  """The blocks that splash attention divides a sequence into.

  Attributes:
    size: queries, and keys, of a block: a multiple of 128.
    length: of the padded sequence: whole blocks.
    fused: one backward kernel for all three gradients; else a second one for the
      queries'.
  """

  size: int
  length: int
  fused: bool


def blocks(length: int, itemsize: int) -> Blocks:
  """Chooses the blocks for a sequence, from its length and dtype.

  Large blocks are better, since every step of the grid has the same fixed cost, but
  their tiles of scores must fit into the 16 MiB of VMEM that a kernel may use. Tiles of
  1,024 x 1,024 fit in bfloat16; in float32 the forward kernel exceeds it on v5p, the
  backward kernel on v5e, and 512 x 512 fit. All blocks have one size, so that padding
  is at most 127 columns per block.

  The fused backward kernel recomputes the scores once instead of twice, but writes the
  queries' gradient once for each block of keys, to be summed: good for 4 of them, not
  for 32.

  >>> blocks(1100, itemsize=2)  # two of 550, in whole lanes
  Blocks(size=640, length=1280, fused=True)
  """
  largest = 1024 if itemsize == 2 else 512
  count = -(-length // largest)
  size = -(-length // (count * _LANES)) * _LANES
  count = -(-length // size)
  return Blocks(size, count * size, count <= 4)


def splash(
  query_BTHE: jax.Array,
  key_BKTE: jax.Array,
  value_BKTE: jax.Array,
  segment_ids_BT: jax.Array | None,
  *,
  window: int | None,
  simulate: bool,
) -> jax.Array:
  """Splash attention: Pallas kernels that skip blocks without a visible key.

  https://github.com/jax-ml/jax/tree/main/jax/experimental/pallas/ops/tpu/splash_attention
  """
  # Imported here: it takes 0.13 s, and imports Mosaic.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
  )

  _, T, H, E = query_BTHE.shape
  size, length, fused = blocks(T, query_BTHE.dtype.itemsize)

  def fill(x, axis):
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, length - T)
    return jnp.pad(x, padding)

  mask = splash_attention_mask.CausalMask((length, length))
  if window is not None and window < T:
    mask = splash_attention_mask.LocalMask((length, length), (window - 1, 0), 0)
  # The kernel closes over arrays that name the blocks to visit. Evaluated now, and not
  # traced, they are constants that its custom derivative may close over.
  with jax.ensure_compile_time_eval():
    kernel = splash_attention_kernel.make_splash_mha(
      splash_attention_mask.MultiHeadMask([mask] * H),
      block_sizes=splash_attention_kernel.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=None if fused else size,
        block_kv_dq=None if fused else size,
        use_fused_bwd_kernel=fused,
      ),
      head_shards=1,
      q_seq_shards=1,
      interpret=simulate,
    )

  def rows(query_BHTE, key_BKTE, value_BKTE, ids_BT):
    ids = None
    if ids_BT is not None:
      ids = splash_attention_kernel.SegmentIds(ids_BT, ids_BT)
    return jax.vmap(kernel)(query_BHTE, key_BKTE, value_BKTE, ids)

  if query_BTHE.dtype == jnp.float32:
    rows = _exactly(rows)
  # The kernel does not scale the scores.
  query_BHTE = (query_BTHE * E**-0.5).swapaxes(1, 2)
  ids_BT = segment_ids_BT
  out_BHTE = rows(
    fill(query_BHTE, 2),
    fill(key_BKTE, 2),
    fill(value_BKTE, 2),
    None if ids_BT is None else fill(ids_BT, 1),
  )
  return out_BHTE[:, :, :T].swapaxes(1, 2)


def _exactly(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """`function` with exact float32 products, in the backward pass as well.

  A kernel's backward pass is traced when the gradient is taken, outside of the context
  that set the precision of the forward pass.
  """

  def highest():
    return jax.default_matmul_precision("highest")

  @jax.custom_vjp
  def exact(*operands):
    with highest():
      return function(*operands)

  def forward(*operands):
    with highest():
      return jax.vjp(function, *operands)

  def backward(vjp, cotangent):
    with highest():
      return vjp(cotangent)

  exact.defvjp(forward, backward)
  return exact


KERNELS: dict[str, Callable[..., jax.Array]] = {"cudnn": cudnn, "splash": splash}
