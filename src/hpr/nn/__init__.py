"""The modules that stand in a compressed model: bank, linear, embedding, experts."""
