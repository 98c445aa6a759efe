"""What is learned from: one conversation with its pictures, not yet decoded."""

from dataclasses import dataclass

from tessella.chat import Message
from tessella.geometry import Size
from tessella.inputs import Picture
from tessella.scenes.requests import Asks
from tessella.scenes.truth import Truth


@dataclass(frozen=True)
class Sample:
    """One conversation to learn from."""

    place: str  # "file.jsonl:12", or the picture's path in a folder of folders
    messages: tuple[Message, ...]
    pictures: tuple[Picture, ...]
    key: str  # stable: a hash of what the sample says and shows
    sizes: tuple[Size, ...] = ()  # of the pictures, from their headers
    label: str = ""  # class or dish, where the format has one
    tokens: int = 0  # prompt, pictures and answers; 0 when not measured
    learned: int = 0  # of them, by the loss
    tiles: int = 0
    repeat: float = 1.0  # how often it is seen in an epoch, where the data itself says so
    jpeg: bool = False  # its pictures are compressed anew at each look
    truths: tuple[Truth, ...] = ()  # behind each routing token of the answers, in order
    request: Asks | None = None  # a scene that is composed when it is learned from: messages and pictures come of it
    rejected: str = ""  # of a pair: the answer that is liked less; the messages end in the one that is chosen

    @property
    def question(self) -> str:
        """What the user asks first."""
        return next(message.text for message in self.messages if message.role == "user")

    @property
    def answer(self) -> str:
        """What the assistant says last."""
        return self.messages[-1].text
