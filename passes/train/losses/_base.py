"""What a loss of activations is given.

A loss is a function `name(x, *, options...) -> Tensor []` in a file of its own: x float32 [..., K], what the neurons of one FFN gave. Differentiable,
and a mean over the numbers, so that it depends neither on the batch nor on the width. A NaN of x is a NaN of the loss.
"""
