"""A model's name on a hub becomes its folder on this disk: fetched once, from then on used without a network.

In: "OpenGVLab/InternVL2-2B", "OpenGVLab/InternVL2-2B@REVISION" or "modelscope:OpenGVLab/InternVL2-2B".  Out: a model folder.
Fetched are safetensors, JSON, tokenizer files, and the .py files beside them: those are carried along, never run.
The order is a promise: small files first, the config last of them, then the weights. So what stands in the cache tells how
far a broken fetch had come, whoever made the cache. HF_ENDPOINT, HF_HUB_CACHE, HF_TOKEN and HF_HUB_OFFLINE mean what they
mean to huggingface_hub; HF_HUB_OFFLINE=1 also keeps ModelScope off the network.
"""

import contextlib
import errno
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tessella.checkpoint.adapters import CONFIG as ADAPTER_CONFIG
from tessella.checkpoint.adapters import WEIGHTS as ADAPTER_WEIGHTS
from tessella.checkpoint.folder import check_room
from tessella.checkpoint.weights import INDEX, SINGLE
from tessella.config import read_json
from tessella.errors import CheckpointError, DownloadError

MODELSCOPE = "modelscope:"
PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
NAME = re.compile(rf"(?P<hub>{MODELSCOPE})?(?P<repository>{PART}/{PART})(?:@(?P<revision>[A-Za-z0-9][A-Za-z0-9._/-]*))?")
SMALL = (".json", ".txt", ".model", ".jinja", ".py")
ADDRESS = re.compile(rf"https?://(?P<host>[^/]+)/(?:models/)?(?P<repository>{PART}/{PART})(?:/tree/(?P<revision>[^/]+))?(?:/.*)?")
CONFIGS = ("config.json", ADAPTER_CONFIG)
ANOTHER_DISK = "set HF_HUB_CACHE to a folder on another disk"
REFUSALS = {  # what a hub means by an answer -> what to do
    401: "does not know who asks: log in with `hf auth login`, or set HF_TOKEN; if it is set, it is wrong or worn out",
    403: "answered 403: it knows you, and does not let you read this; ask its owner, or log in as someone who may (HF_TOKEN)",
    404: "answered 404: is HF_ENDPOINT a model hub, and the name spelt as there?",
    429: "answered 429: it was asked too often; wait some minutes, or log in (HF_TOKEN) to be allowed more",
}
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """owner/name on one of the two hubs; revision None: the main branch of the day of the first fetch."""

    repository: str
    revision: str | None = None
    modelscope: bool = False

    def __str__(self) -> str:
        return (MODELSCOPE if self.modelscope else "") + self.repository + (f"@{self.revision}" if self.revision else "")


def hub_name(word: str) -> HubName | None:
    """What a person typed, as a name on a hub, or None when it cannot be one."""
    found = NAME.fullmatch(word)
    if found is None or ".." in word:
        return None
    return HubName(found["repository"], found["revision"], found["hub"] is not None)


def name_in_address(word: str) -> str | None:
    """What a page's address on a hub is to be typed as, or None when it is no such address."""
    found = ADDRESS.fullmatch(word)
    if found is None:
        return None
    return str(HubName(found["repository"], found["revision"], "modelscope" in found["host"]))


def hub_folder(name: HubName, *, weights: bool = True, say: Callable[[str], None] | None = None) -> Path:
    """The folder of a model in the hub's local cache, fetched when it is not whole there.

    weights False: config and tokenizer are enough.  say: told what is fetched; default: standard error.
    Raises DownloadError: missing, gated, renamed away, unreachable, broken on the way, or offline and not in the cache;
    CheckpointError: no room, no safetensors, or ModelScope's package is not installed.
    """
    cached = _modelscope_cached if name.modelscope else _cached
    folder = cached(name)
    if folder is not None and has_config(folder) and (has_weights(folder) or not weights):
        return folder
    if offline():
        here = folder is not None and has_config(folder)
        where = "in the local cache without its weights" if here else "not in the local cache"
        raise DownloadError(
            f"{name} is {where}, and HF_HUB_OFFLINE is set; unset it, or copy the model's folder here and give that folder"
        )
    fetch = _fetch_from_modelscope if name.modelscope else _fetch
    return fetch(name, weights, say or _say)


def offline() -> bool:
    """Whether the network is forbidden, by either of the variables that huggingface_hub knows."""
    words = (os.environ.get(key, "") for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(word.upper() in ("1", "ON", "YES", "TRUE") for word in words)


def has_config(folder: Path) -> bool:
    return any((folder / config).is_file() for config in CONFIGS)


def has_weights(folder: Path) -> bool:
    """Whether the weights that the folder's own files call for are all there."""
    if (folder / INDEX).is_file():
        shards = set(read_json(folder / INDEX).get("weight_map", {}).values())
        return bool(shards) and all((folder / str(shard)).is_file() for shard in shards)
    return (folder / SINGLE).is_file() or (folder / ADAPTER_WEIGHTS).is_file()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# ---- Hugging Face


def endpoint() -> str:
    """Raises DownloadError when HF_ENDPOINT is no address."""
    told = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    if not told.startswith(("http://", "https://")):
        raise DownloadError(f"HF_ENDPOINT is {told!r}, which is no address; write it as https://HOST, or unset it")
    return told


def cache() -> Path:
    """Where huggingface_hub keeps what it fetched; read at each call, so that a test or a caller may move it."""
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()


def _repository(name: HubName) -> Path:
    return cache() / f"models--{name.repository.replace('/', '--')}"


def _cached(name: HubName) -> Path | None:
    """The snapshot of that revision in the cache, whole or not."""
    revision = name.revision or "main"
    reference = _repository(name) / "refs" / revision
    commit = reference.read_text(encoding="utf-8").strip() if reference.is_file() else revision
    folder = _repository(name) / "snapshots" / commit
    return folder if COMMIT.fullmatch(commit) and folder.is_dir() else None


def _fetch(name: HubName, weights: bool, say: Callable[[str], None]) -> Path:
    import huggingface_hub  # takes a third of a second, and only names on a hub need it

    with _told(name):
        information = huggingface_hub.HfApi(endpoint=endpoint()).model_info(
            name.repository, revision=name.revision, files_metadata=True
        )
        commit = information.sha or ""
        if not COMMIT.fullmatch(commit):
            raise DownloadError(f"{endpoint()} names the commit {commit!r} for {name}; is HF_ENDPOINT a model hub?")
        if information.id != name.repository:
            say(f"{name.repository} is called {information.id} now; its files are kept under the name that you gave")
        sizes = {file.rfilename: file.size or 0 for file in information.siblings or []}
        folder = _repository(name) / "snapshots" / commit
        missing = {file: size for file, size in wanted(sizes, weights, str(name)).items() if not (folder / file).is_file()}
        cache().mkdir(parents=True, exist_ok=True)
        check_room(cache(), sum(missing.values()), ANOTHER_DISK)
        files = f"{len(missing)} file{'s' if len(missing) != 1 else ''}"
        say(f"fetching {files} of {name}, {sum(missing.values()) / 2**20:,.0f} MiB, into {folder}")
        # Written first: a fetch that breaks is found again under the same commit, even if the branch has moved on.
        _write_reference(name, commit)
        for file in missing:
            huggingface_hub.hf_hub_download(
                name.repository, file, revision=commit, cache_dir=cache(), endpoint=endpoint(), library_name="tessella"
            )
    return folder


def _write_reference(name: HubName, commit: str) -> None:
    """What `main`, a tag or a branch stood for; the file that huggingface_hub itself keeps in the cache."""
    if name.revision == commit:
        return
    reference = _repository(name) / "refs" / (name.revision or "main")
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit, encoding="utf-8")


def wanted(sizes: Mapping[str, int], weights: bool, name: str) -> dict[str, int]:
    """Of a repository's files (name -> bytes), those that we need, in the order in which they are fetched.

    Files in folders are passed over: onnx/, runs/, examples/. Raises CheckpointError when it is no model, or none that we open.
    """
    top = {file: size for file, size in sorted(sizes.items()) if "/" not in file}
    small = [file for file in top if file.endswith(SMALL)]
    configs = [file for file in CONFIGS if file in small]
    if not configs:
        raise CheckpointError(f"{name} holds no config.json, so it is no model; give another name")
    tensors = [file for file in top if file.endswith(".safetensors") and not file.startswith("consolidated")]
    if not tensors:
        pickles = [file for file in top if file.endswith((".bin", ".pth", ".pt"))]
        found = f"only {pickles[0]}, a pickle, which we do not open" if pickles else "no weights"
        raise CheckpointError(f"{name} holds {found}; give a repository with safetensors")
    order = [file for file in small if file not in configs] + configs + (tensors if weights else [])
    return {file: top[file] for file in order}


@contextlib.contextmanager
def _told(name: HubName) -> Iterator[None]:
    """Turn huggingface_hub's errors into a sentence with a way out."""
    from huggingface_hub import errors  # as above: heavy, and only names on a hub need it

    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"{name} is gated: accept its terms at {endpoint()}/{name.repository}, then log in with "
            "`hf auth login` or set HF_TOKEN, and try again"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise DownloadError(
            f"there is no folder {name.repository} here, and {endpoint()} has no public model of that name; "
            "look at the spelling, and if it is private, set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(
            f"{name.repository} has no revision {name.revision or 'main'}; give a branch, a tag or a commit"
        ) from error
    except errors.LocalEntryNotFoundError as error:  # how huggingface_hub says that one of several files could not be asked for
        raise DownloadError(_network(name, error.__cause__ or error)) from error
    except errors.HTTPError as error:  # type: ignore[attr-defined]  # httpx's, whichever httpx this huggingface_hub has
        raise DownloadError(_network(name, error)) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise CheckpointError(
                f"the disk of {cache()} is full, so {name} could not be fetched whole; files that arrived whole are kept: "
                f"free some room and try again, or {ANOTHER_DISK}"
            ) from error
        if error.errno in (errno.EROFS, errno.EACCES):
            raise CheckpointError(
                f"{cache()}, where models are kept, does not let us write ({error.strerror}); "
                "set HF_HUB_CACHE to a folder that does"
            ) from error
        if error.errno is not None:
            raise
        raise DownloadError(
            f"a file of {name} came broken and was thrown away ({_first_line(error)}); try again: whole files are kept"
        ) from error


def _network(name: HubName, error: BaseException) -> str:
    """A bad answer, or none."""
    from huggingface_hub.errors import HfHubHTTPError  # as above

    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        what = REFUSALS.get(status, f"answered {status}; files that arrived whole are kept: try again later")
        return f"fetching {name}: {endpoint()} {what}"
    return (
        f"{endpoint()} could not be reached, or broke off, while fetching {name} ({_first_line(error)}); whole files are kept: "
        "try again, set HF_ENDPOINT to a mirror, or copy the model's folder here and give that folder"
    )


# ---- ModelScope


def _modelscope_cached(name: HubName) -> Path | None:
    """The model's folder in ModelScope's cache, whole or not; its package alone knows the place, which has moved over time."""
    _need_modelscope(name)
    from modelscope.hub.snapshot_download import snapshot_download  # optional
    from modelscope_hub.errors import HubError  # optional, comes with modelscope

    try:
        return Path(snapshot_download(name.repository, revision=name.revision, local_files_only=True))
    except (HubError, OSError, ValueError):  # each is how it says that nothing is there
        return None


def _fetch_from_modelscope(name: HubName, weights: bool, say: Callable[[str], None]) -> Path:
    from modelscope.hub.snapshot_download import snapshot_download  # optional
    from modelscope_hub.errors import HubError  # optional, comes with modelscope

    small = [f"*{suffix}" for suffix in SMALL]
    say(f"fetching {name}")
    try:
        # In two calls, for the order that the head of this file promises.
        for patterns in (small, ["*.safetensors"]) if weights else (small,):
            folder = Path(snapshot_download(name.repository, revision=name.revision, allow_patterns=patterns))
    except (HubError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise CheckpointError(f"the disk is full, so {name} could not be fetched whole; free some and try again") from error
        raise DownloadError(
            f"fetching {name}: {_first_line(error)}; look at the spelling at modelscope.cn, log in with `modelscope login` "
            "if it is private, or try again: files that arrived whole are kept"
        ) from error
    if not has_config(folder) or (weights and not has_weights(folder)):
        raise CheckpointError(f"{name} holds no config.json with safetensors, so it is no model that we open; give another name")
    return folder


def _need_modelscope(name: HubName) -> None:
    if importlib.util.find_spec("modelscope") is None:
        raise CheckpointError(
            f"{name} needs ModelScope's package, which is not installed: pip install modelscope; "
            f"or leave {MODELSCOPE!r} away to fetch it from {endpoint()}"
        )
