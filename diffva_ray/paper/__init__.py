"""``diffva paper``: every table and figure of Siddiqui et al. 2024, from ordinary runs, with what the paper lacks."""
