"""The plan as an artifact: plan.json, terms, budget, states of layers. No algorithm."""
