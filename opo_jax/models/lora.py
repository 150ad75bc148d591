"""Low-rank adapters: a policy that is trained in a few numbers beside its weights.

`add` puts two thin matrices beside the kernel of chosen linear layers: there the policy
computes `x W + (alpha / rank) (x A) B` (LoRA, https://arxiv.org/abs/2106.09685). B
starts at zero, so that a fresh adapter changes nothing, and the policy before training
is the base itself: no second copy of it is needed to measure the KL to it.

`split` tells what is trained, the adapters, from what is frozen, all else; `merge`
computes the weights that do the same without adapters.
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

# Our linear layers: where in a block each lies, and what PEFT calls it.
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
  """A matrix of an adapter: where there are any, they are what is trained."""


class Adapter(nnx.Module):
  """`scale (x A) B`, A drawn as PEFT draws it, B zero; one for each of L layers.

  Args:
    key: of A.
    shape: [L, in, out] of the kernels beside it.
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
  """The policy with an adapter on each target, which does not change it yet.

  Args:
    policy: stays as it is; the two share their weights.
    key: of the adapters.
    rank: r of A [D, r] and B [r, F]; float32, laid out as the kernel's two axes are.
    alpha: the product is scaled by alpha / rank.
    targets: see `layer_names`.

  Raises:
    ValueError: a target that is none, a rank below 1, an alpha that is not above 0, a
      policy that has adapters.

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
  policy = jax.tree.map(lambda leaf: leaf, policy)  # a module of its own
  for name, linear in _linears(policy):
    if name in names:
      # Each has a key of its own, whatever other targets there are.
      own_key = jax.random.fold_in(key, list(LAYERS).index(name))
      shape, axes = linear.kernel.shape, linear.kernel.axes
      linear.adapter = _fresh(own_key, shape, axes, rank, alpha, policy.mesh)
  return policy


def layer_names(targets: Sequence[str]) -> tuple[str, ...]:
  """Our names of the linear layers that are meant, in our order.

  Args:
    targets: our names (`LAYERS`), PEFT's (`q_proj`), or "all-linear".

  Raises:
    ValueError: a name that is none of these, or no name.

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
  """The adapters of a policy by the names of their layers."""
  for name, linear in _linears(policy):
    if linear.adapter is not None:
      yield name, linear.adapter


def split(policy: Policy) -> tuple[Policy, Policy]:
  """What is trained and what is frozen: the policy twice, None where the other has it.

  Trained are the adapters where there are any, else everything.

  Args:
    policy: or its shapes, gradients and so on.
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
  """The inverse of `split`."""
  return jax.tree.map(
    lambda one, other: other if one is None else one,
    trained,
    frozen,
    is_leaf=lambda leaf: leaf is None or _is_param(leaf),
  )


def without(policy: Policy) -> Policy:
  """The base: the policy before adapters were added; the two share their weights."""
  policy = jax.tree.map(lambda leaf: leaf, policy)
  for _, linear in _linears(policy):
    linear.adapter = None
  return policy


def merge(policy: Policy) -> Policy:
  """The policy without adapters that computes the same: `W + (alpha / rank) A B`.

  Computed in float32 and rounded once, to the dtype of W. Layers without an adapter
  share their weights with the policy given, which stays as it is.
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
