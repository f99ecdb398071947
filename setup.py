"""Where the packages lie; everything else about the project is in pyproject.toml.

The Triton kernels live in the top-level folder kernels/ and install as `smolora.kernels`: a top-level
`kernels` is a Hugging Face library that transformers looks for.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["smolora", "smolora.*"]), "smolora.kernels"],
    package_dir={"smolora.kernels": "kernels"},
)
