"""What happens inside the softmax: weights of keys, self tokens, text and image in one sequence."""
