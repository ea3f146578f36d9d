"""The Triton kernels, one file each: device code alone."""
