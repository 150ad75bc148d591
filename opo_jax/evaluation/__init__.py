"""Evaluation: responses -> pass@k, maj@k and text statistics, with intervals."""

from opo_jax.evaluation.statistics import *  # noqa: F403
