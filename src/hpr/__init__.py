"""HPR: Hierarchical Parameter Reuse."""
