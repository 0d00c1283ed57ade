"""PROFILE: objectives, curvature and layer features become a Profile."""
