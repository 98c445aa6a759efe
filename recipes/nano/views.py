"""Training views made on the device: crops of photographs, drawings on grounds, scenes of objects, words.

In: uint8 tensors on the device.  Out: views (B, 3, S, S) in 0..1 with the truth about each patch.
B views, S side in px, P patches a side.  Chance comes from the generator that is handed in.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH_PX = 14
COLOURS = {  # names and typical sRGB; each pixel colour is drawn around its centre
    "red": (214, 32, 38), "orange": (245, 140, 25), "yellow": (246, 220, 40), "green": (46, 150, 60), "blue": (36, 84, 200),
    "purple": (125, 50, 160), "pink": (246, 150, 190), "brown": (120, 72, 36), "black": (18, 18, 18), "white": (246, 246, 246),
    "grey": (128, 128, 128),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "ring", "diamond", "cross", "heart")
NONE = -100  # ignored by cross-entropy


@dataclass
class Scene:
    """views (B, 3, S, S); what each patch shows: drawing, colour, shape (B, P, P), NONE where there is none; count (B,)."""

    views: Tensor
    drawing: Tensor
    colour: Tensor
    shape: Tensor
    count: Tensor


class Chance:
    """Random numbers on the device from one seeded generator."""

    def __init__(self, device: torch.device, seed: int):
        self.device = device
        self.generator = torch.Generator(device).manual_seed(seed)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(*shape, device=self.device, generator=self.generator)

    def integer(self, limit: int, *shape: int) -> Tensor:
        return torch.randint(limit, shape, device=self.device, generator=self.generator)

    def yes(self, share: float, *shape: int) -> Tensor:
        return self.uniform(*shape) < share


def crop_boxes(chance: Chance, count: int, low: float, high: float = 1.0) -> Tensor:
    """Random boxes as affine maps (B, 2, 3): area share in [low, high], aspect 3:4 to 4:3, mirrored half the time."""
    area = chance.uniform(count, low=low, high=high)
    aspect = torch.exp(chance.uniform(count, low=-math.log(4 / 3), high=math.log(4 / 3)))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    x, y = ((1 - side) * chance.uniform(count, low=-1) for side in (width, height))
    mirror = torch.where(chance.yes(0.5, count), -1.0, 1.0)
    zero = torch.zeros_like(x)
    return torch.stack((torch.stack((width * mirror, zero, x), 1), torch.stack((zero, height, y), 1)), 1)


def crop(pixels: Tensor, boxes: Tensor, side: int) -> Tensor:
    """pixels (B, H, W, 3) uint8, boxes (B, 2, 3) -> (B, 3, S, S) in 0..1."""
    images = pixels.permute(0, 3, 1, 2).float() / 255
    grid = F.affine_grid(boxes, [len(pixels), 3, side, side], align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False).clamp(0, 1)


def jitter(views: Tensor, chance: Chance, strength: float = 0.3) -> Tensor:
    """Brightness, contrast and saturation, each its own factor a view."""
    n = len(views)
    bright, contrast, colour = (chance.uniform(n, 1, 1, 1, low=1 - strength, high=1 + strength) for _ in range(3))
    views = views * bright
    views = views.mean((1, 2, 3), keepdim=True).lerp(views, contrast)
    return views.mean(1, keepdim=True).lerp(views, colour).clamp(0, 1)


def grounds(photos: Tensor, chance: Chance, count: int, side: int) -> Tensor:
    """Backgrounds (B, 3, S, S): white, plain, two-coloured or a piece of a photograph."""
    plain = chance.uniform(count, 3, 1, 1).expand(-1, -1, side, side)
    other = chance.uniform(count, 3, 1, 1)
    ramp = torch.linspace(0, 1, side, device=chance.device)[None, None, :, None]
    shaded = plain.lerp(other.expand_as(plain), ramp)
    picked = photos[chance.integer(len(photos), count)]
    photo = crop(picked, crop_boxes(chance, count, 0.05, 0.6), side)
    kind = chance.uniform(count)[:, None, None, None]
    ground = torch.where(kind < 0.3, torch.ones_like(photo), plain)
    return torch.where(kind > 0.7, photo, torch.where(kind > 0.55, shaded, ground))


def placed(layers: Tensor, centre: Tensor, half: Tensor, angle: Tensor, side: int, mode: str = "bilinear") -> Tensor:
    """Set layers (B, C, h, w) onto canvases: centre and half size (B, 2) in -1..1, angle (B,) -> (B, C, S, S)."""
    cos, sin = angle.cos(), angle.sin()
    x, y = centre.unbind(1)
    w, h = half.unbind(1)
    row0 = torch.stack((cos / w, sin / w, -(cos * x + sin * y) / w), 1)
    row1 = torch.stack((-sin / h, cos / h, (sin * x - cos * y) / h), 1)
    grid = F.affine_grid(torch.stack((row0, row1), 1), [len(layers), layers.shape[1], side, side], align_corners=False)
    return F.grid_sample(layers, grid, mode=mode, padding_mode="zeros", align_corners=False)


def over(ground: Tensor, colour: Tensor, alpha: Tensor) -> Tensor:
    return ground * (1 - alpha) + colour * alpha


def at_patches(alpha: Tensor) -> Tensor:
    """alpha (B, 1, S, S) -> the covered share of each patch (B, P, P)."""
    return F.avg_pool2d(alpha, PATCH_PX)[:, 0]


def drawings(
    emoji: Tensor, classes: Tensor, photos: Tensor, chance: Chance, count: int, side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One large drawing a view -> views (B, 3, S, S), its class (B,), its class at each covered patch (B, P, P)."""
    picked = chance.integer(len(emoji), count)
    layer = emoji[picked].float() / 255
    mirror = chance.yes(0.5, count)
    layer = torch.where(mirror[:, None, None, None], layer.flip(3), layer)
    size = chance.uniform(count, low=0.35, high=1.0)
    stretch = torch.exp(chance.uniform(count, low=-0.12, high=0.12))
    half = torch.stack((size * stretch, size / stretch), 1)
    centre = (1.05 - half).clamp(min=0) * chance.uniform(count, 2, low=-1)
    flat = placed(layer, centre, half, chance.uniform(count, low=-0.25, high=0.25), side)
    views = over(grounds(photos, chance, count, side), jitter(flat[:, :3], chance, 0.25), flat[:, 3:])
    label = classes[picked]
    return views, label, torch.where(at_patches(flat[:, 3:]) > 0.3, label[:, None, None], NONE)


def shape_masks(size: int, device: torch.device) -> Tensor:
    """The eight shapes as masks (8, 1, size, size)."""
    fine = torch.linspace(-1, 1, size * 4, device=device)
    y, x = torch.meshgrid(fine, fine, indexing="ij")
    r, angle = (x**2 + y**2).sqrt(), torch.atan2(x, -y)
    wave = torch.cos(5 * angle)
    masks = [
        r < 0.95,
        (x.abs() < 0.9) & (y.abs() < 0.9),
        (y < 0.85) & (y > -0.9 + 1.75 * x.abs() * 1.0),
        r < 0.45 + 0.25 * (wave + 1) ** 1.5 / 2**0.5,
        (r < 0.95) & (r > 0.55),
        x.abs() + y.abs() < 0.97,
        ((x.abs() < 0.32) | (y.abs() < 0.32)) & (x.abs() < 0.95) & (y.abs() < 0.95),
        ((x * 1.2) ** 2 + (-y * 1.25 + 0.15) ** 2 - 0.75) ** 3 - (x * 1.2) ** 2 * (-y * 1.25 + 0.15) ** 3 < 0,
    ]
    return F.avg_pool2d(torch.stack(masks).float()[:, None], 4)


def scenes(emoji: Tensor, classes: Tensor, photos: Tensor, chance: Chance, count: int, side: int) -> Scene:
    """One to five small objects a view in cells of a 3 x 3 board: drawings (often all alike) or coloured shapes."""
    device, patches = chance.device, side // PATCH_PX
    number = 1 + chance.integer(5, count)
    cells = torch.rand(count, 9, device=device, generator=chance.generator).argsort(1)[:, :5]
    alike, flat_shapes = chance.yes(0.6, count), chance.yes(0.5, count)
    pick, pick_shape = chance.integer(len(emoji), count, 5), chance.integer(len(SHAPES), count, 5)
    pick = torch.where(alike[:, None], pick[:, :1], pick)
    pick_shape = torch.where(alike[:, None], pick_shape[:, :1], pick_shape)
    pick_colour = chance.integer(len(COLOURS), count, 5)
    masks = shape_masks(64, device)
    table = torch.tensor(list(COLOURS.values()), device=device) / 255
    views = grounds(photos, chance, count, side)
    blank = torch.full((count, patches, patches), NONE, device=device)
    drawing, colour, shape = blank, blank, blank
    for k in range(5):
        half = chance.uniform(count, 1, low=0.12, high=0.3).expand(-1, 2)
        cell = torch.stack((cells[:, k] % 3, cells[:, k] // 3), 1) * (2 / 3) - 2 / 3
        centre = cell + (1 / 3 - half).clamp(min=0) * chance.uniform(count, 2, low=-1)
        turn = chance.uniform(count, low=-0.2, high=0.2)
        stamp = F.interpolate(emoji[pick[:, k]].float() / 255, size=64, mode="bilinear", antialias=True)
        tint = (table[pick_colour[:, k]] + 0.06 * torch.randn(count, 3, device=device, generator=chance.generator)).clamp(0, 1)
        painted = torch.cat((tint[:, :, None, None].expand(-1, -1, 64, 64), masks[pick_shape[:, k]]), 1)
        layer = placed(torch.where(flat_shapes[:, None, None, None], painted, stamp), centre, half, turn, side)
        alpha = layer[:, 3:] * (number > k)[:, None, None, None]
        views = over(views, layer[:, :3], alpha)
        covered = at_patches(alpha) > 0.3
        flat = flat_shapes[:, None, None]
        drawing = torch.where(covered & ~flat, classes[pick[:, k]][:, None, None], drawing)
        colour = torch.where(covered & flat, pick_colour[:, k][:, None, None], colour)
        shape = torch.where(covered & flat, pick_shape[:, k][:, None, None], shape)
    return Scene(views, drawing, colour, shape, number - 1)


def written(
    words: tuple[Tensor, Tensor, Tensor], photos: Tensor, chance: Chance, count: int, side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One word a view -> views (B, 3, S, S), its letters (B, 8), the letter at each patch (B, P, P), 0 where there is none."""
    masks, columns, codes = words
    pick = chance.integer(len(masks), count)
    mask = masks[pick][:, None].float() / 255
    used = (columns[pick] > 0).float().sum(1) / columns.shape[1]  # share of the mask's width that the word takes
    letter_height = chance.uniform(count, low=0.10, high=0.42)
    wide = (letter_height * columns.shape[1] / masks.shape[1]).minimum(0.96 / used.clamp(min=0.05))
    half = torch.stack((wide, wide * masks.shape[1] / columns.shape[1]), 1)
    reach = torch.stack((half[:, 0] * used, half[:, 1] * 0.8), 1)
    centre = (0.97 - reach).clamp(min=0) * chance.uniform(count, 2, low=-1)
    turn = chance.uniform(count, low=-0.12, high=0.12) * chance.yes(0.5, count)
    alpha = placed(mask, centre, half, turn, side)
    ground = grounds(photos, chance, count, side)
    shade = (ground * alpha).sum((2, 3), keepdim=True) / alpha.sum((2, 3), keepdim=True).clamp(min=1)
    ink = chance.uniform(count, 3, 1, 1)
    close = (ink - shade).abs().mean(1, keepdim=True) < 0.3
    ink = torch.where(close, torch.where(shade.mean(1, keepdim=True) > 0.5, ink * 0.15, 1 - ink * 0.15), ink)
    label = columns[pick][:, None, None].float().expand(-1, -1, masks.shape[1], -1)
    at = placed(label, centre, half, turn, side // PATCH_PX, mode="nearest")[:, 0].round().long()
    return over(ground, ink.expand_as(ground), alpha), codes[pick].long(), at
