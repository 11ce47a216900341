"""torch's operators: shapes, gradients, autocast, vmap, FLOPs, and what they do below autograd."""
