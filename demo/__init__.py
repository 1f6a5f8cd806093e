"""A small trained model and the node that loads it: a way to see the plugin work with nothing downloaded."""
