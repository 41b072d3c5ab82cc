"""Groups of elements that a penalty presses on together: dimensions of one weight, or coupled units of several."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules.conv import _ConvTransposeNd

from secateur.errors import RecipeError, WeightError
from secateur.penalties._weights import pressed_on
from secateur.types import CoupledGroup, Tensors

By = Literal["out", "in", "kernel", "shape", "layer", "coupled"]

# Shapes: U units, M rows of a member (indices of the dimensions that a unit is found by), E elements per row.


@dataclass(frozen=True)
class Member:
    """Where units are in one tensor: the dimensions whose indices find them, and the unit of each of those.

    Attributes:
        name: The tensor.
        dims: The dimensions, in order.
        shape: Their sizes.
        unit: The unit of each row, or -1; ``None`` where rows are units.
    """

    name: str
    dims: tuple[int, ...]
    shape: tuple[int, ...]
    unit: Tensor | None

    def rows(self, values: Tensor) -> Tensor:
        """Return a tensor of the parameter's shape as M x E."""
        front = values.movedim(self.dims, tuple(range(len(self.dims))))
        return front.reshape(math.prod(self.shape), -1)

    def per_unit(self, by_row: Tensor, units: int) -> Tensor:
        """Add up one number per row into one per unit."""
        if self.unit is None:
            return by_row
        index = self.unit.to(by_row.device)
        mine = index >= 0
        return by_row.new_zeros(units).index_add(0, index[mine], by_row[mine])

    def most_per_unit(self, by_row: Tensor, units: int) -> Tensor:
        """Return the largest of one number per row for each unit, and at least zero."""
        if self.unit is None:
            return by_row.clamp_min(0.0)
        index = self.unit.to(by_row.device)
        mine = index >= 0
        return by_row.new_zeros(units).scatter_reduce(0, index[mine], by_row[mine], "amax")

    def per_row(self, by_unit: Tensor, outside: float) -> Tensor:
        """Return each row's number, of one number per unit; ``outside`` belongs to no unit."""
        if self.unit is None:
            return by_unit
        return torch.cat([by_unit, by_unit.new_full((1,), outside)])[self.unit.to(by_unit.device)]

    def spread(self, by_unit: Tensor, like: Tensor, outside: float) -> Tensor:
        """Return one number per unit as a tensor that broadcasts over the parameter; ``outside`` belongs to no unit."""
        values = self.per_row(by_unit.to(like.device), outside)
        sizes = [1] * like.dim()
        for dim, size in zip(self.dims, self.shape, strict=True):
            sizes[dim] = size
        return values.reshape(sizes)


@dataclass(frozen=True)
class Units:
    """A set of units.

    Attributes:
        name: Of the weight, or of the coupled group.
        count: How many there are.
        members: Where they are.
    """

    name: str
    count: int
    members: tuple[Member, ...]

    def total(self, values: Tensors) -> Tensor:
        """Add up non-negative values per unit, over all members; at least in float32."""
        out: Tensor | None = None
        for member in self.members:
            rows = member.rows(values[member.name])
            part = member.per_unit(rows.to(torch.promote_types(rows.dtype, torch.float32)).sum(1), self.count)
            out = part if out is None else out + part.to(out)
        if out is None:
            raise AssertionError("a set of units has members")
        return out

    def squares(self, weights: Tensors) -> Tensor:
        """Return the squared norm of each unit."""
        return self.total({m.name: weights[m.name].square() for m in self.members})

    def norms(self, weights: Tensors) -> Tensor:
        """Return the Euclidean norm of each unit; its derivative at zero is zero."""
        total = self.squares(weights)
        positive = total > 0
        return torch.where(positive, torch.where(positive, total, 1.0).sqrt(), 0.0)

    def sizes(self, weights: Tensors) -> Tensor:
        """Return the number of elements of each unit."""
        like = weights[self.members[0].name]
        out = torch.zeros(self.count, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
        for member in self.members:
            w, rows = weights[member.name], math.prod(member.shape)
            out += member.per_unit(out.new_full((rows,), w.numel() // max(rows, 1)), self.count)
        return out

    def add_scaled(self, out: dict[str, Tensor], by_unit: Tensor, weights: Tensors) -> None:
        """Add every unit's weights, times its number, to tensors of the weights' shapes."""
        for member in self.members:
            w = weights[member.name]
            out[member.name] = out[member.name] + w * member.spread(by_unit, w, 0.0).to(w.dtype)


def units_of(by: By, groups: tuple[CoupledGroup, ...], weights: Tensors) -> list[Units]:
    """Return the sets of units over some weights: one per weight, or per coupled group.

    Args:
        by: What a unit is.
        groups: The coupled groups.
        weights: The weights; members of groups that are not among them are left out.
    """
    if by != "coupled":
        return [_dimensions(by, name, tuple(w.shape)) for name, w in weights.items()]
    out = []
    for group in groups:
        members = tuple(Member(s.name, (s.dim,), (len(s.units),), s.index) for s in group.slices if s.name in weights)
        if members:
            out.append(Units(group.name, group.units, members))
    return out


def _dimensions(by: By, name: str, shape: tuple[int, ...]) -> Units:
    last = len(shape)
    dims = {"out": (0,), "in": (1,), "kernel": (0, 1), "shape": tuple(range(1, last)), "layer": ()}[by]
    dims = dims if last else ()  # a single number is its own group
    sizes = tuple(shape[d] for d in dims)
    return Units(name, math.prod(sizes), (Member(name, dims, sizes, None),))


def half_squares(sets: list[Units], factors: Tensors, weights: Tensors) -> Tensor:
    """Return half the sum of the units' squared norms times their numbers, of which :func:`scaled` is the gradient."""
    squares = [(s.name, s.squares(weights)) for s in sets]
    sums = [(factors[name].to(q) * q).sum() / 2 for name, q in squares]
    return torch.stack([x.to(sums[0]) for x in sums]).sum()


def scaled(sets: list[Units], factors: Mapping[str, Tensor], weights: Tensors) -> dict[str, Tensor]:
    """Return every unit's weights times its number; zero where no unit is, summed where several are."""
    out = {name: torch.zeros_like(w) for name, w in weights.items()}
    for some in sets:
        some.add_scaled(out, factors[some.name], weights)
    return out


def check_units(part: str, by: By, groups: tuple[CoupledGroup, ...]) -> None:
    """Refuse groups that no option asks for.

    Raises:
        RecipeError: When there are groups and ``by`` is not ``"coupled"``, or two of one name.
    """
    if by not in ("out", "in", "kernel", "shape", "layer", "coupled"):
        raise RecipeError(f"{part}: by must be out, in, kernel, shape, layer or coupled, got {by!r}")
    if groups and by != "coupled":
        raise RecipeError(f"{part}: groups are for by = 'coupled'; got by = {by!r} and {len(groups)} groups")
    if len({g.name for g in groups}) != len(groups):
        raise RecipeError(f"{part}: two of the groups have one name")


def parameters_by(
    part: str,
    model: Module,
    by: By,
    groups: tuple[CoupledGroup, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    *,
    disjoint: bool = False,
) -> tuple[str, ...]:
    """Name the parameters that a penalty on groups presses on.

    Args:
        part: Its name.
        model: The model.
        by: What a unit is.
        groups: The coupled groups.
        include: Shell patterns of what it presses on.
        exclude: Shell patterns of what it leaves alone.
        disjoint: Whether no element may be in two groups.

    Raises:
        WeightError: When nothing is left, a pattern matches nothing, or a weight has no such groups.
        RecipeError: When the coupled groups are missing, or overlap and must not.
    """
    if by == "coupled":
        return _coupled_parameters(part, model, groups, include, exclude, disjoint=disjoint)
    names = pressed_on(model, include, exclude)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    for name in names:
        if not math.prod(shapes[name]):
            raise WeightError(f"{name}: has no elements (shape {shapes[name]}); exclude it from {part}")
        if by in ("in", "kernel", "shape") and len(shapes[name]) < 2:
            raise WeightError(f"{name}: by = {by!r} needs two dimensions, and it has shape {shapes[name]}; exclude it")
        owner = model.get_submodule(name.rpartition(".")[0])
        turned = isinstance(owner, _ConvTransposeNd) or type(owner).__name__ == "Conv1D"
        if turned and len(shapes[name]) > 1 and by not in ("kernel", "layer"):
            raise WeightError(
                f"{name}: a {type(owner).__name__} stores its weight inputs first, so by = {by!r} would take the "
                "wrong side; exclude it, or use by = 'coupled'"
            )
    return names


def _coupled_parameters(
    part: str,
    model: Module,
    groups: tuple[CoupledGroup, ...],
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    *,
    disjoint: bool,
) -> tuple[str, ...]:
    if not groups:
        raise RecipeError(
            f"{part}: by = 'coupled' needs the groups: pass groups=secateur.structure.coupled_groups(model, inputs)"
        )
    known = dict(model.named_parameters(remove_duplicate=False))
    for group in groups:
        for one in group.slices:
            shape = tuple(known[one.name].shape) if one.name in known else None
            fits = shape is not None and one.dim < len(shape) and shape[one.dim] == len(one.units)
            if not fits or not all(-1 <= u < group.units for u in one.units):
                raise WeightError(
                    f"{part}: group {group.name} is not of this model: it has {len(one.units)} places in dimension "
                    f"{one.dim} of {one.name}, {'which the model lacks' if shape is None else f'of shape {shape}'}"
                )
    names = pressed_on(model, include, exclude, only={s.name for g in groups for s in g.slices})
    if disjoint:
        taken: dict[str, tuple[int, set[int]]] = {}
        for group in groups:
            for one in group.slices:
                mine = {place for place, unit in enumerate(one.units) if unit >= 0}
                dim, before = taken.get(one.name, (one.dim, set()))
                if one.name in names and (dim != one.dim or before & mine):
                    raise RecipeError(
                        f"{part}: elements of {one.name} are in two groups, for which there is no proximal step in "
                        "closed form; use proximal_step = False, or coupled_groups(..., readers=False)"
                    )
                taken[one.name] = dim, before | mine
    return names
