"""One compute thread: the models here are tiny, and threads that wait for each other would be most of the time.

Tests that are about threads ask for them by number.
"""

import torch

torch.set_num_threads(1)
