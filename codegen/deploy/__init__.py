"""What runs an exported library without PyTorch: run.py from Python, sparsify.h from C and C++. Nothing here is imported by the compiler."""
