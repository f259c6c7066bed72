"""What a fine-tune is: examples, tokens, model, loss, loop, checkpoint, merge."""
