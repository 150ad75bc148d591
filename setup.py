"""Installation: `pip install -e .[dev] -c constraints.txt`; the Makefile does it."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
VERSION = re.search(
  r'__version__ = "(.+)"', (HERE / "opo_jax" / "__init__.py").read_text()
)[1]

setup(
  name="opo-jax",
  version=VERSION,
  description="On-policy RL of language models with the optimal baseline, in JAX",
  long_description=(HERE / "README.md").read_text(),
  long_description_content_type="text/markdown",
  license="MIT",
  packages=find_packages(include=["opo_jax", "opo_jax.*"]),
  package_data={"opo_jax": ["reports/*.html.jinja"]},
  python_requires=">=3.11",
  install_requires=[
    # The device side.
    "numpy>=2.0,<3",
    # 0.10.1 on CPU: a page of errors for every compiled program that is read again.
    "jax>=0.10.2,<0.13",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    # Tokenizers, chat templates, weights.
    "transformers>=5.0,<6",
    "tokenizers>=0.22,<0.24",
    "huggingface_hub>=1.0,<3",
    "jinja2>=3.1,<4",
    "safetensors>=0.8,<0.9",
    # Data: TFDS reads ArrayRecord files, without TensorFlow.
    "tensorflow-datasets>=4.9.10,<5",
    "array_record>=0.8,<0.9",
    "pyarrow>=18",  # parquet files; TFDS brings it along, too
    # Rewards: SymPy behind a parser, in processes with a time limit.
    "math-verify>=0.9,<0.10",
    "pebble>=5.2,<6",
    # Command line, progress, figures.
    "tyro>=1.0,<2",
    "rich>=14,<16",
    "matplotlib>=3.10,<4",
    "tensorboardX>=2.6,<3",
  ],
  extras_require={
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    # Compiles for absent TPUs on a CPU: a wheel of 205 MB.
    "plan": ["libtpu>=0.0.42,<0.1"],
    # For `make test-parity` alone; the CPU build of PyTorch will do.
    "parity": ["torch==2.13.0", "peft>=0.21,<0.22"],
    "dev": [
      "pytest>=9,<10",
      "pytest-xdist>=3.8,<4",
      "hypothesis>=6.150,<7",
      "ruff>=0.17,<0.18",
      "equinox>=0.13,<0.14",  # only docs/equinox.md, which the tests run
    ],
  },
)
