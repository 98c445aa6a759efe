"""The tree of errors a caller can catch.

Every error that a user's input can cause is a TessellaError whose message holds the value, the limit and a way out.
Our own mistakes are assertions and are not caught anywhere.
"""


class TessellaError(Exception):
    """Something a person can mend; str(error) says what was wrong, the limit, and the way out."""


class ConfigError(TessellaError):
    """A model's config.json, a recipe or an option holds a value that we cannot honour."""


class CheckpointError(TessellaError):
    """A model folder is missing, incomplete, inconsistent, or must not be written over."""


class ImageError(TessellaError):
    """A picture is missing, is not a picture, is damaged, or is larger than the limit."""


class PromptError(TessellaError):
    """Messages that cannot be rendered: unknown role, wrong number of pictures, wrong order."""


class ContextError(PromptError):
    """A prompt that is longer than the model's context."""


class DataError(TessellaError):
    """A dataset that is empty, broken, or too bad to train on."""


class TrainingError(TessellaError):
    """A run that cannot start, resume or go on: another recipe, a non-finite loss, no room on the disk."""


class RankError(TrainingError):
    """Another process of the same run has gone; its own error tells why."""


class MemoryError_(TessellaError):
    """Out of memory, with the estimate and what to lower."""


class NumbersError(TessellaError):
    """A model that computes NaN or infinity: broken weights, or a number type that is too narrow for it."""


class EngineError(TessellaError):
    """The engine cannot take what it was given: an unknown adapter, one that cannot run beside others, or it has stopped."""


class QueueFull(EngineError):
    """As many requests wait as may wait; later there is room again."""


class DownloadError(TessellaError):
    """A model on a hub, or a part of the built-in one, could not be fetched, or came broken."""


class WriteError(TessellaError):
    """A file that cannot be written: no such place, no permission, no room on the disk."""


def is_out_of_memory(error: BaseException) -> bool:
    """MemoryError, torch.OutOfMemoryError, or the plain RuntimeError of torch's CPU allocator or of mapping a file."""
    # by its name, because torch is not imported here
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or "allocate memory" in str(error)
