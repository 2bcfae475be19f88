"""What a schedule is: a function `name(step, *, options...) -> float` in a file of its own, of the number of steps that are done.

What it gives multiplies the number that it stands beside: the weight of a loss, a threshold.
"""
