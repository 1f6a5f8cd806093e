"""ToMe in AUTOMATIC1111, Forge and reForge. Loaded by scripts/tome.py."""
