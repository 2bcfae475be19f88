"""Mixtures of experts made of dense FFNs: how neurons become experts, what routes, who is selected. split_experts is the one rewrite."""
