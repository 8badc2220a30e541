"""What brings requests from the kernel and answers to it."""
