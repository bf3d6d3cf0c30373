"""Channel permutations that keep more under N:M: the search on one matrix, and the axes of a network that move together."""
