"""A name on a hub becomes a folder, once; every way in which that can fail has its own words.

The hub is a stand-in on 127.0.0.1 (hub_stand_in.py); huggingface_hub is the real one.
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import tiny
from hub_stand_in import COMMIT, Hub, serving
from tessella import cli
from tessella.checkpoint import hub as hub_file
from tessella.checkpoint.hub import HubName, hub_folder, hub_name, wanted
from tessella.checkpoint.read import find_model, load, load_model
from tessella.errors import CheckpointError, DownloadError

NAME = "OpenGVLab/InternVL2-Tiny"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What lies on the hub: a model of ours, and things that nobody needs."""
    folder = tiny.tiny_folder(tmp_path_factory.mktemp("hub") / "model", "InternLM2ForCausalLM")
    (folder / "onnx").mkdir()
    for name in ("README.md", "pytorch_model.bin", "picture.jpg", "onnx/model.json", "onnx/model.safetensors"):
        (folder / name).write_bytes(b"not needed")
    (folder / "modeling_internvl_chat.py").write_text("raise SystemExit('this file must never be run')\n")
    return folder


@pytest.fixture
def hub(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it reads the variable once, when it is imported
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)  # it waits before it tries again
    with serving(Hub({NAME: original})) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


def got(hub: Hub) -> list[str]:
    """Files whose contents were asked for, in order."""
    return [line.rpartition("/")[2] for line in hub.asked if line.startswith("GET /" + NAME)]


def test_a_model_named_on_a_hub_is_the_model_that_lies_there(
    hub: Hub, original: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load(NAME, device="cpu", dtype="float32")
    model, _ = load_model(original, dtype=torch.float32)
    for (name, ours), (_, theirs) in zip(loaded.model.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert "fetching" in capsys.readouterr().err


def test_only_what_is_needed_is_fetched_config_last_of_the_small_files_and_weights_at_the_end(hub: Hub, original: Path) -> None:
    folder = hub_folder(HubName(NAME))
    names = got(hub)
    assert names[-2:] == ["config.json", WEIGHTS]
    assert {path.name for path in folder.iterdir()} == set(names)
    assert set(names) == {
        path.name
        for path in original.iterdir()
        if path.is_file() and path.name not in ("README.md", "pytorch_model.bin", "picture.jpg")
    }
    assert "modeling_internvl_chat.py" in names


def test_a_whole_cache_is_used_without_a_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hub_folder(HubName(NAME))
    hub.asked.clear()
    assert find_model(NAME) == (folder, ())
    assert hub.asked == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_model(NAME) == (folder, ())


def test_config_alone_is_fetched_for_a_look_and_the_weights_later(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = find_model(NAME, weights=False)
    assert (folder / "config.json").is_file() and not (folder / WEIGHTS).exists()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_model(NAME, weights=False)[0] == folder
    with pytest.raises(DownloadError, match="without its weights"):
        find_model(NAME)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.asked.clear()
    assert find_model(NAME)[0] == folder
    assert got(hub) == [WEIGHTS]


def test_inspect_looks_at_a_name_without_fetching_its_weights(hub: Hub, tmp_path: Path, original: Path) -> None:
    out = tmp_path / "inspect.json"
    assert cli.main(["inspect", NAME, "--json", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["parameters"]["total"] == sum(weight.numel() for weight in load_model(original)[0].parameters())
    assert result["disk_bytes"] is None and WEIGHTS not in got(hub)


def test_a_revision_is_pinned(hub: Hub) -> None:
    older = "a" * 40
    hub.commits["v1.0"] = older
    assert hub_folder(HubName(NAME, "v1.0")).name == older
    assert hub_folder(HubName(NAME, COMMIT)).name == COMMIT
    hub.commits["v1.0"] = COMMIT  # the tag was moved; what was fetched under it stays
    assert hub_folder(HubName(NAME, "v1.0")).name == older


def test_a_fetch_that_breaks_off_goes_on_where_it_stopped(hub: Hub, original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # it keeps whole chunks; ours is a small file
    hub.cuts[WEIGHTS] = 2
    folder = hub_folder(HubName(NAME))
    assert (folder / WEIGHTS).read_bytes() == (original / WEIGHTS).read_bytes()
    half = (original / WEIGHTS).stat().st_size // 2
    first, second = (int(asked.removeprefix("bytes=").removesuffix("-")) for asked in hub.ranges)
    assert half - 1000 < first <= half < 1.4 * half < second < 1.5 * half + 1000


def test_a_fetch_that_never_ends_is_told_and_the_next_one_fetches_what_is_missing(hub: Hub) -> None:
    hub.cuts[WEIGHTS] = 10**6
    with pytest.raises(DownloadError, match=r"broke off.*whole files are kept"):
        hub_folder(HubName(NAME))
    hub.cuts.clear()
    hub.asked.clear()
    folder = hub_folder(HubName(NAME))
    assert got(hub) == [WEIGHTS]
    assert load_model(folder)


def test_a_repository_that_is_missing(hub: Hub) -> None:
    with pytest.raises(DownloadError, match=r"no folder OpenGVLab/InternVL2-2C here, and http://127.* has no public model"):
        find_model("OpenGVLab/InternVL2-2C")


def test_a_revision_that_is_missing(hub: Hub) -> None:
    with pytest.raises(DownloadError, match="has no revision v9; give a branch, a tag or a commit"):
        find_model(f"{NAME}@v9")


def test_a_gated_repository(hub: Hub) -> None:
    hub.gated.add(NAME)
    with pytest.raises(DownloadError, match=f"gated: accept its terms at {hub.endpoint}/{NAME}, then log in"):
        find_model(NAME)


def test_a_renamed_repository_is_fetched_and_the_new_name_told(hub: Hub) -> None:
    hub.renamed["OpenGVLab/Old-Name"] = NAME
    said: list[str] = []
    folder = hub_folder(HubName("OpenGVLab/Old-Name"), say=said.append)
    assert load_model(folder)
    assert said[0].startswith(f"OpenGVLab/Old-Name is called {NAME} now")
    hub.asked.clear()
    assert hub_folder(HubName("OpenGVLab/Old-Name")) == folder and not hub.asked


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "does not know who asks: .* HF_TOKEN"),
        (403, "answered 403: it knows you, and does not let you read this"),
        (404, "answered 404: is HF_ENDPOINT a model hub"),
        (429, "answered 429: it was asked too often; wait"),
        (503, "answered 503; .* try again later"),
    ],
)
def test_a_refusal_is_told(hub: Hub, status: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    hub.status = status
    with pytest.raises(DownloadError, match=words):
        find_model(NAME)


def test_no_network_at_all(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"http://127.0.0.1:9 could not be reached.*HF_ENDPOINT"):
        find_model(NAME)


def test_an_endpoint_that_is_no_address(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com")
    with pytest.raises(DownloadError, match=r"HF_ENDPOINT is 'hf-mirror.com', which is no address; write it as https://HOST"):
        find_model(NAME)


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("https://huggingface.co/OpenGVLab/InternVL2-2B", "OpenGVLab/InternVL2-2B"),
        ("https://huggingface.co/OpenGVLab/InternVL2-2B/tree/main", "OpenGVLab/InternVL2-2B@main"),
        ("https://huggingface.co/OpenGVLab/InternVL2-2B/blob/main/config.json", "OpenGVLab/InternVL2-2B"),
        ("https://www.modelscope.cn/models/OpenGVLab/InternVL2-2B/files", "modelscope:OpenGVLab/InternVL2-2B"),
    ],
)
def test_the_address_of_a_page_is_told_how_to_be_typed(hub: Hub, address: str, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"is the address of a page; .*: say {name}$"):
        find_model(address)
    assert hub.asked == []


def test_offline_without_a_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DownloadError, match=r"not in the local cache, and HF_HUB_OFFLINE is set"):
        find_model(NAME)
    assert hub.asked == []


def test_too_small_a_disk_is_told_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(os.curdir)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"MiB are needed in .*set HF_HUB_CACHE to a folder on another disk"):
        find_model(NAME)
    assert got(hub) == []


def test_a_cache_that_takes_no_writing(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refused)
    with pytest.raises(CheckpointError, match=r"cache, where models are kept, does not let us write .*set HF_HUB_CACHE"):
        find_model(NAME)


def test_a_disk_that_fills_up_on_the_way(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(CheckpointError, match=r"disk of .*cache is full.*HF_HUB_CACHE"):
        find_model(NAME)


def test_a_file_of_the_wrong_size_is_thrown_away_and_told(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object, **__: object) -> None:
        raise OSError("Consistency check failed: file should be of size 10 but has size 9 (model.safetensors).\nMore words.")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", wrong)
    with pytest.raises(DownloadError, match=r"came broken and was thrown away \(Consistency check failed.*\); try again"):
        find_model(NAME)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["README.md"], "holds no config.json"),
        (["config.json", "pytorch_model.bin"], "only pytorch_model.bin, a pickle"),
        (["config.json"], "no weights"),
    ],
)
def test_a_repository_that_is_no_model_of_ours(files: list[str], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        wanted(dict.fromkeys(files, 1), True, "a/b")


def test_an_adapter_on_a_hub_brings_its_base(hub: Hub, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{NAME}"}}')
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    hub.folders["someone/adapter"] = adapter
    base, (found,) = find_model("someone/adapter")
    assert base.parts[-3] == "models--OpenGVLab--InternVL2-Tiny"
    assert found.parts[-3] == "models--someone--adapter"


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("OpenGVLab/InternVL2-2B", HubName("OpenGVLab/InternVL2-2B")),
        ("OpenGVLab/InternVL2-2B@refs/pr/3", HubName("OpenGVLab/InternVL2-2B", "refs/pr/3")),
        ("modelscope:OpenGVLab/InternVL2-2B@v1", HubName("OpenGVLab/InternVL2-2B", "v1", modelscope=True)),
        ("InternVL2-2B", None),
        ("./runs/food", None),
        ("/runs/food", None),
        ("a/b/c", None),
        ("a/..", None),
        ("a/b@../../c", None),
    ],
)
def test_names(word: str, name: HubName | None) -> None:
    assert hub_name(word) == name
    assert name is None or str(name) == word


# ---- ModelScope, whose package stands in: what we ask of it, and what we make of its answers


@pytest.fixture
def modelscope(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """A package of that name that copies from the original; gives the list of calls."""
    calls: list[dict[str, object]] = []
    folder = tmp_path / "modelscope" / "models" / NAME

    class HubError(Exception):
        pass

    def snapshot_download(model_id: str, revision: str | None = None, **more: object) -> str:
        if more.get("local_files_only"):
            if not folder.is_dir():
                raise ValueError("Cannot find the requested files in the cached path")
            return str(folder)
        calls.append({"model_id": model_id, "revision": revision, **more})
        if model_id != NAME:
            raise HubError(f"the model {model_id} does not exist")
        folder.mkdir(parents=True, exist_ok=True)
        patterns = more["allow_patterns"]
        assert isinstance(patterns, list)
        for path in original.iterdir():
            if any(path.match(pattern) for pattern in patterns):
                shutil.copy(path, folder)
        return str(folder)

    for name, more in {
        "modelscope": {},
        "modelscope.hub": {},
        "modelscope.hub.snapshot_download": {"snapshot_download": snapshot_download},
        "modelscope_hub": {},
        "modelscope_hub.errors": {"HubError": HubError},
    }.items():
        module = ModuleType(name)
        vars(module).update(more)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(hub_file.importlib.util, "find_spec", lambda _: object())
    for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(key, raising=False)
    return calls


def test_modelscope_is_asked_for_the_same_files_in_the_same_order(
    modelscope: list[dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = find_model(f"modelscope:{NAME}@v1")
    assert load_model(folder)
    assert [(call["model_id"], call["revision"]) for call in modelscope] == [(NAME, "v1")] * 2
    assert modelscope[1]["allow_patterns"] == ["*.safetensors"]
    assert not (folder / "pytorch_model.bin").exists()
    modelscope.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_model(f"modelscope:{NAME}@v1")[0] == folder and not modelscope


def test_modelscopes_refusal_is_told(modelscope: list[dict[str, object]]) -> None:
    with pytest.raises(DownloadError, match=r"modelscope:OpenGVLab/Nothing: the model OpenGVLab/Nothing does not exist; look at"):
        find_model("modelscope:OpenGVLab/Nothing")


def test_modelscopes_package_is_named_when_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_file.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match="pip install modelscope"):
        find_model(f"modelscope:{NAME}")
