"""What the server of forked starts imports before its first fork. It must start no thread: a fork would lose it."""

import logging
import os

os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

import bitsandbytes  # noqa: E402
import deepspeed  # noqa: E402
import transformers.utils  # noqa: E402
import yaml  # noqa: E402

import dlm_dist.training.run  # noqa: E402
import launcher.pretrain  # noqa: E402
import tests.faults.starts  # noqa: E402

__all__ = ["bitsandbytes", "deepspeed", "dlm_dist", "launcher", "tests", "transformers", "yaml"]
