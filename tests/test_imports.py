"""Imports go one way, and importing the package stays light."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = REPOSITORY / "src" / "secateur"

CORE = {
    "checkpoint",
    "types",
    "errors",
    "registry",
    "select",
    "masks",
    "forward",
    "history",
    "_cpu",
    "_files",
    "_rng",
    "_tree",
}
PARTS = {
    "stats",
    "scores",
    "patterns",
    "penalties",
    "allocate",
    "recover",
    "metrics",
    "export",
    "report",
    "targets",
    "schedules",
    "prunable",
    "graph",
    "solvers",
    "codec",
    "sparse",
    "inputs",
}
MIDDLE = {
    "ablations",
    "facts",
    "structure",
    "masking",
    "method",
    "pruner",
    "pipeline",
    "training",
    "recipe",
    "recipe_checks",
    "recipe_files",
    "recipe_parts",
    "recipe_sections",
    "inspection",
    "zoo",
    "testing",
}
TOP = {"bench", "cli", "integrations", "contrib", "__main__"}

LEVEL = {name: level for level, names in enumerate((CORE, PARTS, MIDDLE, TOP)) for name in names}
BETWEEN_PARTS = {
    ("metrics", "graph"),  # a figure is counted on the graph
    # A part names the statistic that it needs by an object with options, and reads what that returns.
    ("scores", "stats"),
    ("solvers", "stats"),
    ("inputs", "graph"),  # whatever holds tensors is opened in one way
    # A compiled model is an end in itself: it is run on example inputs, and measured beside the dense one.
    ("sparse", "inputs"),
    ("sparse", "metrics"),
    ("export", "sparse"),  # one of the formats
}
ROOT = {"__init__"}  # re-exports, lazily


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def running(node: ast.AST) -> Iterator[ast.AST]:
    """Walk what runs, imports inside functions included; what only type checkers read does not count.

    Yields:
        Every node below ``node``.
    """
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield child
            yield from running(child)


def imported(path: Path) -> set[tuple[str, int]]:
    """Packages of secateur that a file imports, with the line."""
    out = set()
    for node in running(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            names = [node.module or ""]
            if node.module == "secateur":
                names = [f"secateur.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "secateur":
                out.add((parts[1] if len(parts) > 1 else "__init__", node.lineno))
    return out


FILES = sorted(SOURCE.rglob("*.py"))


def allowed(importer: str, target: str) -> bool:
    if importer == target or importer in ROOT:
        return True
    if LEVEL[importer] != LEVEL[target]:
        return LEVEL[importer] > LEVEL[target]
    same_floor_is_free = LEVEL[importer] != LEVEL["stats"]
    return same_floor_is_free or (importer, target) in BETWEEN_PARTS


def test_every_module_has_a_level() -> None:
    assert {package_of(path) for path in FILES} - ROOT <= LEVEL.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    importer = package_of(path)
    wrong = [
        f"line {line}: secateur.{importer} must not import secateur.{target}"
        for target, line in sorted(imported(path), key=lambda item: item[1])
        if target in LEVEL and not allowed(importer, target)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_rules_catch_what_they_should() -> None:
    assert allowed("pruner", "select")
    assert allowed("metrics", "graph")
    assert allowed("select", "types")
    assert not allowed("graph", "metrics")
    assert not allowed("scores", "patterns")
    assert not allowed("types", "scores")
    assert not allowed("export", "pruner")
    assert not allowed("pipeline", "cli")


def exported(path: Path) -> list[str]:
    """Public names that a module binds itself: classes, and what it assigns."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        names += [node.name] if isinstance(node, ast.ClassDef | ast.FunctionDef) else []
        names += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def test_each_contract_has_one_home_and_one_address() -> None:
    import secateur.types

    homes = sorted((SOURCE / "types").glob("[!_]*.py"))
    assert sorted(name for path in homes for name in exported(path)) == sorted(secateur.types.__all__)
    folders = [REPOSITORY / name for name in ("src", "tests", "examples", "benchmarks")]
    outside = [p for folder in folders for p in folder.rglob("*.py") if p.parent != SOURCE / "types"]
    around = re.compile(r"^\s*(?:from|import) secateur\.types\.", flags=re.M)
    wrong = [str(path.relative_to(REPOSITORY)) for path in outside if around.search(path.read_text(encoding="utf-8"))]
    assert not wrong, f"import from secateur.types, not from its modules: {wrong}"
    assert around.search((SOURCE / "types" / "__init__.py").read_text(encoding="utf-8"))


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after one statement."""
    code = f"import sys; {statement}; print('\\n'.join({{n.partition('.')[0] for n in sys.modules}}))"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, env=environment
    )
    return set(done.stdout.split())


HEAVY = {
    "matplotlib",
    "scipy",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "sklearn",
    "triton",
    "pandas",
    "PIL",
}


def test_importing_the_package_is_light() -> None:
    assert not loaded_by("import secateur") & (HEAVY | {"torch", "numpy", "pydantic", "rich", "typer", "jinja2"})


def test_importing_the_pruner_is_free_of_extras() -> None:
    loaded = loaded_by("import secateur.pruner")
    assert "torch" in loaded
    assert not loaded & HEAVY


def test_public_names_load_and_are_few() -> None:
    import secateur

    assert len(secateur.__all__) <= 25
    assert sorted(secateur.__all__) == list(secateur.__all__)
    for name in secateur.__all__:
        assert getattr(secateur, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'prun_'"):
        _ = secateur.prun_


def test_pruning_weights_imports_no_tracer() -> None:
    code = "import sys, secateur.pruner; print([m for m in sys.modules if m == 'secateur.graph.trace'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
