"""An adapter folder with its LoRA in float16, to travel: pack_adapter.py IN OUT. Half the bytes; routing/ is small already."""

import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file


def main() -> None:
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    path = target / "adapter_model.safetensors"
    save_file({name: value.half() for name, value in load_file(path).items()}, path, metadata={"format": "pt"})
    for file in sorted(target.rglob("*.safetensors")):
        print(f"{file.relative_to(target)}: {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
