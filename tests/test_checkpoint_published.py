"""The published models are counted right to the parameter, from their built-in configs, without a network and in no time."""

import json
from pathlib import Path

import pytest

from tessella import cli
from tessella.chat import TEMPLATES
from tessella.checkpoint.hub import hub_name
from tessella.checkpoint.published import DECODERS, HUB, PUBLISHED, TOWERS, published_config
from tessella.inspection import Parts, count_parts

# Language model, projector and all: LoRA logs and part tables of the InternVL documentation, worked out to the parameter.
INTERNVL2 = {
    "InternVL2-1B": (629_663_872, 4_482_816, 938_158_976),
    "InternVL2-2B": (1_889_146_880, 12_595_200, 2_205_754_368),
    "InternVL2-4B": (3_820_809_216, 22_034_432, 4_146_855_936),
    "InternVL2-8B": (7_737_782_272, 33_570_816, 8_075_365_376),
    "InternVL2-26B": (19_861_260_288, 116_429_824, 25_514_186_112),
    "InternVL2-40B": (34_389_017_600, 143_170_560, 40_068_684_160),
    "InternVL2-Llama3-76B": (70_553_853_952, 172_008_448, 76_262_358_400),
}
TOWER = {"300M": 304_012_288, "6B": 5_536_496_000}
# Bytes of keys and values a token, in bfloat16.
CACHE = {
    "InternVL2-1B": 12_288,
    "InternVL2-2B": 98_304,
    "InternVL2-4B": 393_216,
    "InternVL2-8B": 131_072,
    "InternVL2-26B": 196_608,
    "InternVL2-40B": 245_760,
    "InternVL2-Llama3-76B": 327_680,
}
# Published totals that were seen, in billions as printed: (total, digits behind the point).
SEEN = {
    "InternVL2_5-2B": (2.206, 3),
    "InternVL3-9B": (9, 0),
    "InternVL3-78B": (78.41, 2),
    "InternVL3_5-1B": (1.061, 3),
    "InternVL3_5-2B": (2, 0),
    "InternVL3_5-4B": (5, 0),
    "InternVL3_5-8B": (9, 0),
    "InternVL3_5-14B": (15, 0),
    "InternVL3_5-38B": (38, 0),
}


def parts_of(name: str) -> Parts:
    return count_parts(published_config(name))


@pytest.mark.parametrize("name", INTERNVL2)
def test_the_seven_of_internvl2_are_counted_to_the_parameter(name: str) -> None:
    language, projector, total = INTERNVL2[name]
    parts = parts_of(name)
    assert parts.total == total
    assert (parts.layers + parts.embeddings + parts.head, parts.projector) == (language, projector)
    assert parts.tower == TOWER[PUBLISHED[name].tower]


@pytest.mark.parametrize("name", SEEN)
def test_the_others_agree_with_what_their_cards_print(name: str) -> None:
    printed, digits = SEEN[name]
    assert round(parts_of(name).total / 1e9, digits) == printed


def test_parts_of_internvl3_5_1b_as_its_card_prints_them() -> None:
    parts = parts_of("InternVL3_5-1B")
    assert round((parts.tower + parts.projector) / 1e6, 1) == 309.3
    assert round((parts.layers + parts.embeddings + parts.head) / 1e6, 1) == 751.6


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_name_has_a_config_a_prompt_and_a_place_on_a_hub(name: str) -> None:
    config = published_config(name)
    assert config.slots_per_tile == 256
    assert config.template in TEMPLATES
    assert hub_name(f"{HUB}/{name}") is not None


def test_no_part_of_the_tables_is_unused() -> None:
    assert {row.tower for row in PUBLISHED.values()} == TOWERS.keys()
    assert {row.decoder for row in PUBLISHED.values()} == DECODERS.keys()


@pytest.mark.parametrize("name", INTERNVL2)
def test_inspect_tells_parts_and_memory_of_a_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "inspect.json"
    assert cli.main(["inspect", name, "--device", "cpu", "--dtype", "bfloat16", "--json", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    total = INTERNVL2[name][2]
    assert result["parameters"]["total"] == total
    assert result["weight_bytes"] == 2 * total
    assert result["cache_bytes_per_token"] == CACHE[name]
    assert (result["folder"], result["disk_bytes"]) == (None, None)
    assert f"{total:,} parameters" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["chat", "InternVL2-2B", "Hello"], "say OpenGVLab/InternVL2-2B to fetch them"),
        (["inspect", "InternVL2-76B"], "InternVL2-40B, InternVL2-Llama3-76B"),
    ],
)
def test_a_name_without_weights_and_a_name_that_is_none(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 2
    assert told in capsys.readouterr().err
