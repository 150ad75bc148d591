"""Simulate the sampler's schedule on the host: what decoding a shard's batch costs.

The sampler decodes one token in every slot at a time. Each token attends to the whole
ring of columns, which is as wide as the longest response in any slot needs: the ring
doubles and halves, and slots become fewer as responses end. The rules are the sampler's
own functions, called here on a shard's lengths.
"""

import numpy as np

from opo_jax.sampler import schedule


def assumed_lengths(mean: float, longest: int, count: int) -> np.ndarray:
  """Response lengths that a plan assumes: `T u^(T / mean - 1)`, u evenly from 0 to 1.

  All lengths up to T are equally frequent where the mean is T / 2. One response has
  length T; their order is random, the same in every call.

  Args:
    mean: of a response, tokens.
    longest: T.
    count: of responses.

  >>> sorted(assumed_lengths(4, 8, 4).tolist())
  [1, 3, 5, 8]
  """
  uniform = (np.arange(count) + 0.5) / count
  exponent = max(longest / mean - 1, 0.0)
  lengths = np.maximum(longest * uniform**exponent, 1).astype(int)
  lengths[-1] = longest
  return np.random.default_rng(0).permutation(lengths)


def simulate_decoding(
  lengths: np.ndarray, slots: int, longest: int
) -> tuple[int, float]:
  """What a shard's decoding costs.

  Args:
    lengths: [n] of its responses, in the order of the queue.
    slots: of the shard, at the start.
    longest: T.

  Returns:
    Tokens that are decoded one after the other, and the mean share of the largest ring,
    `slots` x T columns, that one of them attends to.

  Four responses of 256 tokens in four slots. The ring grows with them:

      tokens      1…64   65…128   129…256
      columns       64      128       256      (64 * 64 + 64 * 128 + 128 * 256) / 256²

  >>> simulate_decoding(np.full(4, 256), slots=4, longest=256)
  (256, 0.6875)
  """
  # left[s]: tokens that slot s has still to decode; grown[s]: tokens of its response.
  left, queue = np.array(lengths[:slots]), list(lengths[slots:])
  num_slots = max_slots = len(left)
  grown, width = np.zeros_like(left), schedule.ring(0, longest)
  tokens = columns = 0
  while (left > 0).any():
    busy = left > 0
    # Nothing changes until a response ends or the ring is full.
    steps = left[busy].min()
    if width < longest:
      steps = min(steps, width - grown.max())
    tokens, columns = tokens + steps, columns + steps * num_slots * width
    left, grown = left - steps * busy, grown + steps * busy
    for slot in np.flatnonzero(busy & (left == 0)):  # ended: refill
      grown[slot] = 0
      left[slot] = queue.pop(0) if queue else 0
    width = _resized_ring(width, grown.max(), longest)
    while not queue and schedule.mostly_idle((left > 0).sum(), num_slots, longest):
      num_slots = schedule.fewer_slots(num_slots)
      busy_first = np.argsort(left == 0, kind="stable")[:num_slots]
      left, grown = left[busy_first], grown[busy_first]
  return int(tokens), float(columns / (tokens * max_slots * longest))


def _resized_ring(width: int, grown: int, longest: int) -> int:
  """Columns of the ring once its longest response has `grown` tokens."""
  if grown >= width:
    width = schedule.ring(grown, longest)
  while schedule.too_wide(grown, width):
    width = schedule.ring((width - 1) // 2, longest)
  return width
