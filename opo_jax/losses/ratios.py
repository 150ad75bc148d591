"""Log-ratios of two policies: importance ratios and KL estimates."""

import jax
import jax.numpy as jnp

from opo_jax.losses.checks import check_name, check_numbers, trainable

# exp(20) = 5e8. A sampled token with a larger ratio indicates a bug.
_MAX_LOG_RATIO = 20.0


def importance_ratio(
  logprobs: jax.Array, old_logprobs: jax.Array, mask: jax.Array
) -> jax.Array:
  """`pi / pi_old` per token, [N, T] float32; 1 where `mask` is False.

  Bounded to [exp(-20), exp(20)]: beyond, float32 soon overflows to infinity, and a
  finite loss has a NaN gradient.

  >>> import jax.numpy as jnp
  >>> new, old = jnp.log(jnp.array([[0.5, 0.9]])), jnp.log(jnp.array([[0.25, 0.1]]))
  >>> importance_ratio(new, old, jnp.array([[True, False]])).tolist()
  [[2.0, 1.0]]
  """
  return jnp.exp(masked_log_ratio(logprobs, old_logprobs, mask))


def truncated_importance(
  logprobs: jax.Array,
  sampling_logprobs: jax.Array,
  mask: jax.Array,
  *,
  cap: float = 2.0,
) -> jax.Array:
  """Truncated importance sampling: corrects for a sampler other than the learner.

      w = min(pi_learner / pi_sampler, cap)

  Pass it to a loss as `importance_weights`. The ratio of `ppo_clip`, `gspo` and `cispo`
  is relative to `old_logprobs`; if those are the learner's own, call this function with
  (old_logprobs, sampling_logprobs). If `old_logprobs` are the sampler's, the ratio
  already corrects, and weights would correct twice.
  https://fengyao.notion.site/off-policy-rl

  Args:
    logprobs: [N, T] of the learner, constants.
    sampling_logprobs: [N, T] under the distribution that the tokens were sampled from.
    mask: [N, T] bool, trainable tokens.
    cap: the largest weight.

  Returns:
    [N, T] float32 without a gradient; 1 where `mask` is False.

  Raises:
    ValueError: shapes that differ, a cap of 0 or less.

  >>> import jax.numpy as jnp
  >>> learner, sampler = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.0, -3.0]])
  >>> truncated_importance(learner, sampler, jnp.array([[True, True]])).tolist()
  [[1.0, 2.0]]
  """
  check_numbers(cap=cap)
  ratio = jax.lax.stop_gradient(importance_ratio(logprobs, sampling_logprobs, mask))
  return jnp.where(jnp.asarray(mask, bool), jnp.minimum(ratio, cap), 1.0)


def kl(
  logprobs: jax.Array,
  reference_logprobs: jax.Array,
  mask: jax.Array,
  *,
  estimator: str = "k3",
) -> jax.Array:
  """Estimates KL(pi || reference) per token, from tokens that pi sampled.

      k1 = log pi - log ref        k2 = k1^2 / 2        k3 = exp(-k1) - 1 + k1

  The values of k1 and k3 are unbiased. k3 is never negative; its exponent is bounded as
  in `importance_ratio`. http://joschu.net/blog/kl-approx.html

  For a penalty that is differentiated on the policy's own tokens, use `k2`: its
  expected gradient `E[k1 grad log pi]` is that of the KL. The expected gradient of k1
  is zero (`E[grad log pi]`), that of k3 belongs to KL(reference || pi).

  Args:
    logprobs: [N, T] of the policy that sampled.
    reference_logprobs: [N, T].
    mask: [N, T] bool.
    estimator: `k1`, `k2` or `k3`.

  Returns:
    [N, T] float32; 0 where `mask` is False.

  Raises:
    ValueError: an unknown estimator, shapes that differ.

  >>> import jax.numpy as jnp
  >>> new, start = jnp.array([[-1.0, -9.0]]), jnp.array([[-1.5, -1.0]])
  >>> kl(new, start, jnp.array([[True, False]]), estimator="k1").tolist()
  [[0.5, 0.0]]
  """
  check_name("KL estimator", estimator, ("k1", "k2", "k3"))
  mask = trainable(mask, logprobs=logprobs, reference_logprobs=reference_logprobs)
  k1 = jnp.asarray(logprobs, jnp.float32) - jnp.asarray(reference_logprobs, jnp.float32)
  k1 = jnp.where(mask, k1, 0.0)
  if estimator == "k1":
    return k1
  if estimator == "k2":
    return 0.5 * k1**2
  k1 = jnp.maximum(k1, -_MAX_LOG_RATIO)
  return jnp.expm1(-k1) + k1


def masked_log_ratio(logprobs, old_logprobs, mask):
  """[N, T] float32, 0 where `mask` is False, with a gradient for `logprobs` only."""
  mask = trainable(mask, logprobs=logprobs, old_logprobs=old_logprobs)
  difference = jnp.asarray(logprobs, jnp.float32) - jax.lax.stop_gradient(
    jnp.asarray(old_logprobs, jnp.float32)
  )
  difference = jnp.where(mask, difference, 0.0)
  return jnp.clip(difference, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
