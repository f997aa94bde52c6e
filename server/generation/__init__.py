"""Text from a causal backbone: requests under different compositions, decoded together, one step at a time."""
