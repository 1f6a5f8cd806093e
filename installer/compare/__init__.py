"""`install.py compare`: a person's own model, the time of whole generations and their distance to the unmerged ones."""
