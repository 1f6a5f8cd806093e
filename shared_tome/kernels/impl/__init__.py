"""The kernels, an operation each: loaded with the first one that is used. These modules import triton."""
