"""Planning's readers: compiled programs and traces whose traffic is known by hand."""

import re

import jax
import jax.numpy as jnp
import pytest

from opo_jax.devices import sharding
from opo_jax.planning import hlo, jaxpr
from opo_jax.planning.replication import replicated

pytestmark = pytest.mark.usefixtures("no_compilation_cache")


def compiled_text(function, *args):
  return jax.jit(function).lower(*args).compile().as_text()


def shaped(shape, mesh, *spec):
  layout = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
  return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=layout)


def gathered_layers(trip_count):
  """The program that the module's docstring draws; the loop's trip count as written."""
  return f"""
%one (p: f32[5,4,8], n: s32[]) -> f32[4,8] {{
  %p = f32[5,4,8]{{2,1,0}} parameter(0)
  %n = s32[] parameter(1)
  ROOT %row = f32[4,8]{{1,0}} dynamic-slice(%p, %n), dynamic_slice_sizes={{1,4,8}}
}}

%body (c: (s32[], f32[5,4,8])) -> (s32[], f32[5,4,8]) {{
  %c = (s32[], f32[5,4,8]{{2,1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %stack = f32[5,4,8]{{2,1,0}} get-tuple-element(%c), index=1
  %half = f32[4,8]{{1,0}} fusion(%stack, %i), kind=kLoop, calls=%one
  %all = f32[8,8]{{1,0}} all-gather(%half), replica_groups=[2,2]<=[2,2]T(1,0)
  ROOT %next = (s32[], f32[5,4,8]{{2,1,0}}) tuple(%i, %stack)
}}

%less (c: (s32[], f32[5,4,8])) -> pred[] {{
  %c = (s32[], f32[5,4,8]{{2,1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %limit), direction={"LT" if trip_count else "NE"}
}}

ENTRY %main (x: (s32[], f32[5,4,8])) -> (s32[], f32[5,4,8]) {{
  %x = (s32[], f32[5,4,8]{{2,1,0}}) parameter(0)
  ROOT %loop = (s32[], f32[5,4,8]{{2,1,0}}) while(%x), condition=%less, body=%body{
    trip_count
  }
}}
"""


def test_the_drawn_program_moves_what_its_explanation_says():
  mesh = {"fsdp": 2, "tensor": 2}
  known = ', backend_config={"known_trip_count":{"n":"5"}}'
  # The trip count as XLA writes it, or as the loop's condition has it.
  for written in (known, " "):
    moved = hlo.traffic(gathered_layers(written), mesh, dynamic_trip_count=7)
    assert moved == hlo.Traffic({"fsdp": 640.0}, 1300.0, 0)
  moved = hlo.traffic(gathered_layers(""), mesh, dynamic_trip_count=7)
  assert moved == hlo.Traffic({"fsdp": 7 * 128.0}, 7 * 260.0, 1)


def test_collectives_are_told_apart_by_mesh_axis():
  mesh = sharding.make_mesh(1, 4, 2)
  x = shaped((64, 128), mesh, "fsdp", "tensor")

  def sum_over(axis, left):
    out = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(left))
    return lambda x: jax.lax.with_sharding_constraint(x.sum(axis), out)

  # All-reduces move 2 (n - 1) / n of what each device has: 64 floats over 4 devices of
  # `fsdp`, 16 over 2 of `tensor`.
  text = compiled_text(sum_over(0, "tensor"), x)
  moved = hlo.traffic(text, dict(mesh.shape)).collective_bytes
  assert moved == {"fsdp": 2 * 3 / 4 * 64 * 4}
  text = compiled_text(sum_over(1, "fsdp"), x)
  moved = hlo.traffic(text, dict(mesh.shape)).collective_bytes
  assert moved == {"tensor": 2 * 1 / 2 * 16 * 4}


def test_a_compiled_scan_counts_its_body_once_an_iteration():
  mesh = sharding.make_mesh(1, 8, 1)
  x, w = shaped((64, 32), mesh, "fsdp"), shaped((5, 32, 32), mesh, None, "fsdp")

  def layers(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

  found = hlo.traffic(compiled_text(layers, x, w), dict(mesh.shape))
  # Each of 5 weights of 32 x 32 floats is gathered over 8 devices.
  assert found.collective_bytes == {"fsdp": 5 * 7 / 8 * 32 * 32 * 4}
  assert found.dynamic_loops == 0


def test_a_loop_that_ends_by_its_data_has_the_assumed_trip_count():
  def function(x):
    return jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: x * 2.0, x)

  text = compiled_text(function, jnp.ones(8))
  once = hlo.traffic(text, {"data": 1})
  assert once.dynamic_loops == 1
  five_times = hlo.traffic(text, {"data": 1}, dynamic_trip_count=5)
  assert five_times.memory_bytes > once.memory_bytes


def test_memory_traffic_of_a_copy_is_reading_and_writing():
  x = jnp.ones((1024, 1024))
  found = hlo.traffic(compiled_text(lambda x: jnp.tanh(x) + 1, x), {"data": 1})
  assert found.memory_bytes == 2 * x.nbytes


def test_a_slice_of_a_stack_counts_as_a_slice():
  stack, x = jnp.ones((16, 256, 256)), jnp.ones(256)

  def function(stack, x):
    return jax.lax.scan(lambda x, w: (x + w.sum(0), None), x, stack)[0]

  found = hlo.traffic(compiled_text(function, stack, x), {"data": 1})
  # Each slice is read, written and read; sixteen whole stacks would be 16 times that.
  assert stack.nbytes <= found.memory_bytes < 3.1 * stack.nbytes


def test_an_array_read_under_another_name_counts():
  """As XLA for TPUs writes a product: the weight comes through a fusion of its own that
  only renames it."""
  text = """
%renamed (p: bf16[64,512]) -> bf16[64,512] {
  %p = bf16[64,512]{1,0} parameter(0)
  ROOT %b = bf16[64,512]{1,0} bitcast(%p)
}

%product (x: bf16[8,512], w: bf16[64,512]) -> f32[8,64] {
  %x = bf16[8,512]{1,0} parameter(0)
  %w = bf16[64,512]{1,0} parameter(1)
  %again = bf16[64,512]{1,0} fusion(%w), kind=kLoop, calls=%renamed
  ROOT %y = f32[8,64]{1,0} convolution(%x, %again), dim_labels=bf_oi->bf
}

ENTRY %main (x: bf16[8,512], w: bf16[64,512]) -> f32[8,64] {
  %x = bf16[8,512]{1,0} parameter(0)
  %w = bf16[64,512]{1,0} parameter(1)
  ROOT %y = f32[8,64]{1,0} fusion(%x, %w), kind=kOutput, calls=%product
}
"""
  bytes_ = 2 * 8 * 512 + 2 * 64 * 512 + 4 * 8 * 64
  assert hlo.traffic(text, {"data": 1}).memory_bytes == bytes_


def test_replica_groups_give_the_same_axes_however_they_are_written():
  mesh = {"data": 1, "fsdp": 4, "tensor": 2}
  cases = {
    "replica_groups=[4,2]<=[8]": ("tensor", 2),
    "replica_groups=[2,4]<=[4,2]T(1,0)": ("fsdp", 4),
    "replica_groups={{0,2,4,6},{1,3,5,7}}": ("fsdp", 4),
    "replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}": ("tensor", 2),
    "replica_groups=mesh['a'=4,'b'=2] {'a','b'}": ("fsdp+tensor", 8),
    "source_target_pairs={{0,2},{2,4}}": ("fsdp", 2),
    "replica_groups={}": ("fsdp+tensor", 8),
  }
  assert {text: hlo._axes_and_group_size(text, mesh) for text in cases} == cases


def test_what_is_replicated_is_named_with_the_axes():
  mesh = sharding.make_mesh(1, 4, 2)
  arguments = {
    "both": shaped((4096, 8192), mesh, "fsdp", "tensor"),
    "one": shaped((4096, 8192), mesh, "fsdp"),
    "none": shaped((4096, 8192), mesh),
    "small": shaped((4096, 4096), mesh),
  }

  def function(arrays):
    # Split on its way in and out, and whole in between.
    whole = jax.lax.with_sharding_constraint(
      arrays["both"].T @ arrays["both"], jax.NamedSharding(mesh, jax.P())
    )
    out = jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))
    total = sum(array.sum() for array in arrays.values())
    return jax.lax.with_sharding_constraint(jnp.sort(whole) + total, out)

  traced = jax.jit(function).trace(arguments)
  found = replicated(traced.lower().compile(), traced, mesh)
  assert found.pop("input [0][0]['one']") == "tensor"
  assert found.pop("input [0][0]['none']") == "fsdp+tensor"
  assert found.pop("f32[8192,8192]").startswith("1 of 8 parts")
  # Both of these are inputs again, under their shapes.
  assert all(re.fullmatch(r"f32\[(4096|1024),8192\]", name) for name in found)


def test_flops_count_scans_recomputation_and_branches():
  x, w = jnp.ones((8, 16)), jnp.ones((3, 16, 16))
  product = 2 * 8 * 16 * 16

  def layers(x, w):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

  def count(function, **options):
    return jaxpr.flops(jax.jit(function).trace(x, w), **options)

  assert count(layers) == 3 * product
  # Backward: two products for each forward one.
  assert count(jax.grad(layers, argnums=(0, 1))) == 9 * product
  again = jax.grad(jax.checkpoint(layers), argnums=(0, 1))
  assert count(again) == 12 * product

  def either(x, w):
    return jax.lax.cond(x.sum() > 0, lambda: x @ w[0] @ w[1], lambda: x)

  assert count(either) == 2 * product

  def until(x, w):
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ w[0], x)

  assert count(until) == product
  assert count(until, dynamic_trip_count=7) == 7 * product
