"""Evaluation: responses -> pass@k, maj@k and text statistics, with intervals."""

from opo_jax.evaluation.estimators import bootstrap_interval, majority_at_k, pass_at_k
from opo_jax.evaluation.responses import Response, by_problem, collect, read_responses
from opo_jax.evaluation.summary import (
  KS,
  mean_over_problems,
  pass_rates,
  per_problem,
  response_statistics,
  summarise,
)
from opo_jax.evaluation.tables import Column, columns, markdown, table

__all__ = [
  "KS",
  "Column",
  "Response",
  "bootstrap_interval",
  "by_problem",
  "collect",
  "columns",
  "majority_at_k",
  "markdown",
  "mean_over_problems",
  "pass_at_k",
  "pass_rates",
  "per_problem",
  "read_responses",
  "response_statistics",
  "summarise",
  "table",
]
