"""One file for a family of kernels: which forms of a layer it has on a machine, and the seconds of each as formulas."""
