"""Pure numbers: candidates, the lattice over layers, the Lagrange multiplier."""
