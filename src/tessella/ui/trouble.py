"""What a person is told when something goes wrong, in the language of the page at the time it is shown.

In: a key of words.py and its values.  Out: a sentence.
"""

from tessella.errors import TessellaError
from tessella.ui.words import say


class Trouble(TessellaError):
    """Something a person can mend; told in English by str(), in any language of the page by sentence()."""

    def __init__(self, key: str, **values: str):
        super().__init__(say("en", key, **values))
        self.key = key
        self.values = values

    def sentence(self, language: str) -> str:
        return say(language, self.key, **self.values)
