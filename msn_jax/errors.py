"""How input is refused, and what is said about input that is taken."""

from __future__ import annotations

import contextlib
import sys
from typing import Any


class InputError(ValueError):
    """Input that cannot be honoured: one line that names what is wrong and what is accepted."""


def first_line(error: Exception) -> str:
    """What an error of another library says, short enough for an InputError of ours."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def warn(line: str) -> None:
    """Say on stderr what a user may not expect of an input that is taken all the same."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def check_fields(config: Any, prefix: str, **fields: tuple[bool, str]) -> None:
    """Raise InputError for the first field that is not fine: name=(fine, what is accepted)."""
    for name, (fine, accepted) in fields.items():
        if not fine:
            raise InputError(f"{prefix}{name} = {getattr(config, name)} is not possible; accepted: {accepted}")


@contextlib.contextmanager
def named(**names: str):
    """A refusal inside that begins with an argument's name begins with what the user gave instead: ckpt="--ckpt"."""
    try:
        yield
    except InputError as e:
        argument, _, rest = str(e).partition(" ")
        if argument not in names:
            raise
        raise InputError(f"{names[argument]} {rest}") from e
