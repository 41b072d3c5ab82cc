"""Recipe files by people who are mistaken or hostile: refused with one message, in no time, running nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.errors import RecipeError
from secateur.recipe_files import MAX_BYTES, parse

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)

REFUSED = {
    "alias bomb.yaml": (BOMB, "anchors and aliases"),
    "merge key.yaml": ("a: {x: 1}\nb:\n  <<: *a\n", ""),
    "python object.yaml": ("a: !!python/object/apply:os.system ['touch sprung']\n", "tags"),
    "python name.yaml": ("a: !!python/name:os.system\n", "tags"),
    "binary tag.yaml": ("a: !!binary aGk=\n", "tags"),
    "key twice.yaml": ("a: 1\nb: 2\na: 3\n", "the key 'a' appears twice"),
    "inner key twice.yaml": ("t:\n  a: 1\n  a: 3\n", "the key 'a' appears twice"),
    "number as key.yaml": ("1: x\n", "the key 1 is not text"),
    "two documents.yaml": ("a: 1\n---\na: 2\n", ""),
    "tab.yaml": ("a:\n\tb: 1\n", "line 2"),
    "list on top.yaml": ("- a\n- b\n", "expected a table at the top, got list"),
    "empty.yaml": ("", "expected a table at the top, got NoneType"),
    "deep.yaml": ("a: " + "[" * 500 + "]" * 500, "deeper than 32"),
    "very deep.yaml": ("a: " + "[" * 200_000, ""),
    "key twice.toml": ("a = 1\na = 2\n", "line 2"),
    "deep.toml": ("a = " + "[" * 100 + "]" * 100, "deeper than 32"),
    "very deep.toml": ("a = " + "[" * 100_000, ""),
    "unfinished.toml": ("[model\n", "line 1"),
    "key twice.json": ('{"a": 1, "a": 2}', "the key 'a' appears twice"),
    "nan.json": ('{"a": NaN}', "NaN is not JSON"),
    "deep.json": ('{"a": ' + "[" * 100 + "]" * 100 + "}", "deeper than 32"),
    "very deep.json": ('{"a": ' + "[" * 100_000, ""),
    "truncated.json": ('{"a": ', ""),
    "wrong.txt": ("a: 1", "a recipe is a .toml, .yaml or .json file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_file_and_reason(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, words = REFUSED[name]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(RecipeError) as error:
        parse(path)
    assert str(error.value).startswith(str(path))
    assert words in str(error.value)
    assert not (tmp_path / "sprung").exists()


def test_what_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'name = "caf\xe9"\n')
    with pytest.raises(RecipeError, match="not UTF-8"):
        parse(tmp_path / "latin.toml")
    (tmp_path / "dir.toml").mkdir()
    with pytest.raises(RecipeError, match="cannot be read"):
        parse(tmp_path / "dir.toml")
    with pytest.raises(RecipeError, match="No such file"):
        parse(tmp_path / "missing.toml")
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.seek(MAX_BYTES * 4000)
        file.write(b"x")
    with pytest.raises(RecipeError, match="larger than"):
        parse(tmp_path / "huge.yaml")
    Path(tmp_path / "huge.yaml").unlink()


def test_yaml_scalars_follow_the_core_schema(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        "no: no\nyes: yes\non: on\noff: off\nlr: 1e-3\nbig: 1E6\nint: 010\nhalf: .5\ntrue_: true\nnull_: ~\nnone:\n"
        "time: 12:30:45\ndate: 2026-11-23\nhex: 0x10\ntext: '1'\nunder: 1_000\nplus: +5\nminus: -5.0\n"
    )
    assert parse(path) == {
        "no": "no", "yes": "yes", "on": "on", "off": "off", "lr": 1e-3, "big": 1e6, "int": 10, "half": 0.5,
        "true_": True, "null_": None, "none": None, "time": "12:30:45", "date": "2026-11-23", "hex": "0x10",
        "text": "1", "under": "1_000", "plus": 5, "minus": -5.0,
    }  # fmt: skip


TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=126) | st.sampled_from("éß中×"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT, children, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(TEXT, VALUES, max_size=4))
def test_json_is_read_alike_by_the_yaml_reader(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]
) -> None:
    path = tmp_path_factory.mktemp("y")
    for suffix in (".json", ".yaml"):
        (path / f"r{suffix}").write_text(json.dumps(values, ensure_ascii=False))
        assert parse(path / f"r{suffix}") == values


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([".toml", ".yaml", ".json"]), st.text(max_size=80))
def test_any_text_is_a_table_or_one_typed_error(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, text: str
) -> None:
    path = tmp_path_factory.mktemp("t") / f"r{suffix}"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        values = parse(path)
    except RecipeError as refusal:
        values = None
        message = str(refusal)
    assert isinstance(values, dict) if values is not None else message.startswith(str(path))
