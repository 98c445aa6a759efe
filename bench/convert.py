"""How fast is converting beside copying? A folder of a published model's widths, official -> native -> official.

In: a place with room for three such folders (two with --sparse), a published name, how many layers of it.
Out: a table in Markdown. Each way is measured as writing alone (which hashes and syncs too) and as convert with its proof, each
between two runs of `cp` and sync of the same folder, in a process of its own. Before each of them the page cache lets go of what
is read, so that all read from the disk. --sparse: the source is all holes, which cost a reader nothing.

    python bench/convert.py WORK --name InternVL2-26B --layers 6
    python bench/convert.py WORK --name InternVL2-26B --layers 20 --sparse
"""

import argparse
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tessella.checkpoint.blank import blank_model
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.folder import check_room
from tessella.checkpoint.layout import generation_config, official_config, preprocessor_config
from tessella.checkpoint.published import published_config
from tessella.checkpoint.source import Source, open_source
from tessella.checkpoint.weights import Entry, header_of, write_file
from tessella.checkpoint.write import plan_shards, stored_entries, write_index, write_json, write_model
from tessella.config import ModelConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny

SHARD_BYTES = 5 * 10**9
KEPT_FREE = 10**10  # bytes of the disk that stay free
BLOCK_NUMBERS = 2**26 - 5  # random numbers that are laid down again and again, in step with no row


def shortened(name: str, layers: int | None) -> ModelConfig:
    """The published config; with layers, at most so many in the tower and in the decoder."""
    config = published_config(name)
    if layers is None:
        return config
    vision = replace(config.vision, num_layers=min(layers, config.vision.num_layers))
    return replace(config, vision=vision, language=replace(config.language, num_layers=min(layers, config.language.num_layers)))


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in blank_model(config).named_parameters()}


def make_folder(folder: Path, config: ModelConfig, sparse: bool) -> None:
    """An official folder of that config in bfloat16, with the tests' tiny tokenizer: its prompts need one."""
    block = (torch.randn(BLOCK_NUMBERS, generator=torch.Generator().manual_seed(0)) / 50).bfloat16()
    begin = 0

    def make(shape: tuple[int, ...]) -> Tensor:
        nonlocal begin
        count = torch.Size(shape).numel()
        begin = (begin + 7919) % BLOCK_NUMBERS
        turned = torch.cat([block[begin:], block[:begin]])
        return turned.repeat(-(-count // BLOCK_NUMBERS))[:count].reshape(shape)

    shapes = parameter_shapes(config)
    parameters = [Entry(name, shape, torch.bfloat16, lambda shape=shape: make(shape)) for name, shape in shapes.items()]  # type: ignore[misc]
    shards = plan_shards(stored_entries(parameters, "official", config.language), SHARD_BYTES)
    folder.mkdir(parents=True)
    for name, part in shards.items():
        if sparse:
            write_holes(folder / name, part)
        else:
            write_file(folder / name, part)
    if len(shards) > 1:
        write_index(folder, shards)
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", official_config(config, "bfloat16"))
    write_json(folder / "preprocessor_config.json", preprocessor_config(config))
    write_json(folder / "generation_config.json", generation_config({}, [tokenizer.token_to_id("<|im_end|>")]))
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", tokens)


def write_holes(path: Path, entries: Sequence[Entry]) -> None:
    """A safetensors file whose numbers are all 0 and take no room."""
    header, end = header_of(entries)
    path.write_bytes(header)
    os.truncate(path, len(header) + end)


def forget(folder: Path) -> None:
    """The page cache lets go of the folder's files, so that the next reader reads the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def copied(source: Path, out: Path) -> None:
    subprocess.run(["cp", "-r", "--sparse=never", "--reflink=never", source, out], check=True)
    for path in out.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)


def written(source: Source, out: Path, to: str) -> None:
    """What convert does, but for the proof."""
    layout = "native" if to == "native" else "official"
    write_model(source.entries(), out, source.config, layout=layout, end_ids=[1], base_folder=source.folder)


def one(how: str, source: Path, out: Path, to: str) -> None:
    """One measurement, in this process. Prints seconds, CPU seconds, peak memory in bytes."""
    start = time.perf_counter()
    if how == "cp":
        copied(source, out)
    elif how == "write":
        written(open_source(source), out, to)
    else:
        assert convert(source, out, Wish(to="native" if to == "native" else "official")).proof.holds
    wall = time.perf_counter() - start
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime
    print(wall, cpu, peak_bytes())


def peak_bytes() -> int:
    """Most memory that this process held, mapped files counted. (ru_maxrss would begin with what its parent held.)"""
    row = next(line for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if line.startswith("VmHWM"))
    return int(row.split()[1]) * 1024


def measure(how: str, source: Path, out: Path, to: str) -> tuple[float, float, float]:
    """In a process of its own, from a cold cache; out is left only by the last way that makes it."""
    shutil.rmtree(out, ignore_errors=True)
    forget(source)
    command = [sys.executable, __file__, "--one", how, "--to", to, "--source", str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    wall, cpu, peak = map(float, done.stdout.split())
    return wall, cpu, peak


def measured_ways(work: Path, source: Path, out: Path, to: str) -> None:
    """The rows of one way, cp among them; a speed is told beside the mean of the two copies around it."""
    copies: list[float] = []
    waiting: list[tuple[str, float, float, float]] = []
    for how in ("cp", "write", "cp", "convert", "cp"):
        wall, cpu, peak = measure(how, source, work / "copy" if how == "cp" else out, to)
        if how == "cp":
            shutil.rmtree(work / "copy")
            for name, *told in waiting:
                show(to, name, *told, (copies[-1] + wall) / 2 / told[0])
            copies.append(wall)
            waiting.clear()
            show(to, how, wall, cpu, peak, None)
        else:
            waiting.append((how, wall, cpu, peak))
        if how == "write" or (how, to) == ("convert", "official"):  # the next cp needs its room; a native one is converted back
            shutil.rmtree(out)


def show(to: str, how: str, wall: float, cpu: float, peak: float, share: float | None) -> None:
    told = "" if share is None else f"{share:.2f}"
    print(f"| to {to} | {how} | {wall:.1f} s | {told} | {cpu:.1f} s | {peak / 1e9:.2f} GB |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--name", default="InternVL2-26B")
    parser.add_argument("--layers", type=int, default=None, help="at most so many of the tower and of the decoder")
    parser.add_argument("--sparse", action="store_true", help="a source of holes; on the way back it is one of zeros")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--to", default="native", help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.one:
        one(told.one, told.source, told.work, told.to)
        return
    config = shortened(told.name, told.layers)
    told.work.mkdir(parents=True, exist_ok=True)
    size = 2 * sum(math.prod(shape) for shape in parameter_shapes(config).values())
    official, native, back = (told.work / name for name in ("official", "native", "back"))
    check_room(told.work, size * (2 if told.sparse else 3) + KEPT_FREE)
    make_folder(official, config, told.sparse)
    shards = len(list(official.glob("*.safetensors")))
    kind = "holes" if told.sparse else "random"
    print(f"{told.name}, {told.layers or 'all'} layers, {size / 1e9:.2f} GB in {shards} files, {kind}\n")
    print("| way | what | wall | of cp's speed | CPU | peak memory |\n| --- | --- | --- | --- | --- | --- |")
    measured_ways(told.work, official, native, "native")
    shutil.rmtree(official)
    measured_ways(told.work, native, back, "official")
    shutil.rmtree(native)


if __name__ == "__main__":
    main()
