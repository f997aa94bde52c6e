"""Ours: adapters composed under the graph's prior, after they were trained apart or while they train together."""
