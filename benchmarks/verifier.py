"""Throughput of the math verifier: answers a second, and answers a CPU second.

    OPO_DATA_DIR=… python benchmarks/verifier.py [--workers 2] [--group 8]

GSM8K and MATH-500. Each problem has a group of responses like a policy's: half are
right (some in another notation), half wrong (another number, or the answer of another
problem). CPU seconds count the workers and this process; on a shared machine they are
more reliable than wall-clock time.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import time

from opo_jax.rewards import RewardPool, math_reward

THOUGHT = "We add what is known to what is asked, and check it once more. " * 40


def responses(references, group, draw):
  """Returns (response, reference) pairs, a group for each problem."""
  pairs = []
  for reference in references:
    for _ in range(group):
      kind = draw.random()
      if kind < 0.4:
        answer = reference
      elif kind < 0.5:
        answer = f"{reference} ".replace(r"\frac", r"\dfrac").replace(", ", ",")
      elif kind < 0.8:
        digits = [i for i, character in enumerate(reference) if character.isdigit()]
        place = draw.choice(digits) if digits else 0
        digit = str(draw.randrange(1, 10))
        answer = reference[:place] + digit + reference[place + 1 :]
      else:
        answer = draw.choice(references)
      pairs.append((rf"{THOUGHT}So the answer is \boxed{{{answer}}}.", reference))
  return pairs


def cpu_s():
  """Returns the CPU seconds of this process and of the workers that have ended."""
  used = [resource.getrusage(resource.RUSAGE_SELF)]
  used.append(resource.getrusage(resource.RUSAGE_CHILDREN))
  return sum(each.ru_utime + each.ru_stime for each in used)


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--group", type=int, default=8)
  options = parser.parse_args()
  if not os.environ.get("OPO_DATA_DIR"):
    print("skipped: set OPO_DATA_DIR to a directory with gsm8k/ and math500/")
    return
  root = pathlib.Path(os.environ["OPO_DATA_DIR"])
  rows = [json.loads(line) for line in (root / "gsm8k/test.jsonl").open()]
  sets = {"gsm8k": [row["answer"].rpartition("#### ")[2] for row in rows]}
  rows = [json.loads(line) for line in (root / "math500/test.jsonl").open()]
  sets["math500"] = [row["answer"] for row in rows]
  print("set       answers   right  unscorable  clock s  CPU s   a CPU second")
  for name, references in sets.items():
    pairs = responses(references, options.group, random.Random(0))
    texts, wanted = zip(*pairs, strict=True)
    # Subtract the start of a worker (importing SymPy), measured by a run of one answer.
    idle = cpu_s()
    with RewardPool(math_reward, workers=options.workers, timeout_s=10.0) as pool:
      pool.score(texts[:1], wanted[:1])
      time.sleep(3.0)
    idle = cpu_s() - idle
    used = cpu_s()
    with RewardPool(math_reward, workers=options.workers, timeout_s=10.0) as pool:
      pool.score(texts[:1], wanted[:1])
      time.sleep(3.0)
      start = time.monotonic()
      scores = pool.score(texts, wanted)
      clock = time.monotonic() - start
    used = cpu_s() - used - idle
    right = sum(score == 1.0 for score in scores) / len(scores)
    lost = sum(score is None for score in scores)
    print(
      f"{name:8} {len(scores):8,} {right:7.0%} {lost:11} {clock:8.2f} {used:6.2f}"
      f" {len(scores) / used:14,.0f}"
    )


if __name__ == "__main__":
  main()
