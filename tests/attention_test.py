"""Every attention backend computes the same, and runs where it says it does.

Kernels are simulated here: splash attention by Pallas' interpreter, the arguments made
for cuDNN by plain XLA. Beyond that, splash attention is compiled for TPUs that are not
there (`make test-plan`, which installs libtpu), and cuDNN's calls are lowered.
"""

import functools
import importlib.util
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from opo_jax import build, models, sampler
from opo_jax import learner as trainer
from opo_jax.config import Config, Model
from opo_jax.devices import sharding
from opo_jax.models import attention as attention_module
from opo_jax.models import flash
from opo_jax.models.attention import Keys, attention, choose_backend
from opo_jax.models.transformer import Policy

KERNELS = sorted(flash.KERNELS)
# Padding before, between and after segments of uneven length; none in the second row.
SEGMENTS = np.stack(
  [
    np.repeat([0, 3, 0, 1, 0], [9, 101, 5, 80, 6]),
    np.repeat([2, 1, 5], [1, 150, 50]),
  ]
)
CASES = {
  "causal": dict(),
  "window": dict(window=40),
  "segments": dict(segment_ids=SEGMENTS),
  "segments, window": dict(segment_ids=SEGMENTS, window=40),
}


def random_inputs(B=2, T=201, H=6, K=2, E=16, dtype=jnp.float32, seed=0):
  """Queries, keys, values, and a weight for every number that comes out."""
  random = np.random.default_rng(seed)
  shapes = (B, T, H, E), (B, K, T, E), (B, K, T, E)
  query, key, value = (
    jnp.asarray(2 * random.normal(size=shape), dtype) for shape in shapes
  )
  return query, key, value, jnp.asarray(random.normal(size=shapes[0]), jnp.float32)


@functools.partial(jax.jit, static_argnames=("window", "backend", "mesh"))
def outputs_and_gradients(
  query, key, value, weight, segment_ids=None, *, window=None, backend, mesh=None
):
  """What comes out, zero at padding, and the gradients of its weighted sum."""
  B, T, *_ = query.shape
  real = True if segment_ids is None else (segment_ids > 0)[..., None, None]

  def weighted_sum(query, key, value):
    out = attention(
      query,
      [Keys(key, value)],
      positions=jnp.broadcast_to(jnp.arange(T), (B, T)),
      segment_ids=segment_ids,
      window=window,
      backend=backend,
      mesh=mesh,
    )
    return jnp.where(real, weight * out, 0.0).sum(), jnp.where(real, out, 0.0)

  gradients, out = jax.grad(weighted_sum, (0, 1, 2), has_aux=True)(query, key, value)
  return out, *gradients


def assert_close(actual, expected, atol):
  for ours, theirs in zip(actual, expected, strict=True):
    ours, theirs = np.asarray(ours, np.float32), np.asarray(theirs, np.float32)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


# --- the einsum, which is the reference ----------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_query_sees_its_segment_up_to_itself_and_back_to_the_window(case):
  """One query, one head at a time, in float64."""
  segment_ids = CASES[case].get("segment_ids", np.ones((2, 201), int))
  window = CASES[case].get("window", 1000)
  query, key, value, weight = random_inputs()
  out, *_ = outputs_and_gradients(
    query, key, value, weight, **CASES[case], backend="einsum"
  )
  real = [(0, 9), (0, 60), (0, 115), (0, 190), (1, 0), (1, 1), (1, 199)]
  for b, t in real:
    before = np.arange(max(0, t - window + 1), t + 1)
    seen = before[segment_ids[b, before] == segment_ids[b, t]]
    for h in (0, 2, 3):
      scores = np.asarray(key[b, h // 3, seen], float) @ query[b, t, h] / 4
      weights = np.exp(scores - scores.max())
      expected = weights / weights.sum() @ value[b, h // 3, seen]
      np.testing.assert_allclose(out[b, t, h], expected, rtol=0, atol=1e-5)


def test_queries_in_blocks_equal_queries_at_once(monkeypatch):
  """Four blocks for 201 queries, the last one padded; a cache beside their own keys."""
  query, key, value, weight = random_inputs()
  cached = random_inputs(B=1, T=7, seed=1)[1:3]
  mask = np.arange(7) > np.arange(201)[:, None] % 7  # one row for every query
  positions = 7 + np.broadcast_to(np.arange(201), (2, 201))

  @jax.jit
  def gradients(query, key, value, cached_key, cached_value):
    parts = [
      Keys(cached_key, cached_value, mask[None], positions=np.arange(7)[None]),
      Keys(
        cached_key, cached_value, np.ones((1, 1, 7), bool), None, np.arange(7)[None]
      ),
      Keys(key, value),
    ]

    def weighted_sum(*operands):
      out = attention(
        operands[0],
        [*parts[:2], Keys(*operands[1:])],
        positions=positions,
        segment_ids=SEGMENTS,
        window=60,
      )
      return (weight * out).sum(), out

    return jax.grad(weighted_sum, (0, 1, 2), has_aux=True)(query, key, value)

  expected, out = gradients(query, key, value, *cached)
  monkeypatch.setattr(attention_module, "_BLOCK", 64)
  jax.clear_caches()
  actual, out_of_blocks = gradients(query, key, value, *cached)
  assert_close([out_of_blocks, *actual], [out, *expected], atol=1e-5)


def test_scores_of_long_sequences_are_never_held_at_once():
  T, H = 2048, 4
  operands = random_inputs(B=1, T=T, H=H)
  program = outputs_and_gradients.lower(*operands, backend="einsum").compile()
  # 64 MiB of float32 scores, and as much again for their gradient and the probs.
  assert program.memory_analysis().temp_size_in_bytes < 4 * H * T**2


# --- kernels -------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_equals_the_einsum(kernel, case):
  operands, options = random_inputs(), dict(CASES[case])
  segment_ids = options.pop("segment_ids", None)
  expected = outputs_and_gradients(*operands, segment_ids, backend="einsum", **options)
  actual = outputs_and_gradients(*operands, segment_ids, backend=kernel, **options)
  # Float32 sums in another order. A window one wider is off by more than 0.1.
  assert_close(actual, expected, atol=3e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_in_bfloat16_is_as_exact_as_the_einsum(kernel):
  operands = random_inputs(dtype=jnp.bfloat16)
  wide = [operand.astype(jnp.float32) for operand in operands]
  exact = outputs_and_gradients(*wide, SEGMENTS, backend="einsum")

  def errors(backend):
    outputs = outputs_and_gradients(*operands, SEGMENTS, backend=backend)
    assert all(array.dtype == jnp.bfloat16 for array in outputs[1:])
    return [
      np.sqrt(np.mean((np.asarray(x, np.float32) - y) ** 2))
      for x, y in zip(outputs, exact, strict=True)
    ]

  ratios = np.array(errors(kernel)) / np.array(errors("einsum"))
  # Root mean squares over thousands of numbers. Splash attention's outputs are nearer
  # to float32 (it keeps its probs there), its gradients are not: they start from the
  # rounded output.
  assert ratios[0] < 1.1 and (ratios < 1.8).all()


@pytest.mark.parametrize(
  ("length", "window"), [(1100, None), (4200, None), (1100, 130)]
)
def test_splash_attention_over_several_blocks_equals_the_einsum(length, window):
  """2 blocks and the fused backward kernel; 5 blocks and one for queries alone."""
  assert flash.blocks(length, 2).fused == (length == 1100)
  operands = random_inputs(B=1, T=length, H=2, K=1, E=8, dtype=jnp.bfloat16)
  ids = np.repeat([[0, 1, 2]], [3, 500, length - 503], axis=1)
  actual = outputs_and_gradients(*operands, ids, window=window, backend="splash")
  wide = [operand.astype(jnp.float32) for operand in operands]
  expected = outputs_and_gradients(*wide, ids, window=window, backend="einsum")
  for ours, theirs in zip(actual, expected, strict=True):
    error = np.linalg.norm(np.asarray(ours, np.float32) - theirs)
    assert error < 0.01 * np.linalg.norm(theirs)  # bfloat16 holds 2^-8


@pytest.mark.parametrize("kernel", ["einsum", *KERNELS])
def test_padding_is_finite_and_adds_nothing(kernel):
  query, key, value, weight = random_inputs()
  padding = SEGMENTS == 0
  other = [
    jnp.where(padding[:, :, None, None], 30.0, query),
    *(jnp.where(padding[:, None, :, None], -30.0, x) for x in (key, value)),
  ]
  forward = jax.jit(
    lambda query, *keys: attention(
      query, [Keys(*keys)], segment_ids=SEGMENTS, backend=kernel
    )
  )
  assert np.isfinite(forward(*other)).all()
  expected = outputs_and_gradients(query, key, value, weight, SEGMENTS, backend=kernel)
  actual = outputs_and_gradients(*other, weight, SEGMENTS, backend=kernel)
  # The same program, the same numbers where they count.
  assert_close(actual, expected, atol=0)
  _, query_grad, key_grad, value_grad = actual
  assert (query_grad[padding] == 0).all()
  assert all((x.swapaxes(1, 2)[padding] == 0).all() for x in (key_grad, value_grad))


@pytest.mark.parametrize(
  ("kernel", "num_heads", "sizes"),
  [
    ("splash", 8, (2, 1, 4)),  # 4 devices share 2 key-value heads
    ("splash", 6, (1, 4, 2)),  # 2 rows do not divide over 4 devices
    ("splash", 6, (1, 2, 4)),  # nor do 6 heads
    ("cudnn", 8, (2, 1, 4)),
  ],
)
def test_kernel_on_eight_devices_equals_one(kernel, num_heads, sizes):
  operands = random_inputs(H=num_heads, K=2)
  mesh = sharding.make_mesh(*sizes)
  placed = [jax.device_put(x, sharding.named(mesh)) for x in operands]
  run = functools.partial(outputs_and_gradients, window=40, backend=kernel)
  assert_close(run(*placed, SEGMENTS, mesh=mesh), run(*operands, SEGMENTS), atol=1e-5)


def test_devices_run_a_kernel_on_their_own_rows_and_heads_alone():
  mesh = sharding.make_mesh(1, 4, 2)
  query, key, value, _ = random_inputs(B=4)
  program = jax.make_jaxpr(functools.partial(attention, backend="splash", mesh=mesh))
  jaxpr = program(query, [Keys(key, value)])
  (mapped,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "shard_map"]
  shapes = [var.aval.shape for var in mapped.params["jaxpr"].invars]
  shapes = [shape for shape in shapes if len(shape) == 4]
  assert shapes == [(1, 201, 3, 16), (1, 1, 201, 16), (1, 1, 201, 16)]


def test_long_rows_that_attend_to_a_cache_as_well_take_the_einsum():
  query, key, value, _ = random_inputs()
  own, mask = Keys(key, value), np.ones((2, 1, 201), bool)

  def runs_a_kernel(*parts):
    program = functools.partial(attention, parts=parts, backend="splash")
    return "pallas_call" in str(jax.make_jaxpr(program)(query))

  assert runs_a_kernel(own)
  assert not runs_a_kernel(Keys(key, value, mask), own)
  assert not runs_a_kernel(Keys(key, value, mask))


def test_float32_is_multiplied_as_such_in_the_backward_kernels_too():
  operands = random_inputs()[:3]

  def precisions(jaxpr):
    for eqn in jaxpr.eqns:
      if eqn.primitive.name == "dot_general":
        yield eqn.params["precision"]
      for inner in jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
      ):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          yield from precisions(inner)

  def products(dtype):
    def total(*operands):
      return flash.splash(*operands, None, window=None, simulate=True).sum()

    operands_ = [operand.astype(dtype) for operand in operands]
    found = list(
      precisions(jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(*operands_).jaxpr)
    )
    assert len(found) >= 7  # two forward, five backward
    return found

  highest = (jax.lax.Precision.HIGHEST,) * 2
  assert set(products(jnp.float32)) == {highest}
  assert highest not in products(jnp.bfloat16)


def test_blocks_are_whole_lanes_and_waste_less_than_one_block_of_them_each():
  for length in [1, 127, 128, 129, 511, 513, 1024, 1025, 1664, 4097, 8192, 32768]:
    for itemsize, largest in [(2, 1024), (4, 512)]:
      blocks = flash.blocks(length, itemsize)
      count = blocks.length // blocks.size
      assert blocks.size % 128 == 0 and blocks.size <= largest
      assert blocks.length == count * blocks.size
      assert length <= blocks.length < length + 128 * count
      assert blocks.fused == (count <= 4)


# --- policies ------------------------------------------------------------------------


def tiny_policy(**changes):
  sizes = dict(
    vocab_size=61,
    width=16,
    mlp_width=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    initializer_range=0.3,
  )
  policy = Policy(models.ModelConfig(**(sizes | changes)), jax.random.key(0))
  assert policy.attention == "einsum"  # what `auto` is on a CPU
  return policy


def with_backend(policy, backend):
  policy = jax.tree.map(lambda leaf: leaf, policy)
  policy.attention = backend
  return policy


@functools.partial(jax.jit, static_argnames="remat")
def logits_and_gradients(policy, tokens, segment_ids, remat="none"):
  def loss(policy):
    hidden, _ = policy.hidden(
      tokens,
      jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
      segment_ids,
      remat=remat,
    )
    logits = jnp.where((segment_ids > 0)[..., None], policy.project(hidden), 0.0)
    return jax.nn.logsumexp(logits, axis=-1).mean(), logits

  gradients, logits = jax.grad(loss, has_aux=True)(policy)
  return [logits, *jax.tree.leaves(gradients)]


@pytest.mark.parametrize("sliding", [(), (0, 2), (0, 1, 2)], ids=str)
def test_policy_is_the_same_whatever_its_attention_runs_on(sliding):
  """Layers with and without a window are one program, also where it is a kernel's."""
  policy = tiny_policy(sliding_window=30 if sliding else None, sliding_layers=sliding)
  tokens = np.random.default_rng(1).integers(0, 61, SEGMENTS.shape)
  expected = logits_and_gradients(policy, tokens, SEGMENTS)
  for backend in KERNELS:
    other = with_backend(policy, backend)
    remat = "block" if sliding == (0, 2) else "none"
    actual = logits_and_gradients(other, tokens, SEGMENTS, remat=remat)
    # Float32, three layers; logits of order 10.
    assert_close(actual, expected, atol=1e-4)


def test_no_mask_of_all_columns_is_built_for_a_kernel_that_takes_segments():
  T = 201  # a kernel's own tiles are of 256
  tokens, ids = np.zeros((2, T), int), np.ones((2, T), int)

  def squares(backend):
    policy = with_backend(tiny_policy(), backend)
    program = jax.make_jaxpr(Policy.hidden)(policy, tokens, tokens, ids)
    return f"{T},{T}" in str(program)

  assert squares("einsum") and not squares("splash")


def test_sampler_records_the_logprobs_of_a_learner_with_a_kernel():
  """Prompts are prefilled by the kernel, responses decoded by the einsum."""
  policy = with_backend(tiny_policy(sliding_window=50, sliding_layers=(1,)), "splash")
  random = np.random.default_rng(2)
  prompts = [random.integers(0, 61, n).tolist() for n in (140, 170)]
  rollouts = sampler.generate(policy, prompts, samples_per_prompt=2, max_new_tokens=5)
  learner = trainer.response_logprobs(policy, rollouts)
  assert_close([rollouts.logprobs], [learner], atol=3e-5)


# --- which backend -------------------------------------------------------------------


def test_auto_takes_the_kernel_of_the_platform_where_it_can():
  def auto(platform, dtype="bfloat16", head_dim=64):
    return choose_backend("auto", platform=platform, dtype=dtype, head_dim=head_dim)

  assert auto("cpu") == auto("cpu", "float32") == "einsum"
  assert auto("tpu") == auto("tpu", "float32", 80) == "splash"
  assert auto("gpu") == "cudnn"
  assert auto("gpu", "float32") == auto("gpu", head_dim=20) == "einsum"
  assert auto("gpu", head_dim=256) == "einsum"


@pytest.mark.parametrize(
  ("wish", "platform", "dtype", "message"),
  [
    ("cudnn", "cpu", "bfloat16", "runs on NVIDIA GPUs, not on a cpu; use"),
    ("splash", "gpu", "bfloat16", "runs on TPUs, not on a gpu; use"),
    ("cudnn", "gpu", "float32", r"takes bfloat16 \(--model.dtype bfloat16\), not"),
    ("flash", "gpu", "bfloat16", "has no 'flash'; auto, einsum, cudnn, splash"),
  ],
)
def test_a_wish_that_cannot_be_met_is_refused(wish, platform, dtype, message):
  with pytest.raises(ValueError, match=f"^--model.attention .*{message}") as error:
    choose_backend(wish, platform=platform, dtype=dtype, head_dim=64)
  assert "\n" not in str(error.value)


def test_build_refuses_a_kernel_that_this_machine_has_not():
  config = Config(model=Model(attention="cudnn"))
  with pytest.raises(ValueError, match="attention cudnn runs on NVIDIA GPUs"):
    build.abstract_policy(
      config, build.make_mesh(config), eos_ids=(0,), shape=build.model_config(config)
    )


# --- absent machines -----------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_cudnn_is_called_forward_and_backward_on_nvidia(case, monkeypatch):
  """Without a GPU, only the program that XLA would pass to cuDNN can be checked."""
  from jax._src.cudnn import fused_attention_stablehlo

  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
  segment_ids, window = CASES[case].get("segment_ids"), CASES[case].get("window")

  def total(*operands):
    return flash.cudnn(*operands, segment_ids, window=window, simulate=False).sum()

  program = jax.jit(jax.grad(total, (0, 1, 2)))
  operands = random_inputs(dtype=jnp.bfloat16)[:3]
  text = program.trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
  bias = "" if segment_ids is None else "ScaleBias"
  assert f"__cudnn$fmha{bias}Softmax(" in text
  assert f"__cudnn$fmha{bias}SoftmaxBackward(" in text
  assert "CAUSAL" in text and "float32" not in text
  in_kernel = window if segment_ids is None and window else 0
  assert rf"sliding_window_length\22: {in_kernel}," in text


def test_cudnn_is_called_on_each_devices_own_rows_and_heads(monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo

  monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(sharding, "platform", lambda mesh: "gpu")
  query, key, value, weight = random_inputs(H=8, dtype=jnp.bfloat16)
  run = functools.partial(
    outputs_and_gradients, backend="cudnn", mesh=sharding.make_mesh(2, 1, 4)
  )
  program = jax.jit(run).trace(query, key, value, weight, SEGMENTS)
  text = program.lower(lowering_platforms=("cuda",)).as_text()
  calls = [line for line in text.splitlines() if "__cudnn$fmha" in line]
  # 1 of 2 rows, 2 of 8 heads, of 2 key-value heads the one they read.
  local = "(tensor<1x208x2x16xbf16>, tensor<1x208x1x16xbf16>, tensor<1x208x1x16xbf16>,"
  assert len(calls) == 2 and all(local in call for call in calls)


needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed, which compiles for absent TPUs: make test-plan",
)


def absent_tpu(name, sizes):
  from jax.experimental import topologies

  os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # no cloud to ask
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # no chip to keep to oneself
  topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
  return sharding.make_mesh(*sizes, devices=topology.devices)


def compiled_gradient(mesh, dtype, *, B=4, T, H=4, K=2, E=128, window=None):
  def total(query, key, value, segment_ids):
    out = attention(
      query,
      [Keys(key, value)],
      segment_ids=segment_ids,
      window=window,
      backend="splash",
      mesh=mesh,
    )
    return out.astype(jnp.float32).sum()

  def array(shape, dtype, *axes):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.named(mesh, *axes))

  keys = array((B, K, T, E), dtype, "batch", "kv_heads")
  program = jax.jit(jax.grad(total, (0, 1, 2)))
  return program.lower(
    array((B, T, H, E), dtype, "batch", None, "heads"),
    keys,
    keys,
    array((B, T), jnp.int32, "batch"),
  ).compile()


@needs_libtpu
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_splash_attention_compiles_for_an_absent_tpu(name):
  """Every block size and dtype, both backward kernels, windows, odd head widths."""
  mesh = absent_tpu(name, (1, 2, 2))
  assert (
    choose_backend(
      "auto", platform=sharding.platform(mesh), dtype="bfloat16", head_dim=128
    )
    == "splash"
  )
  for dtype, options in [
    (jnp.bfloat16, dict(T=129, E=64)),  # Qwen2.5-0.5B's heads
    (jnp.bfloat16, dict(T=1100, E=80)),
    (jnp.bfloat16, dict(T=8192, window=1000)),
    (jnp.float32, dict(T=2048)),
    (jnp.float32, dict(T=4096)),
  ]:
    program = compiled_gradient(mesh, dtype, **options)
    assert program.as_text().count('custom_call_target="tpu_custom_call"') >= 2


@needs_libtpu
@pytest.mark.usefixtures("no_compilation_cache")
def test_a_policy_on_an_absent_tpu_runs_splash_attention():
  mesh = absent_tpu("v5e:2x2", (1, 2, 2))
  config = models.ModelConfig(
    256, 256, 512, 2, 4, 2, 128, sliding_window=200, sliding_layers=(1,)
  )
  like = models.hf.abstract_policy(config, mesh=mesh, dtype=jnp.bfloat16)
  assert like.attention == "splash"
  tokens = jax.ShapeDtypeStruct((4, 600), jnp.int32, sharding=sharding.named(mesh))

  def loss(policy, tokens):
    return policy.logits(tokens, segment_ids=tokens).sum()

  text = jax.jit(jax.grad(loss)).lower(like, tokens).compile().as_text()
  assert 'custom_call_target="tpu_custom_call"' in text
  assert "600,600]" not in text
