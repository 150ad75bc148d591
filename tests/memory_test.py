"""An update's memory is known before it runs, and moments may be offloaded."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from opo_jax import build, loop, sft
from opo_jax.config import Algorithm, Config, Model, Optimizer, Rollout
from opo_jax.devices import memory, sharding
from opo_jax.devices.memory import Memory
from opo_jax.planning.programs import abstract_run
from opo_jax.storage.checkpoint import Checkpoints

CONFIG = Config(
  model=Model(width=32, mlp_width=48, num_layers=1, num_heads=2, head_dim=16),
  rollout=Rollout(prompts_per_step=8, group_size=6, max_new_tokens=5),
  optimizer=Optimizer(learning_rate=0.01),
)


def offloading(offload):
  optimizer = dataclasses.replace(CONFIG.optimizer, offload=offload)
  return dataclasses.replace(CONFIG, optimizer=optimizer)


def first_policy():
  policy = abstract_run(CONFIG, build.make_mesh(CONFIG), build.model_config(CONFIG))
  return build.init_policy(CONFIG, policy.policy)


def demonstrations():
  prompts = [[3 + i] * (1 + i % 3) for i in range(8)]
  rollouts = sft.as_rollouts(
    prompts, [[4, 5, 6 + i, 1] for i in range(8)], [True] * 8, max_new_tokens=5
  )
  return rollouts, np.ones(8, np.float32)


def kinds(tree):
  return {x.sharding.memory_kind for x in jax.tree.leaves(tree) if x.ndim}


def fine_tuned(offload, steps=2):
  learner = build.make_sft_learner(offloading(offload))
  state = learner.init(first_policy())
  states = [state.opt_state]
  for _ in range(steps):
    state, update = learner.update(state, *demonstrations())
    states.append(state.opt_state)
  return state, update.scalars, [kinds(each) for each in states]


def test_offloaded_moments_lie_on_the_host_and_change_no_step(tmp_path):
  state, metrics, where = fine_tuned(offload=True)
  assert where == [{"pinned_host"}] * 3
  assert kinds(state.policy) == {"device"}
  near, _, where = fine_tuned(offload=False)
  assert where == [{"device"}] * 3
  assert float(metrics["grad_norm"]) > 0.1
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(near), strict=True):
    np.testing.assert_array_equal(a, b)

  # A checkpoint of one goes on as the other.
  with Checkpoints(tmp_path / "far") as checkpoints:
    checkpoints.save(1, state, {})
  for offload in (True, False):
    config = offloading(offload)
    mesh, shape = build.make_mesh(config), build.model_config(config)
    like = abstract_run(config, mesh, shape).state
    with Checkpoints(tmp_path / "far") as checkpoints:
      restored, _ = checkpoints.restore(1, like)
    assert kinds(restored.opt_state) == {"pinned_host" if offload else "device"}
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(near), strict=True):
      np.testing.assert_array_equal(a, b)


def test_offload_without_such_memory_is_refused_before_any_work():
  device = SimpleNamespace(
    device_kind="Toaster", addressable_memories=lambda: [SimpleNamespace(kind="device")]
  )
  # The first device is another process's, and says nothing of its memory.
  mesh = SimpleNamespace(devices=np.array([None, device]), local_devices=[device])
  with pytest.raises(
    ValueError, match=r"--optimizer.offload .*'pinned_host'.*Toaster.*\['device'\]"
  ):
    sharding.on_host((), (), mesh)


def test_the_program_whose_memory_is_told_is_the_one_that_runs():
  compiled = []

  def listen(event, seconds, **labels):
    if event.endswith("backend_compile_duration"):
      compiled.append(labels["fun_name"])

  learner = build.make_sft_learner(CONFIG)
  state, batch = learner.init(first_policy()), demonstrations()
  jax.monitoring.register_event_duration_secs_listener(listen)
  told = memory.of(learner.memory(state, *batch))
  state, _ = learner.update(state, *batch)
  jax.block_until_ready(state)
  assert compiled == ["jit(_weigh)", "jit(_update)"], "once, and nothing besides"
  # The state lies on eight devices; gradients come on top of it.
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
  assert size / 8 < told.arguments < size
  assert (
    told.temporaries > sum(leaf.nbytes for leaf in jax.tree.leaves(state.policy)) / 8
  )
  assert told.outputs < size / 8, "the old state's memory is taken again"


def test_parts_that_fit_by_hand():
  device = 100  # 90 may be planned for
  for arguments, temporaries, expected in (
    (10, 90, 2),  # 80 are left
    (10, 160, 2),
    (10, 161, 4),
    (50, 330, 16),  # 40 are left, 8.25 parts
    (89, 1, 2),
    (90, 1, None),
  ):
    assert Memory(arguments, 0, temporaries).parts_to_fit(device) == expected
  assert Memory(60, 30, 1).parts_to_fit(device) is None


GIB = 2**30
EXHAUSTED = "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes."


@pytest.mark.parametrize(
  ("known", "changes", "message"),
  [
    # 14.4 - 4 = 10.4 are left for 27: 4 parts of 16,384 tokens; but a row of 512 + 5
    # for each of 8 devices is the least.
    (
      Memory(4 * GIB, 0, 27 * GIB),
      {},
      r"needs 31.0 GiB of the 16.0 GiB .* 4.0 GiB of state .* Use"
      r" --algorithm.micro-batch-tokens 4136 or --model.remat block; .*er.offload,",
    ),
    # 2 parts.
    (
      Memory(4 * GIB, 0, 13 * GIB),
      {
        "algorithm": Algorithm(micro_batch_tokens=12_000),
        "model": dataclasses.replace(CONFIG.model, remat="block"),
      },
      r"Use --algorithm.micro-batch-tokens 6000; or make the state smaller",
    ),
    (
      Memory(15 * GIB, 0, 1 * GIB),
      {"optimizer": Optimizer(offload=True)},
      r"Make the state smaller: --optimizer.moment-dtype bfloat16, or more devices",
    ),
    (None, {}, r"does not fit into the 16.0 GiB .*micro-batch-tokens 8192 or"),
  ],
)
def test_an_update_that_does_not_fit_says_what_to_turn_and_how_far(
  known, changes, message, tmp_path, monkeypatch
):
  def no_room(*_):
    raise jax.errors.JaxRuntimeError(EXHAUSTED)

  monkeypatch.setattr(sharding, "device_bytes", lambda mesh: 16 * GIB)
  config = dataclasses.replace(CONFIG, **changes)
  update_memory = build.update_memory(config, build.make_mesh(config))
  update_memory.measured = known
  # When the update is compiled or begins, and when its result is waited for.
  monkeypatch.setattr(jax, "device_get", no_room)
  for start in (no_room, lambda: loop._read({"loss": 1})):
    with pytest.raises(RuntimeError, match=message) as raised:
      with memory.explained(update_memory.advice):
        start()
      assert str(raised.value).endswith(f"XLA said: {EXHAUSTED}")
