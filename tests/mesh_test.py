"""A run's numbers do not depend on the mesh: whole runs, from prompts to metrics."""

import dataclasses
import functools
import json

import jax
import pytest

from experiments.quickstart import get_config
from opo_jax import loop
from opo_jax.config import SFT, Eval, Mesh, Record, Rollout
from opo_jax.devices import sharding

ROWS = 32


def run_on(mesh, directory, monkeypatch):
  """metrics.jsonl and samples.jsonl of two steps on a mesh of the first devices."""
  base, (data, fsdp, tensor) = get_config(), mesh
  config = dataclasses.replace(
    base,
    steps=2,
    # The heads of Qwen2.5-0.5B, narrow: 14 share the keys of 2. Neither number is a
    # multiple of 4 or 8, so that `tensor` cuts through heads and has keys left over.
    model=dataclasses.replace(
      base.model, width=32, mlp_width=32, num_layers=2,
      num_heads=14, num_kv_heads=2, head_dim=4, initializer_range=0.3,
    ),
    mesh=Mesh(data, fsdp, tensor),
    sft=SFT(steps=0),
    optimizer=dataclasses.replace(base.optimizer, learning_rate=1e-3),
    # A random policy is never right, but it repeats itself more or less.
    reward=dataclasses.replace(base.reward, repetition_weight=0.5, repetition_ngram=1),
    # Fewer slots than rows: some are refilled.
    rollout=Rollout(
      prompts_per_step=8, group_size=4, max_prompt_tokens=24, max_new_tokens=12,
      slots=16,
    ),
    eval=Eval(every=0, problems=8, samples=4),
    record=Record(kl_rollouts=8, samples=ROWS),
  )  # fmt: skip
  devices = jax.devices()[: data * fsdp * tensor]
  make = functools.partial(sharding.make_mesh, devices=devices)
  with monkeypatch.context() as patch:
    patch.setattr(sharding, "make_mesh", make)
    loop.train(config, directory)
  metrics = (directory / "metrics.jsonl").read_text().splitlines()
  return [json.loads(row) for row in metrics], (directory / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  with pytest.MonkeyPatch.context() as patch:
    return run_on((1, 1, 1), tmp_path_factory.mktemp("runs") / "alone", patch)


MESHES = [
  (2, 2, 2),
  pytest.param((8, 1, 1), marks=pytest.mark.slow),
  pytest.param((1, 8, 1), marks=pytest.mark.slow),
  pytest.param((1, 1, 8), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("mesh", MESHES, ids=lambda mesh: "x".join(map(str, mesh)))
def test_metrics_and_rollouts_are_those_of_one_device(
  mesh, alone, tmp_path, monkeypatch
):
  metrics, samples = run_on(mesh, tmp_path / "run", monkeypatch)
  assert [row["step"] for row in metrics] == [0, 1, 2]
  assert all(row["grad_norm"] > 0.01 for row in metrics[1:])
  for row, expected in zip(metrics, alone[0], strict=True):
    assert row.keys() == expected.keys()
    for name, value in expected.items():
      if name.startswith(("time/", "throughput/")):
        continue
      if name in ("update/tokens", "update/packing_efficiency"):
        continue  # rows are filled up to the devices
      # float32 in another order, and Adam's steps on it.
      assert row[name] == pytest.approx(value, rel=1e-3, abs=1e-5), (row["step"], name)
  theirs = [json.loads(line) for line in alone[1].splitlines()]
  ours = [json.loads(line) for line in samples.splitlines()]
  assert len(ours) == 2 * ROWS
  for row, expected in zip(ours, theirs, strict=True):
    assert row.pop("advantage") == pytest.approx(expected.pop("advantage"), abs=1e-5)
    assert row == expected
