"""One thread for torch: models this small are slower with two, and many times slower beside other programs."""

import pytest
import torch
import transformers


@pytest.fixture(autouse=True, scope="session")
def one_torch_thread() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
