"""Statistics and examples of latents from all their activations: arithmetic alone, without a file or a task.

`entries` holds the activations of some latents together in row order, and every other module is a function of them.
"""
