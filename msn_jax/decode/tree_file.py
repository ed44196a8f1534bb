"""Tree sets as JSON: what `--tune_out` writes and `--tree FILE.json` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from msn_jax.decode.tree import TreeSet, TreeSpec
from msn_jax.errors import InputError


def to_dict(trees: TreeSet) -> dict[str, Any]:
    return {
        "name": trees.name,
        "min_match": trees.min_match,
        "worth": trees.worth,
        "cost": trees.cost,
        "trees": [{"name": t.name, "parents": t.parents, "sources": t.sources} for t in trees.trees],
    }


def from_dict(row: dict[str, Any]) -> TreeSet:
    specs = tuple(TreeSpec(t["name"], tuple(t["parents"]), _tuples(t["sources"])) for t in row["trees"])
    return TreeSet(row["name"], specs, tuple(row["min_match"]), _tuples(row["worth"]), tuple(row["cost"]))


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def write(path: str | Path, sets: dict[int, TreeSet], figures: dict[str, Any]) -> None:
    """One set for each batch size, and the figures that they were chosen by."""
    rows = {str(batch): to_dict(trees) for batch, trees in sets.items()}
    part = Path(f"{path}.partial")
    part.write_text(json.dumps({**figures, "sets": rows}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read(path: str | Path, batch: int) -> TreeSet:
    """The set for the batch size nearest to `batch`. Raises InputError for what is no such file."""
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["sets"]
        nearest = min(map(int, rows), key=lambda size: max(size, batch) / min(size, batch))
        return from_dict(rows[str(nearest)])
    except InputError:
        raise
    except OSError as e:
        raise InputError(f"tree file {path}: {e.strerror}") from e
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as e:
        raise InputError(f"tree file {path}: not one that --tune_out wrote ({type(e).__name__}: {e})") from e
