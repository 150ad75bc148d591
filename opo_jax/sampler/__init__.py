"""Sampler: prompts in, `Rollouts` out.

params      how to sample: temperature, filters, lengths, what ends a response
engine      the host side: `JaxSampler`, `generate`
schedule    sizes of ring, slots and prompts, and when they change
prefill     compiled, once a batch: weights, keys and values of the prompts
decoding    compiled: the loop that samples, token by token
tokens      logits -> a token and its two log-probs
state       the pytrees that compiled programs exchange
lowering    the compiled programs from shapes alone
"""

from opo_jax.sampler.engine import JaxSampler, compiled_programs, generate
from opo_jax.sampler.params import SamplingParams
from opo_jax.sampler.schedule import bucket, count_bucket
from opo_jax.sampler.state import Ended

__all__ = [
  "Ended",
  "JaxSampler",
  "SamplingParams",
  "bucket",
  "compiled_programs",
  "count_bucket",
  "generate",
]
