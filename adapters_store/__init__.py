"""What adapters are: kinds, primitives, sites, composition, the relation graph, the store."""
