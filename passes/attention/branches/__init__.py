"""Branches of an attention that are no choice of blocks. One file a branch: a frozen dataclass with what branches.Branch asks for, and

    initial(heads, groups, width, value_width) -> {name: tensor}    what its learned tensors are before they are trained, float32
"""
