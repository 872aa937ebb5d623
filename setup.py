"""Packaging. `kernels/` stands at the root and is imported as `semanticfl_ref.kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$',
    (ROOT / "semanticfl_ref" / "__init__.py").read_text(encoding="utf-8"),
    re.M,
).group(1)
README = ROOT / "README.md"

setup(
    name="semanticfl_ref",
    version=VERSION,
    description="SemanticFL: federated learning guided by a frozen diffusion model, as a compact "
    "reference",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The links semanticfl_ref/kernels and semanticfl_ref/configs serve a checkout that was not
    # installed; an installation takes the folders themselves.
    packages=[
        *find_packages(
            include=["semanticfl_ref", "semanticfl_ref.*"], exclude=["semanticfl_ref.kernels*"]
        ),
        "semanticfl_ref.kernels",
        "semanticfl_ref.configs",
    ],
    package_dir={
        "semanticfl_ref": "semanticfl_ref",
        "semanticfl_ref.kernels": "kernels",
        "semanticfl_ref.configs": "configs",
    },
    package_data={
        "semanticfl_ref.configs": ["*.toml", "*/*.toml"],
        "semanticfl_ref.data": ["assets/*"],
        "semanticfl_ref.tools": ["*.jinja", "*/*.jinja"],
        "semanticfl_ref.diffusion": ["tiny/*", "tiny/*/*", "tiny/*/*/*"],
    },
    install_requires=[
        # Bounded above: an open range takes a build of several GB where a smaller one would do, and
        # 2.11 ... 2.13 are what was tested.
        "torch>=2.11,<2.14",
        "diffusers",
        "transformers",
        "numpy",
        "triton; sys_platform == 'linux' and platform_machine == 'x86_64'",
        "tqdm",
        "safetensors",
        "pillow",
        "huggingface_hub",
        # Both come with the above, torch and transformers: the report's templates, and `doctor`'s
        # reading of this list.
        "jinja2",
        "packaging",
    ],
    extras_require={
        "test": ["pytest", "pytest-benchmark"],
        # Figures; intervals and p values of `compare`.
        "plots": ["matplotlib", "scipy"],
        # Tables of images from Hugging Face; metrics for TensorBoard.
        "parquet": ["pyarrow"],
        "tensorboard": ["tensorboard"],
        # The app in flower/: its simulation engine, and deployments.
        "flower": ["flwr[simulation]>=1.42,<2"],
        # Pinned: another version may format otherwise.
        "dev": ["ruff==0.17.6"],
    },
    entry_points={"console_scripts": ["semanticfl_ref = semanticfl_ref.cli:main"]},
)
