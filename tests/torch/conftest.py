"""PyTorch's own operators on one thread: on a busy machine its threads wait for each other."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
