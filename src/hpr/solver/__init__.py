"""The solver chooses candidates on a lattice over layers under a budget, with one Lagrange multiplier and numbers only."""
