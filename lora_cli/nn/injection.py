"""Putting LoRA layers into a live model, in place, and taking them out again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_cli.adapters.modules import Module
from lora_cli.adapters.source import ReadOptions
from lora_cli.adapters.targets import choose
from lora_cli.errors import LoraCliError, NamesError, UsageError
from lora_cli.nn.config import LoRAConfig
from lora_cli.nn.factors import DEFAULT
from lora_cli.nn.layer import LoRALayer
from lora_cli.nn.loading import find
from lora_cli.nn.modules import described, layers_of, owners, paths_of, refuse_tied, without_inner
from lora_cli.nn.naming import PlainNames, check_names, check_shapes
from lora_cli.nn.saving import save_adapter
from lora_cli.nn.wholes import Wholes, biases, saved_modules
from lora_cli.nn.wrap import wrap


def inject(model: nn.Module, config: LoRAConfig | None = None, *, name: str = DEFAULT, **fields: Any) -> Injection:
    """Put an adapter into a model, in place, and freeze everything else.

    The same targets as `lora-cli inject` chooses on the model's checkpoint get factors of the same shapes, and for one
    seed the same numbers.

    Args:
        model: Any module. Its parameters keep their values, unless the config's init changes the base.
        config: What the adapter is to be like.
        name: What it is called; further ones can be added.
        **fields: Fields of `LoRAConfig`, in the place of `config`.

    Raises:
        UsageError: A config that makes no sense, or a model that has LoRA layers already.
        NamesError: Patterns that match nothing.
        UnsupportedError: Layers that take no adapter.
    """
    if config is not None and fields:
        raise UsageError("Give a config or its fields, not both", found=", ".join(fields))
    settled = config or LoRAConfig(**fields)
    injection = Injection(model)
    injection.add(settled, name)
    return injection


def load_adapter(
    model: nn.Module,
    folder: str | Path,
    *,
    name: str = DEFAULT,
    options: ReadOptions | None = None,
    dropout: float | None = None,
) -> Injection:
    """Put LoRA layers with an adapter from files into a plain model, in place. Arguments are those of `Injection.load`.

    Raises:
        LoraCliError: What `inject` and `Injection.load` raise.
    """
    injection = Injection(model)
    try:
        injection.load(folder, name, options=options, dropout=dropout)
    except BaseException:
        injection.take_out()  # all parameters ask for gradients as they did
        raise
    return injection


class Injection(PlainNames):
    """A model with LoRA layers in it. `inject` makes one.

    Attributes:
        model: The model, changed in place.
        configs: The config of each adapter.
        layers: The LoRA layers, by the names that their modules have in a checkpoint.
        notes: What the choice of targets passed over, for people.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(isinstance(module, LoRALayer) for module in model.modules()):
            raise UsageError("The model has LoRA layers already", hint="add a further adapter with Injection.add")
        super().__init__(model)
        self.configs: dict[str, LoRAConfig] = {}
        self._asked = {key: p.requires_grad for key, p in model.named_parameters(remove_duplicate=False)}
        self._initial = _count(parameter for parameter in model.parameters() if parameter.requires_grad)
        self.notes: tuple[str, ...] = ()
        self._wholes = Wholes(self._plain_tensors)
        self._untied: list[tuple[LoRALayer, nn.Parameter]] = []

    def __repr__(self) -> str:
        adapters = ", ".join(self.configs) or "none"
        return f"<Injection in {type(self.model).__name__}: {len(self.layers)} layers, adapters {adapters}>"

    # Adapters

    def add(self, config: LoRAConfig, name: str) -> None:
        """Put a further adapter into the model. Errors are those of `inject`; after one the model is as before."""
        if name in self.configs:
            raise NamesError("There is an adapter of this name already", found=name)
        self._refuse_while_merged("take a new adapter")
        chosen = choose(described(self.model), config.targets, config.exclude, label=type(self.model).__name__)
        picked = without_inner([module for module in chosen.modules if config.takes_layer(module)])
        if not picked:
            raise NamesError("No target is in these layers", tensor="layers", found=str(config.layers))
        found = layers_of(self.model)
        if config.principal:
            refuse_tied(self.model, {module.name: found[module.name] for module in picked})
        if (config.modules_to_save or config.bias != "none") and any(p.is_meta for p in self.model.parameters()):
            raise UsageError("Nothing can be trained whole in a model without weights", hint="load them first")
        frozen = [*self.layers.values(), *(found[module.name] for module in picked)]
        whole = saved_modules(self.model, config.modules_to_save, frozen)
        asked = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            if not self.configs:
                self.model.requires_grad_(False)  # before there are factors in it: those of attention are at once
            layers = self._with_adapter(picked, config, name)
        except BaseException:
            for parameter, asks in asked:
                parameter.requires_grad_(asks)
            raise
        new = {layer.base: layer for module, layer in layers.items() if module not in self.layers}
        self._replace(new)
        self.layers |= layers
        self._settle_names()
        self.configs[name] = config
        self.notes += chosen.notes
        self._wholes.ask()  # wrapping a layer froze its bias
        self._wholes.train([self.plain_name(key) for key in [*whole, *biases(self.model, config.bias, layers)]], name)

    def load(
        self, folder: str | Path, name: str, *, options: ReadOptions | None = None, dropout: float | None = None
    ) -> None:
        """Put a further adapter into the model, from files: a PEFT folder, or any other that `lora-cli merge` reads.

        Args:
            folder: The adapter.
            name: What it is called here.
            options: How it is read, such as its alpha where the files do not say it.
            dropout: In training from now on; what the files say unless given.

        Raises:
            LoraCliError: Names, shapes or fields that do not fit. The model is then as before.
        """
        tensors = self._plain_tensors()
        found = find(folder, tensors, options or ReadOptions()).without_copies(self._places(), tensors)
        doubly = self._wholes.shared_with(list(found.wholes))
        if doubly:
            hint = "load it into a model of its own, or without these tensors"
            raise UsageError("Another adapter trains what this one holds whole", file=folder, details=doubly, hint=hint)
        self.add(found.config(dropout=dropout), name)
        try:
            self._wholes.train(list(found.wholes), name)
            found.fill(self._places(), self._plain_tensors(), name)
        except BaseException:
            self.remove(name)
            raise

    def remove(self, name: str) -> None:
        """Take one adapter out of the model, and give back what was trained whole with it.

        A layer without any adapter left is in the model as it was before, frozen; `take_out` ends that too.

        Raises:
            NamesError: No such adapter.
            UsageError: The model is merged.
        """
        self._check_known([name])
        self._refuse_while_merged("lose an adapter")
        having = [layer for layer in self.layers.values() if name in layer.settings]
        for layer in having:
            layer.check_removable(name)
        for layer in having:
            layer.remove_adapter(name)
        bare = {module: layer for module, layer in self.layers.items() if not layer.settings}
        self._replace({layer: layer.released() for layer in bare.values()})
        for module in bare:
            del self.layers[module]
        del self.configs[name]
        self._wholes.restore(name)
        self._settle_names()

    def save(
        self, folder: str | Path, name: str = DEFAULT, *, base_model: str | None = None, force: bool = False
    ) -> None:
        """Write an adapter as a PEFT folder; see `saving.save_adapter`."""
        save_adapter(self, folder, name, base_model=base_model, force=force)

    def _with_adapter(self, modules: Iterable[Module], config: LoRAConfig, name: str) -> dict[str, LoRALayer]:
        """The layers of these modules with the adapter beside them, new ones not yet in the model."""
        found, ready = layers_of(self.model), dict[str, LoRALayer]()
        known = {layer: module for module, layer in self.layers.items()}
        try:
            for module in modules:
                there = found[module.name]
                if any(layer.base is there for layer in ready.values()) or there in ready.values():
                    continue  # one layer under two names
                layer = there if isinstance(there, LoRALayer) else wrap(there)
                ready[known.get(layer, module.name)] = layer
                layer.add_adapter(name, config.parameters_for(module.name), start=config.start_for(module.name))
        except BaseException as error:
            if isinstance(error, LoraCliError):
                error.tensor = error.tensor or module.name
            for module_name, layer in ready.items():
                if name in layer.settings:
                    layer.remove_adapter(name)
                if module_name not in self.layers:
                    layer.released()
            raise
        return ready

    def activate(self, *names: str, **weights: float) -> None:
        """Use exactly these adapters: `activate("style", facts=0.5)`. Names alone have weight 1.

        Raises:
            NamesError: No such adapter.
            UnsupportedError: An adapter with DoRA, at another weight than 1 or beside others.
            UsageError: The model is merged.
        """
        wanted = {**dict.fromkeys(names, 1.0), **weights}
        self._check_known(wanted)
        shares = [
            (layer, {name: weight for name, weight in wanted.items() if name in layer.settings})
            for layer in self.layers.values()
        ]
        for layer, share in shares:
            layer.check_weights(share)
        for layer, share in shares:
            layer.activate(share)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Compute with the base alone for a while; of a merged model that is the merged one."""
        with ExitStack() as stack:
            for layer in self.layers.values():
                stack.enter_context(layer.disabled())
            if not any(layer.merged for layer in self.layers.values()):
                stack.enter_context(self._wholes.swapped())
            yield

    def _check_known(self, names: Iterable[str]) -> None:
        lost = [name for name in names if name not in self.configs]
        if lost:
            raise NamesError(
                "No such adapter", found=", ".join(lost), expected=", ".join(self.configs) or "none is here"
            )

    # What is trained

    def wholes_of(self, name: str) -> dict[str, Tensor]:
        """What is trained whole with an adapter, by its names in a plain checkpoint."""
        return self._wholes.of(name)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters that ask for gradients: give them to the optimizer."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def trainable_state(self) -> dict[str, Tensor]:
        """What is trained, by its name in the injected model: enough to go on later, together with the base.

        Raises:
            UsageError: The adapters are disabled.
        """
        self._wholes.refuse_while_swapped()
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `trainable_state` gave.

        Raises:
            NamesError: Names that are missing, or too many.
            ShapeError: Tensors of other shapes, as those of another rank.
        """
        own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        check_names(state, own, "The state is not of this injection")
        check_shapes(state, own, "The state is not of this injection")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    def summary(self) -> str:
        """How much is trained, of how much, as one line."""
        trained = _count(self.parameters())
        share = f"{100 * trained / self._initial:.2f}%" if self._initial else "all"
        return f"Initial Parameters : {self._initial} || LoRA Parameters : {trained} || Trainable Proportion : {share}"

    @property
    def trainable_fraction(self) -> float:
        """Share of all parameters, those of adapters among them, that are trained."""
        return _count(self.parameters()) / _count(self.model.parameters())

    def load_base(self, state: Mapping[str, Tensor]) -> None:
        """Load a plain checkpoint, strictly; see `PlainNames.load_base`. `take_out` then gives back this one."""
        super().load_base(state)
        self._wholes.renew()

    # Merging

    def merge(self) -> None:
        """Put the active adapters into the base's weights, exactly. A tied weight is untied: its twin stays as it was.

        Raises:
            UsageError: The model is merged already, or no adapter is in use.
            NumericError: Numbers that must not be merged. The model is then as before.
        """
        self._refuse_while_merged("be merged again")
        active = {module: layer for module, layer in self.layers.items() if layer.active}
        if not active:
            raise UsageError("No adapter is active, so there is nothing to merge")
        done: list[LoRALayer] = []
        for module, layer in active.items():
            try:
                self._untie(layer)
                layer.merge()
                done.append(layer)
            except BaseException as error:
                for merged in done:
                    merged.unmerge()
                self._tie()
                if isinstance(error, LoraCliError):
                    error.tensor = error.tensor or module
                raise

    def unmerge(self) -> None:
        """Give the base's weights back bit for bit.

        Raises:
            UsageError: The model is not merged.
            WrongInputError: A weight was changed since. All are then merged still.
        """
        merged = [layer for layer in self.layers.values() if layer.merged]
        if not merged:
            raise UsageError("The model is not merged, so there is nothing to take out")
        for layer in merged:
            layer.check_unmergeable()
        for layer in merged:
            layer.unmerge()
        self._tie()

    def _untie(self, layer: LoRALayer) -> None:
        weight = layer.base_weight
        if owners(self.model)[id(weight)] > 1:
            self._untied.append((layer, weight))
            layer.hold(nn.Parameter(weight.detach().clone(), requires_grad=False))

    def _tie(self) -> None:
        for layer, weight in self._untied:
            layer.hold(weight)
        self._untied.clear()

    def take_out(self, *, merged: bool = False) -> nn.Module:
        """Take the LoRA layers out of the model, with what they learned put into its weights or not.

        Args:
            merged: Merge first, and keep what was trained whole; a tied weight that was merged stays untied, which a
                transformers model is to be told (`config.tie_word_embeddings`). Otherwise the model is bit for bit as
                before the injection.

        Returns:
            The model: plain layers, and the parameters ask for gradients as they did before.
        """
        is_merged = any(layer.merged for layer in self.layers.values())
        if merged and not is_merged:
            self.merge()
        if not merged:
            if is_merged:
                self.unmerge()
            for layer in self.layers.values():
                layer.check_restorable()
            for layer in self.layers.values():
                layer.restore_base()
            for name in self.configs:
                self._wholes.restore(name)
        self._replace({layer: layer.released() for layer in self.layers.values()})
        for key, parameter in self.model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(self._asked[key])
        self._untied.clear()
        self._wholes.clear()
        self.layers.clear()
        self.configs.clear()
        self._settle_names()
        return self.model

    def _replace(self, new: Mapping[nn.Module, nn.Module]) -> None:
        """Put new layers in the place of old ones, wherever the model has them."""
        for module, paths in paths_of(self.model).items():
            if module in new:
                for path in paths:
                    self.model.set_submodule(path, new[module])


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
