"""The C++ kernels (`*.cpp`) and, a module an op, the functions that call them with tensors."""
