"""Images: decoding, data sets, phantoms."""
