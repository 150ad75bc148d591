"""Measures every family and writes the table in docs/models.md: `make parity-table`."""

import pathlib
import platform

import compare
import jax
import reference
import torch
import transformers

DOC = pathlib.Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- parity table: make parity-table -->\n", "<!-- end -->\n"
COLUMNS = (*compare.LAYOUTS, "logprobs", "gradient")


def main():
  lines = [
    "| family | dtype | right-padded | left-padded | packed | KV cache | log-probs"
    " | gradients |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for name in reference.CASES:
    measured = compare.measure(name)
    for dtype, shown in (("float32", "{:.0e}"), ("bfloat16", "{:.2f} x")):
      cells = [shown.format(measured[dtype][column]) for column in COLUMNS]
      lines.append(f"| {' | '.join([name, dtype, *cells])} |")
      print(lines[-1], flush=True)
  versions = (
    f"transformers {transformers.__version__}, torch {torch.__version__}, jax"
    f" {jax.__version__}, Python {platform.python_version()}, CPU."
  )
  head, rest = DOC.read_text().split(BEGIN)
  _, tail = rest.split(END)
  table = "\n".join([*lines, "", versions, ""])
  DOC.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}")


if __name__ == "__main__":
  main()
