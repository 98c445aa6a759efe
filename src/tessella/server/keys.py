"""Who may ask: bearer keys, compared in constant time.

In: an Authorization header.  Out: the number of the key, or a Refusal 401.
"""

import hashlib
import hmac
from collections.abc import Sequence

from tessella.server.refusal import Refusal


class Keys:
    """Only digests are kept, so every comparison is of 32 bytes, and all keys are compared each time."""

    def __init__(self, keys: Sequence[str]):
        self._digests = [_digest(key.encode("ascii")) for key in keys]

    def __len__(self) -> int:
        return len(self._digests)

    def find(self, header: bytes | None) -> int | None:
        """The number of the key in "Bearer KEY", None when it is none of ours."""
        scheme, _, key = (header or b"").strip().partition(b" ")
        given = _digest(key.strip())
        found = None
        for number, digest in enumerate(self._digests):
            if hmac.compare_digest(digest, given):
                found = number
        return found if scheme.lower() == b"bearer" else None

    def check(self, header: bytes | None) -> int:
        """Raises Refusal 401."""
        found = self.find(header)
        if found is None:
            what = "the key is not one of this server's" if header else "this server asks for a key"
            raise Refusal(401, f"{what}; send Authorization: Bearer KEY", code="invalid_api_key")
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
