"""The training loop, on the host, from top to bottom.

    prompts -> rollouts -> rewards -> update -> record

Each step is three calls: the sampler samples, the scorer scores, the learner updates.
A run lives in a directory; the same command on the same directory resumes from the last
checkpoint exactly, since everything random is drawn from (seed, purpose, step).
"""

import contextlib
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from opo_jax import build, reward_training, sft
from opo_jax.config import Config
from opo_jax.devices import distributed, memory, sharding
from opo_jax.devices.memory import gib
from opo_jax.devices.profiling import Profiler
from opo_jax.evaluation.evaluator import Evaluator
from opo_jax.learner import PolicyGradientLearner, kl_to_start
from opo_jax.metrics import Timers, check_finite, describe_responses
from opo_jax.protocols import Learner, Sampler, Scorer
from opo_jax.reports.terminal import evaluation_line, step_line
from opo_jax.rollouts import Rollouts
from opo_jax.run import Run
from opo_jax.sampler import JaxSampler, compiled_programs
from opo_jax.scorer import on_host
from opo_jax.storage.record import NoRecord, Record, Responses
from opo_jax.storage.run_json import add_to_run_json

# The largest difference of log-probs that float32 rounding explains.
_MAX_ROUNDING_GAP = 1e-4


def train(
  config: Config,
  directory: pathlib.Path,
  *,
  sampler: Sampler | None = None,
  scorer: Scorer | None = None,
  learner: Learner | None = None,
) -> bool:
  """Trains from the start, or from the directory's last checkpoint, to the last step.

  Args:
    config: of the run.
    directory: of the run; the README lists its files.
    sampler, scorer, learner: replace the parts that the config describes; see
      `protocols`.

  Returns:
    Whether this process writes the reports (the first of several does).

  Raises:
    ValueError: a config that cannot run, or a directory of another config. Nothing has
      been written then.
    FloatingPointError: a metric that is not finite; names the step.
  """
  where = config.distributed
  distributed.start_processes(where.coordinator, where.num_processes, where.process_id)
  with contextlib.ExitStack() as stack:
    # Everything that can be refused is refused before anything is written.
    sft.check(config)
    run = Run(config, directory)
    run.directory.check()
    build.check_batch(config, run.mesh)
    scorer = scorer or stack.enter_context(run.make_scorer())
    sampler = sampler or build.make_sampler(config)
    learner = learner or build.make_learner(config, run.mesh)
    evaluator = Evaluator(run, sampler, scorer)
    stream = run.problems.stream(config.seed)
    run.problems.check()
    reward_training.check(run, scorer)
    run.write_head()

    start_policy = sft.start_policy(run)
    reward_training.prepare(run, start_policy)
    state = learner.init(build.add_adapters(config, start_policy))
    checkpoints = stack.enter_context(run.directory.checkpoints())
    done, state = checkpoints.resume(state, stream)
    record = stack.enter_context(_open_record(run, done))
    if not done:
      row = {"step": 0} | evaluator.evaluate(start_policy)
      record.metrics(row)
      run.terminal.say(f"step 0  {evaluation_line(row)}  (the start policy)")

    params = build.rollout_params(config)
    learning_rate = build.rl_schedule(config)
    update_memory = build.update_memory(config, run.mesh)
    profiler = stack.enter_context(
      Profiler(directory / "tensorboard", config.profile.span)
    )
    advance = stack.enter_context(
      run.terminal.progress("RL", done=done, total=config.steps)
    )
    timers = Timers()
    with timers.phase("data"):
      problems = stream.take(config.rollout.prompts_per_step)
      prompts = run.encode_local(problems)
    for step in profiler.steps(range(done + 1, config.steps + 1)):
      with timers.phase("rollout"):
        scorer.begin(problems)
        rollouts = sampler.sample(
          state.policy,
          run.gather_prompts(prompts, len(problems)),
          params,
          seed=run.seed("rollout", step),
          version=jnp.copy(state.step),
          on_ended=scorer.add if scorer.wants_early_rows else None,
        )
        jax.block_until_ready(rollouts)
      with timers.phase("reward"):
        sampled = on_host(rollouts, run.mesh)
        _check_groups(sampled, len(problems), params.samples_per_prompt)
        rewards = scorer.finish(sampled)
      with timers.phase("update"), memory.explained(update_memory.advice):
        if update_memory.measured is None and isinstance(
          learner, PolicyGradientLearner
        ):
          stats = learner.memory(state, rollouts, rewards.values)
          update_memory.measured = memory.of(stats)
          _tell_memory(run, sampler, update_memory)
        state, update = learner.update(state, rollouts, rewards.values)
      # The devices are at work; meanwhile the host does what it can.
      with timers.phase("measure"):
        kl = _kl_to_start(run, start_policy, rollouts)
        updates_done = (step - 1) * config.algorithm.updates_per_batch
        row = {"step": step, "learning_rate": float(learning_rate(updates_done))}
        row |= describe_responses(rewards.values, sampled.lengths, sampled.finished)
        row |= rewards.metrics
      with timers.phase("data"):
        position = stream.state()
        next_problems = stream.take(config.rollout.prompts_per_step)
        prompts = run.encode_local(next_problems)
      with timers.phase("update"), memory.explained(update_memory.advice):
        row |= _read(update.scalars)
      with timers.phase("measure"):
        row |= _read(kl)
      row |= timers.metrics()
      row["throughput/tokens_per_s"] = row["rollout/tokens"] / row["time/step_s"]

      last = step == config.steps
      if last or (config.eval.every and step % config.eval.every == 0):
        row |= evaluator.evaluate(state.policy)
      timers = Timers()  # the row is complete: what follows counts for the next one
      with timers.phase("record"):
        check_finite(row, step)
        _warn_of_gap(run, row)
        record.step(
          row,
          Responses(
            problems, rewards.texts, rewards.values, sampled, update.advantages
          ),
        )
        advance()
        if last or step % config.record.print_every == 0:
          run.terminal.say(step_line(row))
      if last or step % config.checkpoint.every == 0:
        with timers.phase("checkpoint"):
          record.sync()  # a checkpoint of step k promises the lines up to k
          checkpoints.save_state(step, state, position)
      problems = next_problems
    return run.writes


def _open_record(run: Run, done: int) -> Record | NoRecord:
  """The record of a run that continues after `done` steps; warns of lost lines."""
  if done:
    run.terminal.say(f"Resumed after step {done} of {run.config.steps}.")
  if not run.writes:
    return NoRecord()
  record = Record(
    run.directory.path, resume_at=done or None, samples=run.config.record.samples
  )
  if done and record.last < done:
    run.terminal.say(
      f"warning: metrics.jsonl has no lines of steps {record.last + 1} to {done}: they"
      " were lost, the policy was not. Curves have a gap there."
    )
  return record


def _check_groups(rollouts: Rollouts, num_prompts: int, group_size: int) -> None:
  """Refuses rollouts that are not `group_size` responses to every prompt.

  Groups of another size would merge or split prompts: wrong baselines.
  """
  sizes = np.bincount(rollouts.prompt_ids, minlength=num_prompts)
  if len(sizes) != num_prompts or (sizes != group_size).any():
    raise ValueError(
      f"The sampler returned groups of {sizes.tolist()} responses; each of the"
      f" {num_prompts} prompts needs {group_size} (--rollout.group-size)."
    )


def _read(metrics: dict[str, jax.Array]) -> dict[str, float]:
  """Waits for metrics that a device computes."""
  return {name: float(value) for name, value in jax.device_get(metrics).items()}


def _kl_to_start(run: Run, start_policy, rollouts) -> dict[str, jax.Array]:
  """Starts computing the KL on `--record.kl-rollouts` rows, evenly spaced."""
  config, num_rows = run.config, rollouts.tokens.shape[0]
  if not config.record.kl_rollouts:
    return {}
  shards = sharding.batch_shards(run.mesh)
  count = min(num_rows, math.ceil(config.record.kl_rollouts / shards) * shards)
  kl = kl_to_start(
    start_policy,
    rollouts,
    jnp.arange(count) * num_rows // count,
    micro_batch_tokens=config.algorithm.micro_batch_tokens,
  )
  return {"policy/kl_to_start": kl}


def _warn_of_gap(run: Run, row: dict[str, Any]) -> None:
  """Warns when sampler and learner differ by more than float32 rounding explains."""
  gap = row.get("onpolicy/logprob_diff_max", 0.0)  # absent: nothing was computed
  on_policy = run.config.algorithm.updates_per_batch == 1
  in_float32 = run.abstract_policy.dtype == jnp.float32
  if on_policy and in_float32 and gap > _MAX_ROUNDING_GAP:
    run.terminal.say(
      f"warning: step {row['step']}: sampler and learner differ by {gap:.1e} in a"
      f" log-prob, more than {_MAX_ROUNDING_GAP:.0e}; this is not on-policy to"
      " rounding."
    )


def _tell_memory(run: Run, sampler: Sampler, update_memory) -> None:
  """Says, before the first update, what it and sampling take of a device."""
  update, device = update_memory.measured, update_memory.device_bytes
  told, words = {"device": device, "update": update.peak}, ""
  if isinstance(sampler, JaxSampler):
    rollout = run.config.rollout
    slots, told["sampling"] = sampler.memory_bytes(
      run.abstract_policy,
      rollout.prompts_per_step * rollout.group_size,
      build.rollout_params(run.config),
    )
    words = f", sampling with {slots} slots at most {gib(told['sampling'])}"
  run.terminal.say(
    f"Compiled {compiled_programs()} sampling programs. Memory of a device:"
    f" {gib(device)}. The update takes {gib(update.peak)} ({gib(update.arguments)} of"
    f" state and batch, {gib(update.temporaries)} more while it runs){words}."
  )
  if run.writes:
    add_to_run_json(run.directory.path, memory_bytes=told)
