"""What the peers' scripts have in common: the shape, the arguments, the JSON line.

A script prints one JSON line on stdout, everything else goes to stderr:

    {"peer": "trl", "version": "1.16.0", "task": "dense", "tokens": 16384,
     "seconds": [10.1, 9.8], "rollout_s": [10.1, 9.8], "update_s": [],
     "cpu_s": [17.3, 17.2], "settings": {"rows_per_call": 128},
     "peak_rss_bytes": 1234567890}

`tokens` is what one repeat samples (the prompt's are not counted), `seconds` the time
of each repeat after a warm-up, `rollout_s` and `update_s` its two parts (`rollout_s +
update_s = seconds`; `update_s` is empty for rollouts alone), `cpu_s` the CPU time of
all threads in `seconds` (less than `seconds` on two threads: the machine was busy with
something else), `peak_rss_bytes` the largest resident size of the whole process, its
libraries and the warm-up included.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import random
import resource
import sys
import time
from collections.abc import Callable

# bench-small: a Qwen2 with random float32 weights and tied embeddings.
VOCABULARY, WIDTH, MLP, LAYERS, HEADS, KV_HEADS = 4096, 256, 1024, 6, 8, 2
HEAD_DIM = WIDTH // HEADS
SAMPLES_PER_PROMPT, PROMPT_TOKENS = 8, 64
DENSE_PROMPTS, DENSE_TOKENS = 16, 128
LONG_TAIL_PROMPTS, LONG_TAIL_LIMIT = 64, 512
# An end token that the unembedding has no row for: it can never be sampled, so every
# response runs to its limit and no contender pays for a mask. Padding must have an
# embedding, since transformers feeds it to rows that have ended; no prompt contains it.
END_ID, PAD_ID = VOCABULARY, 0


def prompts(count: int) -> list[list[int]]:
  """Random token ids, the same in every run: `count` lists of 64."""
  rng = random.Random(0)
  return [rng.choices(range(3, VOCABULARY), k=PROMPT_TOKENS) for _ in range(count)]


def as_text(ids: list[int]) -> str:
  """A prompt as the peers' trainers want it: one word for each id."""
  return " ".join(f"t{i}" for i in ids)


def tokenizer():
  """A Hugging Face tokenizer of one word for each id: `t17` is 17.

  The special tokens are found inside of words too: no word may begin with one.
  """
  from tokenizers import Tokenizer, decoders, models, pre_tokenizers
  from transformers import PreTrainedTokenizerFast

  special = {"<pad>": PAD_ID, "<unknown>": 1, "<end>": END_ID}
  words = special | {f"t{i}": i for i in range(2, VOCABULARY)}
  backend = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
  backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  backend.decoder = decoders.Fuse()
  return PreTrainedTokenizerFast(
    tokenizer_object=backend,
    eos_token="<end>",
    pad_token="<pad>",
    unk_token="<unknown>",
  )


def alternating_rewards(prompts, completions, **_) -> list[float]:
  """0, 1, 0, 1, ...: every group has signal and scoring costs nothing."""
  return [float(i % 2) for i in range(len(completions))]


class Stopwatch:
  """Seconds of each lap, by the wall clock and of all threads together."""

  def __init__(self):
    self.wall_s: list[float] = []
    self.cpu_s: list[float] = []
    self.restart()

  def restart(self) -> None:
    self._start = time.perf_counter(), time.process_time()

  def lap(self) -> None:
    wall, cpu = time.perf_counter(), time.process_time()
    self.wall_s.append(wall - self._start[0])
    self.cpu_s.append(cpu - self._start[1])
    self._start = wall, cpu


def split(steps: Stopwatch, sampling: Stopwatch) -> dict:
  """The times of whole steps, after the first one, and of their two parts."""
  assert len(steps.wall_s) == len(sampling.wall_s), "one rollout in each step"
  return {
    "seconds": steps.wall_s[1:],
    "rollout_s": sampling.wall_s[1:],
    "update_s": [
      step - rollout
      for step, rollout in zip(steps.wall_s[1:], sampling.wall_s[1:], strict=True)
    ],
    "cpu_s": steps.cpu_s[1:],
  }


def peak_rss_bytes() -> int:
  # Linux counts in KiB.
  return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(
  description: str,
  package: str,
  peer: str,
  tasks: dict[str, Callable[[argparse.Namespace], dict]],
  add_arguments: Callable[[argparse.ArgumentParser], None],
) -> None:
  """Parses the arguments, runs the task and prints its JSON line."""
  parser = argparse.ArgumentParser(description=description)
  parser.add_argument("--task", choices=tasks, required=True)
  parser.add_argument("--repeats", type=int, default=3, help="measured after a warm-up")
  parser.add_argument("--threads", type=int, default=2, help="CPU cores to use")
  parser.add_argument(
    "--lengths",
    type=pathlib.Path,
    help=f"JSON list of {LONG_TAIL_PROMPTS * SAMPLES_PER_PROMPT} response lengths, "
    f"1 to {LONG_TAIL_LIMIT}, samples of a prompt side by side (task long_tail)",
  )
  add_arguments(parser)
  arguments = parser.parse_args()
  if arguments.repeats < 1:
    parser.error("--repeats must be 1 or more")
  if arguments.task == "long_tail":
    if arguments.lengths is None:
      parser.error("--task long_tail needs --lengths FILE")
    arguments.lengths = json.loads(arguments.lengths.read_text())
    expected = LONG_TAIL_PROMPTS * SAMPLES_PER_PROMPT
    if len(arguments.lengths) != expected or not all(
      1 <= length <= LONG_TAIL_LIMIT for length in arguments.lengths
    ):
      parser.error(f"--lengths: expected {expected} lengths of 1 to {LONG_TAIL_LIMIT}")

  # The cores are taken away before a library counts them for its thread pool.
  cores = sorted(os.sched_getaffinity(0))
  if arguments.threads > len(cores):
    parser.error(f"--threads {arguments.threads}: this process has {len(cores)} cores")
  os.sched_setaffinity(0, cores[: arguments.threads])
  os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
  # OpenMP's threads wait for each other by spinning. Without a bound, one that is not
  # scheduled costs the other its whole time slice: TRL took 46 s instead of 7 s on a
  # machine at load 16. About 0.1 ms of spinning is enough where the machine is quiet.
  os.environ.setdefault("GOMP_SPINCOUNT", "3000")
  # Nothing of this may go to the network, whatever a library would like to look up.
  os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
  os.environ["JAX_PLATFORMS"] = "cpu"
  with contextlib.redirect_stdout(sys.stderr):
    measured = tasks[arguments.task](arguments)
  record = {
    "peer": peer,
    "version": importlib.metadata.version(package),
    "task": arguments.task,
    **measured,
    "peak_rss_bytes": peak_rss_bytes(),
  }
  print(json.dumps(record), flush=True)
