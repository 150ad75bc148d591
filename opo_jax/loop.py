"""Training, on the host, from top to bottom.

    prompts -> rollouts -> rewards -> update -> record

A run lives in a directory. The same command on the same directory goes on where the
last checkpoint was, exactly: everything random is drawn from (seed, purpose, step).
"""

import contextlib
import math
import pathlib
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from opo_jax import build
from opo_jax import reward_training as reward_training
from opo_jax.config import Config
from opo_jax.devices import distributed
from opo_jax.devices.profiling import Profiler
from opo_jax.run import Run, check_directory, scores
from opo_jax.storage.checkpoint import Checkpoints
from opo_jax.storage.metrics import (
  JsonLines,
  TensorBoard,
  Timers,
  check_finite,
  describe_responses,
)


def train(config: Config, directory: pathlib.Path) -> bool:
  """Trains from the start, or from the directory's last checkpoint, to the last step.

  Args:
    config: the run.
    directory: where it is written; the README lists its files.

  Returns:
    Whether this process is the one that writes what is to be read, of several.

  Raises:
    ValueError: a config that cannot run, or a directory of another config. Nothing has
      been written then.
    FloatingPointError: a metric that is not finite; names the step.
  """
  where = config.distributed
  distributed.start_processes(where.coordinator, where.num_processes, where.process_id)
  check_directory(config, directory)
  with contextlib.ExitStack() as stack:
    run = stack.enter_context(Run(config, directory))
    build.check_batch(config, run.parts.mesh)
    stream = run.problems.stream(config.seed)
    run.problems.check()  # what is wrong with them shows now, not at step 700
    reward_training.check(run)
    run.write_head()

    start_policy = run.start_policy()
    reward_training.prepare(run, start_policy)
    state = run.parts.start(start_policy)
    checkpoints = stack.enter_context(
      Checkpoints(directory / "checkpoints", keep=config.checkpoint.keep)
    )
    done, state = run.resume(checkpoints, state, stream)
    if done:
      run.terminal.say(f"Resumed after step {done} of {config.steps}.")
    record = stack.enter_context(
      Record(directory, resume_at=done or None, samples=config.record.samples)
      if run.writes
      else NoRecord()
    )
    if done and record.last < done:
      run.terminal.say(
        f"warning: metrics.jsonl has no lines of steps {record.last + 1} to {done}:"
        " they were lost, the policy was not. Curves have a gap there."
      )

    if not done:
      row = {"step": 0} | run.evaluate(start_policy)
      record.metrics(row)
      run.terminal.say(f"step 0  {scores(row)}  (the start model)")

    profiler = stack.enter_context(
      Profiler(directory / "tensorboard", config.profile.span)
    )
    advance = stack.enter_context(
      run.terminal.progress("RL", done=done, total=config.steps)
    )
    timers = Timers()
    with timers.phase("data"):
      asked = stream.take(config.rollout.prompts_per_step)
      prompts = run.encode_own(asked)
    for step in profiler.steps(range(done + 1, config.steps + 1)):
      with timers.phase("rollout"):
        scoring = run.scoring(asked)  # begins while others are still being sampled
        rollouts = run.sample(state, asked, step, prompts=prompts, scoring=scoring)
      with timers.phase("reward"):
        answers = run.on_host(rollouts)
        texts, verified = run.score(answers, asked, scoring)
        rewards, pieces = run.shape(answers, texts, verified)
      with timers.phase("update"):
        state, metrics, advantages = run.update(state, rollouts, rewards)
      # The devices are at work; what the host can do meanwhile, it does here.
      with timers.phase("measure"):
        kl = run.kl_to_start(start_policy, rollouts)
        row = {"step": step, "learning_rate": run.learning_rate(step)}
        row |= describe_responses(rewards, answers.lengths, answers.finished)
        row |= pieces
      with timers.phase("data"):
        position = stream.state()
        following = stream.take(config.rollout.prompts_per_step)
        prompts = run.encode_own(following)
      with timers.phase("update"):
        row |= run.read(metrics)
      with timers.phase("measure"):
        row |= run.read(kl)
      row |= timers.metrics()
      row["throughput/tokens_per_s"] = row["rollout/tokens"] / row["time/step_s"]

      last = step == config.steps
      if last or (config.eval.every and step % config.eval.every == 0):
        row |= run.evaluate(state.policy)
      timers = Timers()  # this row is complete: what follows counts for the next
      with timers.phase("record"):
        check_finite(row, step)
        run.warn_of_gap(row)
        record.step(row, asked, texts, rewards, answers, advantages)
        advance()
        if last or step % config.record.print_every == 0:
          run.terminal.say(_line(row))
      if last or step % config.checkpoint.every == 0:
        with timers.phase("checkpoint"):
          record.keep()  # a checkpoint of step k promises the lines up to k
          run.save(checkpoints, step, state, position)
      asked = following
    return run.writes


class Record:
  """metrics.jsonl, samples.jsonl and TensorBoard, side by side.

  A step is written on a thread, while the next one samples. What goes wrong there is
  raised by the next call.

  Args:
    directory: of the run.
    resume_at: the step after which the run goes on; None starts anew.
    samples: responses of a step that are written down.
  """

  def __init__(
    self, directory: pathlib.Path, *, resume_at: int | None, samples: int = 0
  ):
    self._metrics = JsonLines(directory / "metrics.jsonl", resume_at=resume_at)
    self.last = self._metrics.last  # the latest step that metrics.jsonl holds
    self._samples = JsonLines(directory / "samples.jsonl", resume_at=resume_at)
    self._board = TensorBoard(directory / "tensorboard", resume_at=resume_at)
    self._num_samples = samples
    self._thread = ThreadPoolExecutor(1, "record")
    self._writing: Future | None = None

  def metrics(self, row: dict[str, Any]) -> None:
    self._metrics.write(row)
    self._board.write(row)

  def samples(self, step, problems, texts, rewards, rollouts, advantages) -> None:
    lengths, finished = np.asarray(rollouts.lengths), np.asarray(rollouts.finished)
    groups, advantages = np.asarray(rollouts.prompt_ids), np.asarray(advantages)
    count = min(self._num_samples, len(texts))
    for i in np.linspace(0, len(texts) - 1, count).astype(int):
      row = {
        "step": step,
        "prompt": problems[groups[i]].question,
        "response": texts[i],
        "reference": problems[groups[i]].answer,
        "length": int(lengths[i]),
        "finished": bool(finished[i]),
        "advantage": float(advantages[i]),
      }
      if not np.isnan(rewards[i]):
        row["reward"] = float(rewards[i])
      self._samples.write(row)

  def step(self, row: dict[str, Any], *answers) -> None:
    """Starts writing a step: its row, and some of its answers (see `samples`)."""
    self.wait()
    self._writing = self._thread.submit(self._write, row, answers)

  def _write(self, row, answers):
    self.metrics(row)
    self.samples(row["step"], *answers)

  def wait(self) -> None:
    """Returns when everything is written."""
    if self._writing is not None:
      writing, self._writing = self._writing, None
      writing.result()

  def keep(self) -> None:
    """Returns when everything is written where it outlives the machine."""
    self.wait()
    self._metrics.keep()
    self._samples.keep()

  def __enter__(self) -> "Record":
    return self

  def __exit__(self, *error) -> None:
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      for part in (self._metrics, self._samples, self._board):
        part.close()


class NoRecord(contextlib.nullcontext):
  """A `Record` of a process that leaves the writing to another."""

  last = math.inf  # nothing is missing

  def __enter__(self) -> "NoRecord":
    return self

  def metrics(self, row: dict[str, Any]) -> None:
    """Nothing."""

  def step(self, row: dict[str, Any], *answers) -> None:
    """Nothing."""

  def keep(self) -> None:
    """Nothing."""


def _line(row: dict[str, Any]) -> str:
  """The line now and then: what a person watches."""
  shown = {
    "reward": "reward/mean",
    "length": "response_length/mean",
    "entropy": "policy/entropy",
    "KL to start": "policy/kl_to_start",
    "grad norm": "grad_norm",
    "tokens/s": "throughput/tokens_per_s",
  }
  words = [f"step {row['step']}"]
  for label, name in shown.items():
    if name in row:
      words.append(f"{label} {row[name]:.4g}")
  held_out = [
    f"{name.rsplit('/')[-1]} {value:.3f}"
    for name, value in row.items()
    if name.endswith(("/pass@1", "_score", "_win_rate"))
  ]
  return "  ".join(words + held_out)
