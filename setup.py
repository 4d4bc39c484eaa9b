"""Packaging of dlm_dist: the library, the data pipeline and the `dlm` command."""

from setuptools import find_packages, setup

INSTALL_REQUIRES = [
    # The oldest release whose Triton the flash-linear-attention kernels support.
    "torch>=2.7",
    # From 0.19.8: before it, ZeRO-3 on CPU did not wait for all of its gathers (DeepSpeed #8381).
    # Below 0.20: dlm_dist/training/zero_state.py knows where each ZeRO wrapper of this series keeps its shards.
    "deepspeed>=0.19.8,<0.20",
    "flash-linear-attention>=0.6",
    # Below 6: the models subclass PreTrainedModel, and flash-linear-attention 0.6 asks for the same series.
    "transformers>=5.6,<6",
    # The first release with 8-bit optimizer kernels for CPU.
    "bitsandbytes>=0.49",
    "webdataset>=1.0",
    "wandb>=0.20",
    "huggingface_hub>=1.0",
    "tokenizers>=0.22",
    "tiktoken>=0.9",
    "pyrwkv-tokenizer>=0.9",
    "safetensors>=0.6",
    # Below 3: the configuration translates the error types of this series into sentences.
    "pydantic>=2.7,<3",
    "annotated-types>=0.6",
    "pyyaml>=6.0",
    "numpy>=2.0",
    "tqdm>=4.60",
    # A run's progress on a terminal.
    "rich>=13.7",
    "tensorboard>=2.18",
    "zstandard>=0.22",
    "packaging>=23",
    # Memory of a rank; the demo kills a whole family of processes.
    "psutil>=5.9",
]

TEST_REQUIRES = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "hypothesis>=6.100",
    "ruff>=0.12",
    "mypy>=1.15",
    # Runs RWKV-7 files on CPU: the client that reads what `dlm convert` writes.
    "rwkv>=0.8.32",
]

setup(
    name="dlm_dist",
    version="0.1.0",
    description="Pretraining of masked-diffusion language models with DeepSpeed ZeRO and exact resume",
    author="dlm_dist authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["dlm_dist*", "data_pipeline*", "launcher*"]),
    package_data={"dlm_dist": ["py.typed"]},
    install_requires=INSTALL_REQUIRES,
    extras_require={"test": TEST_REQUIRES},
    entry_points={"console_scripts": ["dlm = launcher.cli:program"]},
    keywords=["diffusion language model", "masked diffusion", "RWKV-7", "Qwen3", "DeepSpeed", "ZeRO"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
