"""A run's lasting parts, and the phases of a step, on the host.

`Run` holds what stays the same from the first step to the last: the device parts, the
tokenizer, the verifiers, the directory. `loop.train` puts its phases in order; the
commands that look at a finished run use the same ones.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opo_jax import build
from opo_jax import config as config_lib
from opo_jax import sft as sft
from opo_jax.build import Parts
from opo_jax.config import Config
from opo_jax.data import arithmetic, preferences
from opo_jax.data import prompts as prompts_lib
from opo_jax.data.prompts import Problem
from opo_jax.data.stream import OnDemand
from opo_jax.devices import distributed, memory, sharding
from opo_jax.devices.memory import gib
from opo_jax.evaluation import Response, summarise
from opo_jax.evaluation import graded as judging
from opo_jax.problems import Problems
from opo_jax.rewards import (
  RewardPool,
  math_reward,
  normal_answer,
  reward_model,
  shaping,
)
from opo_jax.rewards.custom import CustomReward
from opo_jax.rollouts import Rollouts
from opo_jax.scorer import Answer, Scoring
from opo_jax.storage.checkpoint import Checkpoints
from opo_jax.storage.metrics import (
  Terminal,
  Timers,
  add_to_run_json,
  write_json,
  write_run_json,
)

VERIFIERS: dict[str, Callable[[str, str], float]] = {
  "arithmetic": arithmetic.verify,
  "math": math_reward,
  "preferences": preferences.true_score,
}
# Where a verifier's final answers are, for maj@k; a verifier without has no maj@k.
FINAL_ANSWERS: dict[str, Callable[[str], str | None]] = {
  "arithmetic": arithmetic.final_answer,
  "math": normal_answer,
}
# How good an answer really is, where that is known: benchmark -> a verifier. No
# reward but its own sees it.
TRUTHS = {"preferences": preferences.true_score}
# Verifiers whose rewards are more or less, not right or wrong.
GRADED = ("preferences", "reward_model")
# The largest difference of log-probs that float32 rounding explains.
GAP_BOUND = 1e-4
TOKENIZERS = {"arithmetic": arithmetic.tokenizer, "preferences": preferences.tokenizer}


class Run:
  """What stays the same from the first step to the last; closes its processes."""

  def __init__(self, config: Config, directory: pathlib.Path):
    self.config, self.directory = config, directory
    self._stack = contextlib.ExitStack()
    # One process writes what is to be read; checkpoints are written by all.
    self.writes = distributed.is_first_process()
    self.terminal = Terminal(quiet=not self.writes)
    self.update_memory: memory.Memory | None = None  # known before the first update
    self.tokenizer = (
      TOKENIZERS[config.data.tokenizer]()
      if config.data.tokenizer in TOKENIZERS
      else prompts_lib.load_tokenizer(config.data.tokenizer or config.model.path)
    )
    self.parts: Parts = build.build(
      config,
      eos_ids=prompts_lib.end_token_ids(self.tokenizer, build.model_end_tokens(config)),
      vocab_size=len(self.tokenizer),
    )
    sft.check(config)
    self._verify = None  # a reward model takes no processes
    if config.reward.verifier != "reward_model":
      self._verify = verifier(config.reward.verifier)
    elif not distributed.is_single_process():
      raise ValueError(
        "A reward model scores in one process yet; start one process alone"
        " (--distributed.*), or use another --reward.verifier."
      )
    self.problems = Problems(config, self.tokenizer)

  @functools.cached_property
  def verifier(self) -> RewardPool:
    """The processes that score answers, started on first use."""
    reward = self.config.reward
    return self._stack.enter_context(
      RewardPool(
        self._verify,
        workers=reward.workers,
        timeout_s=reward.timeout_s,
        memory_gib=reward.memory_gib,
      )
    )

  @functools.cached_property
  def _scoring_thread(self) -> ThreadPoolExecutor | None:
    """Where answers are scored while others are sampled; None where that would take
    this process's time from nobody but itself."""
    if not self.config.reward.workers or self._verify is None:
      return None
    thread = self._stack.enter_context(ThreadPoolExecutor(1, "scoring"))
    # Closed before the thread is, which ends what still runs there.
    _ = self.verifier
    return thread

  @functools.cached_property
  def reward_model(self) -> reward_model.RewardModel:
    """The reward model: one that is there, or the one trained in this directory."""
    named = self.config.reward.model
    path = reward_model.find(named or self.directory)
    model = self.parts.load_reward(path)
    self._check_reward_tokens(model, path)
    return model

  def _check_reward_tokens(self, model, path):
    """Refuses a reward model of another vocabulary: it sees token ids, not text."""
    own = theirs = self.tokenizer.get_vocab()
    if not path.is_dir() or (path / "tokenizer_config.json").is_file():
      theirs = prompts_lib.load_tokenizer(str(path)).get_vocab()
    # Loaded from files, a tokenizer may have got further special tokens.
    if not own.items() <= theirs.items() or model.config.vocab_size < len(own):
      raise ValueError(
        f"The reward model {path} does not share the policy's vocabulary; use one that"
        " was trained with this tokenizer (--reward.model, --data.tokenizer)."
      )

  def __enter__(self):
    return self

  def __exit__(self, *error):
    self._stack.close()

  def write_head(self) -> None:
    """run.json and config.json, before anything else; all processes have to see them.

    Raises:
      ValueError: some do not.
    """
    distributed.barrier("checked")  # nobody finds a directory that another has begun
    config = self.directory / "config.json"
    if self.writes:
      self.directory.mkdir(parents=True, exist_ok=True)
      left_out = self.tell_left_out()
      devices = sharding.describe(self.parts.mesh) | {"data_left_out": left_out}
      write_run_json(self.directory, seed=self.config.seed, devices=devices)
      write_json(config, config_lib.to_dict(self.config))
    distributed.barrier("written")
    distributed.assert_same_on_all_hosts(config.is_file(), f"whether {config} is there")

  def tell_left_out(self) -> dict[str, dict[str, int]]:
    """Says which of the problems loaded so far are left out, and gives the numbers."""
    left_out = self.problems.left_out
    for name, reasons in left_out.items():
      words = ", ".join(f"{count:,} by {reason}" for reason, count in reasons.items())
      self.terminal.say(f"{name}: problems left out: {words}.")
    return left_out

  def seed(self, purpose: str, step: int = 0) -> int:
    """A new seed for every purpose and step."""
    purposes = ("rollout", "evaluation", "demonstration", "variance", "pairs")
    entropy = (self.config.seed, purposes.index(purpose), step)
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

  def encode_own(self, problems: Sequence[Problem]) -> list[list[int]]:
    """As `encode`, of several processes each its share; no other problem is read."""
    own = distributed.local_indices(self.parts.mesh, len(problems))
    return self.encode([problems[i] for i in own])

  # --- the phases of a step -----------------------------------------------------

  def sample(self, state, problems, step, *, prompts=None, scoring=None):
    """Answers to `problems`.

    Args:
      state: whose policy is sampled from.
      problems: all that are asked.
      step: of the run, for the seed.
      prompts: what `encode_own` gave.
      scoring: is given the answers that end early, as they do.
    """
    # Early rows lie on the devices of several processes, where there are several.
    early = (
      scoring is not None and scoring.wants_rows and distributed.is_single_process()
    )
    rollouts = self._sampled(
      state.policy,
      problems,
      prompts or self.encode_own(problems),
      self.config.rollout,
      samples_per_prompt=self.config.rollout.group_size,
      seed=self.seed("rollout", step),
      version=jnp.copy(state.step),
      on_ended=scoring.add if early else None,
    )
    # Groups of another size would be merged or split prompts: wrong baselines.
    sizes = np.bincount(np.asarray(rollouts.prompt_ids), minlength=len(problems))
    assert (sizes == self.config.rollout.group_size).all(), sizes
    return jax.block_until_ready(rollouts)

  def on_host(self, rollouts: Rollouts) -> Rollouts:
    """What the host reads of rollouts, as NumPy arrays: alike in every process."""
    names = ("tokens", "lengths", "finished", "prompt_ids")
    small = {name: getattr(rollouts, name) for name in names}
    small = distributed.to_host_replicated(small, self.parts.mesh)
    return dataclasses.replace(rollouts, **small)

  def _sampled(self, policy, problems, own_prompts, distribution, **options):
    """Rollouts; says so when they needed a new compiled program."""
    before = self.parts.sampling_programs()
    # Small beside the responses, and the learner wants the prompts everywhere.
    prompts = distributed.all_gather_lists(own_prompts, self.parts.mesh, len(problems))
    rollouts = self.parts.sample(policy, prompts, distribution, **options)
    programs = self.parts.sampling_programs()
    if programs > before:
      self.terminal.say(f"Compiled {programs} sampling programs so far.")
    return rollouts

  def scoring(self, problems: Sequence[Problem]) -> Scoring:
    """The scoring of one batch of answers to `problems`."""

    def score(prompt_ids, tokens, lengths, finished):
      texts = prompts_lib.decode_responses(self.tokenizer, tokens, lengths)
      answers = [Answer(text, 0.0) for text in texts]
      to_verify = np.arange(len(texts))
      if self.config.reward.truncated != "scored":
        to_verify = np.flatnonzero(finished)
      asked = [problems[prompt_ids[i]] for i in to_verify]
      whole = getattr(self._verify, "takes_problems", False)
      scores = self.verifier.score(
        [texts[i] for i in to_verify],
        [problem if whole else problem.answer for problem in asked],
      )
      reasons = dict(self.verifier.last_errors)
      for place, (i, score) in enumerate(zip(to_verify, scores, strict=True)):
        answers[i] = (
          Answer(texts[i], np.nan, reason=reasons[place])
          if score is None
          else Answer(texts[i], score)
        )
      return answers

    return Scoring(score, self._scoring_thread)

  def score(self, rollouts, problems, scoring=None) -> tuple[Sequence[str], np.ndarray]:
    """Texts of the responses and their rewards [N]; NaN is unscorable.

    Of several processes each scores its own rows; the rewards are exchanged, texts of
    others' rows are decoded when they are asked for.

    Args:
      rollouts: N responses, on the host.
      problems: that were asked.
      scoring: of these rollouts, where it has begun already.
    """
    if self.config.reward.verifier == "reward_model":
      return self._score_by_model(rollouts, problems)
    mesh, num_rows = self.parts.mesh, len(rollouts.lengths)
    own = distributed.local_indices(mesh, num_rows)
    answers = (scoring or self.scoring(problems)).finish(rollouts, own)
    rewards = np.array([answer.reward for answer in answers], np.float32)
    failed = [
      f"{problems[rollouts.prompt_ids[row]].id}: {answer.reason}"
      for row, answer in zip(own, answers, strict=True)
      if math.isnan(answer.reward)
    ]
    rewards = distributed.all_gather(rewards, mesh, num_rows)
    self._check_scorable(rewards, failed)
    texts = [answer.text for answer in answers]
    if len(own) < num_rows:
      texts = self._all_texts(rollouts, dict(zip(own.tolist(), texts, strict=True)))
    return texts, rewards

  def _all_texts(self, rollouts, own: dict[int, str]) -> Sequence[str]:
    """Texts of all rows, of which this process has its own already."""
    tokens, lengths = rollouts.tokens, rollouts.lengths

    def text(row):
      if row in own:
        return own[row]
      row = slice(row, row + 1)
      return prompts_lib.decode_responses(self.tokenizer, tokens[row], lengths[row])[0]

    return OnDemand(len(lengths), text)

  def _score_by_model(self, rollouts, problems):
    """`score` of responses as they are, also of cut-off ones."""
    (num_rows, columns), asked = rollouts.tokens.shape, np.asarray(rollouts.prompt_ids)
    tokens = num_rows * (rollouts.prompts.shape[1] + columns)
    parts = math.ceil(tokens / (self.config.algorithm.micro_batch_tokens or tokens))
    # One row a shard is the least.
    parts = min(parts, max(num_rows // sharding.batch_shards(self.parts.mesh), 1))
    rewards = np.array(reward_model.score(self.reward_model, rollouts, parts=parts))
    bad = np.flatnonzero(~np.isfinite(rewards))
    failed = [
      f"{problems[asked[i]].id}: the reward model gave {rewards[i]}" for i in bad
    ]
    rewards[bad] = np.nan
    self._check_scorable(rewards, failed)
    tokens, lengths = np.asarray(rollouts.tokens), np.asarray(rollouts.lengths)
    return prompts_lib.decode_responses(self.tokenizer, tokens, lengths), rewards

  def _check_scorable(self, rewards, failed):
    limit = self.config.reward.max_unscorable_fraction
    # Of all of them, also the cut-off ones that are wrong as they are: early in a run
    # few may end, and one of these that defeats the verifier is no reason to stop.
    share = float(np.isnan(rewards).mean())
    examples = failed[:3]
    if share > limit:
      raise RuntimeError(
        f"{share:.0%} of the answers could not be scored, more than {limit:.0%}"
        f" (--reward.max-unscorable-fraction). {'; '.join(examples)}"
      )
    if examples:
      self.terminal.say(f"unscorable: {share:.1%} of the answers; {examples[0]}")

  def shape(self, rollouts, texts, verified) -> tuple[np.ndarray, dict[str, float]]:
    """What the responses are trained on, and each piece of it by its name.

    Args:
      rollouts: N of them.
      texts: theirs.
      verified: [N] what the verifier gave; NaN is unscorable.

    Returns:
      rewards [N], NaN for what leaves baseline and loss, and metrics.
    """
    settings, limit = self.config.reward, self.config.rollout.max_new_tokens
    lengths, finished = np.asarray(rollouts.lengths), np.asarray(rollouts.finished)
    mesh, tokens = self.parts.mesh, np.asarray(rollouts.tokens)
    own = distributed.local_indices(mesh, len(lengths))
    pieces = {}
    if settings.format_weight:
      kind = settings.format
      pieces["format"] = [shaping.has_format(texts[i], kind) for i in own]
    if settings.overlong_weight:
      buffer = settings.overlong_tokens
      pieces["overlong"] = [
        shaping.soft_overlong(int(lengths[i]), max_tokens=limit, buffer_tokens=buffer)
        for i in own
      ]
    if settings.repetition_weight:
      ngram = settings.repetition_ngram
      pieces["repetition"] = [
        shaping.repetition(tokens[i, : lengths[i]].tolist(), ngram=ngram) for i in own
      ]
    rewards, metrics = np.array(verified, np.float32), {}
    for name, values in pieces.items():
      values = distributed.all_gather(np.array(values, float), mesh, len(lengths))
      rewards += getattr(settings, f"{name}_weight") * values.astype(np.float32)
      metrics[f"reward/{name}"] = float(values.mean())
    scorable = ~np.isnan(verified)
    metrics["reward/unscorable_fraction"] = float(1.0 - scorable.mean())
    if scorable.any():
      metrics["reward/verified"] = float(verified[scorable].mean())
    if settings.truncated == "left_out":
      rewards[~finished] = np.nan
      metrics["reward/left_out_fraction"] = float(1.0 - finished.mean())
    elif (cut := scorable & ~finished).any():
      metrics["reward/truncated_mean"] = float(rewards[cut].mean())
    return rewards, metrics

  def update(self, state, rollouts, rewards):
    """Starts an update. `read` waits for its metrics."""
    valid = ~np.isnan(rewards)
    batch = rollouts, jnp.asarray(np.where(valid, rewards, 0.0)), jnp.asarray(valid)
    with memory.explained(self._update_advice):
      if self.update_memory is None:
        self.update_memory = memory.of(self.parts.update.memory(state, *batch))
        self._tell_memory()
      return self.parts.update(state, *batch)

  def read(self, metrics: dict[str, jax.Array]) -> dict[str, float]:
    """Waits for the metrics of an update."""
    with memory.explained(self._update_advice):
      return {name: float(value) for name, value in jax.device_get(metrics).items()}

  def _tell_memory(self) -> None:
    """Says, before the first update, what it and sampling take of a device."""
    update, (slots, sampling) = self.update_memory, self.parts.sampling_memory()
    device = sharding.device_bytes(self.parts.mesh)
    self.terminal.say(
      f"Memory of a device: {gib(device)}. The update takes {gib(update.peak)}"
      f" ({gib(update.arguments)} of state and batch, {gib(update.temporaries)} more"
      f" while it runs), sampling with {slots} slots at most {gib(sampling)}."
    )
    told = {"device": device, "update": update.peak, "sampling": sampling}
    if self.writes:
      add_to_run_json(self.directory, memory_bytes=told)

  def _update_advice(self) -> str:
    """What to do about an update that did not fit."""
    config, rollout = self.config, self.config.rollout
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    rows = rollout.prompts_per_step * rollout.group_size
    whole = rows // config.algorithm.updates_per_batch * longest
    return memory.update_advice(
      self.update_memory,
      sharding.device_bytes(self.parts.mesh),
      tokens=config.algorithm.micro_batch_tokens or whole,
      # One row a shard is the least.
      least_tokens=sharding.batch_shards(self.parts.mesh) * longest,
      offload=config.optimizer.offload,
      remat=config.model.remat,
    )

  def kl_to_start(self, start_policy, rollouts) -> dict[str, jax.Array]:
    """Starts measuring it. `read` waits for the result."""
    wanted, num_rows = self.config.record.kl_rollouts, rollouts.tokens.shape[0]
    if not wanted:
      return {}
    shards = sharding.batch_shards(self.parts.mesh)
    count = min(num_rows, math.ceil(wanted / shards) * shards)
    rows = jnp.arange(count) * num_rows // count
    return {"policy/kl_to_start": self.parts.kl_to_start(start_policy, rollouts, rows)}

  def learning_rate(self, step: int) -> float:
    """Of the first optimiser step of a step."""
    updates = (step - 1) * self.config.algorithm.updates_per_batch
    return float(self.parts.learning_rate(updates))

  def warn_of_gap(self, row: dict[str, Any]) -> None:
    """Says so when sampler and learner differ by more than float32 explains."""
    gap = row.get("onpolicy/logprob_diff_max", 0.0)  # absent: nothing was computed
    on_policy = self.parts.update.is_on_policy
    if on_policy and self.parts.like.dtype == jnp.float32 and gap > GAP_BOUND:
      self.terminal.say(
        f"warning: step {row['step']}: sampler and learner differ by {gap:.1e} in a"
        f" log-prob, more than {GAP_BOUND:.0e}; this is not on-policy to rounding."
      )

  def evaluate(self, policy) -> dict[str, float]:
    """Held-out scores under `eval/<benchmark>/`, and the time they took."""
    timers, row = Timers(), {}
    with timers.phase("eval"):
      for benchmark in self.problems.held_out:
        responses = self.respond(policy, benchmark)
        start = self._start_answers[benchmark] if self.is_graded else ()
        scores = self.summary(responses, start)
        row |= {f"eval/{benchmark}/{name}": value for name, value in scores.items()}
    return row | {"time/eval_s": timers.seconds["eval"]}

  def respond(
    self, policy, benchmark: str, first: int = 0, last: int | None = None
  ) -> list[Response]:
    """A policy's answers to the problems first ... last - 1 of a benchmark, verified.

    An answer depends on its problem's place in the benchmark, and not on what is asked
    together with it.
    """
    problems = self.problems.held_out[benchmark][first:last]
    samples = self.config.eval.samples
    rollouts = self._sampled(
      policy,
      problems,
      self.encode_own(problems),
      self.config.eval,
      samples_per_prompt=samples,
      seed=self.seed("evaluation"),
      first_prompt=first,
    )
    rollouts = self.on_host(rollouts)
    texts, rewards = self.score(rollouts, problems)
    lengths, finished = rollouts.lengths, rollouts.finished
    find = FINAL_ANSWERS.get(self.config.reward.verifier, lambda text: None)
    truth = TRUTHS.get(benchmark, lambda text, reference: None)
    counts = finished | (self.config.reward.truncated == "scored")
    return [
      Response(
        id=problems[i // samples].id,
        sample=i % samples,
        response=text,
        reference=problems[i // samples].answer,
        answer=find(text) if counts[i] else None,
        reward=None if np.isnan(rewards[i]) else float(rewards[i]),
        length=int(lengths[i]),
        finished=bool(finished[i]),
        truth=truth(text, problems[i // samples].answer),
      )
      for i, text in enumerate(texts)
    ]

  @property
  def is_graded(self) -> bool:
    """Whether rewards are more or less, not right or wrong."""
    named = self.config.reward.verifier in GRADED
    return named or getattr(self._verify, "graded", False)

  def summary(
    self, responses: Sequence[Response], start: Sequence[Response] = ()
  ) -> dict[str, float]:
    """The figures of a policy's answers: pass@k and others, or scores and win rates.

    Args:
      responses: all of them.
      start: the start policy's to the same problems, for the win rates over it.
    """
    if not self.is_graded:
      return summarise(responses)
    return judging.summary(responses, start)

  @functools.cached_property
  def _start_answers(self) -> dict[str, list[Response]]:
    start = self.load_start()
    return {name: self.respond(start, name) for name in self.problems.held_out}

  def save(self, checkpoints, step, state, data_position) -> None:
    checkpoints.save(
      step,
      self.parts.update.split(state)[0],
      {
        "data": data_position,
        "rng": {"seed": self.config.seed, "step": step},
        "config": config_lib.to_dict(self.config),
      },
    )

  def resume(self, checkpoints, state, stream) -> tuple[int, Any]:
    """Goes on where the last checkpoint was: state and stream go to its place.

    Returns:
      The steps that are done, and the state after them; 0 and the state as given where
      there is no checkpoint.

    Raises:
      ValueError: a checkpoint of another run.
    """
    done = checkpoints.latest() or 0
    distributed.assert_same_on_all_hosts(
      done, f"the last checkpoint in {self.directory}"
    )
    if not done:
      return 0, state
    state, host = self.restore(checkpoints, done, state)
    changed = config_lib.conflicts(host["config"], config_lib.to_dict(self.config))
    rng = {"seed": self.config.seed, "step": done}
    if int(state.step) != done or host["rng"] != rng or changed:
      raise ValueError(
        f"Checkpoint {done} in {self.directory} is of another run; take it out of the"
        " directory, or give another RUN= directory."
      )
    stream.restore(host["data"])
    return done, state

  def restore(self, checkpoints, step, state):
    """The state of a checkpoint and the host's values; `state` is where it belongs.

    What no update changes lies in `start/`, not in checkpoints: it stays that of
    `state`.
    """
    changed, frozen = self.parts.update.split(state)
    changed, host = checkpoints.restore(step, changed)
    return self.parts.update.join(changed, frozen), host

  # --- the start policy ---------------------------------------------------------

  def start_policy(self) -> Any:
    """Where RL starts: kept in `start/`, warm-started first if the config says so."""
    with Checkpoints(self.directory / "start") as kept:
      is_there = kept.latest() is not None
      distributed.assert_same_on_all_hosts(
        is_there, f"whether {self.directory} has a start policy"
      )
      if is_there:
        return kept.restore(0, self.parts.like)[0]
      policy = self.parts.init()
      if self.config.sft.steps:
        policy = sft.train(self, policy)
      kept.save(0, policy, {"config": config_lib.to_dict(self.config)})
      return policy

  def load_start(self) -> Any:
    """The policy RL started from, for evaluation beside the trained one."""
    with Checkpoints(self.directory / "start") as kept:
      if kept.latest() is None:
        raise ValueError(f"{self.directory} has no start policy yet; train first.")
      return kept.restore(0, self.parts.like)[0]


def verifier(name: str) -> Callable[..., Any]:
  """The verify function of a name, or a person's own.

  Raises:
    ValueError: there is none, with the near names.
  """
  if ":" in name:
    return CustomReward(name)
  if name not in VERIFIERS:
    near = config_lib.near_names(name, [*VERIFIERS, "reward_model"])
    raise ValueError(
      f"There is no verifier {name!r}; {near} A function of your own is named"
      " package.module:function (--reward.verifier)."
    )
  return VERIFIERS[name]


def load_policy(run: Run, step: int | None = None) -> Any:
  """The policy of a checkpoint: of the last one, or of a step; 0 is the start."""
  if step == 0:
    return run.load_start()
  step = checkpoint_steps(run)[-1] if step is None else step
  state = run.parts.like_state
  _, frozen = run.parts.update.split(state)
  if jax.tree.leaves(frozen):
    state = run.parts.start(run.load_start())
  with Checkpoints(run.directory / "checkpoints") as checkpoints:
    return run.restore(checkpoints, step, state)[0].policy


def checkpoint_steps(run: Run) -> list[int]:
  """The steps whose checkpoints are kept, at least one.

  Raises:
    ValueError: there is none.
  """
  with Checkpoints(run.directory / "checkpoints") as checkpoints:
    if steps := checkpoints.steps():
      return steps
  raise ValueError(
    f"{run.directory} has no checkpoint yet; train first (make train EXP=… RUN=…)."
  )


def check_directory(config: Config, directory: pathlib.Path) -> None:
  """Refuses a directory of another config, and shows the difference.

  Raises:
    ValueError: config.json there differs.
  """
  path = directory / "config.json"
  if not path.exists():
    if directory.exists() and {p.name for p in directory.iterdir()} - {"run.json"}:
      raise ValueError(
        f"{directory} is not empty and no run of ours; give another RUN= directory."
      )
    return
  kept = config_lib.read_json(path)
  changed = config_lib.conflicts(kept, config_lib.to_dict(config))
  if changed:
    raise ValueError(
      f"{directory} holds a run of another config ({'; '.join(changed)}). Give another"
      " RUN= directory, or repeat the command that made this one to resume it."
    )


def scores(row: dict[str, Any]) -> str:
  """What was evaluated, with its intervals, in words."""
  shown = ("/pass@", "_score", "_win_rate")
  return "  ".join(
    f"{name.split('/', 1)[1]} {value:.3f}"
    f" [{row[name + '_low']:.3f}, {row[name + '_high']:.3f}]"
    for name, value in row.items()
    if any(part in name for part in shown) and not name.endswith(("_low", "_high"))
  )
