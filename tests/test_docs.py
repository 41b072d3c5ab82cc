"""Every snippet of the README and the docs runs; every path they name exists."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from secateur.cli import main
from secateur.recipe import from_dict

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "fashion_mnist" / "README.md"]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "snippet"}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "toml")], ids=lambda p: p.name)
def test_toml_blocks_are_recipes(page: Path) -> None:
    for block in blocks(page, "toml"):
        recipe = from_dict(tomllib.loads(block))
        assert from_dict(recipe.to_dict()) == recipe


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:tests|src|docs|benchmarks|examples)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_shown_error_is_the_real_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    good = (ROOT / "src" / "secateur" / "recipes" / "digits_unstructured.toml").read_text()
    recipe.write_text(good.replace('name = "magnitude"', 'name = "magnitud"'))
    assert main(["run", str(recipe), "--check"]) == 2
    shown = re.search(r"^error: recipe.toml(.*)$", (ROOT / "docs" / "recipes.md").read_text(), flags=re.M)
    assert shown is not None
    assert capsys.readouterr().err.strip().endswith(shown[1])
