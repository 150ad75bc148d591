"""The state of training: policy, optimiser state and step, and how it is laid out."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from opo_jax.devices import sharding
from opo_jax.models import lora


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What an update changes.

  Attributes:
    policy: the parameters, an NNX module with `hidden` and `unembedding`.
    opt_state: Optax's, of the trained parameters: of the adapters, where there are any.
    step: int32 scalar, updates done: the policy's version.
  """

  policy: Any
  opt_state: Any
  step: jax.Array

  def split(self) -> tuple["TrainState", Any]:
    """What an update changes, and the frozen rest of the policy.

    Without adapters everything is trained, and the rest has no arrays.
    """
    trained, frozen = lora.split(self.policy)
    return dataclasses.replace(self, policy=trained), frozen

  def join(self, frozen: Any) -> "TrainState":
    """The inverse of `split`."""
    return dataclasses.replace(self, policy=lora.join(self.policy, frozen))


def init_state(
  policy: Any, optimizer: optax.GradientTransformation, *, offload: bool = False
) -> TrainState:
  """The state before the first update.

  Args:
    policy: stays the caller's: what is trained is copied, since every update donates
      its state. Frozen weights are not donated, and are shared.
    optimizer: Optax's.
    offload: keep its moments in the hosts' memory.
  """
  trained, frozen = lora.split(policy)
  fresh = functools.partial(_fresh_state, optimizer)
  layout = _layout(jax.eval_shape(fresh, trained), policy.mesh, offload)
  return jax.jit(fresh, out_shardings=layout)(trained).join(frozen)


def abstract_state(
  abstract_policy: Any,
  optimizer: optax.GradientTransformation,
  *,
  offload: bool = False,
) -> TrainState:
  """Shapes, dtypes and layout of what `init_state` gives, for devices that are absent.

  Args:
    abstract_policy: of `jax.ShapeDtypeStruct`s, with a mesh.
    optimizer, offload: as of `init_state`.
  """
  mesh = abstract_policy.mesh
  trained, frozen = lora.split(abstract_policy)
  state = jax.eval_shape(functools.partial(_fresh_state, optimizer), trained)
  state = sharding.abstract(state, _layout(state, mesh, offload))
  return state.join(sharding.abstract(frozen, sharding.tree_shardings(frozen, mesh)))


def _fresh_state(optimizer, trained) -> TrainState:
  trained = jax.tree.map(jnp.copy, trained)
  return TrainState(trained, optimizer.init(trained), jnp.int32(0))


def _layout(state: TrainState, mesh: Mesh | None, offload: bool) -> TrainState | None:
  if mesh is None:
    return None
  layout = sharding.tree_shardings(state, mesh)
  if not offload:
    return layout
  moments = sharding.on_host(layout.opt_state, state.opt_state, mesh)
  return dataclasses.replace(layout, opt_state=moments)
