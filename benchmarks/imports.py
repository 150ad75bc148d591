"""How long importing the algorithm takes beyond importing JAX, in ms.

    python benchmarks/imports.py [--repeats 5]

Each figure comes from a process of its own (`python -X importtime`): the cumulative
time of the module, and the part of it that `import jax` and `import jax.numpy` took.
The minimum of several runs counts, since a busy machine only adds time. The limit
is JAX plus 200 ms; the script exits with 1 above it.
"""

import argparse
import re
import subprocess
import sys

LIMIT_MS = 200.0
MODULES = ("opo_jax.advantages", "opo_jax.losses", "opo_jax.logprobs")


def milliseconds(module):
  """(the import of the module with all it imports, that of JAX)."""
  command = [sys.executable, "-X", "importtime", "-c", f"import jax, {module}"]
  done = subprocess.run(command, capture_output=True, text=True, check=True)
  # import time: self [us] | cumulative | imported package, nested ones first, indented.
  lines = re.findall(r"^import time:\s*\d+ \|\s*(\d+) \|( +)(\S+)$", done.stderr, re.M)
  outer = {name: int(time) / 1e3 for time, indent, name in lines if len(indent) == 1}
  own = sum(time for name, time in outer.items() if name.startswith("opo_jax"))
  return own + outer["jax"], outer["jax"]


def main(repeats: int) -> int:
  extras = []
  print("module                import jax    with the module    beyond jax")
  for module in MODULES:
    runs = [milliseconds(module) for _ in range(repeats)]
    both, jax = (min(column) for column in zip(*runs, strict=True))
    extras.append(min(both - jax for both, jax in runs))
    print(f"{module:20} {jax:8.0f} ms {both:15.0f} ms {extras[-1]:10.1f} ms")
  return int(max(extras) > LIMIT_MS)


if __name__ == "__main__":
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--repeats", type=int, default=5)
  sys.exit(main(parser.parse_args().repeats))
