"""What ``pyproject.toml`` cannot say: the packages as they are found, and the configs as one more among them."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["lit_distill*"]), "lit_distill.configs"],
    package_dir={"lit_distill.configs": "configs"},
)
