"""One thread for each test process: the tests run side by side instead."""

import torch

torch.set_num_threads(1)
