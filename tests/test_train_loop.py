"""A run as a whole, on tiny models: it learns, stops, goes on, and refuses."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("peft", reason="teaching goes through PEFT, which is not installed: it is in the train extra")

from colours import colour_samples, interrupt_at, recipe_of
from tessella.checkpoint import folder as folders
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.read import find_model, load
from tessella.errors import ConfigError, DataError, MemoryError_, TrainingError
from tessella.inputs import Picture
from tessella.train import state
from tessella.train.batch import Pack
from tessella.train.held_out import HeldOut
from tessella.train.limits import Stop
from tessella.train.log import Event
from tessella.train.loop import TrainResult, train
from tessella.train.passes import Passes
from tiny import tiny_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("base") / "tiny", "LlamaForCausalLM")


def learned(result: TrainResult) -> dict[str, torch.Tensor]:
    return load_file(result.adapter / "adapter_model.safetensors")


def test_a_run_learns_what_it_is_shown(folder: Path, tmp_path: Path) -> None:
    result = train(recipe_of(folder, tmp_path, epochs=40.0), samples=colour_samples())
    assert result.finished and result.steps == result.total_steps == 120
    assert result.losses[-1][1] < 0.1 * result.losses[0][1]


def test_the_adapter_gives_the_taught_answers_when_loaded_as_a_model(folder: Path, tmp_path: Path) -> None:
    samples = colour_samples()
    result = train(recipe_of(folder, tmp_path, epochs=40.0, sample_answers=4), samples=samples, held_out=samples[:4])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = next(row["answers"] for row in rows if row["kind"] == "answers")
    assert [row["answer"] for row in told] == [row["expected"] for row in told]
    again = load(result.adapter, device="cpu", dtype="float32")
    assert again.folder == folder
    assert result.held_out_losses[-1][1] < 0.6


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_six_steps_equal_three_and_three_resumed_bit_for_bit(folder: Path, tmp_path: Path, dropout: float) -> None:
    samples = colour_samples()
    straight = train(recipe_of(folder, tmp_path / "a", lora_dropout=dropout), samples=samples)
    recipe = recipe_of(folder, tmp_path / "b", lora_dropout=dropout)
    part = train(recipe, samples=samples, on_event=interrupt_at(3))
    assert (part.finished, part.stopped_by, part.steps, part.total_steps) == (False, "interrupted", 3, 6)
    rest = train(replace(recipe, resume=True), samples=samples)
    assert rest.finished and rest.steps == 6
    assert rest.losses == straight.losses
    ours, theirs = learned(rest), learned(straight)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ctrl_c_between_two_passes_drops_the_half_step(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = Passes.token_losses

    def loss(self: Passes, hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        calls.append(pack)
        if len(calls) == 4:  # the second pass of the second step
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self, hidden, pack)

    samples = colour_samples()
    monkeypatch.setattr(Passes, "token_losses", loss)
    recipe = recipe_of(folder, tmp_path / "a", samples_per_step=6, tokens_per_pass=64)
    part = train(recipe, samples=samples)
    assert part.steps == 1 and not part.finished
    monkeypatch.setattr(Passes, "token_losses", plain)
    rest = train(replace(recipe, resume=True), samples=samples)
    whole = train(replace(recipe, output=tmp_path / "b"), samples=samples)
    assert all(torch.equal(learned(rest)[name], value) for name, value in learned(whole).items())


def test_the_signal_handler_is_given_back(folder: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    train(recipe_of(folder, tmp_path, max_steps=1), samples=colour_samples())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_time_limit_saves_and_resume_finishes(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, tmp_path, time_limit_s=1e-6)
    part = train(recipe, samples=colour_samples())
    assert (part.finished, part.stopped_by, part.steps) == (False, "time limit", 0)
    assert train(replace(recipe, resume=True, time_limit_s=None), samples=colour_samples()).finished


def test_resume_refuses_another_recipe_and_names_the_fields(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, tmp_path, max_steps=2)
    train(recipe, samples=colour_samples())
    with pytest.raises(TrainingError, match=r"learning_rate was 0\.005, is 0\.001.*another output"):
        train(replace(recipe, resume=True, learning_rate=1e-3), samples=colour_samples())


def test_resume_refuses_other_samples(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, tmp_path, max_steps=2)
    train(recipe, samples=colour_samples())
    with pytest.raises(TrainingError, match="samples are not the same"):
        train(replace(recipe, resume=True), samples=colour_samples()[::-1])


def test_resume_with_other_passes_is_the_same_run(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, tmp_path)
    train(recipe, samples=colour_samples(), on_event=interrupt_at(2))
    assert train(replace(recipe, resume=True, tokens_per_pass=64), samples=colour_samples()).finished


def test_a_second_run_does_not_bury_the_first(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, tmp_path, max_steps=1)
    train(recipe, samples=colour_samples())
    with pytest.raises(TrainingError, match="holds a run already; say --resume"):
        train(recipe, samples=colour_samples())


def test_a_broken_newest_checkpoint_is_told_and_the_one_before_is_used(folder: Path, tmp_path: Path) -> None:
    recipe = recipe_of(folder, tmp_path / "a", save_every=2, keep=3)
    train(recipe, samples=colour_samples(), on_event=interrupt_at(5))
    newest = tmp_path / "a/checkpoints/step-000005/state.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(data)
    told: list[str] = []
    resumed = replace(recipe, resume=True)
    rest = train(resumed, samples=colour_samples(), on_event=lambda event: told.append(str(event.values.get("text"))))
    assert any("step-000005 is broken (state.safetensors has another hash" in text for text in told)
    assert any("resumed from" in text and "step-000004" in text for text in told)
    straight = train(replace(recipe, output=tmp_path / "b"), samples=colour_samples())
    assert all(torch.equal(learned(rest)[name], value) for name, value in learned(straight).items())


def test_a_broken_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    progress = state.Progress(3, 6, {}, "", 1.0)
    for value in (0.0, 1.0):
        saved = state.save(tmp_path, progress, {"w": torch.full((4,), value)}, keep=2)
        found, told = state.newest(tmp_path)
        assert found is not None and not told and torch.equal(found.tensors["w"], torch.full((4,), value))
        (saved / state.TENSORS).unlink()


def test_only_the_newest_checkpoints_are_kept(folder: Path, tmp_path: Path) -> None:
    train(recipe_of(folder, tmp_path, save_every=1, keep=2), samples=colour_samples())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000005", "step-000006"]


def test_a_full_disk_leaves_older_checkpoints_and_nothing_half_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(folder, tmp_path, save_every=2)

    def fill(event: Event) -> None:
        if event.kind == "checkpoint":
            monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: folders.shutil._ntuple_diskusage(10, 10, 0))

    with pytest.raises(TrainingError, match=r"could not be saved at step 4.*MiB are needed.*Older checkpoints stand"):
        train(recipe, samples=colour_samples(), on_event=fill)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert train(replace(recipe, resume=True), samples=colour_samples()).finished


def test_a_loss_that_is_not_finite_names_step_and_samples(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Passes.token_losses
    calls = []

    def loss(self: Passes, hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        calls.append(pack)
        return plain(self, hidden, pack) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(Passes, "token_losses", loss)
    with pytest.raises(TrainingError, match=r"loss is not finite at step 3 of 6.*made:\d+.*Lower learning_rate \(now 0\.005\)"):
        train(recipe_of(folder, tmp_path, report_every=100, save_every=1), samples=colour_samples())
    assert (tmp_path / "checkpoints/step-000002").is_dir()
    assert not (tmp_path / "checkpoints/step-000003").exists()


def test_no_memory_is_told_with_estimate_and_way_out(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(self: Passes, hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        return torch.empty(1 << 56)

    monkeypatch.setattr(Passes, "token_losses", loss)
    with pytest.raises(MemoryError_, match=r"needs about \d.* GiB.*Lower tokens_per_pass \(now 8,192"):
        train(recipe_of(folder, tmp_path), samples=colour_samples())


def test_other_runtime_errors_are_not_called_memory(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(self: Passes, hidden: torch.Tensor, pack: Pack) -> torch.Tensor:
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(Passes, "token_losses", loss)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train(recipe_of(folder, tmp_path), samples=colour_samples())


def test_bad_pictures_go_into_the_ledger_and_too_many_stop_the_run(folder: Path, tmp_path: Path) -> None:
    samples = colour_samples(12)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    samples[5] = replace(samples[5], pictures=(Picture(broken),))
    result = train(recipe_of(folder, tmp_path / "a"), samples=samples)
    assert result.finished and result.ledger["used"] == 11
    assert [place for place, _ in result.ledger["skipped"]] == ["made:5"]
    with pytest.raises(DataError, match=r"8\.3% of the samples turned out bad while training; at most 5\.0%"):
        train(recipe_of(folder, tmp_path / "b", max_bad_share=0.05), samples=samples)


def test_an_adapter_is_taught_further_and_both_are_asked_and_converted_as_one(folder: Path, tmp_path: Path) -> None:
    first = train(recipe_of(folder, tmp_path / "a", max_steps=3), samples=colour_samples())
    second = train(recipe_of(tmp_path / "a", tmp_path / "b", max_steps=3), samples=colour_samples())
    assert second.losses[0] < first.losses[0]  # it begins where the first ended
    found, adapters = find_model(tmp_path / "b")
    assert found == folder and adapters == (first.adapter.resolve(), second.adapter)
    merged = convert(tmp_path / "b", tmp_path / "merged", Wish(proof="logits"))
    assert merged.proof.holds and merged.merged_pairs
    asked, whole = (
        dict(load(place, device="cpu", dtype="float32").model.named_parameters())
        for place in (tmp_path / "b", tmp_path / "merged")
    )
    alone = dict(load(first.adapter, device="cpu", dtype="float32").model.named_parameters())
    assert all(torch.allclose(asked[name], whole[name], atol=1e-6) for name in whole)
    assert any(not torch.allclose(alone[name], whole[name], atol=1e-6) for name in whole)
    with pytest.raises(TrainingError, match="would be written over"):
        train(recipe_of(tmp_path / "a", tmp_path / "a", max_steps=3, resume=True), samples=colour_samples())


def test_an_unknown_target_names_the_known_ones(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r'names "wqkv", which is no linear layer there; did you mean q_proj, k_proj, v_proj\? there are q_proj'
    ):
        train(recipe_of(folder, tmp_path, lora_targets=("wqkv",)), samples=colour_samples())


def test_no_sample_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample"):
        train(recipe_of(folder, tmp_path), samples=[])


@pytest.mark.parametrize(
    "parts",
    [
        {"language": "lora", "tower": "frozen", "projector": "frozen"},
        {"language": "frozen", "tower": "frozen", "projector": "train"},
        {"language": "lora", "tower": "lora", "projector": "train"},
        {"language": "frozen", "tower": "full", "projector": "frozen"},
    ],
)
def test_only_what_the_recipe_names_learns_and_the_adapter_carries_it(
    folder: Path, tmp_path: Path, parts: dict[str, str]
) -> None:
    result = train(recipe_of(folder, tmp_path, **parts), samples=colour_samples())
    roots = {name.removeprefix("base_model.model.").split(".")[0] for name in learned(result)}
    names = {"language": "language_model", "tower": "vision_model", "projector": "mlp1"}
    assert roots == {names[part] for part, how in parts.items() if how != "frozen"}
    base, taught = load(folder, device="cpu", dtype="float32"), load(result.adapter, device="cpu", dtype="float32")
    theirs = dict(base.model.named_parameters())
    changed = {n.split(".")[0] for n, p in taught.model.named_parameters() if not torch.equal(p, theirs[n])}
    assert changed == roots


@pytest.mark.parametrize("tower", ["frozen", "lora"])
def test_a_whole_language_model_is_written_in_the_official_layout(folder: Path, tmp_path: Path, tower: str) -> None:
    samples = colour_samples()
    recipe = recipe_of(folder, tmp_path, language="full", tower=tower, epochs=20.0, learning_rate=2e-3)
    result = train(recipe, samples=samples, held_out=samples[:4])
    assert result.losses[-1][1] < 0.5 * result.losses[0][1]
    model = load(result.adapter, device="cpu", dtype="float32")
    passes = Passes(model.model, replace(recipe, tower="frozen"))
    held_out = HeldOut(samples[:4], model, passes, recipe)
    assert held_out.loss(Stop(None, 0.0)) == pytest.approx(result.held_out_losses[-1][1], rel=1e-3)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no bfloat16 arithmetic")
def test_bfloat16_learns_with_float32_masters(folder: Path, tmp_path: Path) -> None:
    result = train(recipe_of(folder, tmp_path, dtype="bfloat16", epochs=40.0), samples=colour_samples())
    assert result.losses[-1][1] < 0.2 * result.losses[0][1]
    values = learned(result)
    assert all(value.dtype == torch.float32 for value in values.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in values.values())


def test_features_of_a_frozen_tower_are_computed_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Passes] = []
    plain = Passes.__init__

    def init(self: Passes, *args: object) -> None:
        plain(self, *args)
        seen.append(self)

    monkeypatch.setattr(Passes, "__init__", init)
    cached = train(recipe_of(folder, tmp_path / "a", epochs=5.0), samples=colour_samples())
    uncached = train(recipe_of(folder, tmp_path / "b", epochs=5.0, cache_features=False), samples=colour_samples())
    assert [passes.tiles.computed for passes in seen] == [12, 60]
    assert all(torch.equal(learned(cached)[name], value) for name, value in learned(uncached).items())


def test_metrics_are_json_lines_and_tensorboard_has_them_too(folder: Path, tmp_path: Path) -> None:
    samples = colour_samples()
    recipe = recipe_of(folder, tmp_path, tensorboard=True, evaluate_every=3, sample_answers=1)
    result = train(recipe, samples=samples, held_out=samples[:2])
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if "held_out_loss" in row] == [0, 3, 6]  # 0: before it learns
    assert all({"tokens_per_s", "memory_gib", "learning_rate", "grad_norm"} <= row.keys() for row in rows if "loss" in row)
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))
    json.dumps(result.as_json())
