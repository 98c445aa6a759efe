"""Pieces of text as they come, and where an answer ends."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from tessella.chat import Message
from tessella.checkpoint.read import Loaded, load
from tessella.generate import generate, generate_batch, stream_text, visual_tokens
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
    monkeypatch.setattr(loaded.model, "visual_tokens", lambda tiles: (seen.append(len(tiles)), plain(tiles))[1])
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
