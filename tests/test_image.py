"""image.py: the tile rule as published, Pillow's own pixels, and safe opening."""

import base64
import io
import random
import warnings
import zlib
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from tessella.errors import ConfigError, ImageError
from tessella.image import Grid, TileRule, candidate_grids, choose_grid, count_tiles, cut_tiles, normalise, open_image, read_size

GOLDEN = [  # internvl2: width, height -> (grid at most 12 tiles), (grid at most 6 tiles)
    ([(448, 448), (633, 633)], (1, 1), (1, 1)),
    ([(634, 634), (776, 776)], (2, 2), (2, 2)),
    ([(951, 951)], (3, 3), (2, 2)),
    ([(300, 200), (1500, 1000)], (3, 2), (3, 2)),
    ([(640, 480), (800, 600), (1024, 768), (1280, 1024), (4032, 3024)], (4, 3), (3, 2)),
    ([(480, 640), (3024, 4032)], (3, 4), (2, 3)),
    ([(1280, 720), (1920, 1080)], (4, 2), (2, 1)),
    ([(1080, 1920)], (2, 4), (1, 2)),
    ([(2000, 500)], (4, 1), (4, 1)),
    ([(5000, 400)], (12, 1), (6, 1)),
    ([(100, 1000)], (1, 10), (1, 6)),
]


def noise(width: int, height: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


# ---- the tile rule


@pytest.mark.parametrize(("sizes", "twelve", "six"), GOLDEN)
def test_grids_equal_the_golden_vectors(sizes, twelve, six):
    for width, height in sizes:
        for most, grid in ((12, twelve), (6, six)):
            rule = TileRule(max_tiles=most)
            assert choose_grid(width, height, rule) == Grid(*grid)
            tiles = grid[0] * grid[1]
            assert count_tiles(width, height, rule) == tiles + (tiles > 1)


@pytest.mark.parametrize(("most", "grids"), [(1, 1), (2, 3), (4, 8), (6, 14), (12, 35), (24, 84), (40, 158)])
def test_number_of_candidate_grids(most, grids):
    assert len(candidate_grids(TileRule(max_tiles=most))) == grids


def published_grid(width: int, height: int, size: int, least: int, most: int) -> tuple[int, int]:
    """The rule in its own words, over all grids at once: nearest ratio; of exact ties the largest that the picture half fills.

    The gap is compared as the float that training compared.
    """
    grids = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if least <= i * j <= most]
    gap = {grid: abs(width / height - grid[0] / grid[1]) for grid in grids}
    least_gap = min(gap.values())
    nearest = sorted((grid for grid in grids if gap[grid] == least_gap), key=lambda grid: grid[0] * grid[1])
    filled = [grid for grid in nearest[1:] if Fraction(width * height) > Fraction(size * size * grid[0] * grid[1], 2)]
    return filled[-1] if filled else nearest[0]


limits = st.tuples(st.integers(1, 40), st.integers(1, 40)).map(sorted)
sides = st.integers(2, 5000)


@settings(max_examples=400, deadline=None)
@given(sides, sides, limits, st.sampled_from([224, 448]))
def test_any_size_gets_the_grid_of_the_published_rule(width, height, limit, size):
    least, most = limit
    grid = choose_grid(width, height, TileRule(size, least, most))
    assert tuple(grid) == published_grid(width, height, size, least, most)
    assert least <= grid.columns * grid.rows <= most


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 900), limits)
def test_exact_ties_fall_as_published(columns, rows, scale, limit):
    width, height = columns * scale + 1, rows * scale + 1
    for w, h in ((width, height), (columns * scale, rows * scale)):  # the second lies on a candidate's ratio
        assert tuple(choose_grid(w, h, TileRule(448, *limit))) == published_grid(w, h, 448, *limit)


@pytest.mark.parametrize("fields", [{"min_tiles": 0}, {"max_tiles": 41}, {"min_tiles": 3, "max_tiles": 2}, {"size_px": 0}])
def test_a_rule_out_of_range_is_refused_with_its_number(fields):
    with pytest.raises(ConfigError, match=str(max(fields.values()))):
        TileRule(**fields)


# ---- pixels


@pytest.mark.parametrize(
    ("width", "height", "most", "size"),
    [(97, 61, 12, 28), (61, 97, 12, 28), (50, 50, 12, 28), (20, 20, 1, 28), (300, 20, 40, 28), (640, 480, 12, 448)],
)
def test_tiles_are_pillows_bicubic_pixels_bit_for_bit(width, height, most, size):
    image = Image.fromarray(noise(width, height))
    rule = TileRule(size, max_tiles=most)
    tiles = cut_tiles(image, rule)
    columns, rows = tiles.grid
    resized = image.resize((size * columns, size * rows))  # Pillow's default, as in the official code
    expected = [resized.crop((i * size, j * size, (i + 1) * size, (j + 1) * size)) for j in range(rows) for i in range(columns)]
    if len(expected) > 1:
        expected.append(image.resize((size, size)))
    assert tiles.pixels.dtype == torch.uint8
    assert tiles.pixels.shape == (count_tiles(width, height, rule), 3, size, size)
    for tile, picture in zip(tiles.pixels, expected, strict=True):
        assert np.array_equal(tile.permute(1, 2, 0).numpy(), np.asarray(picture))
    assert (tiles.width_px, tiles.height_px) == (width, height)


def test_without_thumbnail_there_is_none():
    image = Image.fromarray(noise(56, 28))
    assert len(cut_tiles(image, TileRule(28, max_tiles=2, thumbnail=False)).pixels) == 2
    assert len(cut_tiles(image, TileRule(28, max_tiles=2, thumbnail=True)).pixels) == 3


def test_equal_tiles_have_equal_digests_and_others_do_not():
    left, right = noise(28, 28, seed=1), noise(28, 28, seed=2)
    both = cut_tiles(Image.fromarray(np.hstack([left, right])), TileRule(28, max_tiles=2))
    alone = cut_tiles(Image.fromarray(left), TileRule(28))
    assert both.digests[0] == alone.digests[0]
    assert len(set(both.digests)) == 3


def test_normalise_is_totensor_and_imagenet_statistics():
    tiles = torch.from_numpy(noise(9, 9)).permute(2, 0, 1)[None]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (tiles.float() / 255 - mean[:, None, None]) / std[:, None, None]
    assert torch.equal(normalise(tiles, torch.float32), expected)
    assert torch.equal(normalise(tiles, torch.bfloat16), expected.bfloat16())
    assert tiles.dtype == torch.uint8  # the input is not changed
    assert torch.equal(normalise(expected, torch.float32), expected)  # floats pass through


# ---- opening


def test_every_kind_of_source_opens_alike(tmp_path):
    image = Image.fromarray(noise(12, 9))
    data = saved(image, "PNG")
    (tmp_path / "a.png").write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (str(tmp_path / "a.png"), tmp_path / "a.png", data, uri, image):
        assert np.array_equal(np.asarray(open_image(source)), np.asarray(image))
        assert read_size(source) == (12, 9)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
def test_opaque_pictures_equal_pillows_rgb(kind):
    data = saved(Image.fromarray(noise(21, 13)), kind)
    opened = open_image(data)
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.fromarray(noise(8, 16)).resize((32, 64))
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Image.Transpose that undoes the turn
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    data = saved(stored, kind, exif=exif, **({"quality": 100} if kind in ("JPEG", "WEBP") else {}))
    opened = open_image(data)
    assert opened.size == (32, 64) == read_size(data)
    assert np.abs(np.asarray(opened).astype(int) - np.asarray(upright)).mean() < (0.1 if kind in ("PNG", "TIFF") else 25)


def test_a_turned_compressed_tiff_is_turned_once():
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.fromarray(noise(8, 6))
    opened = open_image(saved(picture, "TIFF", exif=exif, compression="tiff_lzw"))
    assert np.array_equal(np.asarray(opened), np.asarray(picture.transpose(Image.Transpose.ROTATE_270)))


@pytest.mark.parametrize("value", [0, 9, 77])
def test_a_senseless_orientation_turns_nothing(value):
    exif = Image.Exif()
    exif[0x0112] = value
    assert read_size(saved(Image.new("RGB", (6, 4)), "JPEG", exif=exif)) == (6, 4)


def test_a_palette_that_only_claims_transparency_warns_of_nothing():
    palette = Image.frombytes("P", (2, 2), bytes([0, 1, 0, 1]))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = open_image(saved(palette, "PNG", transparency=bytes([255, 255])))
    assert np.asarray(opened).reshape(-1, 3).tolist() == [[255, 0, 0], [0, 255, 0]] * 2


def test_real_transparency_is_laid_on_white():
    rgba = np.zeros((2, 4, 4), np.uint8)
    rgba[..., 0] = 200  # red under the glass
    rgba[:, :, 3] = [0, 128, 255, 255]
    opened = np.asarray(open_image(saved(Image.fromarray(rgba), "PNG")))
    assert opened[0, 0].tolist() == [255, 255, 255]
    assert opened[0, 3].tolist() == [200, 0, 0]
    assert opened[0, 1].tolist() == [227, 127, 127]


def test_opaque_rgba_is_plain_rgb():
    rgba = noise(9, 7, channels=4)
    rgba[..., 3] = 255
    assert np.array_equal(np.asarray(open_image(saved(Image.fromarray(rgba), "PNG"))), rgba[..., :3])


def test_a_palette_keeps_its_colours_and_its_transparency():
    palette = Image.frombytes("P", (2, 2), bytes([0, 1, 2, 1]))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    red, green, blue, white = [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]
    assert np.asarray(open_image(saved(palette, "PNG"))).reshape(-1, 3).tolist() == [red, green, blue, green]
    for kind in ("PNG", "GIF"):
        clear = np.asarray(open_image(saved(palette, kind, transparency=1)))
        assert clear.reshape(-1, 3).tolist() == [red, white, blue, white]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled_not_clipped(kind):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    opened = np.asarray(open_image(saved(Image.fromarray(ramp), kind)))
    assert np.array_equal(opened, np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, 2))
    assert opened.min() == 0 and opened.max() == 255


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")


def sixteen_bit_rgb_png(pixels: np.ndarray) -> bytes:
    height, width, _ = pixels.shape
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    chunks = [png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(rows)), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_sixteen_bit_rgb_is_scaled_not_clipped():
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, 3)).astype(np.uint16)
    assert np.array_equal(np.asarray(open_image(sixteen_bit_rgb_png(pixels))), (pixels >> 8).astype(np.uint8))


def test_a_clear_colour_of_sixteen_bits_becomes_white():
    grey = np.array([[0, 1000], [40000, 65535]], np.uint16)
    header = bytes([0, 0, 0, 2, 0, 0, 0, 2, 16, 0, 0, 0, 0])
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in grey)
    chunks = [(b"IHDR", header), (b"tRNS", (1000).to_bytes(2, "big")), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    opened = open_image(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
    assert np.asarray(opened)[..., 0].tolist() == [[0, 255], [156, 255]]


def test_floats_are_refused_because_nobody_says_what_is_white():
    with pytest.raises(ImageError, match="8 or 16 bits"):
        open_image(saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode):
    kind = {"CMYK": "JPEG", "YCbCr": "JPEG"}.get(mode, "PNG")
    opened = open_image(saved(Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode), kind))
    assert opened.mode == "RGB"
    assert np.asarray(opened).min() >= 250


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    for kind, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.asarray(open_image(data))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_file_is_refused_by_name(tmp_path, kind, share):
    data = saved(Image.fromarray(noise(64, 64)), kind)
    path = tmp_path / "dish.pic"
    path.write_bytes(data[: int(len(data) * share)])
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    with pytest.raises(ImageError, match=r"dish\.pic.*(cut off|damaged)"):
        open_image(path)


def png_of_size(width: int, height: int) -> bytes:
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")


@pytest.mark.parametrize("side", [10_001, 15_000, 30_000])
def test_an_absurd_size_is_refused_from_the_header_without_a_foreign_warning(side):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for reader in (open_image, read_size):
            with pytest.raises(ImageError, match=rf"{side:,} x {side:,} px = .* megapixels; at most 100"):
                reader(png_of_size(side, side))
    assert Image.MAX_IMAGE_PIXELS is not None  # Pillow's own guard is as it was


def test_the_limit_is_a_setting():
    data = saved(Image.new("RGB", (200, 100)), "PNG")
    assert open_image(data, limit_megapixels=0.02).size == (200, 100)
    with pytest.raises(ImageError, match=r"at most 0\.019"):
        open_image(data, limit_megapixels=0.019)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_size(png_of_size(30_000, 30_000), limit_megapixels=1000) == (30_000, 30_000)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_one_pixel_is_no_picture_but_two_are(size):
    with pytest.raises(ImageError, match="at least 2 px"):
        open_image(saved(Image.new("RGB", size), "PNG"))
    assert open_image(saved(Image.new("RGB", (2, 2)), "PNG")).size == (2, 2)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"hello, I am a text", "not a picture"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\x89PNG\r\n\x1a\n\0\0", "damaged or cut off"),
        (EPS, "not a picture"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_way_out(data, message):
    with pytest.raises(ImageError, match=f"{message}.*give a PNG"):
        open_image(data)


def test_sources_that_cannot_be_had_are_refused_by_name(tmp_path):
    for source, message in (
        (tmp_path / "no.jpg", "no such file"),
        (tmp_path, "is a folder"),
        ("x" * 5000, "5,000 characters"),
        ("a\0b", "cannot be opened"),
        ("https://example.org/a.png", "web address"),
        (Path("https://example.org/a.png"), "web address"),  # as a command line gives it: https:/example.org/a.png
        ("data:image/png;base64,@@@", "broken base64"),
        ("data:image/png;base64,abc", "broken base64"),
        ("data:image/png;base64", "comma"),
    ):
        with pytest.raises(ImageError, match=message):
            open_image(source)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow tells of broken EXIF blocks; the pixels are whole
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]), st.integers(0, 10**6))
def test_damaged_bytes_give_a_picture_or_our_error_and_nothing_else(kind, seed):
    chance = random.Random(seed)
    data = bytearray(saved(Image.fromarray(noise(24, 24)), kind))
    for _ in range(chance.randint(1, 8)):
        data[chance.randrange(min(len(data), chance.choice([40, 400, 10**6])))] = chance.randrange(256)
    try:
        assert open_image(bytes(data)).mode == "RGB"
    except ImageError as error:
        assert str(error)


def test_opening_closes_the_file(tmp_path: Path):
    path = tmp_path / "a.png"
    path.write_bytes(saved(Image.new("RGB", (4, 4)), "PNG"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image(path)
        read_size(path)
