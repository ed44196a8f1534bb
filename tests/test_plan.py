"""What is read off a compiled module for a TPU, and the table that is made of it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks.plan_table import tree_lines
from msn_jax.linear import linear, round_int8
from msn_jax.plan import estimated_seconds, widened_weights


@pytest.mark.parametrize("read, seconds", [(819_000_000, 0.002), (8_190_000_000, 0.01)])
def test_a_cycle_takes_the_longer_of_its_operations_and_of_its_reading(read, seconds):
    text = 'a, backend_config={"estimated_cycles":"1000000","x":0}\nb, backend_config={"estimated_cycles":"2000000"}\nc'
    memory = SimpleNamespace(argument_size_in_bytes=read)
    compiled = SimpleNamespace(as_text=lambda: text, memory_analysis=lambda: memory)
    assert estimated_seconds(compiled, "v5e") == pytest.approx(seconds)  # 1.5 GHz, 819 GB/s


@pytest.mark.parametrize("dtype, rows", [("bfloat16", 2), ("float32", 1)])
def test_a_tpu_multiplies_one_row_of_bfloat16_as_two(dtype, rows):
    x, w = jnp.zeros((1, 1, 16), dtype), jnp.zeros((24, 16), dtype)
    text = jax.jit(linear).trace(x, w).lower(lowering_platforms=("tpu",)).as_text()
    (product,) = [line for line in text.splitlines() if "dot_general" in line]
    assert f"tensor<{'2x' if rows == 2 else '1x1x'}24x" in product.rpartition("->")[2]


def test_a_weight_is_widened_where_an_array_of_its_size_is_made_of_it():
    module = """
%fused_computation.1 (p.0: s8[24,16]) -> bf16[4,24] {
  %inside = bf16[24,16]{1,0} convert(%p.0)
}
ENTRY %main {
  %p.0 = s8[24,16]{1,0} parameter(0)
  %cache = bf16[12,32]{1,0} parameter(1)
  %part.1 = bf16[24,16]{1,0:T(8,128)} slice(%cache), slice={[0:24]}
  %rows = s8[24,16]{1,0} fusion(%cache), kind=kLoop, calls=%fused_computation.4
  %entered = bf16[24,16]{1,0} convert(%rows)
  %turned = s8[16,24]{1,0:T(8,128)(4,1)} fusion(%p.0), kind=kLoop, calls=%fused_computation.2
  %as_large = bf16[24,16]{1,0} fusion(%turned, %cache), kind=kOutput, calls=%fused_computation.5
  %fits = bf16[4,24]{1,0} fusion(%turned, %part.1), kind=kOutput, calls=%fused_computation.1
"""
    w = {"w": round_int8(jnp.ones((24, 16)), 1)}
    assert widened_weights(module, w) == 0
    for wide in (
        "  %wide = bf16[24,16]{1,0:T(8,128)} fusion(%cache, %turned), kind=kLoop, calls=%fused_computation.3\n",
        "  ROOT %c.2 = (bf16[16,24]{1,0}, s32[]) fusion(%turned), kind=kLoop, calls=%fused_computation.3\n",
    ):
        assert widened_weights(module + wide, w) == 1


def test_a_table_of_trees_has_ratios_to_one_token():
    cycle = lambda nodes, ms: {"nodes": nodes, "slots": 8192, "estimated_s": ms / 1e3}
    row = {"model": "m", "topology": "v5e:2x4"}
    one = row | {"cycles": {"1": {"root": cycle(1, 2), "b": cycle(64, 3), "a": cycle(16, 2.5)}}}
    other = row | {"cycles": {"8": {"root": cycle(1, 4), "b": cycle(64, 8)}}}
    assert tree_lines([one, other]).splitlines() == [
        "a (16) | b (64) |",
        "|---" * 7 + "|",
        "| m | v5e:2x4 | 8,192 | 1 | 2.00 | 1.25 | 1.50 |",
        "| m | v5e:2x4 | 8,192 | 8 | 4.00 |  | 2.00 |",
    ]
