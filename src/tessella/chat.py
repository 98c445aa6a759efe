"""Messages become the pieces of a prompt, with the learned parts marked; one template a family, as data.

In: messages of system, user and assistant.  Out: pieces of text, control tokens and picture marks, in order.
Text and control tokens stay apart from here on: what a person typed can never become a control token.
Source: conversation.py of OpenGVLab/InternVL at 2410d1d; ChatML of SmolLM2-135M-Instruct for the built-in model;
conversation.py of haotian-liu/LLaVA at c121f04 (vicuna_v1), the chat template of llava-hf/llava-v1.6-mistral-7b-hf,
conversation.py of Vision-CAIR/MiniGPT-4 at d94738a, and blip2_vicuna_instruct.py of salesforce/LAVIS.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from tessella.errors import ConfigError, PromptError

IMAGE_MARK = "<image>"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn. A user's text holds one <image> for each picture; in other roles <image> is plain text."""

    role: str  # "system", "user" or "assistant"
    text: str


@dataclass(frozen=True)
class Piece:
    """A run of a prompt: text, one control token by name, or the place of one picture. learn: the loss counts it."""

    text: str
    kind: Literal["text", "control", "image"]
    learn: bool = False


@dataclass(frozen=True)
class Template:
    """How one family writes a turn: head + text + end + after_end. A head is a control token and the text behind it."""

    name: str
    default_system: str  # "" for none
    stop: tuple[str, ...]  # special tokens that end an answer; those that a tokenizer lacks are passed over, but not end
    after_end: str = ""
    add_bos: bool = False  # begin with the tokenizer's bos, if the tokenizer is one that adds it
    start: str = "<|im_start|>"  # "" where each role has a control token of its own
    end: str = "<|im_end|>"  # ends a turn; with plain texts only an assistant's
    # (text that opens a turn, text that ends it), by role, where no control tokens do; an answer may end in a text, too.
    # These families' tokenizers put a space before the first word of each stretch of text, so LLaVA's answers need none.
    plain: Mapping[str, tuple[str, str]] | None = None
    # Control tokens of a picture: in front of its slots and behind them, "" for none, and the token that bears the slots.
    image_start: str = "<img>"
    image_end: str = "</img>"
    slot: str = "<IMG_CONTEXT>"
    frame: tuple[str, str] = ("", "")  # plain texts around a picture
    picture_before_bos: bool = False  # a picture that opens the prompt stands before the bos, and the text behind it is stripped

    def head(self, role: str) -> tuple[str, str]:
        """(control token, text) that open a turn of that role; no control token where plain texts do."""
        if self.plain is not None:
            return "", self.plain[role][0]
        return (self.start, f"{role}\n") if self.start else (f"<|{role}|>", "\n")

    def tail(self, role: str) -> tuple[str, str]:
        """(control token, text) that end a turn of that role."""
        if self.plain is not None and (role != "assistant" or self.plain[role][1]):
            return "", self.plain[role][1]
        return self.end, self.after_end


# The punctuation is part of what the models were trained with; a changed comma is another prompt.
_SYSTEM_2 = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
_SYSTEM_2_5 = "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
_SYSTEM_VICUNA = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


class _Ends(TypedDict):
    """What the templates of the LLaVA models have in common."""

    stop: tuple[str, ...]
    add_bos: bool
    end: str
    image_start: str
    image_end: str
    slot: str


_LLAVA = _Ends(stop=("</s>",), add_bos=True, end="</s>", image_start="", image_end="", slot="<image>")

TEMPLATES = {
    template.name: template
    for template in (
        # InternLM2's, Llama-3's and Phi-3's tokenizers open every prompt with their bos; the official code keeps it.
        Template("internlm2-chat", _SYSTEM_2, stop=("<|im_end|>", "<|im_start|>", "</s>"), add_bos=True),
        Template("Hermes-2", _SYSTEM_2, stop=("<|im_end|>", "<|im_start|>", "<|endoftext|>")),
        Template("phi3-chat", _SYSTEM_2, stop=("<|end|>", "<|endoftext|>"), add_bos=True, start="", end="<|end|>"),
        # InternVL 2.5, 3 and 3.5; of these only the sizes that have InternLM2's tokenizer have a bos.
        Template(
            "internvl2_5",
            _SYSTEM_2_5,
            stop=("<|im_end|>", "<|im_start|>", "<|endoftext|>", "</s>"),
            after_end="\n",
            add_bos=True,
        ),
        Template("chatml", "", stop=("<|im_end|>", "<|im_start|>", "<|endoftext|>"), after_end="\n"),
        # LLaVA-1.5 and LLaVA-NeXT with Vicuna; LLaVA-NeXT with Mistral.
        Template(
            "vicuna_v1",
            _SYSTEM_VICUNA,
            plain={"system": ("", " "), "user": ("USER: ", " "), "assistant": ("ASSISTANT:", "")},
            **_LLAVA,
        ),
        Template(
            "mistral_instruct",
            "",
            plain={"system": ("<<SYS>>\n", "\n<</SYS>>\n\n"), "user": ("[INST] ", " [/INST]"), "assistant": ("", "")},
            **_LLAVA,
        ),
        # MiniGPT-4 with Vicuna. It ends a turn with "###", which its tokenizer has as one piece behind a space and begins with
        # "##" elsewhere.
        Template(
            "minigpt4",
            "Give the following image: <Img>ImageContent</Img>. You will be able to see the image once I provide it to you. "
            "Please answer my questions.",
            stop=("</s>", "\u2581###", "###", "##"),
            add_bos=True,
            end="</s>",
            plain={"system": ("", "###"), "user": ("Human: ", "###"), "assistant": ("Assistant: ", "###")},
            image_start="",
            image_end="",
            slot="<image>",
            frame=("<Img>", "</Img>"),
        ),
        # InstructBLIP with Vicuna: the picture, then the question as it stands.
        Template(
            "instructblip",
            "",
            stop=("</s>",),
            add_bos=True,
            end="</s>",
            plain={"system": ("", "\n"), "user": ("", ""), "assistant": ("", "")},
            image_start="",
            image_end="",
            slot="<image>",
            picture_before_bos=True,
        ),
    )
}


def template_named(name: str) -> Template:
    """Raises ConfigError with the known names."""
    if name not in TEMPLATES:
        raise ConfigError(f'template is "{name}"; known are {", ".join(TEMPLATES)}')
    return TEMPLATES[name]


def render(messages: Sequence[Message], template: Template, *, system: str | None = None, open_turn: bool) -> tuple[Piece, ...]:
    """The conversation in the family's form; open_turn adds the head of the answer that the model is to write.

    The system text is the first of: a system message, system, the template's own. An empty one leaves the system turn out,
    in every family. Learned are an assistant's text and the token that ends it; heads and newlines are not.
    Raises PromptError: no turn, unknown or misplaced role, an empty user turn, nothing to answer.
    """
    turns = _checked(messages, open_turn)
    if turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    elif system is None:
        system = template.default_system
    pieces: list[Piece] = []
    if system:
        pieces += _turn(Message("system", system), template)
    for turn in turns:
        pieces += _turn(turn, template)
    if open_turn:
        pieces += _head("assistant", template)
    return tuple(pieces)


def text_of(pieces: Sequence[Piece]) -> str:
    """The prompt as a person reads it, pictures as <image>."""
    return "".join(piece.text for piece in pieces)


def place_marks(text: str, n_images: int, first_number: int = 1) -> str:
    """A user's text with one <image> for each of its n_images pictures; marks that stand there already are kept.

    Without marks: one picture goes before the text; several, or one that follows others in the conversation
    (first_number > 1), are labelled "Image-1: <image>". Raises PromptError when some, but not all, are marked.
    """
    marks = text.count(IMAGE_MARK)
    if marks == n_images:
        return text
    if marks:
        raise PromptError(
            f"{_count(n_images, 'picture')} but {_count(marks, IMAGE_MARK + ' mark')} in the text; "
            "write one mark for each picture, or none"
        )
    if n_images == 1 and first_number == 1:
        return f"{IMAGE_MARK}\n{text}"
    labels = "".join(f"Image-{number}: {IMAGE_MARK}\n" for number in range(first_number, first_number + n_images))
    return labels + text


def count_marks(messages: Sequence[Message]) -> int:
    """Pictures that these messages call for; only users show pictures."""
    return sum(message.text.count(IMAGE_MARK) for message in messages if message.role == "user")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _checked(messages: Sequence[Message], open_turn: bool) -> list[Message]:
    """Raises PromptError with the turn's number, counted from 1."""
    turns = list(messages)
    for number, turn in enumerate(turns, 1):
        if turn.role not in ROLES:
            raise PromptError(f'turn {number} has the role "{turn.role}"; known are {", ".join(ROLES)}')
        if turn.role == "system" and number > 1:
            raise PromptError(f"turn {number} is a system turn; only the first may be: move it to the front")
        if turn.role == "user" and not turn.text.strip():
            raise PromptError(f"turn {number}, the user's, is empty; write a question")
    spoken = [turn for turn in turns if turn.role != "system"]
    if not spoken:
        raise PromptError(f"{_count(len(turns), 'turn')}, but none by the user; at least 1: write a question")
    offset = len(turns) - len(spoken) + 1
    for index, turn in enumerate(spoken):
        expected = ROLES[1 + index % 2]
        if turn.role != expected:
            raise PromptError(
                f"turn {index + offset} is by the {turn.role}, must be by the {expected}: they take turns, user first"
            )
    if open_turn and spoken[-1].role == "assistant":
        raise PromptError(f"turn {len(turns)}, the last, is the assistant's; nothing to answer: end with a user turn")
    return turns


def _head(role: str, template: Template) -> list[Piece]:
    return list(_marks(*template.head(role)))


def _marks(control: str, text: str, learn: bool = False) -> Iterator[Piece]:
    """A control token and the text behind it, where there are any."""
    if control:
        yield Piece(control, "control", learn)
    if text:
        yield Piece(text, "text", learn and not control)


def _turn(turn: Message, template: Template) -> Iterator[Piece]:
    learn = turn.role == "assistant"
    yield from _head(turn.role, template)
    if turn.role == "user":
        for index, text in enumerate(turn.text.split(IMAGE_MARK)):
            if index:
                before, behind = template.frame
                yield from _marks("", before)
                yield Piece(IMAGE_MARK, "image")
                yield from _marks("", behind)
            text = text.lstrip() if index and template.picture_before_bos else text
            if text:
                yield Piece(text, "text")
    elif turn.text:
        yield Piece(turn.text, "text", learn)
    yield from _marks(*template.tail(turn.role), learn)
