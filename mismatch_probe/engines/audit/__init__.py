"""What an audit measures on the model object itself: activations, gradients, a real FP16 pass, and engine lag."""
