"""How the shared library is found, and what is said when it cannot be had. Runs with and without it."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from secateur.sparse import formats, images, isas, library, reason
from secateur.sparse.library import ABI, ACTIVATIONS, ISA_VARIABLE, VARIABLE

COMPILER = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)

TRY = """
import secateur.sparse as sparse
import torch
for attempt in range(2):
    try:
        sparse.Panelled.pack(torch.eye(3))
    except sparse.library.SparseError as error:
        print("refused:", error)
print("reason:", sparse.reason())
"""


def said(**variables: str) -> list[str]:
    """What a fresh interpreter prints that imports the package, packs a weight twice and asks for the reason."""
    environment = {**os.environ, **variables}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRY], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.splitlines()


def assert_one_error(lines: list[str], *parts: str) -> None:
    """The same words every time, which have these parts in them."""
    assert len(lines) == 3
    texts = {line.partition(": ")[2] for line in lines}
    assert len(texts) == 1
    text = texts.pop()
    for part in parts:
        assert part in text


def test_the_kernels_are_built_where_they_can_be() -> None:
    assert COMPILER is None or not reason(), f"there is a C++ compiler ({COMPILER}), and yet: {reason()}"


@pytest.mark.skipif(bool(reason()), reason=reason())
def test_an_empty_variable_is_no_choice() -> None:
    assert said(**{ISA_VARIABLE: ""}) == ["reason: "]


@pytest.mark.skipif(bool(reason()), reason=reason())
@pytest.mark.parametrize("name", [] if reason() else isas())
def test_the_environment_chooses_an_instruction_set(name: str) -> None:
    code = "import secateur.sparse as s; print(s.isa())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, ISA_VARIABLE: name},
    )
    assert done.stdout.split() == [name], done.stderr


@pytest.mark.skipif(bool(reason()), reason=reason())
def test_an_instruction_set_that_is_none_is_named() -> None:
    assert_one_error(said(**{ISA_VARIABLE: "avx1024"}), f"{ISA_VARIABLE} asks for 'avx1024'", *isas())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "gone.so")
    assert_one_error(said(**{VARIABLE: path}), VARIABLE, path, "there is no such file")


def test_a_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.so"
    path.write_text("not a library\n")
    assert_one_error(said(**{VARIABLE: str(path)}), "notes.so cannot be used", "install secateur again")


def built(folder: Path, source: str) -> str:
    assert COMPILER is not None
    (folder / "other.cc").write_text(source)
    path = folder / "libother.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", str(path), str(folder / "other.cc")], check=True, timeout=120)
    return str(path)


needs_a_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@needs_a_compiler
def test_a_library_of_another_version_is_named(tmp_path: Path) -> None:
    path = built(tmp_path, 'extern "C" int secateur_abi(void) { return 4711; }\n')
    assert_one_error(said(**{VARIABLE: path}), "libother.so has version 4711", f"needs {ABI}", "install secateur again")


@needs_a_compiler
def test_a_library_that_lacks_a_function_is_named(tmp_path: Path) -> None:
    path = built(tmp_path, f'extern "C" int secateur_abi(void) {{ return {ABI}; }}\n')
    assert_one_error(said(**{VARIABLE: path}), "libother.so has no function secateur_", "install secateur again")


@needs_a_compiler
def test_another_library_is_named(tmp_path: Path) -> None:
    path = built(tmp_path, "int something(void) { return 0; }\n")
    assert_one_error(said(**{VARIABLE: path}), "libother.so cannot be used", "secateur_abi")


@needs_a_compiler
def test_a_processor_without_the_instruction_sets_is_told_so(tmp_path: Path) -> None:
    """A library built for others, in place of a processor that has none of them."""
    lines = [f'extern "C" int secateur_abi(void) {{ return {ABI}; }}']
    lines += [
        f'extern "C" const char* secateur_{name}(void) {{ return ""; }}' for name in ("isa", "isas", "usable_isas")
    ]
    others = [name for name in library._FUNCTIONS if name not in ("abi", "isa", "isas", "usable_isas")]
    lines += [f'extern "C" int secateur_{name}(void) {{ return 0; }}' for name in others]
    path = built(tmp_path, "\n".join(lines))
    environment = {VARIABLE: path, ISA_VARIABLE: ""}
    assert_one_error(said(**environment), "libother.so cannot run here", "built for other instruction sets")
    assert_one_error(said(**{**environment, ISA_VARIABLE: "neon"}), f"{ISA_VARIABLE} asks for 'neon'", "none of them")


HEADER = Path(__file__).resolve().parents[2] / "cpp" / "include" / "secateur_sparse.h"


def test_the_numbers_are_those_of_the_header() -> None:
    text = HEADER.read_text(encoding="utf-8")
    assert f"#define SECATEUR_ABI {ABI}\n" in text
    assert f"#define SECATEUR_SLACK {formats.SLACK}\n" in text
    assert f"#define SECATEUR_BITMASK_SLACK {formats.BITMASK_SLACK}\n" in text
    for number, name in enumerate(ACTIVATIONS):
        assert f"SECATEUR_{name.upper()} = {number}," in text
    declared = set(re.findall(r"^SECATEUR_API [a-z0-9_ ]+\*? ?secateur_(\w+)\(", text, flags=re.M))
    assert declared == set(library._FUNCTIONS)


@pytest.mark.skipif(bool(reason()), reason=reason())
def test_images_are_blocked_as_the_library_has_it() -> None:
    assert library.library().secateur_image_block() == images.IMAGE_BLOCK


@needs_a_compiler
def test_the_structs_are_those_of_the_header(tmp_path: Path) -> None:
    structs = {
        "panelled": library.PanelledStruct,
        "bitmask": library.BitmaskStruct,
        "epilogue": library.EpilogueStruct,
        "plan": library.PlanStruct,
        "convolution": library.ConvolutionStruct,
    }
    lines = [f'#include "{HEADER}"', "#include <cstddef>"]
    for name, struct in structs.items():
        lines.append(f"static_assert(sizeof(secateur_{name}) == {ctypes.sizeof(struct)});")
        for field, *_ in struct._fields_:
            at = getattr(struct, field)
            lines.append(f"static_assert(offsetof(secateur_{name}, {field}) == {at.offset});")
            lines.append(f"static_assert(sizeof(secateur_{name}::{field}) == {at.size});")
    source = tmp_path / "structs.cc"
    source.write_text("\n".join(lines))
    assert COMPILER is not None
    done = subprocess.run(
        [COMPILER, "-std=c++17", "-fsyntax-only", str(source)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_package_is_not_imported_with_secateur() -> None:
    code = "import sys, secateur; print('secateur.sparse' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False"]
