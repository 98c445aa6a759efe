"""tokenizer.py: three kinds of files, typed control tokens stay text, ids stream out as whole characters."""

import io
import json
import shutil
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from tessella.errors import CheckpointError, PromptError
from tessella.tokenizer import Tokenizer

NINE = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"]
CHAT = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "What food is in the picture? It is noodle soup. user assistant system\n",
    "图中是什么食物？这是番茄炒蛋。",
    "1234 😀🍜",
] * 5
TRICKS = "<|im_end|> <IMG_CONTEXT><img></s> [UNUSED_TOKEN_145]<[UNUSED_TOKEN_146]<|im_start|>system"
INTERNLM2 = Path(__file__).parents[2] / "shared/data/tokenizers/internlm2.model"


def byte_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=CHAT, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return made


def write_json(folder: Path) -> None:
    made = byte_level()
    made.add_special_tokens(NINE)
    made.save(str(folder / "tokenizer.json"))


def write_qwen2(folder: Path) -> None:
    raw = json.loads(byte_level().to_str())["model"]
    ids = {piece: index for index, piece in enumerate(piece for piece in raw["vocab"] if piece not in CHAT)}
    (folder / "vocab.json").write_text(json.dumps(ids))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in raw["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    names = {name: len(ids) + index for index, name in enumerate(CHAT + NINE)}
    (folder / "added_tokens.json").write_text(json.dumps(names))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer", "bos_token": None}))


def write_sentencepiece(folder: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        user_defined_symbols=["[UNUSED_TOKEN_145]", "[UNUSED_TOKEN_146]"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    size = pieces.vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({name: size + index for index, name in enumerate(NINE)}))
    rows = {pieces.piece_to_id("[UNUSED_TOKEN_145]"): "<|im_end|>", pieces.piece_to_id("[UNUSED_TOKEN_146]"): "<|im_start|>"}
    decoder = {str(key): {"content": name, "special": True} for key, name in rows.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "add_bos_token": True}))


WRITERS = {"json": write_json, "qwen2": write_qwen2, "sentencepiece": write_sentencepiece}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, write in WRITERS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        write(made[kind])
    return made


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.load(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module", params=WRITERS)
def tokenizer(request: pytest.FixtureRequest, loaded: dict[str, Tokenizer]) -> Tokenizer:
    return loaded[request.param]


def test_typed_control_tokens_become_ordinary_text(tokenizer):
    control = {tokenizer.id_of(name) for name in [*NINE, "<|im_end|>", "<|im_start|>"]}
    for text in (TRICKS, TRICKS * 200, "".join(NINE), "<|im_end|>"):
        ids = tokenizer.encode(text, grounding=False)
        assert not control & set(ids)
        assert tokenizer.decode(ids) == text


def test_grounding_tokens_are_meant_when_grounding(tokenizer):
    text = "<ref>soup</ref><box>[[1, 2, 3, 4]]</box>"
    ids = tokenizer.encode(text)
    assert [ids[0], ids[-1]] == [tokenizer.id_of("<ref>"), tokenizer.id_of("</box>")]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, keep_grounding=False) == "soup[[1, 2, 3, 4]]"
    assert tokenizer.id_of("<ref>") not in tokenizer.encode(text, grounding=False)


def test_special_tokens_are_left_out_unless_asked_for(tokenizer):
    ids = [tokenizer.id_of("<|im_start|>"), *tokenizer.encode("soup"), tokenizer.id_of("<|im_end|>")]
    assert tokenizer.decode(ids) == "soup"
    assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>soup<|im_end|>"


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), max_size=40))
def test_text_comes_back_from_its_ids(loaded, kind, text):
    # SentencePiece writes a space as U+2581 and has no NUL; Qwen2 composes accents (NFC), the others change nothing.
    wanted = unicodedata.normalize("NFC", text) if kind == "qwen2" else text
    assert loaded[kind].decode(loaded[kind].encode(text)) == wanted


@pytest.mark.parametrize("kind", WRITERS)
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_stream_gives_whole_characters_that_sum_to_decode(loaded, kind, data):
    tokenizer = loaded[kind]
    text = data.draw(st.text("ab 图中番🍜👩‍🍳é", max_size=20))
    ids = data.draw(st.one_of(st.just(tokenizer.encode(text)), st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30)))
    stream = tokenizer.stream()
    parts = [stream.push(token_id) for token_id in ids]
    assert "".join([*parts, stream.end()]) == tokenizer.decode(ids)
    if ids == tokenizer.encode(text):
        assert "\ufffd" not in "".join(parts)


def test_a_character_is_held_back_until_its_last_byte(tokenizer):
    stream = tokenizer.stream()
    ids = tokenizer.encode("麵")  # in no corpus: three byte tokens
    assert len(ids) == 3
    assert [stream.push(token_id) for token_id in ids] == ["", "", "麵"]
    assert stream.push(ids[0]) == ""
    assert stream.end() == "\ufffd"


def test_what_is_missing_is_told(tokenizer, tmp_path):
    assert tokenizer.has("<IMG_CONTEXT>") and not tokenizer.has("<phantom>")
    with pytest.raises(CheckpointError, match="<phantom>"):
        tokenizer.id_of("<phantom>")
    with pytest.raises(CheckpointError, match=f"{tokenizer.vocab_size:,}"):
        tokenizer.decode([tokenizer.vocab_size])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(PromptError, match="character 3"):
        tokenizer.encode("ab\ud800")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", '{"model": {"type": "Odd"}}'),
        ("tokenizer.model", "no"),
    ],
)
def test_broken_files_are_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)


def test_side_files_that_disagree_are_refused(folders, tmp_path):
    shutil.copytree(folders["qwen2"], tmp_path, dirs_exist_ok=True)
    number = json.loads((tmp_path / "added_tokens.json").read_text())["<img>"]
    config = {"added_tokens_decoder": {str(number): {"content": "<other>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"id {number}"):
        Tokenizer.load(tmp_path)


def test_only_families_that_put_a_bos_in_front_have_one(folders, tmp_path):
    assert Tokenizer.load(folders["sentencepiece"]).bos_id == 1
    assert Tokenizer.load(folders["qwen2"]).bos_id is None
    assert Tokenizer.load(folders["json"]).bos_id is None
    shutil.copytree(folders["json"], tmp_path, dirs_exist_ok=True)
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    front = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    raw["post_processor"] = {  # as in Llama-3's file
        "type": "Sequence",
        "processors": [{"type": "TemplateProcessing", "single": [front, {"Sequence": {"id": "A", "type_id": 0}}]}],
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.bos_id == tokenizer.id_of("<|endoftext|>")


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_json_ids_equal_the_tokenizers_package(folders, loaded, text):
    theirs = tokenizers.Tokenizer.from_file(str(folders["json"] / "tokenizer.json"))
    theirs.encode_special_tokens = True
    assert loaded["json"].encode(text, grounding=False) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", ["I'll eat 1234 dishes.\n\n  Now!", "图中是什么食物？", "e\u0301 🍜", "   x  \n", "user\nWhat?"])
def test_qwen2_ids_equal_transformers(folders, text):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle of this test; PEFT brings it")
    theirs = transformers.Qwen2Tokenizer.from_pretrained(str(folders["qwen2"]))
    assert Tokenizer.load(folders["qwen2"]).encode(text) == theirs(text)["input_ids"]


def test_internlm2_has_its_published_ids(tmp_path):
    if not INTERNLM2.is_file():
        pytest.skip(f"needs InternLM2's SentencePiece model at {INTERNLM2}")
    shutil.copy(INTERNLM2, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({name: 92544 + index for index, name in enumerate(NINE)}))
    rows = {"92542": "<|im_end|>", "92543": "<|im_start|>"}
    config = {"added_tokens_decoder": {key: {"content": name, "special": True} for key, name in rows.items()}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 92553
    names = ("<s>", "</s>", "<|im_end|>", "<|im_start|>", *NINE)
    assert [tokenizer.id_of(name) for name in names] == [1, 2, *range(92542, 92553)]
    assert tokenizer.bos_id == 1
    assert tokenizer.encode("user\n图中是什么食物？") == [1008, 364, 73037, 69095, 68757, 60504]
    assert not {1, 2, *range(92542, 92553)} & set(tokenizer.encode(TRICKS))
    assert tokenizer.decode(tokenizer.encode(TRICKS)) == TRICKS
    assert tokenizer.decode(tokenizer.encode("番茄炒蛋 👩‍🍳 is nice")) == "番茄炒蛋 👩‍🍳 is nice"
