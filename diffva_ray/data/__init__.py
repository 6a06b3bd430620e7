"""Films: decoding, data sets, phantoms."""
