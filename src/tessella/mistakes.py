"""What a person is told when something goes wrong that can be mended, and with which exit code.

In: an error.  Out: one clear message on stderr, exit code 2.  It imports no torch, like cli.py.
"""

import errno
import sys

OUT_OF_MEMORY = """out of memory. What can be lowered, the most telling first:
  teaching: --tokens-per-pass (the result stays the same), --max-tiles, --lora-rank; --tower frozen
  asking:   --max-tiles, --max-tokens, --batch-items; --dtype bfloat16 halves the weights of float32
tessella inspect MODEL tells what a model needs."""

MENDABLE = {
    errno.ENOSPC: "make room on the disk and run it again",
    errno.EDQUOT: "make room in your quota and run it again",
    errno.EACCES: "check the permissions, or write somewhere else",
    errno.EPERM: "check the permissions, or write somewhere else",
    errno.EROFS: "the disk takes no writing; write somewhere else",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "it is a folder; give a file",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or write somewhere else",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENOMEM: "there is no memory for it; close other programs, or take --max-tiles 1 or --dtype bfloat16",
    errno.EADDRINUSE: "another program listens there; take another --port",
    errno.ELOOP: "the links lead in a circle; check the path",
}

# Packages that only some commands need -> how to get them.
OPTIONAL = dict.fromkeys(("peft", "transformers", "accelerate"), "teaching needs the train extra: pip install 'tessella[train]'")
OPTIONAL |= dict.fromkeys(
    ("fastapi", "uvicorn", "prometheus_client", "llguidance"), "serving needs the serve extra: pip install 'tessella[serve]'"
)
OPTIONAL |= dict.fromkeys(("gradio", "markdown_it"), "the web chat needs the ui extra: pip install 'tessella[ui]'")
OPTIONAL |= dict.fromkeys(("av", "pyarrow"), "videos and parquet need the data extra: pip install 'tessella[data]'")
OPTIONAL["datasets"] = "hf:NAME needs it: pip install datasets"
OPTIONAL |= dict.fromkeys(
    ("scipy", "pycocotools", "diffusers"), "boxes, masks and pictures need the multitask extra: pip install 'tessella[multitask]'"
)
OPTIONAL["httpx2"] = "serving and the web chat need their extras: pip install 'tessella[serve,ui]'"


def tell(message: str) -> int:
    """One clear message on stderr; gives exit code 2."""
    print(f"tessella: {message}", file=sys.stderr)
    return 2
