"""Pieces of text as they come, and where an answer ends."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tessella.chat import Message
from tessella.checkpoint.read import Loaded, load
from tessella.errors import MemoryError_, NumbersError
from tessella.generate import estimate_bytes, generate, generate_batch, stream_text, visual_tokens
from tessella.inputs import Picture
from tessella.sampling import SamplingParams
from tessella.stops import StopText, held_back
from tiny import tiny_folder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return load(tiny_folder(tmp_path_factory.mktemp("tiny") / "model", "LlamaForCausalLM", 0), device="cpu", dtype="float32")


def prompt(loaded: Loaded, text: str = "hello"):  # type: ignore[no-untyped-def]
    return loaded.inputs.build([Message("user", text)])


def test_pieces_add_up_to_the_decoded_answer(loaded: Loaded) -> None:
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=3)
    ids = list(generate(loaded.model, prompt(loaded), params, loaded.stop_ids))
    pieces = list(stream_text(loaded.model, prompt(loaded), params, loaded.tokenizer, loaded.stop_ids))
    assert len(ids) > 1 and "".join(pieces) == loaded.tokenizer.decode(ids)


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_ends_before_its_first_stop_string_whatever_the_pieces(loaded: Loaded, seed: int) -> None:
    free = SamplingParams(max_tokens=40, temperature=1.0, seed=seed)
    whole = "".join(stream_text(loaded.model, prompt(loaded), free, loaded.tokenizer, loaded.stop_ids))
    for start in range(0, max(1, len(whole) - 3), 5):
        stop = whole[start : start + 3]
        if not stop:
            continue
        params = SamplingParams(max_tokens=40, temperature=1.0, seed=seed, stop=(stop,))
        cut = "".join(stream_text(loaded.model, prompt(loaded), params, loaded.tokenizer, loaded.stop_ids))
        assert cut == whole[: whole.find(stop)]


def test_text_that_may_become_a_stop_string_isheld_back() -> None:
    assert held_back("the EN", ("END",)) == 2
    assert held_back("the END", ("END",)) == 0  # found, not begun
    assert held_back("the", ("END",)) == 0


def test_a_stop_string_is_found_across_pieces_and_what_was_held_comes_at_the_end() -> None:
    stop = StopText(("END", "ND!"))
    assert [stop.push(piece) for piece in ("an E", "", "N", "T", " E")] == ["an ", "", "", "ENT", " "]
    assert stop.end() == "E" and not stop.found
    assert (stop.push("NEND!"), stop.found) == ("N", True)


def test_a_stop_id_ends_a_row_and_is_not_given_out(loaded: Loaded) -> None:
    params = SamplingParams(max_tokens=20)
    free = list(generate(loaded.model, prompt(loaded), params, stop_ids=()))
    stop = free[7]
    assert list(generate(loaded.model, prompt(loaded), params, stop_ids=(stop,))) == free[: free.index(stop)]
    done: list[int] = []
    prompts = [prompt(loaded), prompt(loaded, "a longer prompt than that")]
    rows = generate_batch(loaded.model, prompts, params, (stop,), done.append)
    assert rows[0] == free[: free.index(stop)] and sum(done) == 2


def test_equal_tiles_are_seen_once_and_stay_in_their_places(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    red, blue = (Picture(Image.new("RGB", (28, 28), name), max_tiles=1) for name in ("red", "blue"))
    asked = [loaded.inputs.build([Message("user", "<image>" * len(some))], some) for some in ([red], [blue, red], [red])]
    seen: list[int] = []
    plain = loaded.model.visual_tokens
    monkeypatch.setattr(loaded.model, "visual_tokens", lambda tiles, _: (seen.append(len(tiles)), plain(tiles))[1])
    together = visual_tokens(loaded.model, asked)
    assert seen == [2]
    torch.testing.assert_close(together, torch.cat([plain(one.tiles) for one in asked]))


@pytest.mark.gpu
def test_the_packed_kernel_of_a_gpu_equals_rows_apart() -> None:
    from tessella.model.attend import Causal, one_row

    torch.manual_seed(0)
    lengths = [5, 70, 1, 33]
    q, k, v = (torch.randn(sum(lengths), heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (6, 2, 2))
    packed = Causal(lengths, "cuda")(0, q, k, v).float()
    apart = torch.cat([one_row(*row).float() for row in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)])
    assert (packed - apart).norm() / apart.norm() < 1e-2


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_ids_in_float32(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "InternLM2ForCausalLM", 1)
    params = SamplingParams(max_tokens=32)
    answers = []
    for device in ("cpu", "cuda"):
        there = load(folder, device=device, dtype="float32")
        answers.append(list(generate(there.model, prompt(there), params, stop_ids=())))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named_and_no_empty_answer_is_given(tmp_path: Path, value: float) -> None:
    broken = load(tiny_folder(tmp_path / "model", "LlamaForCausalLM", 0), device="cpu", dtype="float32")
    layer = broken.model.language_model.model.layers[1].mlp.down_proj
    layer.weight.data = layer.weight.data.clone()
    layer.weight.data[3, 5] = value
    with pytest.raises(
        NumbersError, match=r"because language_model\.model\.layers\.1\.mlp\.down_proj\.weight hold such numbers; fetch"
    ):
        list(generate(broken.model, prompt(broken), SamplingParams(), broken.stop_ids))


def test_a_type_that_is_too_narrow_is_told_from_broken_weights(tmp_path: Path) -> None:
    loaded = load(tiny_folder(tmp_path / "model", "LlamaForCausalLM", 0), device="cpu", dtype="float32")
    head = loaded.model.language_model.lm_head
    assert head is not None
    head.weight.data = head.weight.data * 3e38
    with pytest.raises(NumbersError, match="float32 is too narrow for it"):
        list(generate(loaded.model, prompt(loaded), SamplingParams(), loaded.stop_ids))


def test_no_memory_left_is_told_with_an_estimate_and_what_to_lower(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: object) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(loaded.model, "logits", full)
    with pytest.raises(MemoryError_, match=r"1 prompts of \d+ tokens and 0 tiles, .* need about 0\.0 GiB .* --max-tiles"):
        list(generate(loaded.model, prompt(loaded), SamplingParams(), loaded.stop_ids))


def test_the_estimate_grows_with_what_it_is_made_of(loaded: Loaded) -> None:
    short, long = prompt(loaded), prompt(loaded, "hello " * 50)
    shown = loaded.inputs.build([Message("user", "<image>\nhello")], [Picture(Image.new("RGB", (56, 56)))])
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    few, many = SamplingParams(max_tokens=1), SamplingParams(max_tokens=1000)
    language = loaded.config.language
    a_token = 2 * language.num_layers * language.num_kv_heads * language.head_dim * 4
    assert weights < estimate_bytes(loaded.model, [short], few) < estimate_bytes(loaded.model, [long], few)
    assert estimate_bytes(loaded.model, [short], many) - estimate_bytes(loaded.model, [short], few) == 999 * a_token
    assert estimate_bytes(loaded.model, [shown] * 9, few) > estimate_bytes(loaded.model, [short] * 9, few)
