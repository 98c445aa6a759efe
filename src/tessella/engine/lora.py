"""Several adapters in one batch: each token's layer outputs are changed by its own request's adapter.

In: low-rank pairs by module name, whole tensors by parameter name.  Out: Adapter; Adapters, which hangs them beside the layers.
T tokens of all rows back to back; tokens of one adapter lie in few runs.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tessella.engine.request import LowRank
from tessella.errors import EngineError
from tessella.geometry import Window
from tessella.image import normalise
from tessella.model.vision_language import VisionLanguageModel

LANGUAGE, SEEING = "language_model.", ("vision_model.", "mlp1.")


@dataclass(frozen=True, eq=False)
class Adapter:
    """number: never given twice, so that a later adapter of the same name shares nothing with this one."""

    name: str
    number: int
    pairs: dict[str, tuple[Tensor, Tensor]]  # by module of the decoder: A (rank, in) and B (out, rank) times the scale
    seeing: dict[str, Tensor]  # parameters of tower and connector as this adapter has them, merged

    @property
    def sees(self) -> bool:
        """Whether it sees tiles otherwise than the model itself."""
        return bool(self.seeing)


class Run(NamedTuple):
    """Tokens start <= t < end of a pass belong to this adapter."""

    adapter: Adapter
    start: int
    end: int


def make_adapter(
    model: VisionLanguageModel, name: str, number: int, pairs: Mapping[str, LowRank], whole: Mapping[str, Tensor]
) -> Adapter:
    """Raises EngineError for what cannot run beside others, has no place, another shape, or numbers that are not finite."""
    parameters = dict(model.named_parameters())
    for parameter, tensor in whole.items():
        if not parameter.startswith(SEEING):
            raise EngineError(
                f'adapter "{name}" replaces {parameter}, a whole tensor of the language model, which no other answer could '
                "share; merge it with tessella convert and serve the merged model"
            )
        _check(name, parameter, tuple(tensor.shape), parameters)
    seeing = {parameter: tensor.to(model.device, parameters[parameter].dtype) for parameter, tensor in whole.items()}
    decoder: dict[str, tuple[Tensor, Tensor]] = {}
    for module, pair in pairs.items():
        parameter = f"{module}.weight"
        _check(name, parameter, (pair.b.shape[0], pair.a.shape[1]), parameters)
        weight = parameters[parameter]
        a, b = (x.to(model.device, torch.float32) for x in (pair.a, pair.b))
        if not (bool(a.isfinite().all()) and bool(b.isfinite().all())):
            raise EngineError(f'adapter "{name}": {module} holds numbers that are not finite; it is damaged')
        if not module.startswith(LANGUAGE):
            base = seeing.get(parameter, weight.detach())
            seeing[parameter] = (base.float() + pair.scale * (b @ a)).to(weight.dtype)
        elif isinstance(model.get_submodule(module), nn.Linear):
            decoder[module] = a.to(weight.dtype), (pair.scale * b).to(weight.dtype)
        else:
            raise EngineError(f'adapter "{name}" changes {module}, which is no linear layer; merge it with tessella convert')
    return Adapter(name, number, decoder, seeing)


def _check(name: str, parameter: str, shape: tuple[int, ...], parameters: Mapping[str, nn.Parameter]) -> None:
    if parameter not in parameters:
        raise EngineError(f'adapter "{name}" changes {parameter}, which the model does not have; it is of another model')
    need = tuple(parameters[parameter].shape)
    if shape != need:
        raise EngineError(f'adapter "{name}": {parameter} is {shape}, must be {need}; it is of another model')


class Adapters:
    """Beside each linear layer that any adapter changes hangs a hook that adds what the pass's runs say.

    The hooks read `runs`, which the runner sets before each pass; the model's own code knows nothing of adapters.
    """

    def __init__(self, model: VisionLanguageModel):
        self.runs: Sequence[Run] = ()
        self._model = model
        self._hooks: dict[str, RemovableHandle] = {}

    def hook(self, adapter: Adapter) -> None:
        """Make sure that every layer that this adapter changes has its hook."""
        for module in adapter.pairs.keys() - self._hooks.keys():
            self._hooks[module] = self._model.get_submodule(module).register_forward_hook(self._adding(module))

    def unhook(self) -> None:
        """Leave the model as it was."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks = {}

    def add(self, module: str, x: Tensor, out: Tensor) -> None:
        """x (T, in), out (T, width out), which is changed in place: what each run's adapter adds to this layer's output."""
        for adapter, start, end in self.runs:
            if module in adapter.pairs:
                a, b = adapter.pairs[module]
                out[start:end] += x[start:end] @ a.T @ b.T

    def _adding(self, module: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        return lambda _, inputs, out: self.add(module, inputs[0], out)


class Sight(nn.Module):
    """The model's way from tiles to visual tokens, as a module of its own, so that an adapter's tensors can stand in for its."""

    def __init__(self, model: VisionLanguageModel):
        super().__init__()
        self.model = model
        self.tower: Callable[[Tensor], Tensor] | None = None  # normalised tiles -> features, quicker than the model's own way

    def forward(self, tiles: Tensor, questions: Sequence[Sequence[int]], windows: Sequence[Window]) -> Tensor:
        return self.model.mlp1.laid_out(self.model.visual_tokens(tiles, questions), windows)

    def through(
        self,
        adapter: Adapter | None,
        tiles: Tensor,
        questions: Sequence[Sequence[int]] = (),
        windows: Sequence[Window] = (),
    ) -> Tensor:
        """tiles (N, 3, S, S) uint8 -> visual tokens (S, D) in the order of their slots, as this adapter sees them.

        questions where they are read; windows where the tiles of a picture are laid out together.
        """
        if adapter is None or not adapter.sees:
            if self.tower is None:
                return self(tiles, questions, windows)
            model = self.model
            features = self.tower(normalise(tiles, model.dtype, model.config.vision.statistics))
            return model.mlp1.laid_out(model.mlp1(features, questions), windows)
        theirs = {f"model.{name}": tensor for name, tensor in adapter.seeing.items()}
        seen: Tensor = torch.func.functional_call(self, theirs, (tiles, questions, windows))
        return seen
