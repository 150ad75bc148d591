"""Scorer: rollouts in, rewards out.

A verifier (a rule, in processes with time limits) or a reward model scores the
responses; shaping adds format, length and repetition terms. Responses that end early
are verified on a thread while others are still being sampled. Every result is kept
under its row, so that no reward depends on when it was computed.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from opo_jax.config import Reward, near_names
from opo_jax.data import arithmetic, preferences
from opo_jax.data import prompts as prompts_lib
from opo_jax.data.prompts import Problem
from opo_jax.data.stream import OnDemand
from opo_jax.devices import distributed, sharding
from opo_jax.reports.terminal import Terminal
from opo_jax.rewards import (
  RewardPool,
  math_reward,
  normal_answer,
  reward_model,
  shaping,
)
from opo_jax.rewards.custom import CustomReward
from opo_jax.rewards.early import EarlyScoring, ScoredResponse
from opo_jax.rollouts import Rollouts


class Verifier(NamedTuple):
  """A rule that scores responses.

  Attributes:
    verify: (response, reference answer) -> reward; a `CustomReward` receives the whole
      problem instead of its answer.
    final_answer: response -> the answer that it ends with, for maj@k; None: the
      verifier has no maj@k.
    graded: rewards are graded scores, not right (1) or wrong (0).
  """

  verify: Callable[[str, Any], float]
  final_answer: Callable[[str], str | None] | None = None
  graded: bool = False


VERIFIERS = {
  "arithmetic": Verifier(arithmetic.verify, arithmetic.final_answer),
  "math": Verifier(math_reward, normal_answer),
  "preferences": Verifier(preferences.true_score, graded=True),
}
REWARD_MODEL = "reward_model"


def find_verifier(name: str) -> Verifier:
  """The verifier of a name, or a user's own function.

  Args:
    name: a key of `VERIFIERS`, or `package.module:function`.

  Raises:
    ValueError: no such verifier, with the near names.
  """
  if ":" in name:
    custom = CustomReward(name)
    return Verifier(custom, graded=custom.graded)
  if name not in VERIFIERS:
    near = near_names(name, [*VERIFIERS, REWARD_MODEL])
    raise ValueError(
      f"There is no verifier {name!r}; {near} A function of your own is named"
      " package.module:function (--reward.verifier)."
    )
  return VERIFIERS[name]


class Rewards(NamedTuple):
  """The rewards of N rollouts.

  Attributes:
    values: [N] what the learner trains on: verified and shaped. NaN masks a row out of
      baseline and loss.
    verified: [N] before shaping; NaN is unscorable.
    texts: N responses without special tokens.
    metrics: scalars by their name in metrics.jsonl.
  """

  values: np.ndarray
  verified: np.ndarray
  texts: Sequence[str]
  metrics: dict[str, float]


def on_host(rollouts: Rollouts, mesh: Mesh | None) -> Rollouts:
  """Rollouts as scorers read them: the same NumPy arrays in every process.

  Log-probs and masks stay on the devices.
  """
  names = ("tokens", "lengths", "finished", "prompt_ids")
  small = {name: getattr(rollouts, name) for name in names}
  small = distributed.to_host_replicated(small, mesh)
  return dataclasses.replace(rollouts, **small)


class VerifierScorer:
  """Scores responses with a verifier, in processes with a time limit.

  Args:
    settings: `config.reward`.
    tokenizer: decodes responses.
    mesh: of all processes' devices; each process verifies its own rows.
    max_new_tokens: the length limit, for the overlong penalty.
    terminal: receives a line about unscorable responses.
    verifier: None takes the one that `settings.verifier` names.
  """

  def __init__(
    self,
    settings: Reward,
    tokenizer: Any,
    *,
    mesh: Mesh | None = None,
    max_new_tokens: int,
    terminal: Terminal,
    verifier: Verifier | None = None,
  ):
    self.settings, self.tokenizer, self.mesh = settings, tokenizer, mesh
    self.max_new_tokens, self.terminal = max_new_tokens, terminal
    self.verifier = verifier or find_verifier(settings.verifier)
    self._stack = contextlib.ExitStack()

  @property
  def is_graded(self) -> bool:
    """Whether rewards are graded scores, not right or wrong."""
    return self.verifier.graded

  def final_answer(self, text: str) -> str | None:
    """The answer that a response ends with; None where the verifier has no maj@k."""
    find = self.verifier.final_answer
    return None if find is None else find(text)

  @functools.cached_property
  def pool(self) -> RewardPool:
    """The processes that verify, started on first use."""
    settings = self.settings
    return self._stack.enter_context(
      RewardPool(
        self.verifier.verify,
        workers=settings.workers,
        timeout_s=settings.timeout_s,
        memory_gib=settings.memory_gib,
      )
    )

  @functools.cached_property
  def _thread(self) -> ThreadPoolExecutor | None:
    """Where rows are verified while others are sampled. None if the verifier runs
    in-process: overlapping gains nothing."""
    if not self.settings.workers:
      return None
    thread = self._stack.enter_context(ThreadPoolExecutor(1, "scoring"))
    _ = self.pool  # entered after the thread, so closed before it: that ends its calls
    return thread

  @property
  def wants_early_rows(self) -> bool:
    """Whether `add` should receive rows while others are still sampled.

    Not with several processes: early rows lie on devices of all of them.
    """
    return distributed.is_single_process() and self._thread is not None

  def begin(self, problems: Sequence[Problem]) -> None:
    """Starts a batch of responses to `problems`."""
    self._problems = problems
    self.batch = EarlyScoring(self._verify_rows, self._thread)

  def add(self, ended: Any) -> None:
    """Takes rows that have ended (`sampler.Ended`), and returns at once."""
    self.batch.add(ended)

  def finish(self, rollouts: Rollouts) -> Rewards:
    """The rewards of the whole batch.

    Each process verifies its own rows and all exchange the rewards. The texts of other
    processes' rows are decoded when they are read.

    Args:
      rollouts: N rows, on the host.

    Raises:
      RuntimeError: more unscorable responses than `--reward.max-unscorable-fraction`.
    """
    num_rows = len(rollouts.lengths)
    own = distributed.local_indices(self.mesh, num_rows)
    scored = self.batch.finish(rollouts, own)
    verified = np.array([each.reward for each in scored], np.float32)
    failed = [
      f"{self._problems[rollouts.prompt_ids[row]].id}: {each.reason}"
      for row, each in zip(own, scored, strict=True)
      if math.isnan(each.reward)
    ]
    verified = distributed.all_gather(verified, self.mesh, num_rows)
    _check_scorable(verified, failed, self.settings, self.terminal)
    texts: Sequence[str] = [each.text for each in scored]
    if len(own) < num_rows:
      local_texts = dict(zip(own.tolist(), texts, strict=True))
      texts = _texts_on_demand(self.tokenizer, rollouts, local_texts)
    values, metrics = shape_rewards(
      rollouts, texts, verified, self.settings, self.mesh, self.max_new_tokens
    )
    return Rewards(values, verified, texts, metrics)

  def _verify_rows(self, prompt_ids, tokens, lengths, finished):
    """Verifies rows; a truncated one earns 0 unless its text is to be scored."""
    texts = prompts_lib.decode_responses(self.tokenizer, tokens, lengths)
    scored = [ScoredResponse(text, 0.0) for text in texts]
    to_verify = np.arange(len(texts))
    if self.settings.truncated != "scored":
      to_verify = np.flatnonzero(finished)
    problems = [self._problems[prompt_ids[i]] for i in to_verify]
    takes_problems = getattr(self.verifier.verify, "takes_problems", False)
    rewards = self.pool.score(
      [texts[i] for i in to_verify],
      [problem if takes_problems else problem.answer for problem in problems],
    )
    reasons = dict(self.pool.last_errors)
    for place, (i, reward) in enumerate(zip(to_verify, rewards, strict=True)):
      if reward is None:
        scored[i] = ScoredResponse(texts[i], np.nan, reason=reasons[place])
      else:
        scored[i] = ScoredResponse(texts[i], reward)
    return scored

  def __enter__(self) -> "VerifierScorer":
    return self

  def __exit__(self, *error) -> None:
    """Ends the verifying processes."""
    self._stack.close()


class RewardModelScorer:
  """Scores responses with a reward model, as token ids and without decoding them.

  Args:
    settings: `config.reward`.
    tokenizer: of the policy; the reward model must share its vocabulary.
    mesh: of this process's devices.
    max_new_tokens: the length limit, for the overlong penalty.
    terminal: receives a line about unscorable responses.
    directory: of the run; its own reward model scores unless `settings.model` names
      another.
    dtype: of the reward model's parameters and activations.
    micro_batch_tokens: scored at a time at most, padding included; 0: all at once.

  Raises:
    ValueError: several processes.
  """

  is_graded, wants_early_rows = True, False

  def __init__(
    self,
    settings: Reward,
    tokenizer: Any,
    *,
    mesh: Mesh | None = None,
    max_new_tokens: int,
    terminal: Terminal,
    directory: pathlib.Path,
    dtype: Any,
    micro_batch_tokens: int = 0,
  ):
    if not distributed.is_single_process():
      raise ValueError(
        "A reward model scores in one process yet; start one process alone"
        " (--distributed.*), or use another --reward.verifier."
      )
    self.settings, self.tokenizer, self.mesh = settings, tokenizer, mesh
    self.max_new_tokens, self.terminal = max_new_tokens, terminal
    self._path = settings.model or directory
    self._dtype, self._micro_batch_tokens = dtype, micro_batch_tokens

  @functools.cached_property
  def model(self) -> reward_model.RewardModel:
    """The reward model, loaded on first use: the run may train it first."""
    path = reward_model.find(self._path)
    model = reward_model.load(
      path, mesh=self.mesh, dtype=self._dtype, param_dtype=self._dtype
    )
    self._check_vocabulary(model, path)
    return model

  def _check_vocabulary(self, model, path):
    """Refuses a reward model of another vocabulary: it reads token ids, not text."""
    own = theirs = self.tokenizer.get_vocab()
    if not path.is_dir() or (path / "tokenizer_config.json").is_file():
      theirs = prompts_lib.load_tokenizer(str(path)).get_vocab()
    # A tokenizer that was loaded from files may have further special tokens.
    if not own.items() <= theirs.items() or model.config.vocab_size < len(own):
      raise ValueError(
        f"The reward model {path} does not share the policy's vocabulary; use one that"
        " was trained with this tokenizer (--reward.model, --data.tokenizer)."
      )

  def final_answer(self, text: str) -> str | None:
    """None: graded rewards have no maj@k."""
    return None

  def begin(self, problems: Sequence[Problem]) -> None:
    """Starts a batch of responses to `problems`."""
    self._problems = problems

  def add(self, ended: Any) -> None:
    """Never called: `wants_early_rows` is False."""
    raise ValueError("A reward model scores whole batches; call finish alone.")

  def finish(self, rollouts: Rollouts) -> Rewards:
    """The rewards of the whole batch, truncated responses included.

    Raises:
      RuntimeError: more unscorable responses than `--reward.max-unscorable-fraction`.
    """
    (num_rows, width), prompt_ids = rollouts.tokens.shape, rollouts.prompt_ids
    num_tokens = num_rows * (rollouts.prompts.shape[1] + width)
    parts = math.ceil(num_tokens / (self._micro_batch_tokens or num_tokens))
    # One row a shard is the least.
    parts = min(parts, max(num_rows // sharding.batch_shards(self.mesh), 1))
    verified = np.array(reward_model.score(self.model, rollouts, parts=parts))
    bad = np.flatnonzero(~np.isfinite(verified))
    failed = [
      f"{self._problems[prompt_ids[i]].id}: the reward model gave {verified[i]}"
      for i in bad
    ]
    verified[bad] = np.nan
    _check_scorable(verified, failed, self.settings, self.terminal)
    tokens, lengths = np.asarray(rollouts.tokens), np.asarray(rollouts.lengths)
    texts = prompts_lib.decode_responses(self.tokenizer, tokens, lengths)
    values, metrics = shape_rewards(
      rollouts, texts, verified, self.settings, self.mesh, self.max_new_tokens
    )
    return Rewards(values, verified, texts, metrics)

  def __enter__(self) -> "RewardModelScorer":
    return self

  def __exit__(self, *error) -> None:
    """Nothing to end."""


def shape_rewards(
  rollouts: Rollouts,
  texts: Sequence[str],
  verified: np.ndarray,
  settings: Reward,
  mesh: Mesh | None,
  max_new_tokens: int,
) -> tuple[np.ndarray, dict[str, float]]:
  """Adds the shaping terms to verified rewards.

  Args:
    rollouts: N rows, on the host.
    texts: N responses.
    verified: [N]; NaN is unscorable.
    settings: `config.reward`.
    mesh: each process computes the terms of its own rows.
    max_new_tokens: the length limit.

  Returns:
    Rewards [N], NaN for rows to mask out of baseline and loss, and metrics:
    `reward/verified` (mean over scorable rows), `reward/unscorable_fraction` (of all
    rows: the verifier failed), each shaping term, and what happened to truncated rows.
  """
  lengths, finished = np.asarray(rollouts.lengths), np.asarray(rollouts.finished)
  tokens = np.asarray(rollouts.tokens)
  own = distributed.local_indices(mesh, len(lengths))
  terms: dict[str, list[float]] = {}
  if settings.format_weight:
    terms["format"] = [shaping.has_format(texts[i], settings.format) for i in own]
  if settings.overlong_weight:
    terms["overlong"] = [
      shaping.soft_overlong(
        int(lengths[i]),
        max_tokens=max_new_tokens,
        buffer_tokens=settings.overlong_tokens,
      )
      for i in own
    ]
  if settings.repetition_weight:
    terms["repetition"] = [
      shaping.repetition(
        tokens[i, : lengths[i]].tolist(), ngram=settings.repetition_ngram
      )
      for i in own
    ]
  rewards, metrics = np.array(verified, np.float32), {}
  for name, values in terms.items():
    term = distributed.all_gather(np.array(values, float), mesh, len(lengths))
    rewards += getattr(settings, f"{name}_weight") * term.astype(np.float32)
    metrics[f"reward/{name}"] = float(term.mean())
  scorable = ~np.isnan(verified)
  metrics["reward/unscorable_fraction"] = float(1.0 - scorable.mean())
  if scorable.any():
    metrics["reward/verified"] = float(verified[scorable].mean())
  if settings.truncated == "masked":
    rewards[~finished] = np.nan
    metrics["reward/masked_fraction"] = float(1.0 - finished.mean())
  elif (cut := scorable & ~finished).any():
    metrics["reward/truncated_mean"] = float(rewards[cut].mean())
  return rewards, metrics


def _check_scorable(verified, failed, settings: Reward, terminal: Terminal) -> None:
  """Stops the run above the allowed share of unscorable responses; tells of fewer."""
  limit = settings.max_unscorable_fraction
  # A share of all rows, also of truncated ones that earn 0 unread: early in a run few
  # responses end, and one of these that defeats the verifier must not stop the run.
  share, examples = float(np.isnan(verified).mean()), failed[:3]
  if share > limit:
    raise RuntimeError(
      f"{share:.0%} of the responses could not be scored, more than {limit:.0%}"
      f" (--reward.max-unscorable-fraction). {'; '.join(examples)}"
    )
  if examples:
    terminal.say(f"unscorable: {share:.1%} of the responses; {examples[0]}")


def _texts_on_demand(tokenizer, rollouts, local_texts: dict[int, str]) -> Sequence[str]:
  """Texts of all rows: this process's own, and others' decoded when they are read."""
  tokens, lengths = rollouts.tokens, rollouts.lengths

  def text(row):
    if row in local_texts:
      return local_texts[row]
    row = slice(row, row + 1)
    return prompts_lib.decode_responses(tokenizer, tokens[row], lengths[row])[0]

  return OnDemand(len(lengths), text)
