"""What `install.py` runs: an environment, a ComfyUI to try ToMe in, links into a user's own host."""
