"""`data`: training problems that occur in evaluation sets, as a report."""

from collections.abc import Sequence

from opo_jax.data import decontaminate, sources


def compare_data(train: Sequence[str], held_out: Sequence[str]) -> str:
  """A report of the training problems that are in evaluation sets, exactly or nearly.

  Args:
    train: names of sources with a training split.
    held_out: names of sources with a test split.
  """
  found, sizes = {}, {}
  for name in train:
    problems = list(sources.load(name, "train"))
    for apart in held_out:
      pair = f"{name} in {apart}"
      found[pair] = decontaminate.find_duplicates(problems, sources.load(apart, "test"))
      sizes[pair] = len(problems)
  return decontaminate.report(found, sizes)
