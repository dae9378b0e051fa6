"""What every test file shares: one thread (the models are tiny) and a fixed seed before each test."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)
