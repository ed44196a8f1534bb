"""Stop texts: a reply ends before the first one that is whole, wherever its tokens begin and end."""

from __future__ import annotations

from collections.abc import Callable, Sequence


class StopTexts:
    """A growing text, cut before the stop text that is whole first; what may begin one is held back.

    The cut does not depend on the pieces in which the text comes.
    """

    def __init__(self, stops: Sequence[str]):
        self.stops, self._held, self._ended = stops, "", False

    def add(self, piece: str) -> tuple[str, bool]:
        """What may be shown, and whether the text ends there."""
        if self._ended:
            return "", True
        text, self._held = self._held + piece, ""
        found = [(text.index(stop) + len(stop), text.index(stop)) for stop in self.stops if stop in text]
        if found:
            self._ended = True
            return text[: min(found)[1]], True
        begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        end = len(text) - max(begun, default=0)
        self._held = text[end:]
        return text[:end], False

    def flush(self) -> str:
        """What was held back, when nothing more comes."""
        text, self._held = self._held, ""
        return text


def tokens_until_stop(
    text_of: Callable[[Sequence[int]], str], tokens: Sequence[int], known: int, stops: Sequence[str]
) -> int | None:
    """How many tokens a reply has when one of the stop texts is whole first; None: none is.

    text_of: the text of so many of them; known: tokens among which none was.
    """
    if not stops:
        return None
    whole = lambda n: any(stop in text_of(tokens[:n]) for stop in stops)
    if not whole(len(tokens)):
        return None
    return next(n for n in range(known + 1, len(tokens) + 1) if whole(n))
