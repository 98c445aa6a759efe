"""On a GPU the decoder's small steps run as one kernel each, in place of torch's many; the matrix products stay as they are.

In: a model.  Out: the same model with other `forward`s, and the way back. What they compute is what language.py says.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from tessella.engine import kernels
from tessella.model.attend import Attend
from tessella.model.language import MLP, Attention
from tessella.model.layers import RMSNorm
from tessella.model.vision_language import VisionLanguageModel


def norm(module: RMSNorm, x: Tensor) -> Tensor:
    """RMSNorm.forward"""
    return kernels.rms_norm(x, module.weight, module.eps)


def mlp(module: MLP, x: Tensor) -> Tensor:
    """MLP.forward"""
    return module.down_proj(kernels.silu_times(module.gate_proj(x), module.up_proj(x)))


def attention(module: Attention, x: Tensor, turn: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
    """Attention.forward"""
    d = module.head_dim
    q, k, v = (project(x).unflatten(-1, (-1, d)) for project in (module.q_proj, module.k_proj, module.v_proj))
    q, k = module.q_norm(q), module.k_norm(k)
    kernels.rotate_in_place(q, k, *turn)
    return module.o_proj(attend(module.layer, q, k, v).flatten(1))


KERNELS: dict[type[nn.Module], Callable[..., Tensor]] = {RMSNorm: norm, MLP: mlp, Attention: attention}


def swap_in(model: VisionLanguageModel) -> Callable[[], None]:
    """Every module of the decoder that has a kernel takes it; what comes back undoes that."""
    swapped = [module for module in model.language_model.modules() if type(module) in KERNELS]
    for module in swapped:
        module.forward = partial(KERNELS[type(module)], module)

    def undo() -> None:
        for module in swapped:
            del module.forward  # the class's own shows again

    return undo
