"""LoRA: low-rank adapters, trained while the weights of the base stay frozen.

`add` adds two thin matrices to the kernel of chosen linear layers, which then compute
`x W + (alpha / rank) (x A) B` (https://arxiv.org/abs/2106.09685). B starts at zero, so
that a new adapter does not change the policy, and the policy before training is the
base itself: measuring the KL to it needs no second copy.

`split` separates trained parameters (the adapters) from frozen ones; `merge` computes
weights that are equivalent without adapters.
"""

import difflib
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from opo_jax.devices import sharding
from opo_jax.models.transformer import Linear, Policy

# Our linear layers -> (the submodule of a block that holds it, its PEFT name).
LAYERS = {
  "query": ("attention", "q_proj"),
  "key": ("attention", "k_proj"),
  "value": ("attention", "v_proj"),
  "out": ("attention", "o_proj"),
  "gate": ("mlp", "gate_proj"),
  "up": ("mlp", "up_proj"),
  "down": ("mlp", "down_proj"),
}
ALL = "all-linear"


class LoRAParam(nnx.Param):
  """A matrix of an adapter. If a policy has any, only these are trained."""


class Adapter(nnx.Module):
  """`scale (x A) B` of L stacked layers; A is initialised as in PEFT, B with zeros.

  Args:
    key: of A.
    shape: [L, in, out] of the adapted kernels.
    axes: logical axes of `in` and `out`.
    rank: columns of A, rows of B.
    alpha: `scale` is alpha / rank.
  """

  def __init__(self, key, shape, axes, *, rank, alpha):
    layers, width, out = shape
    # Kaiming uniform with a = sqrt(5), the initialiser of torch.nn.Linear.
    bound = 1 / math.sqrt(width)
    a = jax.random.uniform(key, (layers, width, rank), minval=-bound, maxval=bound)
    self.a = LoRAParam(a, axes=(axes[0], None))
    self.b = LoRAParam(jnp.zeros((layers, rank, out)), axes=(None, axes[1]))
    self.rank, self.alpha = rank, alpha

  @property
  def scale(self) -> float:
    return self.alpha / self.rank

  def __call__(self, x):
    a, b = self.a[...].astype(x.dtype), self.b[...].astype(x.dtype)
    return self.scale * (x @ a @ b)


def add(
  policy: Policy,
  key: jax.Array,
  *,
  rank: int,
  alpha: float = 32.0,
  targets: Sequence[str] = (ALL,),
) -> Policy:
  """Adds an adapter to each target; the policy's outputs stay the same.

  Args:
    policy: not modified; the result shares its weights.
    key: of the adapters.
    rank: r of A [in, r] and B [r, out]; float32, sharded as the kernel's two axes.
    alpha: the product is scaled by alpha / rank.
    targets: see `layer_names`.

  Raises:
    ValueError: an unknown target, a rank below 1, an alpha of 0 or less, or a policy
      with adapters.

  >>> from opo_jax.models import ModelConfig
  >>> sizes = dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4)
  >>> config = ModelConfig(vocab_size=32, width=16, mlp_width=48, **sizes)
  >>> base = Policy(config, jax.random.key(0))
  >>> policy = add(base, jax.random.key(1), rank=2, targets=["q_proj", "value"])
  >>> [leaf.shape for leaf in jax.tree.leaves(split(policy)[0])]
  [(2, 16, 2), (2, 2, 16), (2, 16, 2), (2, 2, 8)]
  """
  names = layer_names(targets)
  if rank < 1 or alpha <= 0:
    raise ValueError(
      f"An adapter of rank {rank} and alpha {alpha} adds nothing; use a rank of at"
      " least 1 and an alpha above 0."
    )
  if dict(adapters(policy)):
    raise ValueError("The policy has adapters already; merge them first.")
  policy = jax.tree.map(lambda leaf: leaf, policy)  # a new module, same arrays
  for name, linear in _linears(policy):
    if name in names:
      # Its key does not depend on the other targets.
      own_key = jax.random.fold_in(key, list(LAYERS).index(name))
      shape, axes = linear.kernel.shape, linear.kernel.axes
      linear.adapter = _fresh(own_key, shape, axes, rank, alpha, policy.mesh)
  return policy


def layer_names(targets: Sequence[str]) -> tuple[str, ...]:
  """Resolves targets to our names of linear layers, in our order.

  Args:
    targets: our names (`LAYERS`), PEFT's (`q_proj`), or "all-linear".

  Raises:
    ValueError: an unknown name, or no name.

  >>> layer_names(["v_proj", "query"])
  ('query', 'value')
  """
  theirs = {peft: name for name, (_, peft) in LAYERS.items()}
  known = sorted({ALL, *LAYERS, *theirs})
  for target in targets:
    if target not in known:
      near = difflib.get_close_matches(target, known, cutoff=0.4)
      hint = f"did you mean {' or '.join(near)}?" if near else f"there are {known}."
      raise ValueError(f"No linear layer is called {target!r}; {hint}")
  if not targets:
    raise ValueError(
      f"No layer to adapt; name some, or {ALL!r} (--model.lora-targets)."
    )
  wanted = {theirs.get(target, target) for target in targets}
  return tuple(name for name in LAYERS if name in wanted or ALL in wanted)


def adapters(policy: Policy) -> Iterator[tuple[str, Adapter]]:
  """Yields the layer name and the adapter of each adapted layer."""
  for name, linear in _linears(policy):
    if linear.adapter is not None:
      yield name, linear.adapter


def split(policy: Policy) -> tuple[Policy, Policy]:
  """Splits a policy into (trained, frozen) parameters, each with None for the other's.

  The adapters are trained if there are any, else all parameters.

  Args:
    policy: a policy, or a tree like it (shapes, gradients).
  """
  leaves = jax.tree.leaves(policy, is_leaf=_is_param)
  trained = LoRAParam if any(isinstance(leaf, LoRAParam) for leaf in leaves) else object

  def take(wanted):
    return jax.tree.map(
      lambda leaf: leaf if isinstance(leaf, trained) == wanted else None,
      policy,
      is_leaf=_is_param,
    )

  return take(True), take(False)


def join(trained: Policy, frozen: Policy) -> Policy:
  """Joins (trained, frozen) parameters: inverts `split`."""
  return jax.tree.map(
    lambda one, other: other if one is None else one,
    trained,
    frozen,
    is_leaf=lambda leaf: leaf is None or _is_param(leaf),
  )


def without(policy: Policy) -> Policy:
  """The base, without adapters; it shares the policy's weights."""
  policy = jax.tree.map(lambda leaf: leaf, policy)
  for _, linear in _linears(policy):
    linear.adapter = None
  return policy


def merge(policy: Policy) -> Policy:
  """Merges adapters into the weights: `W + (alpha / rank) A B`, computes the same.

  The sum is float32, rounded once to the dtype of W. Layers without an adapter share
  their weights with `policy`, which is not modified.
  """
  found, policy = dict(adapters(policy)), without(policy)
  for name, linear in _linears(policy):
    if name in found:
      axes = linear.kernel.axes
      merged = _merged(linear.kernel[...], found[name], policy.mesh, axes)
      linear.kernel = nnx.Param(merged, axes=axes)
  return policy


@functools.partial(jax.jit, static_argnums=range(1, 6))
def _fresh(key, shape, axes, rank, alpha, mesh):
  adapter = Adapter(key, shape, axes, rank=rank, alpha=alpha)
  if mesh is None:
    return adapter
  layout = sharding.tree_shardings(adapter, mesh)
  return jax.lax.with_sharding_constraint(adapter, layout)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _merged(kernel, adapter, mesh, axes):
  with jax.default_matmul_precision("highest"):
    change = adapter.scale * (adapter.a[...] @ adapter.b[...])
  merged = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
  return sharding.constrain(merged, mesh, None, *axes)


def _linears(policy) -> Iterator[tuple[str, Linear]]:
  for name, (part, _) in LAYERS.items():
    yield name, getattr(getattr(policy.layers, part), name)


def _is_param(node) -> bool:
  return isinstance(node, nnx.Variable)
