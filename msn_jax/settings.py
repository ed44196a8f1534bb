"""Fields of settings: what each is for and which values it takes, said once, for checks and for --help."""

from __future__ import annotations

import dataclasses
import numbers
import types
import typing
from typing import Any

from msn_jax.errors import InputError

_KINDS = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    bool: (bool, "true or false"),
    str: (str, "a text"),
    list: (list, "a list"),
    dict: (dict, "a mapping"),
    types.NoneType: (types.NoneType, "null"),
}


def setting(
    default: Any = dataclasses.MISSING,
    about: str = "",
    *,
    choices: tuple = (),
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    accepted: str = "",
    factory: Any = dataclasses.MISSING,
) -> Any:
    """A field of a dataclass of settings.

    about: what it is for, in a line of --help. choices, or the bounds least <= value <= most, above < value < below:
    the values it takes; accepted: these in words, where the bounds do not say it all.
    """
    rules = {"choices": choices, "least": least, "most": most, "above": above, "below": below}
    words = accepted or _in_words(**rules)
    metadata = {"about": about, "accepted": words, **rules}
    return dataclasses.field(default=default, default_factory=factory, metadata=metadata)


def describe(field: dataclasses.Field) -> str:
    """A line of --help: what the setting is for, and the values it takes."""
    about, accepted = field.metadata.get("about", ""), field.metadata.get("accepted", "")
    return f"{about} [{accepted}]" if accepted else about


def check_settings(config: Any, prefix: str) -> None:
    """Raise InputError for the first field of a dataclass whose value is not of its type, or not one it takes."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, accepted = getattr(config, field.name), field.metadata.get("accepted", "")
        kinds = _kinds(hints[field.name])
        fine = any(_is(value, kind) for kind in kinds)
        if not fine:
            words = " or ".join(_KINDS[kind][1] if kind in _KINDS else f"a {kind.__name__}" for kind in kinds)
            accepted = f"{words}: {accepted}" if accepted else words
        if not fine or not _allowed(value, field.metadata):
            shown = repr(value) if not fine and isinstance(value, str) else value
            raise InputError(f"{prefix}{field.name} = {shown} is not possible; accepted: {accepted}")


def _kinds(hint: Any) -> list[Any]:
    """The classes that a type hint allows."""
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return [typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if union else (hint,))]


def _is(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind. A whole number is a number, true and false are none."""
    if kind is Any:
        return True
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, _KINDS[kind][0] if kind in _KINDS else kind)


def _allowed(value: Any, rules: typing.Mapping[str, Any]) -> bool:
    if rules.get("choices"):
        return value in rules["choices"]
    bounds = [rules.get(name) for name in ("least", "most", "above", "below")]
    if value is None or bounds == [None] * 4:
        return True
    least, most, above, below = bounds
    return (
        (least is None or value >= least)
        and (most is None or value <= most)
        and (above is None or value > above)
        and (below is None or value < below)
    )


def _in_words(choices: tuple, least: Any, most: Any, above: Any, below: Any) -> str:
    if choices:
        return ", ".join("null" if choice is None else str(choice) for choice in choices)
    if least is not None:
        end = f" to {most}" if most is not None else " or more"
        return f"{least}{end}{f', below {below}' if below is not None else ''}"
    if above is not None:
        if below is not None:
            return f"a number between {above} and {below}"
        return f"a number above {above}" + (f" and up to {most}" if most is not None else "")
    return ""
