"""The page of a run: one HTML file and the pictures beside it, readable offline."""
