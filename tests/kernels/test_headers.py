"""What the files of kernels/ say of themselves."""

import re
from pathlib import Path

import pytest

import smolora.kernels

FILES = sorted(Path(smolora.kernels.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_header_lists_the_kernels_of_its_file(path: Path):
    """In the order in which they are defined; a kernel is what is launched, and its name says so."""
    header, code = path.read_text().split('"""', 2)[1:]
    listed = re.findall(r"^    (\w+_kernel) ", header, re.MULTILINE)
    assert listed == re.findall(r"^def (\w+_kernel)\(", code, re.MULTILINE)
    assert set(listed) == set(re.findall(r"(\w+)\[\(?[\w(]", code)) & set(
        re.findall(r"^def (\w+)\(", code, re.MULTILINE)
    )


def test_all_four_passes_are_looked_at():
    assert {"route_shrink.py", "fuse_expand.py", "grad_output.py", "grad_input.py", "products.py"} <= {
        path.name for path in FILES
    }
