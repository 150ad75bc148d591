"""TRL's GRPOTrainer on bench-small: rollouts, and whole RL steps, on CPU in float32.

    .venv-peers/bin/python benchmarks/peers/trl_peer.py --task dense
    .venv-peers/bin/python benchmarks/peers/trl_peer.py --task long_tail --lengths FILE
    .venv-peers/bin/python benchmarks/peers/trl_peer.py --task step

The trainer is a real one and samples as it does by itself, with transformers' generate
(`use_vllm=False`); prompts are repeated 8 times, as TRL does. bench_small.py says what
is printed. Chosen for speed: no gradient checkpointing (TRL's default is on), beta 0
(no reference model), a rollout batch of all 128 rollouts, and what follows. Figures are
CPU seconds of both threads (`cpu_s`), one repeat each, on a busy machine of 2 cores:
good for telling a factor of 1.5, not 5 %.

- Attention: sdpa 8.5, eager 10.1 for the dense rollout.
- transformers' continuous batching (`--continuous-batching`): 18.0 and 5.3 GB for 48
  tokens each, where generate needs 8.5 to 13 and 1.1 GB for 128. It is not used.
- Long tail, limit and lengths cut to an eighth: 512 rows in one generate call 19.6,
  64 rows at a time 29.7. A stopping criterion ends each row at its length; generate
  goes on computing a row that has ended, and returns with the longest.
- Micro-batch of the update, at 64 new tokens: 16 rollouts 16.4 and 1.9 GB, 32 rollouts
  15.6 and 2.5 GB. A whole step of 128 tokens with 32: 27.4 and 3.1 GB.
"""

import argparse
import tempfile

import bench_small as bench

DENSE_ROWS = bench.DENSE_PROMPTS * bench.SAMPLES_PER_PROMPT


def make_trainer(arguments, *, limit: int, micro_batch: int, max_steps: int = 1):
  """A real GRPOTrainer: 128 rollouts and one AdamW update a step, beta 0."""
  import torch
  from datasets import Dataset
  from transformers import Qwen2Config, Qwen2ForCausalLM
  from trl import GRPOConfig, GRPOTrainer

  torch.set_num_threads(arguments.threads)
  torch.manual_seed(0)
  model = Qwen2ForCausalLM(
    Qwen2Config(
      vocab_size=bench.VOCABULARY,
      hidden_size=bench.WIDTH,
      intermediate_size=bench.MLP,
      num_hidden_layers=bench.LAYERS,
      num_attention_heads=bench.HEADS,
      num_key_value_heads=bench.KV_HEADS,
      tie_word_embeddings=True,
      attn_implementation=arguments.attention,
    )
  ).float()
  texts = [bench.as_text(ids) for ids in bench.prompts(bench.DENSE_PROMPTS)]
  config = GRPOConfig(
    output_dir=tempfile.gettempdir(),  # nothing is saved
    use_cpu=True,
    bf16=False,
    per_device_train_batch_size=micro_batch,
    gradient_accumulation_steps=DENSE_ROWS // micro_batch,
    num_generations=bench.SAMPLES_PER_PROMPT,
    max_completion_length=limit,
    temperature=1.0,
    top_p=1.0,
    top_k=0,
    beta=0.0,
    learning_rate=1e-6,
    gradient_checkpointing=False,
    use_vllm=False,
    use_transformers_continuous_batching=arguments.continuous_batching,
    max_steps=max_steps,
    save_strategy="no",
    logging_strategy="no",
    report_to="none",
    disable_tqdm=True,
  )
  return GRPOTrainer(
    model=model,
    reward_funcs=bench.alternating_rewards,
    args=config,
    train_dataset=Dataset.from_dict({"prompt": texts}),
    processing_class=bench.tokenizer(),
  )


def rollouts(trainer, rows: list[list[int]]) -> list[list[int]]:
  completions, _ = trainer._generate_single_turn(
    rows, None, {}, bench.SAMPLES_PER_PROMPT
  )
  return completions


def repeated(prompts: list[list[int]]) -> list[list[int]]:
  return [ids for ids in prompts for _ in range(bench.SAMPLES_PER_PROMPT)]


def dense(arguments) -> dict:
  trainer = make_trainer(arguments, limit=bench.DENSE_TOKENS, micro_batch=DENSE_ROWS)
  rows = repeated(bench.prompts(bench.DENSE_PROMPTS))
  watch = bench.Stopwatch()
  for _ in range(arguments.repeats + 1):
    watch.restart()
    completions = rollouts(trainer, rows)
    watch.lap()
    lengths = {len(completion) for completion in completions}
    assert lengths == {bench.DENSE_TOKENS}, lengths
  return {
    "tokens": len(rows) * bench.DENSE_TOKENS,
    "seconds": watch.wall_s[1:],
    "rollout_s": watch.wall_s[1:],
    "update_s": [],
    "cpu_s": watch.cpu_s[1:],
    "settings": {"rows_per_call": len(rows)},
  }


def long_tail(arguments) -> dict:
  import torch
  from transformers import StoppingCriteria, StoppingCriteriaList

  class EndsAtItsLength(StoppingCriteria):
    """Row i is done once it has as many new tokens as its length says."""

    def __init__(self, lengths):
      self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **_):
      return input_ids.shape[1] - bench.PROMPT_TOKENS >= self.lengths

  if arguments.continuous_batching:
    raise SystemExit("error: lengths are given to generate, not to continuous batching")
  trainer = make_trainer(arguments, limit=bench.LONG_TAIL_LIMIT, micro_batch=DENSE_ROWS)
  generate = trainer.model.generate

  def sample(rows, lengths):
    # TRL calls generate by itself; what it does not pass on is put in here.
    criteria = StoppingCriteriaList([EndsAtItsLength(lengths)])
    trainer.model.generate = lambda **given: generate(
      stopping_criteria=criteria, **given
    )
    return rollouts(trainer, rows)

  rows = repeated(bench.prompts(bench.LONG_TAIL_PROMPTS))
  size = arguments.rows_per_call
  sample(rows[:size], [8] * size)  # warm-up
  watch = bench.Stopwatch()
  for _ in range(arguments.repeats):
    watch.restart()
    for first in range(0, len(rows), size):
      lengths = arguments.lengths[first : first + size]
      completions = sample(rows[first : first + size], lengths)
      assert len(completions[0]) == max(lengths), "generate ran on after the longest"
    watch.lap()
  return {
    "tokens": sum(arguments.lengths),
    "seconds": watch.wall_s,
    "rollout_s": watch.wall_s,
    "update_s": [],
    "cpu_s": watch.cpu_s,
    "settings": {"rows_per_call": size},
  }


def step(arguments) -> dict:
  from transformers import TrainerCallback

  trainer = make_trainer(
    arguments,
    limit=bench.DENSE_TOKENS,
    micro_batch=arguments.micro_batch,
    max_steps=arguments.repeats + 1,
  )
  steps, sampling = bench.Stopwatch(), bench.Stopwatch()
  score = trainer._generate_and_score_completions

  def timed_rollout(inputs):
    sampling.restart()
    scored = score(inputs)
    sampling.lap()
    assert scored["prompt_ids"].shape == (DENSE_ROWS, bench.PROMPT_TOKENS)
    assert scored["completion_mask"].sum() == DENSE_ROWS * bench.DENSE_TOKENS
    return scored

  class Clock(TrainerCallback):
    def on_step_end(self, *_, **__):
      steps.lap()

  trainer._generate_and_score_completions = timed_rollout
  trainer.add_callback(Clock())
  trainer.train()
  # From the end of one step to the end of the next: loading and logging count too.
  return {
    "tokens": DENSE_ROWS * bench.DENSE_TOKENS,
    **bench.split(steps, sampling),
    "settings": {"micro_batch": arguments.micro_batch},
  }


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    "--rows-per-call", type=int, default=512, help="of one generate call, long_tail"
  )
  parser.add_argument("--micro-batch", type=int, default=32, help="rollouts, step")
  parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
  parser.add_argument(
    "--continuous-batching",
    action="store_true",
    help="sample with transformers' continuous batching; dense and step only",
  )


if __name__ == "__main__":
  tasks = {"dense": dense, "long_tail": long_tail, "step": step}
  bench.main(__doc__.splitlines()[0], "trl", "trl", tasks, add_arguments)
