"""Training a reward model, on the host, from top to bottom.

    preference pairs -> scores -> Bradley-Terry -> record

The reward model begins as the start policy, which knows the language already, with a
fresh score head. It lives in the run's directory under `reward_model/`: metrics.jsonl,
TensorBoard, checkpoints, and at the end `model/` in the Hugging Face format. The same
command resumes from the last checkpoint, as `loop` does.
"""

import contextlib
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from opo_jax import build, learner, models, sft
from opo_jax.config import Config
from opo_jax.data import preferences, sources
from opo_jax.data.preferences import Pair
from opo_jax.devices import sharding
from opo_jax.evaluation import bootstrap_interval
from opo_jax.learner import optimizer
from opo_jax.metrics import Timers, check_finite
from opo_jax.rewards import reward_model
from opo_jax.rollouts import Rollouts
from opo_jax.run import Run
from opo_jax.scorer import REWARD_MODEL, RewardModelScorer
from opo_jax.storage.json_files import JsonLines
from opo_jax.storage.record import TensorBoard


def train(config: Config, directory: pathlib.Path) -> pathlib.Path:
  """Trains an experiment's reward model and nothing else.

  Args:
    config: of the run. Its start policy is made first, SFT included.
    directory: of the run; `loop.train` with the same config continues in it.

  Returns:
    The directory of the model in Hugging Face format.

  Raises:
    ValueError: a config that cannot run, or a directory of another config. Nothing has
      been written then.
  """
  if config.reward.model:
    raise ValueError(
      f"--reward.model {config.reward.model} names a reward model already; leave it"
      " empty to train one."
    )
  sft.check(config)
  run = Run(config, directory)
  run.directory.check()
  with run.make_scorer():  # refuses what the run itself would refuse
    pairs = load_pairs(run)
  run.problems.check()
  run.write_head()
  return fit(run, sft.start_policy(run), pairs)


def check(run: Run, scorer: Any) -> None:
  """Refuses settings of the reward model that cannot work, before a run begins.

  Raises:
    ValueError: no such model or pairs, or sizes that do not fit.
  """
  if not isinstance(scorer, RewardModelScorer):
    return
  if run.config.reward.model:
    _ = scorer.model  # loads it
  else:
    load_pairs(run)


def prepare(run: Run, start_policy: Any) -> None:
  """Trains the reward model that the run scores with, unless one is named."""
  reward = run.config.reward
  if reward.verifier == REWARD_MODEL and not reward.model:
    fit(run, start_policy, load_pairs(run))


def load_pairs(run: Run) -> dict[str, Sequence[Pair]]:
  """The pairs of `train` and `test`; checks that prompts and batches fit the run."""
  settings = run.config.reward_model
  pairs = {
    split: preferences.load_pairs(settings.pairs, split) for split in ("train", "test")
  }
  if settings.num_pairs:
    pairs["train"] = pairs["train"][: settings.num_pairs]
  for each in pairs.values():
    run.encode([pair.chosen.problem for pair in each])
  shards = sharding.batch_shards(run.mesh)
  if 2 * settings.batch_size % shards:
    raise ValueError(
      f"{settings.batch_size} pairs do not fill {shards} devices; use a multiple of"
      f" {shards} (--reward-model.batch-size"
      f" {-(-settings.batch_size // shards) * shards})."
    )
  return pairs


def start_state(
  run: Run, start_policy: Any
) -> tuple[reward_model.PairUpdate, learner.TrainState]:
  """The update of a reward model, and the state before the first one."""
  config, settings = run.config, run.config.reward_model
  schedule = optimizer.sft_schedule(settings.learning_rate, settings.steps)
  adamw = build.adamw(config, schedule)
  key = jax.random.fold_in(jax.random.key(config.seed), 2)
  model = jax.jit(lambda policy: reward_model.from_policy(policy, key))(start_policy)
  update = reward_model.PairUpdate(
    adamw, margin=settings.margin, center=settings.center, remat=config.model.remat
  )
  return update, learner.init_state(model, adamw, offload=config.optimizer.offload)


def fit(run: Run, start_policy: Any, pairs: dict[str, Sequence[Pair]]) -> pathlib.Path:
  """Trains the reward model of a run, or resumes; returns its directory."""
  config, settings = run.config, run.config.reward_model
  directory = run.directory.path / reward_model.FOLDER
  model = directory / "model"
  if model.exists():
    return model
  stream = sources.ProblemStream(pairs["train"], seed=run.seed("pairs"))
  update, state = start_state(run, start_policy)
  with contextlib.ExitStack() as stack:
    checkpoints = stack.enter_context(run.directory.checkpoints(reward_model.FOLDER))
    done, state = checkpoints.resume(state, stream)
    if done:
      run.terminal.say(f"Reward model resumed after step {done} of {settings.steps}.")
    resume_at = done or None
    log = JsonLines(directory / "metrics.jsonl", resume_at=resume_at)
    board = TensorBoard(directory / "tensorboard", resume_at=resume_at)
    stack.callback(log.close)
    stack.callback(board.close)
    if not done:
      log.write({"step": 0, **evaluate(run, state.policy, pairs["test"])})

    progress = run.terminal.progress("reward model", done=done, total=settings.steps)
    advance = stack.enter_context(progress)
    for step in range(done + 1, settings.steps + 1):
      timers = Timers()
      batch = as_rollouts(run, stream.take(settings.batch_size))
      state, metrics = update(state, batch)
      row = {"step": step} | {name: float(value) for name, value in metrics.items()}
      row["truncated_fraction"] = float(1.0 - np.mean(batch.finished))
      row |= timers.metrics()
      last = step == settings.steps
      if last or (config.eval.every and step % config.eval.every == 0):
        row |= evaluate(run, state.policy, pairs["test"])
      check_finite(row, step)
      log.write(row)
      board.write(row)
      if last or step % config.checkpoint.every == 0:
        log.sync()
        checkpoints.save_state(step, state, stream.state())
      advance()
      if last or step % config.record.print_every == 0:
        run.terminal.say(_line(row))
  # Renamed when it is complete: a kill leaves no half of a model.
  unfinished = model.with_suffix(".new")
  models.save(state.policy, unfinished, tokenizer=run.tokenizer)
  unfinished.replace(model)
  return model


def as_rollouts(run: Run, pairs: Sequence[Pair]) -> Rollouts:
  """Rows as `PairUpdate` takes them: chosen, rejected, chosen, rejected, …"""
  return sft.demonstration_rollouts(
    run, [response for pair in pairs for response in pair]
  )


def evaluate(run: Run, model: Any, pairs: Sequence[Pair]) -> dict[str, float]:
  """How often the model prefers what was preferred, on held-out pairs.

  Returns:
    `eval/pairs/accuracy` with its 95 % interval over pairs, `eval/pairs/margin`, and
    for the embedded task `eval/pairs/true_accuracy`: the share of pairs, among those
    that differ in truth, which it puts in their true order.
  """
  size, scores = run.config.reward_model.batch_size, []
  for start in range(0, len(pairs), size):
    batch = list(pairs[start : start + size])
    filled = batch + batch[-1:] * (size - len(batch))  # one shape, one program
    scores += [np.asarray(reward_model.score(model, as_rollouts(run, filled)))]
  ahead = np.concatenate(scores).reshape(-1, 2)[: len(pairs)] @ [1.0, -1.0]
  right = _right(ahead)
  low, high = bootstrap_interval(right)
  row = {
    "eval/pairs/accuracy": float(right.mean()),
    "eval/pairs/accuracy_low": low,
    "eval/pairs/accuracy_high": high,
    "eval/pairs/margin": float(ahead.mean()),
  }
  if run.config.reward_model.pairs == "preferences":
    truth = np.array([preferences.true_margin(pair) for pair in pairs])
    differ = truth != 0
    row["eval/pairs/true_accuracy"] = float(
      _right((ahead * np.sign(truth))[differ]).mean()
    )
  return row


def _right(ahead: np.ndarray) -> np.ndarray:
  """1 where the first of a pair is ahead, 0 where the second is, a half in a tie."""
  return (ahead > 0) + 0.5 * (ahead == 0)


def _line(row: dict[str, Any]) -> str:
  words = [f"reward model, step {row['step']}"]
  words += [f"{name} {row[name]:.3f}" for name in ("loss", "accuracy", "margin")]
  if "eval/pairs/accuracy" in row:
    words.append(
      f"held-out accuracy {row['eval/pairs/accuracy']:.3f}"
      f" [{row['eval/pairs/accuracy_low']:.3f}, {row['eval/pairs/accuracy_high']:.3f}]"
    )
  return "  ".join(words)
