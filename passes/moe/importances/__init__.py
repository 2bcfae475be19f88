"""How much each neuron matters on its own, which says who is always computed: one file an importance."""
