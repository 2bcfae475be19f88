"""What they share.

An importance is a function `name(program, blocks, ctx, *, options...) -> Tensor [blocks]` in a file of its own, float32, the higher the more a block
matters. It may run the model on the batches of calibration.
"""
