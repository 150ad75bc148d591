"""Context of a run: config, tokenizer, mesh, policy's shapes, problems, seeds.

Whatever trains, evaluates or measures a policy opens a `Run` first. It holds what stays
the same from the first step to the last, and nothing that samples, scores or learns.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from opo_jax import build
from opo_jax.config import Config
from opo_jax.data import arithmetic, preferences
from opo_jax.data import prompts as prompts_lib
from opo_jax.data.prompts import Problem
from opo_jax.devices import distributed, sharding
from opo_jax.models import Policy
from opo_jax.models.config_json import end_tokens
from opo_jax.problems import Problems
from opo_jax.reports.terminal import Terminal
from opo_jax.scorer import REWARD_MODEL, RewardModelScorer, VerifierScorer
from opo_jax.storage.directory import RunDirectory

TOKENIZERS = {"arithmetic": arithmetic.tokenizer, "preferences": preferences.tokenizer}
# What seeds are drawn for; the place in this list is part of the seed.
_PURPOSES = ("rollout", "evaluation", "demonstration", "variance", "pairs")


class Run:
  """Context of a run.

  Args:
    config: of the run.
    directory: of the run; nothing is written before `write_head`.

  Attributes:
    directory: its files.
    writes: whether this process writes logs and metrics (checkpoints: all do).
    terminal: of the first process; quiet in others.
    tokenizer: of prompts and responses.
    mesh: of all devices.
    abstract_policy: shapes, dtypes and shardings of the policy, without adapters.
    problems: for training and evaluation.

  Raises:
    ValueError: a tokenizer, shape or mesh that does not fit the others.
  """

  def __init__(self, config: Config, directory: pathlib.Path):
    self.config, self.directory = config, RunDirectory(directory, config)
    self.writes = distributed.is_first_process()
    self.terminal = Terminal(quiet=not self.writes)
    self.tokenizer = load_tokenizer(config)
    eos_ids = prompts_lib.end_token_ids(self.tokenizer, model_end_tokens(config))
    self.mesh = build.make_mesh(config)
    shape = build.model_config(config)
    build.check_vocabulary(shape.vocab_size, len(self.tokenizer))
    self.abstract_policy: Policy = build.abstract_policy(
      config, self.mesh, eos_ids=eos_ids, shape=shape
    )
    self.problems = Problems(config, self.tokenizer)

  def init_policy(self) -> Policy:
    """The policy before any training: loaded, or initialised randomly."""
    return build.init_policy(self.config, self.abstract_policy)

  def make_scorer(self) -> VerifierScorer | RewardModelScorer:
    """The scorer that `--reward.verifier` names; a context manager."""
    config = self.config
    if config.reward.verifier != REWARD_MODEL:
      return VerifierScorer(
        config.reward,
        self.tokenizer,
        mesh=self.mesh,
        max_new_tokens=config.rollout.max_new_tokens,
        terminal=self.terminal,
      )
    return RewardModelScorer(
      config.reward,
      self.tokenizer,
      mesh=self.mesh,
      max_new_tokens=config.rollout.max_new_tokens,
      terminal=self.terminal,
      directory=self.directory.path,
      dtype=self.abstract_policy.dtype,
      micro_batch_tokens=config.algorithm.micro_batch_tokens,
    )

  def write_head(self) -> None:
    """Writes run.json and config.json, before anything else is written.

    Raises:
      ValueError: some processes do not see them.
    """
    facts = sharding.describe(self.mesh) | {"data_left_out": self.tell_left_out()}
    self.directory.write_head(facts)

  def tell_left_out(self) -> dict[str, dict[str, int]]:
    """Says which of the loaded problems are left out, and gives the numbers."""
    left_out = self.problems.left_out
    for name, reasons in left_out.items():
      words = ", ".join(f"{count:,} by {reason}" for reason, count in reasons.items())
      self.terminal.say(f"{name}: problems left out: {words}.")
    return left_out

  def seed(self, purpose: str, step: int = 0) -> int:
    """A new seed for every purpose and step."""
    entropy = (self.config.seed, _PURPOSES.index(purpose), step)
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])

  def encode(self, problems: Sequence[Problem]) -> list[list[int]]:
    """The prompts of problems, as token ids."""
    return prompts_lib.encode_problems(
      self.tokenizer,
      problems,
      max_prompt_tokens=self.config.rollout.max_prompt_tokens,
      system=self.config.data.system,
      instruction=self.config.data.instruction,
    )

  def encode_local(self, problems: Sequence[Problem]) -> list[list[int]]:
    """`encode` of this process's share of the problems; reads no others."""
    own = distributed.local_indices(self.mesh, len(problems))
    return self.encode([problems[i] for i in own])

  def gather_prompts(self, local: list[list[int]], num_prompts: int) -> list[list[int]]:
    """All processes' prompts, from each process's `encode_local`.

    Prompts are small beside responses, and the learner needs them on every device.
    """
    return distributed.all_gather_lists(local, self.mesh, num_prompts)


def load_tokenizer(config: Config) -> Any:
  """The tokenizer that the config names, or the model's own."""
  name = config.data.tokenizer
  if name in TOKENIZERS:
    return TOKENIZERS[name]()
  return prompts_lib.load_tokenizer(name or config.model.path)


def model_end_tokens(config: Config) -> tuple[int, ...]:
  """The end tokens that the model itself names; none for fresh weights."""
  return end_tokens(config.model.path) if config.model.path else ()


def load_policy(run: Run, step: int | None = None) -> Any:
  """The policy of a checkpoint.

  Args:
    run: its directory holds the checkpoint.
    step: None is the last checkpoint's, 0 the start policy.
  """
  if step == 0:
    return run.directory.load_start(run.abstract_policy)
  step = run.directory.checkpoint_steps()[-1] if step is None else step
  learner = build.make_learner(run.config, run.mesh)
  if run.config.model.lora_rank:  # the frozen base lies in start/
    base = run.directory.load_start(run.abstract_policy)
    state = learner.init(build.add_adapters(run.config, base))
  else:
    state = learner.abstract_state(run.abstract_policy)
  with run.directory.checkpoints() as checkpoints:
    return checkpoints.restore_state(step, state)[0].policy
