"""Pictures: a small diffusion decoder, told what to draw by what the super-link queries became.

In: states (N, 64, D) of [GEN] or [EDIT]; for editing the picture, too.  Out: pictures (N, 3, S, S) in -1 to 1.
The states are projected and read by a mapper with queries of its own; a UNet of diffusers removes noise under that condition,
with guidance. Built in: a UNet of some megabytes over pixels. With a folder in Stable Diffusion 1.5's form its UNet and VAE do
the same over latents, frozen, and the mapper alone is taught. An edited picture stands beside the noise, as in InstructPix2Pix.
Source: VisionLLM v2 (arXiv:2406.08394); DDPM 2006.11239, DDIM 2010.02502, v-prediction 2202.00512, guidance 2207.12598,
InstructPix2Pix 2211.09800.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tessella.errors import CheckpointError

NOISE_STEPS = 1000  # of the noise that is taught


@dataclass(frozen=True)
class PictureConfig:
    """folder: a Stable Diffusion folder in place of the built-in UNet, whose numbers then count."""

    language_width: int
    side_px: int = 64
    channels: tuple[int, ...] = (40, 72, 104)
    condition_width: int = 128
    condition_tokens: int = 16
    folder: str | None = None
    pooled: bool = False  # what was told is also added to the time's embedding; what is begun now does, see attach()


class Mapper(nn.Module):
    """The states of a routing token's queries become the tokens that a UNet looks at."""

    def __init__(self, language_width: int, width: int, tokens: int):
        super().__init__()
        self.project = nn.Sequential(nn.LayerNorm(language_width), nn.Linear(language_width, width))
        self.queries = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.nothing = nn.Parameter(0.02 * torch.randn(tokens, width))  # the condition of guidance's other side
        self.norm = nn.LayerNorm(width)
        self.look = nn.MultiheadAttention(width, 4, batch_first=True)
        self.feed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, states: Tensor) -> Tensor:
        """states (N, Q, D) -> (N, tokens, width)."""
        seen = self.project(states.float())
        x = self.queries.expand(len(states), -1, -1)
        x = x + self.look(self.norm(x), seen, seen, need_weights=False)[0]
        return x + self.feed(x)


class PictureDecoder(nn.Module):
    """The decoder of [GEN] and [EDIT]. Runs in float32 whatever the model does."""

    def __init__(self, config: PictureConfig):
        super().__init__()
        self.config = config
        self.outside: StableDiffusion | None = None
        self.unet: nn.Module | None = None
        self.pool: nn.Module | None = None
        if config.folder is None:
            self.unet = built_in_unet(config)
            self.noise_like, self.edits = (3, config.side_px, config.side_px), True
            self.mapper = Mapper(config.language_width, config.condition_width, config.condition_tokens)
            self.pool = nn.LayerNorm(config.condition_width) if config.pooled else None
        else:
            self.outside = StableDiffusion(Path(config.folder))
            self.noise_like, self.edits = self.outside.noise_like, self.outside.edits
            self.mapper = Mapper(config.language_width, self.outside.condition_width, 77)

    def loss(self, states: Tensor, pictures: Tensor, before: Tensor | None, *, looks: int = 1, dropped: float = 0.1) -> Tensor:
        """Mean squared error of what the UNet says of noised pictures, one a row: (N,).

        states (N, Q, D); pictures (N, 3, S, S) in -1 to 1; before (N, 3, S, S): what is edited, zeros where a picture is new.
        looks: noised copies of each. dropped: share of the copies that learn without a condition, for guidance. Chance is
        torch's own, so that resume repeats it.
        """
        rows = len(pictures)
        clean = self._inward(pictures).repeat(looks, 1, 1, 1)
        noise = torch.randn_like(clean)
        when = torch.randint(NOISE_STEPS, (len(clean),), device=clean.device)
        scheduler = self._scheduler()
        noised = scheduler.add_noise(clean, noise, when)
        aim = scheduler.get_velocity(clean, noise, when) if scheduler.config.prediction_type == "v_prediction" else noise
        condition = self.mapper(states).repeat(looks, 1, 1)
        before = None if before is None else before.repeat(looks, 1, 1, 1)
        without = torch.rand(len(clean), device=clean.device) < dropped
        condition = torch.where(without[:, None, None], self.mapper.nothing.expand_as(condition), condition)
        missed = (self._run(self._beside(noised, before), when, condition) - aim).square().mean((1, 2, 3))
        return missed.view(looks, rows).mean(0)

    @torch.no_grad()
    def paint(self, states: Tensor, before: Tensor | None, *, steps: int = 30, guidance: float = 3.0, seed: int = 0) -> Tensor:
        """states (N, Q, D), before (N, 3, S, S) in -1 to 1 or None -> pictures (N, 3, S, S) in -1 to 1."""
        scheduler = self._scheduler()
        scheduler.set_timesteps(steps)
        chance = torch.Generator().manual_seed(seed)
        x = torch.randn((len(states), *self.noise_like), generator=chance).to(states.device)
        x = x * scheduler.init_noise_sigma
        told = self.mapper(states)
        condition = torch.cat((self.mapper.nothing.expand_as(told), told))
        for when in scheduler.timesteps:
            seen = self._beside(x, before)
            guess = self._run(torch.cat((seen, seen)), when.to(x.device).expand(2 * len(x)), condition)
            free, wanted = guess.chunk(2)
            x = scheduler.step(free + guidance * (wanted - free), when, x).prev_sample
        return self._outward(x).clamp(-1, 1)

    def _beside(self, noised: Tensor, before: Tensor | None) -> Tensor:
        """What is edited stands in channels of its own beside the noise, where the UNet has room for it."""
        if not self.edits:
            return noised
        shown = torch.zeros_like(noised) if before is None else self._inward(before)
        return torch.cat((noised, shown), dim=1)

    def _run(self, x: Tensor, when: Tensor, condition: Tensor) -> Tensor:
        unet = self.unet if self.outside is None else self.outside.unet.to(x.device)
        assert unet is not None
        told = None if self.pool is None else self.pool(condition.mean(1))
        out: Tensor = unet(x, when, encoder_hidden_states=condition, class_labels=told).sample
        return out

    def _inward(self, pictures: Tensor) -> Tensor:
        """Pictures of any size -> what the UNet sees: pixels, or latents."""
        if self.outside is not None:
            return self.outside.inward(pictures)
        side = self.config.side_px
        return F.interpolate(pictures, size=(side, side), mode="bilinear", align_corners=False, antialias=True)

    def _outward(self, x: Tensor) -> Tensor:
        return x if self.outside is None else self.outside.outward(x)

    def _scheduler(self) -> Any:
        from diffusers import DDIMScheduler  # an extra that only pictures need

        if self.outside is not None:
            return DDIMScheduler.from_config(self.outside.schedule, clip_sample=False)
        return DDIMScheduler(
            num_train_timesteps=NOISE_STEPS, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=True
        )


def built_in_unet(config: PictureConfig) -> nn.Module:
    """A UNet of diffusers over pixels: three for the noise, three for what is edited."""
    from diffusers import UNet2DConditionModel  # an extra that only pictures need

    depth = len(config.channels)
    unet: nn.Module = UNet2DConditionModel(
        sample_size=config.side_px,
        in_channels=6,
        out_channels=3,
        block_out_channels=config.channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (depth - 1)),
        up_block_types=(*["CrossAttnUpBlock2D"] * (depth - 1), "UpBlock2D"),
        cross_attention_dim=config.condition_width,
        attention_head_dim=4,
        norm_num_groups=8,
        # Hidden states of one food are told from another's by a fifth of their length, which attention alone finds slowly: after
        # 120 steps on eight foods a wrong food's states cost 0.2 % more than the right one's, with this 4.5 % (docs/log.md).
        class_embed_type="projection" if config.pooled else None,
        projection_class_embeddings_input_dim=config.condition_width if config.pooled else None,
    )
    return unet


class StableDiffusion:
    """UNet, VAE and schedule of a Stable Diffusion 1.5 folder; frozen, so no part of what is taught or saved."""

    def __init__(self, folder: Path):
        from diffusers import AutoencoderKL, UNet2DConditionModel  # an extra that only pictures need

        missing = [name for name in ("unet", "vae", "scheduler") if not (folder / name).is_dir()]
        if missing:
            raise CheckpointError(
                f"{folder} holds no {' and no '.join(missing)}; give a folder in Stable Diffusion 1.5's form (diffusers), or "
                "leave it out for the built-in decoder"
            )
        self.unet: Any = UNet2DConditionModel.from_pretrained(folder / "unet", local_files_only=True).requires_grad_(False).eval()
        self.vae: Any = AutoencoderKL.from_pretrained(folder / "vae", local_files_only=True).requires_grad_(False).eval()
        self.schedule = _schedule_of(folder)
        self.condition_width = int(self.unet.config.cross_attention_dim)
        latents, side = int(self.vae.config.latent_channels), int(self.unet.config.sample_size)
        self.noise_like = (latents, side, side)
        self.edits = int(self.unet.config.in_channels) == 2 * latents  # InstructPix2Pix's UNet sees the picture beside the noise
        self.side_px = side * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def inward(self, pictures: Tensor) -> Tensor:
        """Pictures (N, 3, S, S) -> latents."""
        wide = F.interpolate(pictures, size=(self.side_px, self.side_px), mode="bilinear", align_corners=False)
        with torch.no_grad():
            return self.vae.to(pictures.device).encode(wide).latent_dist.mode() * self.vae.config.scaling_factor

    def outward(self, latents: Tensor) -> Tensor:
        return self.vae.to(latents.device).decode(latents / self.vae.config.scaling_factor).sample


def _schedule_of(folder: Path) -> Any:
    from diffusers import DDIMScheduler  # an extra that only pictures need

    return DDIMScheduler.from_pretrained(folder / "scheduler", local_files_only=True).config
