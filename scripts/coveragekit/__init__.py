"""Which fault of the catalogue is checked by which test."""
