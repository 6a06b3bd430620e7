"""Numbers: similarity, distances between sets, localisation, validity."""
