"""What a loss of weights is: a function `name(weights, kept, *, options...) -> Tensor []` in a file of its own.

weights are float32 vectors, one a layer, of all the layers that a pass names; `kept` is how many weights all of them are to keep in the end.
Differentiable, and a sum over the weights.
"""
