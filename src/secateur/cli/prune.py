"""``secateur prune MODEL`` and ``secateur verify``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table
    from torch import Tensor, nn

    from secateur.cli.source import Source
    from secateur.graph.plan import Plan
    from secateur.method import Method
    from secateur.structure import ShrinkReport
    from secateur.types import Ablation, GroupScore, Score

_MODEL = typer.Argument(
    ..., help="package.module:factory, file.py:factory, a recipe file or a run directory.", metavar="MODEL"
)
_WEIGHTS = typer.Option(None, "--weights", help="Weights: .safetensors, .pt or .pth.")
_PRUNED = typer.Option(None, "--pruned", help="Folder of an earlier round, which this one goes on from.")
_INPUTS = typer.Option([], "--input", metavar="SHAPE", help="1,3,224,224 or 1,128:int64. Repeatable.")
_BASE = typer.Option(None, "--base", help="Folder of a run's recipe, if it names a file.py.")


def prune(
    model: str = _MODEL,
    weights: Path | None = _WEIGHTS,
    pruned: Path | None = _PRUNED,
    inputs: list[str] = _INPUTS,
    target: str = typer.Option(
        ..., "--target", "-t", metavar="KIND=VALUE", help="macs=0.5, channels=0.6, compression_ratio=2, sparsity=0.5."
    ),
    pattern: str = typer.Option("channel", "--pattern", help="channel, expert or layer."),
    score: str = typer.Option("magnitude", "--score", "-s", help="See secateur ls score, ls unit-score."),
    score_args: list[str] = typer.Option(
        [], "--score-arg", metavar="KEY=VALUE", help="Of the score: form=square. Repeatable."
    ),
    allocate: str = typer.Option("global", "--allocate", help="layerwise, global or isomorphic."),
    ablate: str | None = typer.Option(
        None,
        "--ablate",
        metavar="NAME",
        help="reinitialise: new weights after the proof. shuffle, random_masks and smaller_dense need a run.",
    ),
    ablate_args: list[str] = typer.Option(
        [], "--ablate-arg", metavar="KEY=VALUE", help="Of the ablation: seed=1. Repeatable."
    ),
    include: list[str] = typer.Option([], "--include", metavar="PATTERN", help="Prune only these. Repeatable."),
    exclude: list[str] = typer.Option([], "--exclude", metavar="PATTERN", help="Leave these alone. Repeatable."),
    align: int = typer.Option(8, "--align", help="Channel counts stay multiples of it; 1 for none."),
    uniform: bool = typer.Option(False, "--uniform", help="Dimensions of one size keep one size."),
    exact: bool = typer.Option(False, "--exact", help="Never prune a dimension that a normalisation runs over."),
    out: Path = typer.Option(Path("pruned"), "--out", "-o", help="Folder for plan.json and model.safetensors."),
    base: Path | None = _BASE,
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Make a model physically smaller, prove the result, write it with its plan.

    Channels, heads and neurons (or experts, or whole residual blocks) go from every tensor that they reach. Nothing is
    written unless the small model equals the masked dense one.

    For example:
    secateur prune net.py:make --weights net.pt --input 1,3,32,32 -t macs=0.5
    secateur prune runs/first --target channels=0.6 --allocate layerwise
    secateur prune net.py:make --input 1,128:int64 --pattern layer -t macs=0.75
    secateur prune recipe.toml -t macs=0.5 -s sensitivity --score-arg per_mac=true
    secateur prune recipe.toml -t macs=0.5 --ablate reinitialise --out untrained
    """
    from secateur.cli.show import console, print_json, put
    from secateur.cli.source import open_source
    from secateur.cli.watch import Watch
    from secateur.errors import CheckpointError, RecipeError
    from secateur.structure import save_pruned, shrink_

    if out.exists() and not out.is_dir():  # said before the work, not after it
        raise CheckpointError(f"--out {out}: a file is in the way; name a folder")
    source = open_source(model, weights=weights, base=base, pruned=pruned)
    method = _method(target, pattern, _score(source, score, score_args), allocate, include, exclude)
    if ablate is None and ablate_args:
        raise RecipeError("--ablate-arg is an option of an ablation, and there is none: give --ablate")
    robbed = None if ablate is None else _ablation(ablate, ablate_args, method)
    example = example_of(source, inputs)
    data = _data(source, method.score) if _looks_at_data(method.score) else {}
    with Watch(source.name, quiet=as_json) as watch:
        watch.progress(0, 1, "pruning")
        report = shrink_(source.model, method, example, align=align, uniform=uniform, exact=exact, **data)
        if robbed is not None:
            robbed.restart_(source.model)
        save_pruned(out, source.model, _plans(source.model, robbed))
    if as_json:
        said = {} if robbed is None else {"ablation": str(robbed)}
        print_json({"source": source.name, "written": str(out), **report.to_dict(), **said})
        return
    from rich.text import Text

    shown = console()
    put(shown, Text(f"{source.name}: pruned", style="bold"), groups_table(report), Text())
    for line in str(report).splitlines():
        put(shown, Text(line[0].upper() + line[1:]))
    for module, why in report.frozen.items():
        put(shown, Text(f"Constrained: {module}: {why}", style="dim"))
    if robbed is not None:
        put(
            shown, Text(f"Ablation: {robbed}: all weights are new since the proof, as after any training", style="bold")
        )
    shown.print(f"written to {out}: plan.json, model.safetensors", markup=False, soft_wrap=True)


def verify(
    model: str = _MODEL,
    pruned: Path = typer.Argument(..., help="Folder with plan.json and model.safetensors.", metavar="PRUNED"),
    weights: Path | None = _WEIGHTS,
    inputs: list[str] = _INPUTS,
    base: Path | None = _BASE,
    as_json: bool = typer.Option(False, "--json", help="Print the proof as JSON."),
) -> None:
    """Compare a pruned model with the dense one whose pruned weights are zero, in float64.

    Exit code 2 when they differ, as they do after further training.

    For example:
    secateur verify net.py:make pruned --weights net.pt --input 1,3,32,32
    """
    import copy

    from secateur.cli.show import print_json
    from secateur.cli.source import open_source
    from secateur.errors import GraphError
    from secateur.structure import load_pruned
    from secateur.structure import verify as prove

    source = open_source(model, weights=weights, base=base)
    small = copy.deepcopy(source.model)
    load_pruned(small, pruned)
    proof = prove(source.model, small, example_of(source, inputs))
    if as_json:
        print_json(proof.to_dict())
    else:
        print(f"{pruned} is {proof}")
    if not proof.equal:
        raise GraphError(f"{pruned} does not equal the masked dense model: largest difference {proof.difference:.2g}")


def groups_table(report: ShrinkReport) -> Table:
    """Return one row per coupled group: units before and after, and what goes along."""
    from secateur.cli.show import plain_table

    table = plain_table()
    table.add_column("group", overflow="fold")
    for name in ("units", "kept", "tensors"):
        table.add_column(name, justify="right", no_wrap=True)
    for group in report.groups:
        dim = group.kept == group.units
        table.add_row(
            group.name, str(group.units), str(group.kept), str(len(group.members)), style="dim" if dim else None
        )
    return table


def _method(
    target: str, pattern: str, score: Score | GroupScore, allocate: str, include: list[str], exclude: list[str]
) -> Method:
    from secateur.allocate import ALLOCATIONS
    from secateur.errors import TargetError, check_choice
    from secateur.method import Method
    from secateur.patterns import UNIT_PATTERNS, Channel
    from secateur.targets import Target

    kind, _, value = target.partition("=")
    try:
        number = float(value)
    except ValueError:
        raise TargetError(f"--target {target!r}: expected KIND=NUMBER, such as macs=0.5") from None
    check_choice("--allocate", allocate, list(ALLOCATIONS))
    patterns: dict[str, Any] = {"channel": Channel, **UNIT_PATTERNS}
    check_choice("--pattern", pattern, list(patterns))
    return Method(
        target=Target(kind, number),  # type: ignore[arg-type]  # refused by Target itself
        score=score,
        pattern=patterns[pattern](),
        allocate=ALLOCATIONS[allocate](),
        include=tuple(include),
        exclude=tuple(exclude),
    )


def _ablation(name: str, options: list[str], method: Method) -> Ablation:
    """Build an ablation, as a recipe's ``prune.ablate``, and refuse what cutting out leaves nothing for."""
    from dataclasses import replace

    from secateur.ablations import ABLATIONS
    from secateur.errors import RecipeError
    from secateur.patterns import Channel
    from secateur.recipe_parts import Part, build_part
    from secateur.types import Ablation

    made = build_part(ABLATIONS, Part(name=name, options=_options("--ablate-arg", options)), "--ablate")
    if not isinstance(made, Ablation):
        raise RecipeError(
            f"--ablate {name} trains a network of its own beside a run, and nothing is trained here: say "
            f"prune.ablate = {name!r} in a recipe, and secateur run"
        )
    units = replace(method.pattern, coupled=True) if isinstance(method.pattern, Channel) else method.pattern
    made.check(units, rounds=True)
    if not made.restarts:
        raise RecipeError(f"--ablate {name} changes masks, and cutting out leaves none: use it in a recipe")
    return made


def _plans(model: nn.Module, robbed: Ablation | None) -> tuple[Plan, ...]:
    """Return the plans that a model was shrunk by; the last one tells of an ablation."""
    from dataclasses import replace

    from secateur.structure.remembered import plans_of

    *before, last = plans_of(model, "save_pruned")
    return (*before, last if robbed is None else replace(last, info={**last.info, "ablation": str(robbed)}))


def _options(flag: str, given: list[str]) -> dict[str, Any]:
    """Read ``KEY=VALUE``."""
    from secateur.errors import RecipeError

    out = {}
    for option in given:
        key, equals, value = option.partition("=")
        if not equals:
            raise RecipeError(f"{flag} {option!r}: expected KEY=VALUE")
        out[key] = _value(value)
    return out


def _score(source: Source, name: str, options: list[str]) -> Score | GroupScore:
    """Build a score from the options given, and from what the recipe says of the network."""
    import inspect

    from secateur.errors import RecipeError, check_choice, nearest
    from secateur.scores import GROUP_SCORES, SCORES

    parts: dict[str, Any] = {**SCORES, **GROUP_SCORES}
    check_choice("--score", name, parts)
    known = list(inspect.signature(parts[name]).parameters)
    given: dict[str, Any] = {"seed": 0} if name == "random" else {}
    if name == "sensitivity" and source.recipe is not None and source.recipe.task != "classification":
        given["outputs"] = "values"
    for key, value in _options("--score-arg", options).items():
        if key not in known:
            raise RecipeError(f"--score-arg {key!r}: {name} has no option {key!r}; {nearest(key, known)}")
        given[key] = value
    try:
        made: Score | GroupScore = parts[name](**given)
    except TypeError as error:
        raise RecipeError(f"--score {name} cannot be built from {given}: {error}") from error
    return made


def _value(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _looks_at_data(score: Score | GroupScore) -> bool:
    """Tell whether a score needs batches: all simple statistics but a unit's cost do, others say so."""
    from secateur.types import Statistic

    return any("batches" in n.uses if isinstance(n, Statistic) else n != "unit_macs" for n in score.needs)


def _data(source: Source, score: Score | GroupScore) -> dict[str, Any]:
    """Return the loss and the batches of a recipe, for scores that need data."""
    from secateur.errors import MissingStatsError
    from secateur.pipeline.data import score_batches
    from secateur.pipeline.factories import make_data
    from secateur.pipeline.tasks import TASKS, loss_of, outputs_of
    from secateur.types import OutputScore

    recipe = source.recipe
    if recipe is None:
        raise MissingStatsError(
            f"{score} looks at data, and {source.name} is a network alone: name a recipe or a run directory, or use "
            "secateur.shrink_ with loss_fn and batches"
        )
    task, data = TASKS[recipe.task](), make_data(recipe.data.factory, recipe.data.args, base=source.base)

    def run(model: nn.Module, batch: Any) -> Tensor:
        return outputs_of(model, batch[0]) if isinstance(score, OutputScore) else loss_of(task, model, batch)

    def batches() -> Iterator[Any]:
        return score_batches(data.train, recipe.seed, size=recipe.data.batch_size, count=recipe.prune.score_batches)

    return {"loss_fn": run, "batches": batches}


def example_of(source: Any, inputs: list[str]) -> Any:
    """Return example inputs: those asked for, or the first of the recipe's test data."""
    from secateur.cli.source import parse_inputs
    from secateur.errors import DataError
    from secateur.pipeline.data import first_inputs
    from secateur.pipeline.factories import make_data

    if inputs:
        return parse_inputs(inputs)
    if source.recipe is None:
        raise DataError(
            "structural pruning records one forward and needs an example; give the shape of the model's input, such as "
            "--input 1,3,224,224"
        )
    data = make_data(source.recipe.data.factory, source.recipe.data.args, base=source.base)
    return first_inputs(data.test, source.recipe.measure.batch)
