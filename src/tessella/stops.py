"""An answer's text ends before the first stop string, wherever its pieces are cut.

In: pieces of text and the stop strings.  Out: pieces that can no longer become a stop string.
"""

from collections.abc import Sequence


class StopText:
    """Holds back what may yet become a stop string; `found` is true once one was found, and nothing comes after it."""

    def __init__(self, stops: Sequence[str]):
        self.found = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> str:
        """The text that is safe now."""
        if not self._stops:
            return text
        self._held += text
        places = [self._held.find(stop) for stop in self._stops if stop in self._held]
        if places:
            self.found = True
        end = min(places) if places else len(self._held) - held_back(self._held, self._stops)
        safe, self._held = self._held[:end], "" if places else self._held[end:]
        return safe

    def end(self) -> str:
        """What was held back, when no stop string can come any more."""
        rest, self._held = self._held, ""
        return rest


def held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of text that is the beginning of a stop string."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
