"""The flags of `tessella serve`: closed by default, a key where strangers come, and docs/serve.md knows them all."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from tessella.errors import ConfigError
from tessella.serving import Serve, keys_in, parse_adapter, served_name

PAGE = (Path(__file__).parents[1] / "docs" / "serve.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def no_keys_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TESSELLA_API_KEY", raising=False)
    monkeypatch.delenv("TESSELLA_ADMIN_KEY", raising=False)


def test_the_page_tells_every_flag_and_no_other() -> None:
    table = PAGE.partition("## Every flag")[2].partition("\n## ")[0]
    told = {
        flag.replace("-", "_")
        for row in table.splitlines()
        for flag in re.findall(r"`--([a-z-]+)", row.partition("|")[2].partition("|")[0])
    }
    assert told | {"model"} == {field.name for field in fields(Serve)}


def test_by_default_only_this_machine_comes_in_and_nothing_is_fetched_or_loaded() -> None:
    settings = Serve().settings()
    assert (settings.host, settings.on_loopback, settings.keys, settings.admin_key) == ("127.0.0.1", True, (), None)
    assert (settings.image_domains, settings.adapter_root, settings.public, settings.cors_origins) == ((), None, False, ())


def test_a_key_is_made_and_told_where_strangers_come(capsys: pytest.CaptureFixture[str]) -> None:
    (first,), (second,) = Serve(host="0.0.0.0").settings().keys, Serve(host="::").settings().keys
    assert first != second
    told = capsys.readouterr().err
    assert first in told
    assert second in told
    assert len(first) > 30
    assert Serve(host="0.0.0.0", public=True).settings().keys == ()
    assert not capsys.readouterr().err


def test_keys_come_from_flags_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("# of the team\n" + "a" * 20 + "\n\n  " + "b" * 20 + "\n")
    monkeypatch.setenv("TESSELLA_API_KEY", "c" * 20)
    monkeypatch.setenv("TESSELLA_ADMIN_KEY", "d" * 20)
    settings = Serve(api_key=("e" * 20,), key_file=tmp_path / "keys").settings()
    assert settings.keys == ("e" * 20, "a" * 20, "b" * 20, "c" * 20)
    assert settings.admin_key == "d" * 20
    (tmp_path / "keys").write_text("#\n")
    for wrong in (tmp_path / "keys", tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match="key"):
            keys_in(wrong)


def test_a_model_is_called_as_its_folder_or_as_its_hub_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    assert served_name(str(tmp_path / "mine")) == "mine"
    monkeypatch.chdir(tmp_path / "mine")
    assert served_name(".") == "mine"
    assert served_name("tessella-nano") == "tessella-nano"
    assert served_name("OpenGVLab/InternVL2-2B@abc") == "OpenGVLab/InternVL2-2B"
    assert served_name("modelscope:OpenGVLab/InternVL2-2B@abc") == "OpenGVLab/InternVL2-2B"


def test_an_adapter_is_a_name_and_a_folder() -> None:
    assert parse_adapter("food=runs/a=b") == ("food", Path("runs/a=b"))
    for wrong in ("food", "=runs", "food="):
        with pytest.raises(ConfigError, match="NAME=DIR"):
            parse_adapter(wrong)
