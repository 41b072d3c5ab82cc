"""A parametrisation at work: around any model, for any optimizer, until the weights go back into the model."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from secateur.errors import CheckpointError, RecipeError, SecateurWarning, WeightError, check_whole
from secateur.pipeline.data import derive_seed
from secateur.prunable import Found, check_each, find_prunable
from secateur.registry import in_words
from secateur.structure.companions import with_companions
from secateur.structure.views import role_of
from secateur.training.activation_noise import check_layer, noisy_outputs
from secateur.types import ActivationNoise, LayerReport, Masks, Moment, Parametrisation

STATE_VERSION = 1
_VERSION, _IDENTITY, _SEED, _STEPS, _FORWARDS, _DONE = range(6)  # places in ``progress``


@dataclass(frozen=True)
class FinishReport:
    """What training found: asked beside achieved, where something was asked for.

    Attributes:
        parametrisation: The parametrisation, with its options.
        asked: Sparsity asked for by now; nothing where training finds it.
        achieved: Fraction of the weights that is zero by mask.
        goal: Sparsity asked for at the end of the schedule, or nothing.
        layers: One row per weight.
        skipped: Weights left alone, and why.
    """

    parametrisation: str
    asked: float | None
    achieved: float
    goal: float | None
    layers: tuple[LayerReport, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether the schedule has reached its end."""
        return self.asked == self.goal

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return {
            "parametrisation": self.parametrisation,
            "asked": self.asked,
            "achieved": self.achieved,
            "goal": self.goal,
            "finished": self.finished,
            "layers": [
                {"name": r.name, "shape": list(r.shape), "total": r.total, "kept": r.kept, "sparsity": r.sparsity}
                for r in self.layers
            ],
            "skipped": dict(self.skipped),
        }


@dataclass(frozen=True)
class Finished:
    """What :meth:`Reparametrised.finish_` returns.

    Attributes:
        masks: Bool masks by parameter name, ``True`` = keep; ``secateur.shrink_`` takes them.
        report: Asked beside achieved.
    """

    masks: Masks
    report: FinishReport


class Reparametrised(nn.Module):
    """A model whose weights are made anew in every forward pass, from trained ones and from latents trained along.

    It is a module like any other: build the optimizer from its ``parameters()``, which are the model's and
    ``latents``; add :meth:`penalty` to the loss; call :meth:`step` after the optimizer's. In training mode the forward
    pass uses the training form (noise, straight-through gradients), in evaluation mode that of the finished network.
    The model itself keeps its modules, and the trained weights, until :meth:`finish_`.

    Its ``state_dict()`` holds tensors only and everything needed to go on bit for bit: the noise of a forward pass is
    a function of ``seed`` and of how many there were.

    The model must not recompute its forward in the backward pass (gradient checkpointing): it would do so with other
    weights.

    Args:
        model: The model; keep using your own reference to it after :meth:`finish_`.
        parametrisation: How weights are made.
        include: Shell patterns of the weights to make.
        exclude: Shell patterns of the weights to leave alone.
        types: Module class names to consider.
        example_inputs: What the forward takes; given them, norms behind a layer are found, for gates on its outputs.
        seed: Of the noise.

    Raises:
        RecipeError: When it is given no parametrisation.
        WeightError: When nothing is left to make, or a weight is tied, quantised or has no values.
        PatternError: When a weight cannot be made this way.
        TargetError: When a sparsity cannot be reached.

    Example:
        >>> from secateur.training.sr_ste import SrSte
        >>> model = nn.Linear(4, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[3.0, -1.0, 2.0, 0.5]]))
        >>> wrapped = Reparametrised(model, SrSte(2, 4))
        >>> wrapped(torch.ones(4)).item()
        5.0
        >>> wrapped.finish_().report.achieved, model.weight.tolist()
        (0.5, [[3.0, 0.0, 2.0, 0.0]])
    """

    progress: Tensor

    def __init__(
        self,
        model: nn.Module,
        parametrisation: Parametrisation,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        types: Sequence[str] = (),
        example_inputs: Any = None,
        seed: int = 0,
    ) -> None:
        if isinstance(parametrisation, type) or not isinstance(parametrisation, Parametrisation):
            raise RecipeError(f"expected a Parametrisation such as L0(1e-5), got {parametrisation!r}")
        check_whole("the seed of a Reparametrised model", seed, least=0)
        model = getattr(model, "_orig_mod", model)  # torch.compile wraps; names are the inner model's
        if isinstance(model, nn.Module) and any(isinstance(m, Reparametrised) for m in model.modules()):
            raise WeightError(
                "the model holds weights that are made anew already (a Reparametrised module); call its finish_() "
                "first, or wrap the model once"
            )
        found = find_prunable(model, include=include, exclude=exclude, types=types)
        _refuse_ties(found)
        check_each(found, parametrisation.check)
        if example_inputs is not None:
            found = _with_norms(model, found, example_inputs)
        super().__init__()
        self.model = model
        self.parametrisation = parametrisation
        self._found, self._layouts, self._skipped = found, found.weights, found.skipped
        numbers = torch.zeros(6, dtype=torch.int64, device="cpu")
        numbers[_VERSION], numbers[_IDENTITY], numbers[_SEED] = STATE_VERSION, self._identity(), seed
        self.register_buffer("progress", numbers)
        names = dict.fromkeys(found.weights)
        for layout in found.weights.values():
            names |= dict.fromkeys(n for n in (layout.bias, *layout.companions) if n is not None)
        self._names = tuple(names)
        self.latents = nn.ParameterDict(self._start(seed))
        self.register_load_state_dict_pre_hook(_check_state)  # type: ignore[no-untyped-call]
        # Asked once: a protocol is looked up by the names of all its members.
        self._noise_on_outputs = parametrisation if isinstance(parametrisation, ActivationNoise) else None
        at = self._moment()
        if self._noise_on_outputs is not None:
            for name in self._noise_on_outputs.variances(at):
                check_layer(model, name)

    def _start(self, seed: int) -> dict[str, nn.Parameter]:
        weights = {n: model_parameter.detach() for n, model_parameter in self._parameters_of_model().items()}
        # On the processor: a training starts alike on every device.
        noise = Generator("cpu").manual_seed(derive_seed(seed, "latents"))
        started = self.parametrisation.start(weights, self._layouts, noise)
        # No name of a parameter may hold a dot.
        self._keys = {name: name.replace(".", "/") for name in started}
        if len(set(self._keys.values())) < len(started):
            raise WeightError("two weights of the model have names that differ in '.' and '/' alone; rename a module")
        return {self._keys[name]: nn.Parameter(latent) for name, latent in started.items()}

    def _identity(self) -> int:
        return zlib.crc32(in_words(self.parametrisation).encode())

    def _apply(self, fn: Any, recurse: bool = True) -> Reparametrised:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.progress = self.progress.cpu()  # it is read in every forward pass, which must not wait for a device
        return self

    def _parameters_of_model(self) -> dict[str, Tensor]:
        return {name: self.model.get_parameter(name) for name in self._names}

    def _moment(self) -> Moment:
        latents = {name: self.latents[key] for name, key in self._keys.items()}
        for name, latent in latents.items():
            if latent.dtype not in (torch.float32, torch.float64):
                raise WeightError(
                    f"the latent of {name} has dtype {latent.dtype}, in which its updates round to nothing; convert "
                    "the model before wrapping it, not the wrapper (latents are float32 then), or train under autocast"
                )
        return Moment(self._parameters_of_model(), latents, self._layouts, int(self.progress[_STEPS]))

    @property
    def found(self) -> Found:
        """The weights that are made, and what is left alone."""
        return self._found

    @property
    def steps(self) -> int:
        """Number of calls of :meth:`step` so far."""
        return int(self.progress[_STEPS])

    @property
    def done(self) -> bool:
        """Whether the finished weights are in the model."""
        return bool(self.progress[_DONE])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model with the weights of this moment."""
        if self.done:
            return self.model(*args, **kwargs)
        at = self._moment()
        if not self.training:
            return functional_call(self.model, self.parametrisation.final(at)[0], args, kwargs)
        noise = self._noise(next(iter(at.weights.values())).device)
        made = self.parametrisation.weights(at, noise)
        variances = {} if self._noise_on_outputs is None else self._noise_on_outputs.variances(at)
        with noisy_outputs(self.model, variances, noise) if variances else nullcontext():
            return functional_call(self.model, made, args, kwargs)

    def _noise(self, device: torch.device) -> Generator:
        """Return the noise of the next forward pass: one sample of everything per pass."""
        number = int(self.progress[_FORWARDS])
        self.progress[_FORWARDS] += 1
        return Generator(device).manual_seed(derive_seed(int(self.progress[_SEED]), "noise", number))

    def penalty(self) -> Tensor:
        """Return the term to add to the loss; zero where a method has none."""
        self._refuse_when_done()
        return self.parametrisation.penalty(self._moment())

    @torch.no_grad()
    def step(self) -> None:
        """Count one optimizer step, for schedules, and hold latents in their bounds. Call it after the optimizer's."""
        self._refuse_when_done()
        for name, value in self.parametrisation.advance(self._moment()).items():
            self.latents[self._keys[name]].copy_(value)
        self.progress[_STEPS] += 1

    @torch.no_grad()
    def masks(self) -> Masks:
        """Return the masks of this moment: what :meth:`finish_` would make zero now."""
        self._refuse_when_done()
        return self.parametrisation.final(self._moment())[1]

    def report(self) -> FinishReport:
        """Return asked beside achieved, as things stand now."""
        return self.report_of(self.masks())

    def report_of(self, masks: Masks) -> FinishReport:
        """Return asked beside achieved under some masks, those that :meth:`finish_` returned for example."""
        rows = tuple(LayerReport(n, w.shape, w.numel, int(masks[n].sum())) for n, w in self._layouts.items())
        part = self.parametrisation
        kept, everything = sum(row.kept for row in rows), sum(row.total for row in rows)
        return FinishReport(
            repr(part), part.asked(self.steps), 1.0 - kept / everything, part.asked(None), rows, self._skipped
        )

    @torch.no_grad()
    def finish_(self) -> Finished:
        """Write the weights of the finished network into the model, exactly zero where they are pruned.

        The model is then plain: this wrapper only passes calls on. ``secateur.shrink_`` cuts out what the masks have
        emptied; ``secateur.masks.MaskHook`` keeps zeros zero when training goes on.

        Returns:
            Masks and report.

        Raises:
            RecipeError: When it has been called before.
            WeightError: When a weight is not finite; the model is unchanged then.
        """
        self._refuse_when_done()
        at = self._moment()
        for name, latent in at.latents.items():
            if bool(torch.isnan(latent).any()):  # infinite ones are gates wide open
                raise WeightError(
                    f"the latent of {name} is NaN: training has diverged, and the model was left as it is"
                )
        values, masks = self.parametrisation.final(at)
        for name, value in values.items():
            if not bool(torch.isfinite(value).all()):
                raise WeightError(f"{name} is not finite: training has diverged, and the model was left as it is")
        own = self._parameters_of_model()
        for name, value in values.items():
            own[name].copy_(value)
        report = self.report_of(masks)
        self.progress[_DONE] = 1
        empty = [row.name for row in report.layers if not row.kept]
        if empty:
            warnings.warn(
                f"nothing is left of {', '.join(empty)}: with a penalty, its strength is likely too high",
                SecateurWarning,
                stacklevel=3,
            )
        return Finished(masks, report)

    def _refuse_when_done(self) -> None:
        if self.done:
            raise RecipeError("finish_() has put the finished weights into the model; there is nothing left to make")

    def extra_repr(self) -> str:
        """Show the parametrisation."""
        return repr(self.parametrisation)


def _check_state(module: Any, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    """Refuse the state of another parametrisation, before anything is loaded."""
    given, own = state.get(f"{prefix}progress"), module.progress
    if given is None:
        return  # torch reports what is missing
    if tuple(given.shape) != tuple(own.shape) or int(given[_VERSION]) != STATE_VERSION:
        raise CheckpointError(f"the state is not one of a Reparametrised model of version {STATE_VERSION}")
    if int(given[_IDENTITY]) != int(own[_IDENTITY]):
        raise CheckpointError(
            f"the state is that of another parametrisation, or of other options, than {module.parametrisation}"
        )


def _refuse_ties(found: Found) -> None:
    for other, name in found.ties.items():
        if name in found.weights:
            raise WeightError(
                f"{name} and {other} are one parameter, and layers that share a weight would be gated or judged as if "
                f"they were one; untie them, or leave it out with exclude=[{name!r}]"
            )


def _with_norms(model: nn.Module, found: Found, example_inputs: Any) -> Found:
    """Name scale and shift of the norm behind a layer; vectors of other layers without a norm are none of these."""
    named = with_companions(model, found, example_inputs)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    weights = {}
    for name, layout in named.weights.items():
        normed = any(role_of(model, n, 0, shapes[n]) == "norm" for n in layout.companions)
        weights[name] = layout if normed else replace(layout, companions=())
    return replace(named, weights=weights)
