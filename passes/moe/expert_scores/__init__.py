"""How much an expert of a mixture does; one file each."""
