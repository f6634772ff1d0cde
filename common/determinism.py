"""--deterministic: the same command gives the same weights, bit for bit, or one sentence says which operation cannot.

That holds on one machine, with the same versions and numbers of processes and threads.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from common.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")  # with which cuBLAS repeats itself


def make_deterministic() -> None:
    """Holds until the end of `settings_kept`; to be called before anything is computed."""
    if os.environ.get(WORKSPACE) not in WORKSPACES:
        os.environ[WORKSPACE] = WORKSPACES[0]
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


@contextmanager
def settings_kept() -> Iterator[None]:
    """After the block the settings are as before it. In it, an operation with no deterministic form is a UserError."""
    cudnn = torch.backends.cudnn
    algorithms = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before = cudnn.deterministic, cudnn.benchmark, os.environ.get(WORKSPACE)
    try:
        yield
    except RuntimeError as error:
        if named := re.search(r"(\S+) does not have a deterministic implementation", str(error)):
            raise UserError(
                f"--deterministic: {named[1]} has no deterministic form on this device: leave it out, or use a CPU"
            ) from error
        raise
    finally:
        torch.use_deterministic_algorithms(algorithms[0], warn_only=algorithms[1])
        cudnn.deterministic, cudnn.benchmark, workspace = before
        os.environ.pop(WORKSPACE, None)
        if workspace is not None:
            os.environ[WORKSPACE] = workspace


def arithmetic(workers: int) -> dict[str, Any]:
    """What a record says of the settings that equal figures depend on; `workers` bring the data, which they do not."""
    return {
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "cublas_workspace": os.environ.get(WORKSPACE),
        "tf32_in_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_in_cudnn": torch.backends.cudnn.allow_tf32,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "threads": torch.get_num_threads(),
        "workers": workers,
    }
