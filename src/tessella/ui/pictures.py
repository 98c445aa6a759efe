"""A picture that a person shows: its bytes for the server as they are, and a copy that a browser can show.

In: the path of an upload.  Out: a Picture; its data: URL.  What the answer marks is drawn in boxes.py.
"""

import base64
import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from tessella.ui.trouble import Trouble

LIMIT_MEGAPIXELS = 100.0  # as `tessella chat` has it; the server has limits of its own
SHOWN_PX = 1024  # longest side of the copy for the browser
THUMBNAIL_PX = 112  # of the quick bar: twice its size on the page, for screens with two dots a pixel


@dataclass(frozen=True)
class Picture:
    """A picture of a question."""

    name: str
    path: Path  # as it was given
    mime: str
    shown: Path  # the copy for the browser, right side up
    width_px: int
    height_px: int

    def data_url(self) -> str:
        """The bytes as they were given: what the model sees must not depend on this page. Raises Trouble when they are gone."""
        try:
            raw = self.path.read_bytes()
        except OSError as error:  # uploads are forgotten after a day
            raise Trouble("bad_picture", name=self.name, reason=error.strerror or "unreadable") from error
        return f"data:{self.mime};base64,{base64.b64encode(raw).decode()}"


def take_in(path: Path, folder: Path) -> Picture:
    """Look at an upload and put a copy for the browser into folder.

    Raises Trouble when it is no picture, is damaged, or is larger than LIMIT_MEGAPIXELS.
    """
    image, mime = _open(path)
    shown = folder / f"{hashlib.sha256(path.read_bytes()).hexdigest()[:24]}.webp"
    width_px, height_px = image.size
    if not shown.is_file():
        image.thumbnail((SHOWN_PX, SHOWN_PX))
        image.save(shown, quality=90)
    return Picture(path.name, path, mime, shown, width_px, height_px)


def thumbnail(path: Path) -> str:
    """A data: URL small enough to be sent with the page. Raises Trouble as take_in does."""
    image, _ = _open(path, THUMBNAIL_PX)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _open(path: Path, enough_px: int | None = None) -> tuple[Image.Image, str]:
    """(RGB or RGBA, right side up; MIME type). With enough_px a JPEG is decoded smaller, not below that: eight times as fast."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit stands below
            image = Image.open(path)
        mime = image.get_format_mimetype() or "application/octet-stream"
        megapixels = image.width * image.height / 1e6
        if megapixels > LIMIT_MEGAPIXELS:
            raise Trouble("large_picture", name=path.name, megapixels=f"{megapixels:.0f}", limit=f"{LIMIT_MEGAPIXELS:.0f}")
        if enough_px is not None:
            image.draft("RGB", (2 * enough_px, 2 * enough_px))
        upright = ImageOps.exif_transpose(image)
        return upright.convert("RGBA" if upright.has_transparency_data else "RGB"), mime
    except UnidentifiedImageError as error:
        raise Trouble("bad_picture", name=path.name, reason="unknown format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG, says Pillow
        raise Trouble("bad_picture", name=path.name, reason=str(error)[:120]) from error
