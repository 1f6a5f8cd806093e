"""The specification: pure functions of tensors and numbers. Imports the options alone; no kernel, no host."""
