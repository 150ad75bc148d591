"""Schedule: the sizes that programs are compiled for, and when they change.

Every new size is another program, so sizes come from short ladders: the columns of the
ring double and halve, slots shrink to a quarter, prompts are padded to buckets. These
are plain functions of plain numbers: the jitted loop asks them when to stop, the host
which size comes next, and `planning` simulates both.
"""

# The shortest ring of columns, and the fewest slots of a shard after shrinking.
MIN_WIDTH, MIN_SLOTS = 64, 16


def ring(longest, max_new_tokens: int) -> int:
  """Columns of the ring while no response is longer than `longest`.

  >>> ring(0, 4096), ring(64, 4096), ring(64, 100)
  (64, 128, 100)
  """
  width = MIN_WIDTH
  while width <= longest:
    width *= 2
  return min(width, max_new_tokens)


def too_wide(longest, width: int):
  """Whether the ring should shrink: the longest response fills less than a quarter."""
  return (4 * longest < width) & (width > MIN_WIDTH)


def mostly_idle(busy, num_slots: int, max_new_tokens: int):
  """Whether a shard should keep its busy slots only; asked once its queue is empty.

  Args:
    busy: slots with a response in progress.
    num_slots: of the shard.
    max_new_tokens: T.
  """
  # Short responses end before another program has been compiled for the few slots.
  worth_it = max_new_tokens >= 4 * MIN_WIDTH and num_slots > MIN_SLOTS
  return worth_it & (busy <= fewer_slots(num_slots))


def fewer_slots(num_slots: int) -> int:
  """The next smaller number of slots of a shard."""
  return max(MIN_SLOTS, num_slots // 4)


def bucket(length: int) -> int:
  """The width that prompts are padded to: the next of 16, 24, 32, 48, 64, 96, …

  Few widths mean few compiled programs; padding takes a third of the columns at most.
  """
  size = 16
  while size < length:
    size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
  return size


def count_bucket(count: int) -> int:
  """The number of prompts that a shard prefills: the next of 1 … 16, 18, 20 … 32, 36 …

  Padding is prefilled and never sampled from; it is an eighth of the prompts at most.
  """
  step = 1 << max((count - 1).bit_length() - 4, 0)
  return -(-count // step) * step
