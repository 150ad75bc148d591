"""The warm start: a fresh policy imitates demonstrations, before RL begins.

Only the embedded tasks have them; whoever starts from a trained model needs none.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from opo_jax import build
from opo_jax.config import Config
from opo_jax.data import arithmetic, preferences
from opo_jax.data.arithmetic import Demonstration
from opo_jax.rollouts import Rollouts
from opo_jax.storage.metrics import JsonLines, Timers, check_finite

DEMONSTRATIONS = {
  "arithmetic": arithmetic.demonstrations,
  "preferences": preferences.demonstrations,
}


def check(config: Config) -> None:
  """Refuses a warm start on a data set without demonstrations.

  Raises:
    ValueError: with the data sets that have them.
  """
  if config.sft.steps and config.data.train not in DEMONSTRATIONS:
    raise ValueError(
      f"There are no demonstrations for {config.data.train!r} to warm-start from,"
      f" only for {sorted(DEMONSTRATIONS)}; use --sft.steps 0."
    )


def train(run: Any, policy: Any) -> Any:
  """The policy after the warm start; `sft.jsonl` has its steps.

  Args:
    run: a `run.Run`. Its directory gets the file.
    policy: where the warm start begins.
  """
  settings = run.config.sft
  demonstrate = DEMONSTRATIONS[run.config.data.train]
  state = run.parts.start_sft(policy)
  stream = run.problems.stream(run.seed("demonstration"))
  path = run.directory / "sft.jsonl"
  log = JsonLines(path, resume_at=None) if run.writes else None
  everything = jnp.ones(settings.batch_size)
  with run.terminal.progress("warm start", done=0, total=settings.steps) as advance:
    for step in range(1, settings.steps + 1):
      timers = Timers()
      batch = demonstrate(
        stream.take(settings.batch_size), seed=run.seed("demonstration", step)
      )
      rollouts = demonstrated(run, batch)
      state, metrics, _ = run.parts.imitate(state, rollouts, everything, everything > 0)
      row = {"step": step, "loss": float(metrics["loss"])}
      row["tokens"] = int(rollouts.lengths.sum())
      row |= timers.metrics()
      check_finite(row, step)
      if log:
        log.write(row)
      advance()
  if log:
    log.close()
  run.terminal.say(
    f"warm start: {settings.steps} supervised steps, loss {row['loss']:.3f} nats a"
    " token"
  )
  return state.policy


def demonstrated(run: Any, batch: Sequence[Demonstration]) -> Rollouts:
  """Demonstrations as rollouts, cut off at the longest response."""
  end = [run.tokenizer.eos_token_id]
  responses = run.tokenizer(
    [each.response for each in batch], add_special_tokens=False
  )["input_ids"]
  ends = [each.ends for each in batch]
  return build.demonstrations(
    run.encode([each.problem for each in batch]),
    [r + end if e else r for r, e in zip(responses, ends, strict=True)],
    ends,
    max_new_tokens=run.config.rollout.max_new_tokens,
  )
