"""The C++ kernels (`*.cpp`), and one module per op with the functions that call them."""
