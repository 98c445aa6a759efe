"""The tasks that come with the package, by name; a new one is one line here."""

from tessella.evaluate.tasks.general import general

TASKS = {"general": general}
