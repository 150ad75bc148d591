"""Reward models: the policy's decoder with a scalar head instead of the unembedding.

They are read and written in the sequence-classification format of Hugging Face, trained
on preference pairs (Bradley-Terry), and score the token ids of rollouts, without
decoding and tokenising them again.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from opo_jax.devices import sharding
from opo_jax.models.config import ModelConfig
from opo_jax.models.config_json import read_config
from opo_jax.models.hf import abstract_policy, read_weights
from opo_jax.models.transformer import Linear, Policy
from opo_jax.rollouts import Rollouts, rows, select

# The subdirectory of a run that holds the reward model trained in it.
FOLDER = "reward_model"


class RewardModel(Policy):
  """A `Policy` with `score` [D, 1], without bias, instead of an unembedding.

  Equals `Qwen2ForSequenceClassification` and its relatives, with one label.

  Args:
    config: sizes and options of the family; `tie_embeddings` has no effect.
    key: random key of the initial weights.
    options: of `Policy`.
  """

  head = "SequenceClassification"

  def __init__(self, config: ModelConfig, key: jax.Array, **options: Any):
    body_key, score_key = jax.random.split(key)
    param_dtype = options.get("param_dtype", jnp.float32)
    super().__init__(config, body_key, **options)
    self.untied = None
    self.score = Linear(
      score_key, (config.width, 1), ("embed", None), std=config.initializer_range
    )
    self.score.kernel[...] = self.score.kernel[...].astype(param_dtype)

  def scores(
    self,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segment_ids_BT: jax.Array,
    last_B: jax.Array,
    *,
    remat: str = "none",
  ) -> jax.Array:
    """The score of each row, read at its last token: [B] float32.

    Args:
      tokens_BT, positions_BT, segment_ids_BT, remat: as of `hidden`.
      last_B: column of the row's last real token.
    """
    hidden_BTD, _ = self.hidden(tokens_BT, positions_BT, segment_ids_BT, remat=remat)
    hidden_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    with jax.default_matmul_precision("highest"):
      kernel_D1 = self.score.kernel[...].astype(jnp.float32)
      return (hidden_BD.astype(jnp.float32) @ kernel_D1)[:, 0]


def find(path: str | pathlib.Path) -> pathlib.Path:
  """Resolves a path to a model in Hugging Face format.

  Args:
    path: the directory of a run that trained a reward model, or a path for `load`.

  Raises:
    ValueError: the directory of a run without a trained reward model.
  """
  path = pathlib.Path(path)
  trained = path / FOLDER / "model"
  if not trained.is_dir() and (path / "run.json").is_file():
    raise ValueError(
      f"{path} is a run without a finished reward model; train it first"
      f" (make reward-model EXP=… RUN={path})."
    )
  return trained if trained.is_dir() else path


def load(
  path: str | pathlib.Path,
  *,
  mesh: jax.sharding.Mesh | None = None,
  dtype: Any = jnp.float32,
  param_dtype: Any = jnp.float32,
) -> RewardModel:
  """Reads a reward model in Hugging Face format.

  Args:
    path: a directory, or a hub id, which is downloaded.
    mesh: the devices that the parameters are sharded over; None for one device.
    dtype: of activations; scores are float32 in any case.
    param_dtype: of parameters.

  Raises:
    ValueError: no model at `path`, no sequence classifier with one label, an
      unsupported field, or weights that do not match, by name.
  """
  config = read_config(path, head=RewardModel.head)
  options = dict(mesh=mesh, dtype=dtype, param_dtype=param_dtype)
  return read_weights(path, abstract_policy(config, kind=RewardModel, **options))


def from_policy(policy: Policy, key: jax.Array) -> RewardModel:
  """Initialises a reward model from a policy's decoder and a random score head.

  Args:
    policy: its unembedding is not used.
    key: random key of the score head.
  """
  model = RewardModel(
    policy.config,
    key,
    eos_ids=policy.eos_ids,
    mesh=policy.mesh,
    dtype=policy.dtype,
    param_dtype=policy.embedding[...].dtype,
    attention=policy.attention,
  )
  model.embedding, model.layers = policy.embedding, policy.layers
  model.final_norm = policy.final_norm
  return model


@functools.partial(jax.jit, static_argnames="parts")
def score(model: RewardModel, rollouts: Rollouts, *, parts: int = 1) -> jax.Array:
  """Scores every rollout, prompt and response together: [N] float32.

  The score is read at the last sampled token, the end token if there is one, located by
  `Rollouts.lengths`, never by a token's id. (For an empty response, at the prompt's
  last token.)

  Args:
    model: must share the policy's vocabulary.
    rollouts: N rows.
    parts: number of parts that are scored one after another, to save memory.
  """
  N = rollouts.tokens.shape[0]
  multiple = parts * sharding.batch_shards(model.mesh)
  # The last row pads the last part. A part takes every parts-th row, so that each
  # device scores its own rows: N 7, parts 2 -> rows 0 2 4 6, then 1 3 5 6.
  rows_N = jnp.minimum(jnp.arange(math.ceil(N / multiple) * multiple), N - 1)
  scores = jax.lax.map(
    lambda indices: _scores(model, select(rollouts, indices)),
    rows_N.reshape(-1, parts).T,
  )
  return scores.T.reshape(-1)[:N]


def _scores(model, rollouts, remat="none"):
  joined = rows(rollouts)
  last = rollouts.prompts.shape[1] - 1 + rollouts.lengths
  return model.scores(
    joined.tokens, joined.positions, joined.segment_ids, last, remat=remat
  )


# --- training on pairs --------------------------------------------------------------


def bradley_terry(
  chosen: jax.Array,
  rejected: jax.Array,
  *,
  margin: float | jax.Array = 0.0,
  center: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """The Bradley-Terry loss of a reward model on preference pairs.

      loss = mean( -log sigmoid(r_chosen - r_rejected - margin)
                   + center (r_chosen + r_rejected)^2 )

  The first term is the negative log-likelihood of the preferences under the model
  P(a preferred to b) = sigmoid(r_a - r_b), https://doi.org/10.2307/2334029; with a
  margin, https://arxiv.org/abs/2307.09288 (section 3.2.2). It depends on differences
  only; the second term centres the scores at 0, https://arxiv.org/abs/2312.09244
  (appendix A, with 0.01).

  Args:
    chosen: [N] scores of the preferred responses.
    rejected: [N] scores of the others.
    margin: the required lead of the preferred response, [N] or one number.
    center: weight of the second term.

  Returns:
    float32 scalar, and a dict: `accuracy`, the fraction of correctly ordered pairs
    (equal scores count half), and `margin`, the mean of `chosen - rejected`.

  Raises:
    ValueError: shapes that differ, or no pair.

  >>> loss, aux = bradley_terry(jnp.array([2.0, 0.5]), jnp.array([2.0, 1.5]))
  >>> round(float(loss), 4)  # (log 2 + log(1 + e)) / 2
  1.0032
  >>> float(aux["accuracy"]), float(aux["margin"])
  (0.25, -0.5)
  """
  if chosen.shape != rejected.shape or chosen.ndim != 1 or not chosen.size:
    raise ValueError(
      f"Expected two arrays [N] of scores, N at least 1, got chosen {chosen.shape} and"
      f" rejected {rejected.shape}."
    )
  chosen, rejected = chosen.astype(jnp.float32), rejected.astype(jnp.float32)
  ahead = chosen - rejected
  loss = jax.nn.softplus(margin - ahead) + center * (chosen + rejected) ** 2
  accuracy = (ahead > 0) + 0.5 * (ahead == 0)
  return loss.mean(), {"accuracy": accuracy.mean(), "margin": ahead.mean()}


class PairUpdate:
  """`update(state, pairs) -> state, metrics`: one optimiser step on a batch of pairs.

  Args:
    optimizer: of Optax.
    margin, center: of `bradley_terry`.
    remat: what the backward pass recomputes, one of `models.transformer.REMAT`.
  """

  def __init__(
    self,
    optimizer: optax.GradientTransformation,
    *,
    margin: float = 0.0,
    center: float = 0.0,
    remat: str = "none",
  ):
    self._options = dict(margin=margin, center=center, remat=remat)
    self._optimizer, self._jitted = optimizer, None

  def __call__(self, state: Any, pairs: Rollouts) -> tuple[Any, dict[str, jax.Array]]:
    """Takes one optimiser step.

    Args:
      state: a TrainState of a reward model; donated.
      pairs: 2B rows: the preferred response of a pair, then the other, pair by pair.

    Returns:
      The new state, and `loss`, `accuracy`, `margin`, `grad_norm` as float32 scalars.
    """
    if self._jitted is None:
      layout = jax.tree.map(lambda leaf: leaf.sharding, state)
      self._jitted = jax.jit(
        self._update, donate_argnums=0, out_shardings=(layout, None)
      )
    return self._jitted(state, pairs)

  def _update(self, state, pairs):
    (loss, aux), gradients = jax.value_and_grad(pair_loss, has_aux=True)(
      state.policy, pairs, **self._options
    )
    step, opt_state = self._optimizer.update(gradients, state.opt_state, state.policy)
    policy = optax.apply_updates(state.policy, step)
    state = dataclasses.replace(
      state, policy=policy, opt_state=opt_state, step=state.step + 1
    )
    return state, {"loss": loss, "grad_norm": optax.tree.norm(gradients), **aux}


def pair_loss(
  model: RewardModel,
  pairs: Rollouts,
  *,
  margin: float = 0.0,
  center: float = 0.0,
  remat: str = "none",
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """`bradley_terry` of a batch, with rows as in `PairUpdate`."""
  scores_B2 = _scores(model, pairs, remat).reshape(-1, 2)
  return bradley_terry(scores_B2[:, 0], scores_B2[:, 1], margin=margin, center=center)
