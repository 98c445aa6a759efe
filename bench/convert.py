"""How fast is converting beside copying? A folder of a published model's widths, random numbers, official -> native -> official.

In: a place with room for three such folders, a published name, how many layers of it.  Out: a table in Markdown.
Each way is measured as `cp` and sync of the same folder, writing alone, and convert with its proof, one after the other.
Before each of them the page cache lets go of what is read, so that all read from the disk.

    python bench/convert.py WORK --name InternVL2-26B --layers 9
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tessella.checkpoint.blank import blank_model
from tessella.checkpoint.convert import Wish, convert
from tessella.checkpoint.layout import generation_config, official_config, preprocessor_config
from tessella.checkpoint.published import published_config
from tessella.checkpoint.source import Source, open_source
from tessella.checkpoint.weights import INDEX, Entry, write_file
from tessella.checkpoint.write import plan_shards, stored_entries, write_index, write_json, write_model
from tessella.config import ModelConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import tiny

SHARD_BYTES = 5 * 10**9
BLOCK_NUMBERS = 2**26 - 5  # random numbers that are laid down again and again, in step with no row


def shortened(name: str, layers: int | None) -> ModelConfig:
    """The published config; with layers, at most so many in the tower and in the decoder."""
    config = published_config(name)
    if layers is None:
        return config
    vision = replace(config.vision, num_layers=min(layers, config.vision.num_layers))
    return replace(config, vision=vision, language=replace(config.language, num_layers=min(layers, config.language.num_layers)))


def make_folder(folder: Path, config: ModelConfig) -> None:
    """An official folder of that config in bfloat16, with the tests' tiny tokenizer: its prompts need one."""
    block = (torch.randn(BLOCK_NUMBERS, generator=torch.Generator().manual_seed(0)) / 50).bfloat16()
    begin = 0

    def make(shape: tuple[int, ...]) -> Tensor:
        nonlocal begin
        count = torch.Size(shape).numel()
        begin = (begin + 7919) % BLOCK_NUMBERS
        turned = torch.cat([block[begin:], block[:begin]])
        return turned.repeat(-(-count // BLOCK_NUMBERS))[:count].reshape(shape)

    shapes = {name: tuple(weight.shape) for name, weight in blank_model(config).named_parameters()}
    parameters = [Entry(name, shape, torch.bfloat16, lambda shape=shape: make(shape)) for name, shape in shapes.items()]  # type: ignore[misc]
    shards = plan_shards(stored_entries(parameters, "official", config.language), SHARD_BYTES)
    folder.mkdir(parents=True)
    for name, part in shards.items():
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--name", default="InternVL2-26B")
    parser.add_argument("--layers", type=int, default=None)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--to", default="native", help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.one:
        one(told.one, told.source, told.work, told.to)
        return
    config = shortened(told.name, told.layers)
    official, native, back = (told.work / name for name in ("official", "native", "back"))
    if not (official / "generation_config.json").is_file():
        make_folder(official, config)
    size = sum(path.stat().st_size for path in official.rglob("*") if path.is_file())
    shards = len(list(official.glob("*.safetensors")))
    print(f"{told.name}, {size / 1e9:.2f} GB in {shards} files ({'sharded' if (official / INDEX).is_file() else 'single'})\n")
    print("| way | what | wall | of cp's speed | CPU | peak memory |\n| --- | --- | --- | --- | --- | --- |")
    for to, source, out in (("native", official, native), ("official", native, back)):
        base = None
        for how in ("cp", "write", "convert", "cp"):
            place = told.work / "copy" if how == "cp" else out
            wall, cpu, peak = measure(how, source, place, to)
            base = base or wall
            print(f"| to {to} | {how} | {wall:.1f} s | {base / wall:.2f} | {cpu:.1f} s | {peak / 1e9:.2f} GB |", flush=True)
            if how == "cp":
                shutil.rmtree(place)
        if to == "official":
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
