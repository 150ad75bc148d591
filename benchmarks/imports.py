"""What importing the algorithm costs beside importing JAX, in ms.

    python benchmarks/imports.py [--repeats 5]

Each figure is from one process of its own (`python -X importtime`): the time of the
room with all it imports, and of that what `import jax` and `import jax.numpy` took. The
least of several, as a busy machine only ever adds. The promise is: JAX plus 200 ms. It
exits with 1 where that is broken.
"""

import argparse
import re
import subprocess
import sys

PROMISE = 200.0
ROOMS = ("opo_jax.advantages", "opo_jax.losses", "opo_jax.logprobs")


def milliseconds(module):
  """(the import of the module with all it imports, that of JAX)."""
  command = [sys.executable, "-X", "importtime", "-c", f"import jax, {module}"]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  # import time: self [us] | cumulative | imported package, nested ones first, indented.
  lines = re.findall(r"^import time:\s*\d+ \|\s*(\d+) \|( +)(\S+)$", done.stderr, re.M)
  outer = {name: int(time) / 1e3 for time, indent, name in lines if len(indent) == 1}
  room = sum(time for name, time in outer.items() if name.startswith("opo_jax"))
  return room + outer["jax"], outer["jax"]


def main(repeats: int) -> int:
  extras = []
  print("room                  import jax    and the room    on top of jax")
  for module in ROOMS:
    runs = [milliseconds(module) for _ in range(repeats)]
    both, jax = (min(column) for column in zip(*runs, strict=True))
    extras.append(min(both - jax for both, jax in runs))
    print(f"{module:20} {jax:8.0f} ms {both:12.0f} ms {extras[-1]:13.1f} ms")
  return int(max(extras) > PROMISE)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=5)
  sys.exit(main(parser.parse_args().repeats))
