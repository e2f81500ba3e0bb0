"""The two names of each tensor: in a plain checkpoint, and in the model since LoRA layers are in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lora_cli.adapters.names import Chain, First, Mapper, Subtree, Wrap
from lora_cli.errors import NamesError, ShapeError, UsageError
from lora_cli.nn.layer import LoRALayer
from lora_cli.nn.merging import states_of_bases
from lora_cli.nn.modules import paths_of


class PlainNames:
    """A model with LoRA layers in it, seen under the names of a plain checkpoint.

    Attributes:
        model: The model.
        layers: The LoRA layers, by the names that their modules have in a checkpoint.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layers: dict[str, LoRALayer] = {}
        self._settle_names()

    @property
    def mapper(self) -> Mapper:
        """Key of a plain checkpoint → key of the injected model: X.weight → X.base.weight, biases too; others stay."""
        return self._mapper

    def _places(self) -> dict[str, LoRALayer]:
        """The LoRA layers by every name that the model has for them."""
        paths = paths_of(self.model)
        return {path: layer for layer in self.layers.values() for path in paths[layer]}

    def _settle_names(self) -> None:
        self._mapper = mapper_of(self.model)
        self._unmapper = self._mapper.inverse

    def plain_name(self, key: str) -> str:
        """The name that a parameter of the injected model has in a plain checkpoint."""
        return self._unmapper(key) or key

    def load_base(self, state: Mapping[str, Tensor]) -> None:
        """Load a plain checkpoint into the injected model, strictly: every tensor of the base, and nothing else.

        Raises:
            NamesError: Tensors that are missing, or that the model does not have.
            ShapeError: Tensors of other shapes.
            UsageError: The model is merged, or its weights lack what an init took off them.
        """
        self._refuse_while_merged("get other weights")
        if any(layer.taken_off for layer in self.layers.values()):
            raise UsageError(
                "The weights of this model lack what the init of an adapter took off them",
                hint="load the checkpoint first, and inject then",
            )
        renamed = {self._mapper(key) or key: tensor for key, tensor in state.items()}
        own = self.model.state_dict(keep_vars=True)
        # Of a tensor that has two names, such as a tied head, files mostly hold one.
        there = {id(own[key]) for key in renamed if key in own}
        wanted = [key for key in self._base_keys(own) if key in renamed or id(own[key]) not in there]
        check_names(renamed, wanted, "The checkpoint is not one of this model")
        check_shapes(renamed, own, "The checkpoint is not one of this model")
        self.model.load_state_dict(renamed, strict=False)

    def base_state(self) -> dict[str, Tensor]:
        """The state of the model under plain names, without adapters: merged, if it is merged.

        It lacks what the inits of adapters took off the weights.
        """
        with states_of_bases():
            state = self.model.state_dict()
            return {self.plain_name(key): state[key] for key in self._base_keys(state)}

    def _plain_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the base as they are in the model, by their plain names."""
        with states_of_bases():
            state = self.model.state_dict(keep_vars=True)
            return {self.plain_name(key): state[key] for key in self._base_keys(state)}

    def _base_keys(self, state: Iterable[str]) -> list[str]:
        """Those keys of the injected model's state that belong to the base."""
        layers = [
            (f"{path}.", layer)
            for path, layer in self.model.named_modules(remove_duplicate=False)
            if isinstance(layer, LoRALayer)
        ]
        own = {path + key for path, layer in layers for key in layer.state_dict() if not key.startswith("base.")}
        return [key for key in state if key not in own]

    def _refuse_while_merged(self, what: str) -> None:
        if any(layer.merged for layer in self.layers.values()):
            raise UsageError(f"A merged model cannot {what}", hint="unmerge it first")


def mapper_of(model: nn.Module) -> Mapper:
    """How parameters are named since LoRA layers took their places."""
    found = {
        path: module for module, paths in paths_of(model).items() if isinstance(module, LoRALayer) for path in paths
    }
    attention = [path for path, layer in found.items() if layer.kind == "attention"]
    outer = Wrap(frozenset(found))
    if not attention:
        return outer
    inner = Wrap(frozenset(f"{path}.out_proj" for path in attention))
    moved = First(tuple(Subtree(f"{path}.out_proj", f"{path}.base.out_proj") for path in attention))
    return First((Chain((inner, moved)), outer))


def check_names(found: Iterable[str], expected: Iterable[str], message: str) -> None:
    """Refuse names that are not those expected.

    Raises:
        NamesError: With all that are missing, or too many.
    """
    there, wanted = set(found), set(expected)
    details = [f"{name} is missing" for name in sorted(wanted - there)]
    details += [f"{name} is not known" for name in sorted(there - wanted)]
    if details:
        raise NamesError(message, details=details)


def check_shapes(found: Mapping[str, Tensor], own: Mapping[str, Tensor], message: str) -> None:
    """Refuse tensors of other shapes than those that they are to replace.

    Raises:
        ShapeError: With all of them.
    """
    details = [
        f"{name} is {list(tensor.shape)}, not {list(own[name].shape)}"
        for name, tensor in found.items()
        if tensor.shape != own[name].shape
    ]
    if details:
        raise ShapeError(message, details=details)
