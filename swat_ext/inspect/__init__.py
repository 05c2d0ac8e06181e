"""Looking at a model: what its layers cost, what they hold for the backward pass, and the peak of memory."""
