"""The terminal output of a run: a progress bar, and lines on steps and evaluations."""

import contextlib
import sys
from typing import Any

from rich.console import Console
from rich.progress import (
  BarColumn,
  MofNCompleteColumn,
  Progress,
  TextColumn,
  TimeElapsedColumn,
  TimeRemainingColumn,
)


class Terminal:
  """Prints lines, and shows a progress bar with the remaining time.

  Args:
    quiet: print nothing.
  """

  def __init__(self, *, quiet: bool = False):
    self.console = Console(highlight=False, soft_wrap=True, quiet=quiet)

  def say(self, text: str) -> None:
    self.console.print(text, markup=False)

  @contextlib.contextmanager
  def progress(self, title: str, *, done: int, total: int):
    """Shows a progress bar; yields a function that advances it by one."""
    columns = (
      TextColumn("{task.description}"),
      BarColumn(),
      MofNCompleteColumn(),
      TimeElapsedColumn(),
      TextColumn("left"),
      TimeRemainingColumn(),
    )
    # In a log file the bar would leave only its last state.
    bar = Progress(*columns, console=self.console, disable=not sys.stdout.isatty())
    with bar:
      task = bar.add_task(title, total=total, completed=done)
      yield lambda: bar.advance(task)


def step_line(row: dict[str, Any]) -> str:
  """Formats the metrics of a step that are worth watching as one line."""
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


def evaluation_line(row: dict[str, Any]) -> str:
  """Formats the held-out scores with their intervals as one line."""
  shown = ("/pass@", "_score", "_win_rate")
  return "  ".join(
    f"{name.split('/', 1)[1]} {value:.3f}"
    f" [{row[name + '_low']:.3f}, {row[name + '_high']:.3f}]"
    for name, value in row.items()
    if any(part in name for part in shown) and not name.endswith(("_low", "_high"))
  )
