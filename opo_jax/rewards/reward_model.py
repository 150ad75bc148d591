"""Reward models: the policy's decoder with a score in place of the vocabulary.

They are read from and written to the sequence-classification format of Hugging Face,
trained on preference pairs (Bradley and Terry), and score rollouts as they were
sampled: token ids, without decoding and tokenising again.
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

# Where a run keeps the reward model that was trained in it.
FOLDER = "reward_model"


class RewardModel(Policy):
  """`Policy.hidden`, and `score` [D, 1] without a bias instead of an unembedding.

  The model of `Qwen2ForSequenceClassification` and its like, with one label.

  Args:
    config: the family's numbers; there is no unembedding to tie.
    key: random key of the fresh weights.
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
  """The model in Hugging Face format that a path means.

  Args:
    path: a run's directory in which one was trained, or what `load` takes.

  Raises:
    ValueError: a run's directory without one.
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
  """Reads a reward model in the Hugging Face format.

  Args:
    path: a directory, or a hub id, which is downloaded.
    mesh: where the parameters are laid out; None for one device.
    dtype: of activations; scores are float32 in any case.
    param_dtype: of parameters.

  Raises:
    ValueError: nothing there, no sequence classifier with one label, an unsupported
      field, or weights that do not match, with their names.
  """
  config = read_config(path, head=RewardModel.head)
  options = dict(mesh=mesh, dtype=dtype, param_dtype=param_dtype)
  return read_weights(path, abstract_policy(config, kind=RewardModel, **options))


def from_policy(policy: Policy, key: jax.Array) -> RewardModel:
  """A policy's decoder with a fresh score: where training on pairs starts.

  Args:
    policy: its unembedding is left behind.
    key: random key of the score.
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
  """The score of every rollout, prompt and response together: [N] float32.

  It is read at the last token that was sampled, which is the end token where there is
  one; `Rollouts.lengths` say where that is, never a token's id. (Where a response is
  empty, at the prompt's last token.)

  Args:
    model: sees the tokens as they are, so it must share the policy's vocabulary.
    rollouts: N rows.
    parts: the rows are scored in so many parts, one after the other, to save memory.
  """
  N = rollouts.tokens.shape[0]
  multiple = parts * sharding.batch_shards(model.mesh)
  # What the last part lacks is filled up with the last row. Every part takes rows
  # from every device.
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
  """The loss of a reward model on pairs of answers of which one was preferred.

      loss = mean( -log sigmoid(r_chosen - r_rejected - margin)
                   + center (r_chosen + r_rejected)^2 )

  The first term is the likelihood of the preferences under the model of Bradley and
  Terry, P(a preferred to b) = sigmoid(r_a - r_b), https://doi.org/10.2307/2334029; with
  a margin, https://arxiv.org/abs/2307.09288 (section 3.2.2). Only differences count in
  it; the second term keeps the scores around 0, https://arxiv.org/abs/2312.09244
  (appendix A, with 0.01).

  Args:
    chosen: [N] scores of the preferred answers.
    rejected: [N] scores of the others.
    margin: by how much more the preferred one should be ahead, [N] or one number.
    center: weight of the second term.

  Returns:
    float32 scalar, and a dict: `accuracy`, the share of pairs in the right order (equal
    scores count half), and `margin`, the mean of `chosen - rejected`.

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
    optimizer: Optax's.
    margin, center: of `bradley_terry`.
    remat: what the backward pass computes again, one of `models.transformer.REMAT`.
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
    """One update.

    Args:
      state: a TrainState of a reward model; donated.
      pairs: 2B rows: a preferred answer, then the other one of its pair, and so on.

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
  """`bradley_terry` of a batch, rows as `PairUpdate` takes them."""
  scores_B2 = _scores(model, pairs, remat).reshape(-1, 2)
  return bradley_terry(scores_B2[:, 0], scores_B2[:, 1], margin=margin, center=center)
