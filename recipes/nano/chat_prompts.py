"""The questions that keep the built-in model talking: lists and templates, no answers.

In: titles of recipes; the lists of chat_prompts.toml.  Out: prompts(titles), about 1,500 user turns in one fixed order.
"""

import random
import tomllib
from pathlib import Path

LISTS: dict[str, list[str]] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def arithmetic(rng: random.Random) -> list[str]:
    rows = []
    for _ in range(90):
        a, b, kind = rng.randint(2, 30), rng.randint(2, 12), rng.choice("+-*/")
        sign = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}[kind]
        left = a * b if kind == "/" else a + b if kind == "-" else a
        rows.append(rng.choice([f"What is {left} {kind} {b}?", f"What is {left} {sign} {b}?", f"Calculate {left} {kind} {b}."]))
    return rows


def prompts(titles: list[str]) -> list[str]:
    """All user turns, without repeats, shuffled once for all; the capital of France comes first."""
    rng = random.Random(7)
    rows = [f"What is the capital of {c}?" for c in LISTS["countries"]]
    rows += [f"{c}: what is its capital?" for c in LISTS["countries"][::3]]
    rows += [f"What is {article(n)} {n}?" for n in LISTS["nouns"]] + [f"Define the word '{n}'." for n in LISTS["nouns"][::3]]
    rows += [
        rng.choice(["Explain {} in one sentence.", "Explain {} simply.", "Tell me about {}."]).format(t) for t in LISTS["topics"]
    ]
    rows += [f"Explain {t} to a child." for t in LISTS["topics"][::2]]
    rows += (
        LISTS["small_talk"]
        + LISTS["everyday"]
        + [r.format(p) for p in LISTS["plain"] for r in LISTS["rewrites"][: 3 + len(p) % 2]]
    )
    rows += [f"What is the opposite of '{w}'?" for w in LISTS["words"]] + [
        f"Give me a synonym for '{w}'." for w in LISTS["words"]
    ]
    rows += [f"Use the word '{w}' in a sentence." for w in LISTS["words"] + LISTS["nouns"][::4]]
    rows += [f"Name three {g}." for g in LISTS["groups"]] + [f"List five {g}." for g in LISTS["groups"][::2]]
    rows += [f"Write a short sentence about {s}." for s in LISTS["scenes"]] + [
        f"Write a short poem about {s}." for s in LISTS["scenes"][::2]
    ]
    rows += [f"Write two sentences about {s}." for s in LISTS["scenes"][1::2]]
    rows += [f"Translate '{t}' into {w}." for t in LISTS["translate"] for w in ("French", "Spanish")]
    rows += (
        arithmetic(rng)
        + [rng.choice(LISTS["cooking"]).format(t) for t in titles]
        + [rng.choice(LISTS["cooking"]).format(t) for t in titles[::2]]
    )
    rows = sorted(set(rows))
    rng.shuffle(rows)
    first = "What is the capital of France?"
    return [first] + [r for r in rows if r != first]
