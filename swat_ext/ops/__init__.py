"""The operator library: what torch knows of ``torch.ops.swat_ext``, and the autograd functions over it."""
