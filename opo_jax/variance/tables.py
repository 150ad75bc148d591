"""Prints what `measure` found."""

from typing import Any

from rich.console import Console
from rich.table import Table


def show(rows: list[dict[str, Any]]) -> None:
  """Prints, for each policy, a table of estimators and the fits of the norms."""
  console = Console(highlight=False, soft_wrap=True)
  for row in rows:
    console.print(table(row))
    for name, fits in row["fits"].items():
      if fits["within"]:
        line = (
          "|s|^2 ~ {name}^{slope:.2f} [{slope_low:.2f}, {slope_high:.2f}] within a"
          " prompt, R^2 {r2:.3f}"
        )
        console.print(line.format(name=name, **fits["within"]), markup=False)


def table(row: dict[str, Any]) -> Table:
  """The table of one policy: an estimator per row, intervals for the largest K."""
  *sizes, last = row["ratios"]
  result = Table(
    title=f"step {row['step']}, reward {row['reward/mean']:.3f}: error |g - J|^2 by K"
    " and noise tr Cov(g)/|E g|^2, of rloo = 1",
    title_justify="left",
  )
  result.add_column("", no_wrap=True)
  for name in (*sizes, last, f"noise at {last}"):
    result.add_column(name, justify="right", no_wrap=True)
  for name, at_last in row["ratios"][last].items():
    result.add_row(
      name,
      *(_cell(row["ratios"][K][name].get("error"), interval=False) for K in sizes),
      _cell(at_last.get("error")),
      _cell(at_last.get("noise")),
    )
  for K, measured in row["tokens"].items():
    error = _cell(measured["optimal_token"].get("error"))
    result.add_row("optimal_token", *(error if k == K else "" for k in (*sizes, last)))
  return result


def _cell(ratio, interval=True):
  if not ratio:
    return ""
  return "{:.3g} [{:.3g}, {:.3g}]".format(*ratio) if interval else f"{ratio[0]:.3g}"
