"""English prose that keeps the language model talking while it learns to see: paragraphs to be continued.

In: --dictionaries, files of Debian's dict-foldoc and dict-jargon (*.dict.dz).  Out: JSONL rows of messages; not shipped.
"""

import argparse
import gzip
import json
import re
from pathlib import Path

WORDS = (24, 130)  # of a paragraph
OPENING = 0.3  # share of it that the user gives


def paragraphs(path: Path) -> list[str]:
    """Paragraphs of prose, white space folded, without marks of cross-reference."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", "replace")
    found = []
    for block in re.split(r"\n\s*\n", text):
        line = re.sub(r"[{}]|<[^>]{1,40}>|\(\d{4}-\d\d-\d\d\)", "", " ".join(block.split()))
        if WORDS[0] <= len(line.split()) and re.match(r"[A-Z]", line) and line.rstrip().endswith((".", "!", "?")):
            found.append(" ".join(line.split()[: WORDS[1]]))
    return found


def row_of(paragraph: str) -> dict:
    words = paragraph.split()
    cut = max(6, int(len(words) * OPENING))
    question = "Continue this text.\n\n" + " ".join(words[:cut])
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": " ".join(words[cut:])}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dictionaries", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = [row_of(p) for path in args.dictionaries for p in dict.fromkeys(paragraphs(path))]
    args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} rows -> {args.out}")


if __name__ == "__main__":
    main()
