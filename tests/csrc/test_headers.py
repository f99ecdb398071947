"""The comments that the files of csrc/ start with: they list the kernels, in the order in which they run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
PASSES = ("route_shrink", "fuse_expand", "grad_output", "grad_input")


def header(path: Path) -> str:
    text = path.read_text()
    return text[: text.index("#include")]


def listed(path: Path) -> list[str]:
    """The names that a header lists: kernels, and in a pass the products, too."""
    return re.findall(r"^//   (\w+)  +\S", header(path), re.MULTILINE)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_header_lists_the_kernels_of_its_file(path: Path):
    """All of them, and no others; everything else in the list is called in the file."""
    text, names = path.read_text(), listed(path)
    assert sorted(name for name in names if name.endswith("_kernel")) == sorted(re.findall(r"(\w+_kernel)\(", text))
    assert all(re.search(rf"^  .*\b{name}\(", text, re.MULTILINE) for name in names if not name.endswith("_kernel"))


@pytest.mark.parametrize("path", [path for path in SOURCES if path.with_suffix(".cuh").exists()], ids=lambda p: p.name)
def test_a_product_stands_by_its_launcher(path: Path):
    """What a product's header declares is defined in the source of that name, next to its kernels."""
    functions = re.compile(r"^void (\w+)\(", re.MULTILINE)
    assert set(functions.findall(path.with_suffix(".cuh").read_text())) <= set(functions.findall(path.read_text()))


def test_triton_has_the_same_names():
    """A kernel that does the same in both has one name, and both have their passes in files of the same names."""
    triton = set()
    for path in (ROOT / "kernels").glob("*.py"):
        triton |= set(re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE))
    cuda = {name for path in SOURCES for name in listed(path) if name.endswith("_kernel")}
    assert triton & cuda == {
        "route_instruction_and_w_kernel",
        "shrink_kernel",
        "router_logits_kernel",
        "reduce_split_k_kernel",
        "mix_backward_kernel",
        "reduce_dw_dweights_kernel",
    }


@pytest.mark.parametrize("name", PASSES)
def test_the_passes_say_where_their_symbols_are_explained(name: str):
    for path in (ROOT / f"csrc/{name}.cu", ROOT / f"kernels/{name}.py"):
        assert "docs/architecture.md" in path.read_text()[:600], path
    assert (ROOT / "docs/architecture.md").exists()


def test_where_gradients_are_summed_over_tokens():
    """A reader who looks for that in either language finds it in a pass's header."""
    for name in ("grad_output", "grad_input"):
        for path in (ROOT / f"csrc/{name}.cu", ROOT / f"kernels/{name}.py"):
            assert "the sum over tokens" in path.read_text()[:1500], path
