"""SFT: supervised fine-tuning on demonstrations, before RL begins.

Only the embedded tasks have demonstrations; a pretrained model needs none.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from opo_jax import build, sampler
from opo_jax.config import Config
from opo_jax.data import arithmetic, preferences
from opo_jax.data.arithmetic import Demonstration
from opo_jax.metrics import Timers, check_finite
from opo_jax.rollouts import Rollouts
from opo_jax.run import Run
from opo_jax.storage.json_files import JsonLines

DEMONSTRATIONS = {
  "arithmetic": arithmetic.demonstrations,
  "preferences": preferences.demonstrations,
}


def check(config: Config) -> None:
  """Refuses SFT on a data set without demonstrations.

  Raises:
    ValueError: names the data sets that have them.
  """
  if config.sft.steps and config.data.train not in DEMONSTRATIONS:
    raise ValueError(
      f"There are no demonstrations for {config.data.train!r} to fine-tune on, only"
      f" for {sorted(DEMONSTRATIONS)}; use --sft.steps 0."
    )


def start_policy(run: Run) -> Any:
  """The policy that RL starts from, after SFT if the config has it; see `start/`."""
  if run.directory.has_start():
    return run.directory.load_start(run.abstract_policy)
  policy = run.init_policy()
  if run.config.sft.steps:
    policy = train(run, policy)
  run.directory.save_start(policy)
  return policy


def train(run: Run, policy: Any) -> Any:
  """Fine-tunes a policy on demonstrations; writes `sft.jsonl`.

  Args:
    run: its directory receives the file.
    policy: to begin with.

  Returns:
    The policy after the last step.
  """
  settings = run.config.sft
  demonstrate = DEMONSTRATIONS[run.config.data.train]
  learner = build.make_sft_learner(run.config)
  state = learner.init(policy)
  stream = run.problems.stream(run.seed("demonstration"))
  path = run.directory.path / "sft.jsonl"
  log = JsonLines(path, resume_at=None) if run.writes else None
  reward_of_all = np.ones(settings.batch_size, np.float32)
  with run.terminal.progress("SFT", done=0, total=settings.steps) as advance:
    for step in range(1, settings.steps + 1):
      timers = Timers()
      batch = demonstrate(
        stream.take(settings.batch_size), seed=run.seed("demonstration", step)
      )
      rollouts = demonstration_rollouts(run, batch)
      state, update = learner.update(state, rollouts, reward_of_all)
      row = {"step": step, "loss": float(update.scalars["loss"])}
      row["tokens"] = int(rollouts.lengths.sum())
      row |= timers.metrics()
      check_finite(row, step)
      if log:
        log.write(row)
      advance()
  if log:
    log.close()
  run.terminal.say(
    f"SFT: {settings.steps} supervised steps, loss {row['loss']:.3f} nats a token"
  )
  return state.policy


def demonstration_rollouts(run: Run, batch: Sequence[Demonstration]) -> Rollouts:
  """Demonstrations as rollouts, cut off at the length limit."""
  end = [run.tokenizer.eos_token_id]
  responses = run.tokenizer(
    [each.response for each in batch], add_special_tokens=False
  )["input_ids"]
  ends = [each.ends for each in batch]
  return as_rollouts(
    run.encode([each.problem for each in batch]),
    [r + end if e else r for r, e in zip(responses, ends, strict=True)],
    ends,
    max_new_tokens=run.config.rollout.max_new_tokens,
  )


def as_rollouts(
  prompts: Sequence[Sequence[int]],
  responses: Sequence[Sequence[int]],
  ends: Sequence[bool],
  *,
  max_new_tokens: int,
) -> Rollouts:
  """Given responses as rollouts, one per prompt, for an update to learn from.

  Args:
    prompts: token ids.
    responses: token ids, with the end token where there is one.
    ends: whether a response ends (by its end token) or is cut off.
    max_new_tokens: T; a longer response is cut off there.
  """
  num, width = len(prompts), sampler.bucket(max(map(len, prompts)))
  prompts_GP = np.zeros((num, width), np.int32)
  tokens_NT = np.zeros((num, max_new_tokens), np.int32)
  lengths = np.array([min(len(r), max_new_tokens) for r in responses], np.int32)
  for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
    prompts_GP[row, width - len(prompt) :] = prompt
    tokens_NT[row, : lengths[row]] = response[: lengths[row]]
  return Rollouts(
    prompts=jnp.asarray(prompts_GP),
    prompt_lengths=jnp.array([len(p) for p in prompts], jnp.int32),
    tokens=jnp.asarray(tokens_NT),
    logprobs=jnp.zeros((num, max_new_tokens), jnp.float32),
    sampling_logprobs=jnp.zeros((num, max_new_tokens), jnp.float32),
    mask=jnp.arange(max_new_tokens) < lengths[:, None],
    lengths=jnp.asarray(lengths),
    prompt_ids=jnp.arange(num, dtype=jnp.int32),
    finished=jnp.array(
      [e and len(r) <= max_new_tokens for e, r in zip(ends, responses, strict=True)]
    ),
    temperature=jnp.float32(1.0),
    version=jnp.int32(-1),
  )
