"""What partitions share.

A partition is a function `name(evidence, neurons, experts, *, options...) -> int64 [experts, size]` in a file of its own: `neurons` int64 [H'] are
those of the FFN that are routed, H' >= experts, and -1 fills up experts that have fewer. A module constant STATISTICS says what it needs of
calibration: "rows", or "rows" and "slopes". Where every neuron is in one expert, all experts together are the dense FFN.
"""
