"""The lab: how near pictures stay and how long they take. None of it is installed with the plugin."""
