"""The planner measures all candidates of a model as a draft and makes plans from it; presets and rules plan without data."""
