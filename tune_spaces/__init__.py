"""Search over training recipes (Ray Tune). Arrives with the search release."""
