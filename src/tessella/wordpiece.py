"""A question as the ids that a Q-Former reads beside the picture: BERT's word pieces, with its own vocabulary.

In: a model folder whose subfolder qformer_tokenizer holds tokenizer.json, or vocab.txt.  Out: ids, [CLS] first, [SEP] last.
Source: the processor of InstructBLIP in huggingface/transformers at 5.23.
"""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from tessella.errors import CheckpointError, PromptError

FOLDER = "qformer_tokenizer"


class QuestionTokenizer:
    """Text -> ids, at most so many as the Q-Former has places for, below vocab_size."""

    def __init__(self, backend: Tokenizer, vocab_size: int, most: int):
        self.backend, self.most = backend, most
        self.backend.no_padding()
        self.backend.no_truncation()
        if backend.get_vocab_size() > vocab_size:
            raise CheckpointError(
                f"{FOLDER} has {backend.get_vocab_size():,} tokens, the Q-Former {vocab_size:,} rows; take both from one model"
            )

    @classmethod
    def load(cls, folder: Path, vocab_size: int, most: int) -> "QuestionTokenizer":
        """Raises CheckpointError when there is none, or it cannot be read."""
        whole, words = folder / FOLDER / "tokenizer.json", folder / FOLDER / "vocab.txt"
        if not whole.is_file() and not words.is_file():
            raise CheckpointError(
                f"{folder} has no {FOLDER} with tokenizer.json or vocab.txt, with which its Q-Former reads the question; "
                "fetch the folder again, subfolders too"
            )
        try:
            backend = Tokenizer.from_file(str(whole)) if whole.is_file() else _of_words(words)
        except Exception as error:  # the library raises bare Exceptions
            raise CheckpointError(f"{folder / FOLDER} cannot be read ({error}); fetch it again") from error
        return cls(backend, vocab_size, most)

    def encode(self, text: str) -> tuple[int, ...]:
        """Raises PromptError when there are more tokens than places."""
        ids = tuple(self.backend.encode(text).ids)
        if len(ids) > self.most:
            raise PromptError(f"the question is {len(ids):,} tokens long for the Q-Former, at most {self.most:,}: shorten it")
        return ids


def _of_words(path: Path) -> Tokenizer:
    wordpiece = BertWordPieceTokenizer(str(path), lowercase=True)
    return Tokenizer.from_str(wordpiece.to_str())
