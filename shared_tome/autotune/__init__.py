"""Whether merging pays on this device: what was measured (paying), how (timing), in which surroundings (surroundings)
and where it is kept (store)."""
