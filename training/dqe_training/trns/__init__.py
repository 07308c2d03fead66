"""Target relative negative sampling: what is mined at a refresh, one draw a step, and the zones that a bundle serves with."""
