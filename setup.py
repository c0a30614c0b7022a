"""Packaging: `pip install -e .` with plain setuptools, without PyTorch in the build environment.

The two-step installation in requirements/constraints.txt pins PyTorch first; see there.
"""

import re
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

ROOT = Path(__file__).parent

FAST = ["gigatoken>=0.10", "orjson>=3.10,<4"]
PLOT = ["matplotlib>=3.8"]
VISION = ["pillow>=10"]
LOG = ["tensorboard>=2.16", "wandb>=0.17"]


def version() -> str:
    """`__version__` of the package, read rather than imported: an import would need PyTorch."""
    source = (ROOT / "megatron_ltd" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if found is None:
        raise SystemExit("megatron_ltd/__init__.py: expected a line __version__ = \"...\"")
    return found[1]


def long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


setup(
    name="megatron_ltd",
    version=version(),
    description="Distributed pretraining of language models with random layerwise token dropping",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # Optional: where it cannot be compiled, the same indices are built in Python, and a run says so.
    ext_modules=[Pybind11Extension("megatron_ltd.data.index_helpers", ["megatron_ltd/data/index_helpers.cpp"],
                                   cxx_std=17, optional=True,
                                   # Multiplication and subtraction stay two roundings, as in numpy.
                                   extra_compile_args=["-O3", "-ffp-contract=off"])],
    package_data={"megatron_ltd.data": ["*.pyi", "*.cpp"],
                  "megatron_ltd.settings": ["*.toml", "*.txt", "recipes/*.toml"]},
    packages=find_packages(include=["megatron_ltd", "megatron_ltd.*"]),
    entry_points={"lm_eval.models": ["megatron-ltd = megatron_ltd.lm_eval.harness.plugin:MegatronLtd"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11,<3",
        "numpy>=1.26,<3",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
        "jinja2>=3.1.6,<4",  # chat templates; before 3.1.6 they could leave the sandbox
        "safetensors>=0.4.5",
        "zstandard>=0.22",
        "tqdm>=4.66",
    ],
    extras_require={
        # Zero-shot tasks of the language model evaluation harness.
        "eval": ["lm-eval>=0.4.9"],
        # Faster preprocessing to the same bytes: a tokenizer for byte-level BPE, and a parser of JSON.
        "fast": FAST,
        # Parquet files as input of tools/preprocess_data.py.
        "parquet": ["pyarrow>=15"],
        # Hugging Face datasets as input of the same tool; before 4.0 a dataset could run code of its own.
        "datasets": ["datasets>=4,<6"],
        # The trained sentence splitter that Megatron-LM uses; its data comes by python -m nltk.downloader punkt_tab.
        "sentences": ["nltk>=3.9"],
        # What --compile needs on GPUs. PyTorch's CUDA builds bring their own; nothing else has to be installed.
        "gpu": ["triton>=3.0; platform_system == 'Linux'"],
        # Folders of images for ViT; idx files need nothing.
        "vision": VISION,
        # Object stores for --upload and --load; torch brings fsspec, which needs one of these for each kind.
        "cloud": ["fsspec>=2024.2", "gcsfs>=2024.2", "s3fs>=2024.2"],
        "plot": PLOT,
        "log": LOG,
        "dev": [
            *FAST,
            *PLOT,
            *VISION,
            "datasets>=4,<6",
            "hypothesis>=6.100",
            "megatron-core==0.16.1",  # reference for sample order, file formats and layers
            "mypy>=1.11",
            "nltk>=3.9",  # reference for sentences
            "pyarrow>=15",
            "pytest>=8.2",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.8",
            "pyyaml>=6",
            "ruff>=0.6",
            "tensorboard>=2.16",
            "transformers>=4.45",  # reference for logits and tokenizers
            "types-tqdm",
        ],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
