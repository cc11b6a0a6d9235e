"""What a checkpoint is: families as data, lazy tensors, tokenizer, the one forward pass."""
