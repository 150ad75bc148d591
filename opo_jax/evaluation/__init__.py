"""Evaluation: responses -> pass@k, maj@k and text statistics, with intervals."""

from opo_jax.evaluation.statistics import (
  Response,
  bootstrap_interval,
  by_problem,
  collect,
  majority_at_k,
  markdown,
  means,
  of_texts,
  pass_at_k,
  pass_rates,
  per_problem,
  read_responses,
  summarise,
  table,
)

__all__ = [
  "Response",
  "bootstrap_interval",
  "by_problem",
  "collect",
  "majority_at_k",
  "markdown",
  "means",
  "of_texts",
  "pass_at_k",
  "pass_rates",
  "per_problem",
  "read_responses",
  "summarise",
  "table",
]
