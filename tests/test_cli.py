"""The command line: quick help without torch, one clear message for every mistake, results as JSON."""

import errno
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tessella import cli
from tessella.commands.chat import words_of_chat
from tessella.errors import DataError
from tessella.image import LIMIT_MEGAPIXELS
from tessella.train.recipe import Recipe

COMMANDS = ("demo", "chat", "finetune", "convert", "verify", "evaluate", "serve", "inspect", "runs", "ui")


def tessella(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, as a person does."""
    command = [sys.executable, "-m", "tessella.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, **options)  # type: ignore[call-overload]


# ---- help


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_imports_no_torch(words: list[str]) -> None:
    code = f"""
import sys
from tessella.cli import main
try:
    main({words})
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "transformers", "numpy", "PIL", "peft", "matplotlib"}} & set(sys.modules)
print(f"heavy={{sorted(heavy)}} count={{len(sys.modules)}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    last = done.stdout.splitlines()[-1]
    assert last.startswith("heavy=[] ")
    # Half a second on a slow machine. The count is what can be held steady in a test; torch alone would bring about 1,500.
    assert int(last.partition("count=")[2]) < 600


def test_help_lists_the_commands_that_exist_and_no_other() -> None:
    text = tessella("--help").stdout
    assert "{" + ",".join(COMMANDS) + "}" in text


def test_the_flags_of_finetune_stand_in_groups_by_topic() -> None:
    _, head, text = tessella("finetune", "--help").stdout.partition(" data options ")
    flags = ("--max-tiles", "learning options", "--lora-rank", "running options", "--output", "decoders options")
    assert head
    places = [text.index(f" {flag} ") for flag in (*flags, "--scenes")]
    assert places == sorted(places)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_teaches_by_example(name: str) -> None:
    text = tessella(name, "--help").stdout
    assert f"tessella {name}" in text.partition("examples:")[2]
    assert "--json" in text
    assert name in ("ui", "runs") or ("--device" in text and "--dtype" in text)  # these run no model


# ---- flags


def test_every_field_of_a_recipe_is_a_flag(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('epochs = 7\nlora_rank = 4\ndata = ["a.jsonl"]\n', encoding="utf-8")
    command = cli.parse(
        ["finetune", str(recipe), "--lora-rank", "8", "--output", "somewhere", "--resume", "--betas", "0.9", "0.95"]
    )
    assert isinstance(command, cli.Finetune)
    expected = Recipe(epochs=7.0, lora_rank=8, data=(Path("a.jsonl"),), output=Path("somewhere"), resume=True, betas=(0.9, 0.95))
    assert command.recipe == expected


@pytest.mark.parametrize(
    ("words", "model", "prompt"),
    [
        ([], "tessella-nano", None),
        (["what is it?"], "tessella-nano", "what is it?"),
        (["tessella-nano"], "tessella-nano", None),
        (["./models/mine"], "./models/mine", None),
        (["OpenGVLab/InternVL2-2B"], "OpenGVLab/InternVL2-2B", None),
        (["and/or what is it?"], "tessella-nano", "and/or what is it?"),
        (["tessella-nano", "./models"], "tessella-nano", "./models"),
    ],
)
def test_one_word_of_chat_is_a_model_only_when_it_looks_like_one(words: list[str], model: str, prompt: str | None) -> None:
    command = cli.parse(["chat", *words])
    assert isinstance(command, cli.Chat)
    assert words_of_chat(command.model, command.prompt) == (model, prompt)


def test_pictures_do_not_swallow_the_question() -> None:
    command = cli.parse(["chat", "--image", "a.jpg", "--image", "b.jpg", "what differs?"])
    assert isinstance(command, cli.Chat)
    assert command.image == (Path("a.jpg"), Path("b.jpg"))
    assert command.model == "what differs?"


# ---- mistakes


def test_teaching_without_the_train_extra_tells_how_to_get_it() -> None:
    code = "import sys; sys.modules['peft'] = None; from tessella.cli import main; sys.exit(main(['finetune', '--data', 'a']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "peft is not installed" in done.stderr and "pip install 'tessella[train]'" in done.stderr


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["finetune", "nowhere.toml"], "nowhere.toml"),
        (["finetune", "--epochs", "-1"], "epochs is -1"),
        (["chat", "./nowhere", "hello"], "nowhere"),
        (["chat", "nobody/nothing", "hello"], "nobody/nothing"),
        (["chat", "--temperature", "-1", "hello"], "temperature"),
        (["inspect", "./nowhere"], "nowhere"),
        (["convert", "./nowhere", "./out"], "nowhere"),
        (["evaluate", "./nowhere"], "--data"),
        (["chat", "--json", "no/such/folder/x.json", "hello"], "no/such/folder"),
        (["chat", "--json", ".", "hello"], "is a folder"),
        (["chat", "pyproject.toml"], "--image pyproject.toml"),
        (["chat", "./pyproject.toml", "hello"], "--image ./pyproject.toml"),
        (["finetune", "photos/"], "photos is no recipe"),
        (["finetune", "--data", "a.jsonl", "pyproject.toml"], "unknown key"),
        (["evaluate", "./nowhere", "--recipe", "r.toml", "--data", "a.jsonl", "--seed", "1"], "leave --data and --seed out"),
        (["evaluate", "./nowhere", "--data", "a.jsonl", "--limit", "-1"], "limit is -1"),
        (["runs", "./nowhere"], "no such folder"),
        (["runs", "src"], "holds no run"),
        (["runs", "a", "b", "c"], "two are compared"),
        (["runs", "src", "tests"], "src holds no run"),
    ],
)
def test_a_mistake_is_one_clear_message_and_exit_2(words: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    error = capfd.readouterr().err
    assert error.startswith("tessella: ") and told in error and "Traceback" not in error


@pytest.mark.parametrize("words", ["chatt", "--version-of-what", "chat --imagee x", "convert only-one", "convert a b --to pth"])
def test_unknown_words_end_with_2_and_a_hint(words: str) -> None:
    done = tessella(*words.split())
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout
    assert "--help" in done.stderr + done.stdout


def test_a_recipe_that_was_read_as_data_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("epochs = 2\n", encoding="utf-8")
    assert cli.main(["finetune", "--data", "a.jsonl", str(recipe)]) == 2
    assert "the recipe goes first" in capsys.readouterr().err


def test_the_limit_of_megapixels_is_one_number() -> None:
    assert cli.Chat().limit_megapixels == cli.Inspect().limit_megapixels == Recipe().limit_megapixels == LIMIT_MEGAPIXELS
    assert cli.Evaluate(()).limit_megapixels == LIMIT_MEGAPIXELS


def test_a_terminal_without_chinese_loses_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: cli.Chat) -> dict[str, object]:
        print("麻婆豆腐, please")
        return {}

    screen = io.BytesIO()
    monkeypatch.setattr(cli.Chat, "run", run)
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(screen, encoding="ascii", write_through=True))
    assert cli.main(["chat", "hello"]) == 0
    assert screen.getvalue() == b"????, please\n"


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and stderr of a command that raises error."""

    def run(self: cli.Chat) -> dict[str, object]:
        raise error

    monkeypatch.setattr(cli.Chat, "run", run)
    return cli.main(["chat", "hello"]), capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (DataError("3 of 4 rows are bad"), 2, "3 of 4 rows are bad"),
        (KeyboardInterrupt(), 130, "Stopped"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 2, "--tokens-per-pass"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 2, "--max-tiles"),
        (RuntimeError("unable to mmap 314 bytes from file </x>: Cannot allocate memory (12)"), 2, "out of memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 2, "--max-tiles"),
        (MemoryError(), 2, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors"), 2, "out/model.safetensors"),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "permissions"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_a_person_can_mend_is_told_without_a_traceback(
    error: BaseException, code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail_with(error, monkeypatch, capsys)[0] == code
    assert told in fail_with(error, monkeypatch, capsys)[1]


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), AssertionError("ours"), OSError(errno.EIO, "I/O error")])
def test_our_own_mistakes_are_not_hidden(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(type(error)):
        fail_with(error, monkeypatch, capsys)


WITHOUT_EXTRAS = """
import sys
sys.modules |= dict.fromkeys(("peft", "transformers", "scipy", "tensorboard", "av", "fastapi", "gradio"))  # as if not installed
from tessella import cli
sys.exit(cli.main(["inspect", "docs/three-foods.png"]))
"""


def test_a_picture_is_inspected_without_any_extra() -> None:
    """inspect reckons with what teaching needs, and so imports much of it; nothing of that may need PEFT."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
