"""Measures the variance of each estimator's policy gradient, on a frozen policy.

For a prompt x, M responses y_i are sampled and rewarded. The score of a response is the
gradient of its log-probability, summed over its tokens:

    s_i = grad log pi(y_i | x)

An estimator turns a group of K of them into advantages and a gradient,

    g = 1/K sum_i A_i s_i                          (of one prompt; a batch averages)

and its quality is its distance to the true gradient J = E[r s]:

    variance   tr Cov(g)  = E|g|^2 - |E g|^2      removed by averaging more groups
    error      E|g - J|^2 = variance + bias^2
    noise      tr Cov(g) / |E g|^2                invariant to scale, not to direction

**Gram matrices suffice.** Every term is an inner product of two sums of scores, a
function of `Q = S S^T` [M, M] of the prompt. M gradients are computed once; any number
of groups, group sizes and estimators is then evaluated exactly, without a projection.
Gradients are large and Q is small; see `gram_matrices` for the memory.

**Unbiased from M responses.** A shuffle cuts them into J = M // K disjoint groups:
independent draws of g. With `<.,.>` over pairs j != j', and h the group's `rloo`
gradient, which is unbiased and, averaged over shuffles, that of all M responses,

    |E g|^2    mean <g_j, g_j'>                   E|g|^2      mean |g_j|^2
    |J|^2      mean <h_j, h_j'>                   E g . J     mean <g_j, h_j'>

so that no noisy vector is multiplied by itself, and the large-sample gradient needs no
noise correction. Results are averaged over shuffles; intervals are a bootstrap over
prompts, and ratios are paired: both sides see the same responses.

**What can be compared.** `mean` is `(K-1)/K` times the unbiased `rloo`, and `opo` is
`(1 - l_i / sum l)` times `opo_loo`: a row's own reward in its baseline shrinks the
gradient, and its variance by a factor of four at K = 2, without less noise. Compare the
leave-one-out forms with each other (they are unbiased: variance is error), or the raw
forms by their noise, which is invariant to scale but not to direction: with the row
itself in the baseline, E g may turn away from J. `grpo`, `maxrl` and `reinforce_pp`
divide by a statistic of the rewards. Only their noise is comparable to the others', and
even there they weight prompts differently, which is another objective, not a better
estimate.

**Rows.** Every one of `advantages.ESTIMATORS`, and `r - sum w r / sum w` with weights

    opo_fitted      l^(2 alpha), alpha fitted here: half the slope of log |s|^2 on log l
    energy          sum_t |onehot(y_t) - pi_t|^2
    exact           |s|^2, measured: the oracle, the baseline of least variance
    *_loo           the same without the row itself
    exact_outside   `exact` from the M - K responses outside of the group
    exact_all       `exact` from all M: a lower bound for all baselines of one number
                    per prompt, slightly too low, as it includes the evaluated rows
    optimal_token   a baseline for every position (measured for one K, see below)
    zero            no gradient at all: the error of making no step

A group of K estimates its baseline from K - 1 others, so `exact_loo` can lose to `rloo`
at small K: better weights, fewer effective samples. At K = 2 the only other response is
the baseline, whatever its weight, and all leave-one-out forms are equal. Where a few
responses hold most of `|s|^2`, weights that include the row itself make such a response
its own baseline: variance falls with the signal, and `zero` shows how far.

**Tokens.** The advantages of `optimal_token` differ within a row, so scores do not
suffice. The gradient of each row's `sum_t A_t log pi_t` is computed, for one shuffle
and one K, and its Gram matrix with the scores gives the same three measures.

**Not measured.** Training's `token_mean` divides by the tokens of the batch, here by K:
a common constant, except for its small fluctuation. The covariance between prompts is
exactly zero for group baselines, and neglected for `opo_batch` and `reinforce_pp`,
whose baseline all prompts of a batch share (order 1/K G^2 of G prompts). Differences
between prompts add the same variance to every estimator that preserves J; no advantage
can remove it. Unscorable rows have advantage 0, as in training.

Shape letters here: G prompts, M responses of each, K responses of a group, J groups of
a prompt, X estimators, T tokens of a response.
"""

from opo_jax.variance.estimates import moments, token_moments
from opo_jax.variance.estimators import ESTIMATORS, ROWS, WEIGHTS
from opo_jax.variance.gram import gram_matrices, row_gradients
from opo_jax.variance.measurement import Settings, measure
from opo_jax.variance.statistics import BASES, fit, ratios
from opo_jax.variance.tables import show, table

__all__ = [
  "BASES",
  "ESTIMATORS",
  "ROWS",
  "WEIGHTS",
  "Settings",
  "fit",
  "gram_matrices",
  "measure",
  "moments",
  "ratios",
  "row_gradients",
  "show",
  "table",
  "token_moments",
]
