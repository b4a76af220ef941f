"""Running moescope on many machines."""
