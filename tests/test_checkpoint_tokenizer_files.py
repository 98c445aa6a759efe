"""The native layout's tokenizer and chat template: the same ids and the same characters as ours, from each kind of files."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

import tiny
from tessella.chat import IMAGE_MARK, TEMPLATES, Message, place_marks, render, text_of
from tessella.checkpoint.jinja import SLOT, chat_template
from tessella.checkpoint.tokenizer_files import native_tokenizer_files
from tessella.errors import CheckpointError
from tessella.inputs import Inputs
from tessella.tokenizer import Tokenizer
from test_tokenizer import CORPUS, INTERNLM2, NINE, TRICKS, write_json, write_qwen2, write_sentencepiece

CONTROL = [*NINE, "<|im_start|>", "<|im_end|>"]


def write_llama(folder: Path) -> None:
    """SentencePiece with a space in front of every text, as Yi's and Phi-3's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, model_type="bpe", vocab_size=400, byte_fallback=True,
        add_dummy_prefix=True, remove_extra_whitespaces=False, normalization_rule_name="identity",
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({name: size + index for index, name in enumerate(CONTROL)}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))


KINDS = {"json": write_json, "qwen2": write_qwen2, "sentencepiece": write_sentencepiece, "llama": write_llama}


def rewritten(folder: Path) -> Tokenizer:
    """The tokenizer that the native files make, in a folder beside."""
    out = folder / "native"
    out.mkdir()
    for name, text in native_tokenizer_files(folder).items():
        (out / name).write_text(text, encoding="utf-8")
    return Tokenizer.load(out)


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Tokenizer]:
    folder = tmp_path_factory.mktemp(request.param)
    KINDS[request.param](folder)
    return Tokenizer.load(folder), rewritten(folder)


def test_special_tokens_keep_their_ids(pair: tuple[Tokenizer, Tokenizer]) -> None:
    source, native = pair
    assert native.bos_id == source.bos_id and native.vocab_size == source.vocab_size
    assert [native.id_of(name) for name in CONTROL] == [source.id_of(name) for name in CONTROL]
    assert not native.has("<video>")  # the processor's word, which has no row in the model


@given(text=st.text())
def test_any_text_has_the_same_ids_and_comes_back(pair: tuple[Tokenizer, Tokenizer], text: str) -> None:
    source, native = pair
    for part in (text, f"What is  in {text} 图中\n"):
        try:
            part.encode()
        except UnicodeEncodeError:
            continue
        ids = source.encode(part)
        assert native.encode(part) == ids and native.decode(ids) == source.decode(ids)


def test_typed_control_tokens_stay_text(pair: tuple[Tokenizer, Tokenizer]) -> None:
    _, native = pair
    ids = native.encode(TRICKS, grounding=False)
    assert not {native.id_of(name) for name in CONTROL} & set(ids) and native.decode(ids) == TRICKS


@pytest.mark.skipif(not INTERNLM2.is_file(), reason=f"InternLM2's own tokenizer.model is not at {INTERNLM2}")
def test_internlm2s_own_tokenizer_has_the_same_ids(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(INTERNLM2.read_bytes())
    names = ["<|im_end|>", "<|im_start|>", *NINE]
    (tmp_path / "added_tokens.json").write_text(json.dumps({name: 92542 + i for i, name in enumerate(names)}))
    source, native = Tokenizer.load(tmp_path), rewritten(tmp_path)
    assert [native.id_of(name) for name in names] == list(range(92542, 92553)) and native.bos_id == 1
    for text in ((Path(__file__).parents[1] / "README.zh.md").read_text(encoding="utf-8"), "a  b\t\tc\x00——……ＡＢ🥟"):
        assert native.encode(text) == source.encode(text)


def test_a_tokenizer_that_would_give_other_ids_is_refused(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    names = json.loads((tmp_path / "added_tokens.json").read_text())
    (tmp_path / "added_tokens.json").write_text(json.dumps({**names, "<far>": max(names.values()) + 5}))
    with pytest.raises(CheckpointError, match=r'"<far>" has the id \d+, in a tokenizer\.json it would have'):
        native_tokenizer_files(tmp_path)


# ---- tokens that drop the white space behind them


def test_phi3s_tokens_drop_the_white_space_behind_them_as_its_tokenizer_does(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer.from_str(tiny.tiny_tokenizer().to_str())
    raw = json.loads(made.to_str())
    for row in raw["added_tokens"]:
        row["rstrip"] = row["content"] in tiny.PHI3_TOKENS
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    oracle = tokenizers.Tokenizer.from_str(json.dumps(raw))
    config = tiny.tiny_config("Phi3ForCausalLM")
    turns = [Message("user", " \n What is it?"), Message("assistant", " It is rice. "), Message("user", "\n图中")]
    text = text_of(render(turns, TEMPLATES["phi3-chat"], open_turn=True))
    wanted = oracle.encode(text, add_special_tokens=False).ids
    for tokenizer in (Tokenizer.load(tmp_path), rewritten(tmp_path)):
        ids = Inputs(config, tokenizer).build(turns).ids.tolist()
        assert ids == wanted and "\n" not in tokenizer.decode(ids, skip_special=False)


# ---- chat templates


def rendered(template: str, messages: list[dict[str, Any]], open_turn: bool = True) -> str:
    # the environment in which transformers renders chat templates
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=messages, add_generation_prompt=open_turn)


@pytest.mark.parametrize("bos", [None, "<s>"])
@pytest.mark.parametrize("name", [name for name, one in TEMPLATES.items() if not one.picture_before_bos])
@pytest.mark.parametrize("system", [None, "Be 'short' \\ {{x}}.\n", ""])
def test_a_chat_template_renders_our_prompt_character_for_character(name: str, system: str | None, bos: str | None) -> None:
    template = TEMPLATES[name]
    turns = [
        Message("user", "<image>\nWhat is 'it'?"),
        Message("assistant", " An <image> tag.\n"),
        Message("user", "\\n{% 50 %}"),
    ]
    messages = ([] if system is None else [Message("system", system)]) + turns
    for open_turn, part in ((True, messages), (False, messages[:-1])):
        wanted = (bos or "") + "".join(SLOT if p.kind == "image" else p.text for p in render(part, template, open_turn=open_turn))
        rows = [{"role": message.role, "content": message.text} for message in part]
        assert rendered(chat_template(template, bos), rows, open_turn) == wanted


def test_pictures_in_a_list_are_labelled_as_ours() -> None:
    def row(text: str, pictures: int) -> dict[str, Any]:
        return {"role": "user", "content": [*[{"type": "image"}] * pictures, {"type": "text", "text": text}]}

    answer = {"role": "assistant", "content": [{"type": "text", "text": "Soup."}]}
    turns = [Message("user", place_marks("What?", 1)), Message("assistant", "Soup."), Message("user", place_marks("And?", 2, 2))]
    template = TEMPLATES["internvl2_5"]
    for rows, part in (
        ([row("What?", 1), answer, row("And?", 2)], turns),
        ([row("And?", 3)], [Message("user", place_marks("And?", 3))]),
    ):
        wanted = text_of(render(part, template, open_turn=True)).replace(IMAGE_MARK, SLOT)
        assert rendered(chat_template(template, None), rows) == wanted
