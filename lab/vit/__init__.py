"""What merging does to a vision transformer's accuracy and speed: a small one, trained on the lab's pictures."""
