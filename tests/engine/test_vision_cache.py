"""The vision cache keeps within its bytes, forgets the longest unused first, and tells adapters apart."""

import torch

from tessella.engine.vision import ViewKey, VisionCache

ONE = torch.zeros(4)  # 16 bytes


def test_the_longest_unused_tile_goes_when_the_bytes_are_spent() -> None:
    seen = VisionCache(40)
    for name in "ab":
        seen.put(ViewKey(0, name), ONE)
    seen.get(ViewKey(0, "a"))
    seen.put(ViewKey(0, "c"), ONE)
    assert [ViewKey(0, name) in seen for name in "abc"] == [True, False, True] and seen.bytes == 32


def test_a_tile_larger_than_all_the_room_is_not_kept() -> None:
    seen = VisionCache(8)
    seen.put(ViewKey(0, "a"), ONE)
    assert ViewKey(0, "a") not in seen and seen.bytes == 0


def test_what_an_adapter_saw_goes_with_it() -> None:
    seen = VisionCache(100)
    for sight in (0, 1):
        seen.put(ViewKey(sight, "a"), ONE)
    seen.forget(1)
    assert ViewKey(0, "a") in seen and ViewKey(1, "a") not in seen and seen.bytes == 16
