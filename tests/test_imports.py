"""Imports run one way: no module needs, over others, itself, wherever in a file the import stands."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def modules(*rooms: str) -> dict[str, Path]:
    """Every module of the rooms and the scripts beside them, by its dotted name."""
    files = [path for room in rooms for path in sorted((ROOT / room).rglob("*.py"))] + sorted(ROOT.glob("*.py"))
    name = lambda path: ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return {name(path).removesuffix(".__init__"): path for path in files}


def imported(source: str, package: str, known: set[str]) -> set[str]:
    """Those of the known modules that a source text imports; of `from a import b`, a.b where that is one."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: 1 - node.level or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= {name if name in known else base for name in names}
    return found & known


def test_what_counts_as_an_import():
    known = {"a", "a.b", "a.b.c", "a.d", "e"}
    find = lambda text: imported(text, "a.b", known)
    assert find("from a import b, thing") == {"a", "a.b"} and find("import os, a.d as d") == {"a.d"}
    assert find("from . import c") == {"a.b.c"} and find("from ..d import x") == {"a.d"}
    assert find("def f():\n    from e import x\n    'import a'") == {"e"}


def needs(*rooms: str) -> dict[str, set[str]]:
    """What each module imports of the others."""
    found, out = modules(*rooms), {}
    for name, path in found.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        out[name] = imported(path.read_text(encoding="utf-8"), package, found.keys()) - {name}
    return out


def test_imports_make_no_circle():
    graph = needs("msn_jax", "benchmarks", "evals", "experiments")
    assert len(graph) > 60 and "msn_jax.model" in graph["msn_jax.decode.loop"]
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("name", ["tree", "verify"])
def test_trees_and_verification_need_no_model(name):
    graph, reached, ahead = needs("msn_jax"), set(), [f"msn_jax.decode.{name}"]
    while ahead:
        module = ahead.pop()
        ahead += graph[module] - reached
        reached.add(module)
    assert not reached & {"msn_jax.model", "msn_jax.cache", "msn_jax.decode.loop"}
