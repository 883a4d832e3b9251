"""The C++ kernels (`*.cpp`), and one module per op with the functions that call them."""

import torch

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # what the kernels read and write; see `with_type`
