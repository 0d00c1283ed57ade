"""The planner measures all candidates of a model as a draft and makes plans from it. Presets and rules plan without data."""
